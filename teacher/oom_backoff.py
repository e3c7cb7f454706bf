"""Batches that are halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Inputs = npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]

_log = logging.getLogger(__name__)


class Halving:
    """Runs a function over rows in pieces that fit into memory, and remembers the size that did.

    Args:
      run: function from an array of rows, or a mapping of names to such arrays, to an array of as many rows.
      out_of_memory: tells whether an exception means that memory ran out.
      release: frees what a failed attempt holds.
      rows: most rows in a piece; None for as many as there are.
    """

    def __init__(
        self,
        run: Callable[[Any], npt.NDArray[Any]],
        out_of_memory: Callable[[Exception], bool],
        release: Callable[[], None],
        rows: int | None = None,
    ) -> None:
        self._run, self._out_of_memory, self._release = run, out_of_memory, release
        self.rows = rows

    def __call__(self, inputs: Inputs) -> npt.NDArray[Any]:
        """Run over all rows.

        Args:
          inputs: array [n, ...], or a mapping of names to such arrays.

        Returns:
          Array [n, ...].

        Raises:
          Exception: whatever the function raises; out of memory only when a single row does not fit.
        """
        total = count_rows(inputs)
        if self.rows is None or total <= self.rows:
            whole = self._try(inputs)
            if whole is not None:
                return whole
        parts: list[npt.NDArray[Any]] = []
        start = 0
        while start < total or not parts:
            piece = cut(inputs, start, start + (self.rows or total or 1))
            part = self._try(piece)
            if part is not None:
                parts.append(part)
                start += count_rows(piece)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _try(self, piece: Inputs) -> npt.NDArray[Any] | None:
        try:
            return self._run(piece)
        except Exception as e:
            if not self._out_of_memory(e) or count_rows(piece) <= 1:
                raise
        # Outside the handler: the exception's traceback would keep the failed attempt's tensors alive.
        self._release()
        rows = count_rows(piece)
        self.rows = rows // 2
        _log.warning("memory ran out with %d rows; the teacher goes on with %d at a time", rows, self.rows)
        return None


def count_rows(inputs: Inputs) -> int:
    """Count the rows of an array or of a mapping of names to arrays."""
    return len(inputs) if isinstance(inputs, np.ndarray) else len(next(iter(inputs.values())))


def cut(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return the rows from start to stop of an array or of a mapping of names to arrays."""
    if isinstance(inputs, np.ndarray):
        return inputs[start:stop]
    return {name: array[start:stop] for name, array in inputs.items()}
