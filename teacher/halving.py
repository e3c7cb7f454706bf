"""Batches that are halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_log = logging.getLogger(__name__)


class Halving:
    """Runs a function over rows in pieces that fit into memory, and remembers the size that did.

    Args:
      run: function from an array of rows to an array of as many rows.
      out_of_memory: tells whether an exception means that memory ran out.
      release: frees what a failed attempt holds.
      rows: most rows in a piece; None for as many as there are.
    """

    def __init__(
        self,
        run: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]],
        out_of_memory: Callable[[Exception], bool],
        release: Callable[[], None],
        rows: int | None = None,
    ) -> None:
        self._run, self._out_of_memory, self._release = run, out_of_memory, release
        self.rows = rows

    def __call__(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Run over all rows.

        Args:
          inputs: array [n, ...].

        Returns:
          float32 [n, ...].

        Raises:
          Exception: whatever the function raises; out of memory only when a single row does not fit.
        """
        parts: list[npt.NDArray[np.float32]] = []
        start = 0
        while start < len(inputs) or not parts:
            piece = inputs[start : start + (self.rows or len(inputs) or 1)]
            part = self._try(piece)
            if part is not None:
                parts.append(part)
                start += len(piece)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _try(self, piece: npt.NDArray[Any]) -> npt.NDArray[np.float32] | None:
        try:
            return self._run(piece)
        except Exception as e:
            if not self._out_of_memory(e) or len(piece) <= 1:
                raise
        # Outside the handler: the exception's traceback would keep the failed attempt's tensors alive.
        self._release()
        self.rows = len(piece) // 2
        _log.warning("memory ran out with %d rows; the teacher goes on with %d at a time", len(piece), self.rows)
        return None
