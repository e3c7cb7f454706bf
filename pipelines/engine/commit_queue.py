"""Flushing to the disk while work goes on: what one item leaves behind is committed beside the work on the next ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

AT_ONCE = 4  # what may wait; also what is flushed together at most
_END: Any = object()


class Settler:
    """Settles what is handed over, in its order, in a thread of its own; several together when they have piled up.

    Args:
      settle: what to do with what was handed over.
    """

    def __init__(self, settle: Callable[[Sequence[Any]], None]) -> None:
        self._settle = settle
        self._waiting: queue.Queue[Any] = queue.Queue(AT_ONCE)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, end: Any) -> None:
        """Hand something over; wait while too much is waiting already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="settle", daemon=True)
            self._thread.start()
        self._waiting.put(end)

    def finish(self) -> None:
        """Wait until everything is settled.

        Raises:
          Exception: the first error of `settle`; what came after it was not settled.
        """
        if self._thread is not None:
            self._waiting.put(_END)
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        ended = False
        while not ended:
            ends = [self._waiting.get()]
            while not self._waiting.empty() and len(ends) < AT_ONCE:
                ends.append(self._waiting.get())
            ended = ends[-1] is _END
            if self._error is None and (rest := ends[:-1] if ended else ends):
                try:
                    self._settle(rest)
                except Exception as e:  # noqa: BLE001  # whoever waits for the end raises it
                    self._error = e
