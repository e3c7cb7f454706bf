"""Shapes of residuals that tests and benchmarks of `laurel_residual` share."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Rows, their width, and the rank of the maps; 0 for none."""

    rows: int
    dim: int
    rank: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim}r{self.rank}"


# No size a power of two, one row, one number in a row, rows longer than wide.
ODD = (Shape(1, 3, 1), Shape(37, 50, 4), Shape(5, 1, 0), Shape(3, 130, 7))

QUICK = (Shape(256, 128, 4), Shape(1024, 512, 16))
DRY = (Shape(16, 32, 2),)  # for an interpreter
CPU = (Shape(64, 256, 16), Shape(1024, 256, 4), Shape(1024, 1024, 16), Shape(8192, 1024, 16), Shape(1024, 8192, 64))
GPU = (
    *(Shape(rows, dim, 16) for dim in (1024, 4096, 8192, 256) for rows in (65_536, 8192)),
    *(Shape(8192, 4096, rank) for rank in (4, 64)),
    Shape(1024, 1024, 16),
)
GPU_ALL = tuple(
    Shape(rows, dim, rank) for rows in (1024, 8192, 65_536) for dim in (256, 1024, 4096, 8192) for rank in (4, 16, 64)
)
