"""Ending a command: Ctrl-C told to the phase that is at work, and a process that a pipeline which was given up would keep.

It imports nothing, so that the command line may ask before Beam is loaded.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_at_work: list[tuple[Callable[[], None], threading.Event]] = []
_given_up = threading.Event()


class Interrupted(RuntimeError):  # noqa: N818  (named after what happened)
    """The phase was told to stop, by Ctrl-C for instance, and has kept what it had."""


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Let `interrupt` call `stop` inside the block.

    Yields:
      Whether it did.
    """
    interrupted = threading.Event()
    _at_work.append((stop, interrupted))
    try:
        yield interrupted
    finally:
        _at_work.pop()


def interrupt() -> bool:
    """Tell the phase that is at work to stop; `run_phase` then raises `Interrupted`. False where none is, or was told before."""
    if not _at_work:
        return False
    stop, interrupted = _at_work[-1]
    if interrupted.is_set():
        return False
    interrupted.set()
    stop()
    return True


def give_up() -> None:
    """Take note that a pipeline was left running in threads of this process."""
    _given_up.set()


def end_given_up(status: int) -> None:
    """End the process at once if a pipeline was given up: its threads would keep the interpreter from ending."""
    if _given_up.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
