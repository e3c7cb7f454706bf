"""Shapes of logits that tests and benchmarks of `distill_loss` share."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Logits [rows, classes] and labels that keep some classes."""

    rows: int
    classes: int
    kept: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}"


# One class or all kept, classes that are no power of two, more classes than a block of any kernel.
ODD = (Shape(1, 2, 1), Shape(3, 5, 5), Shape(2, 257, 3), Shape(9, 33, 17), Shape(2, 4500, 64))

CLASSIFIER = tuple(Shape(rows, classes, min(10, classes)) for rows in (256, 1024, 4096) for classes in (10, 100, 1000))
LANGUAGE = tuple(Shape(rows, 128_256, 64) for rows in (1024, 4096))
EXTREME = (Shape(256, 300_000, 50),)
# What GPU figures decide; 50,257 is GPT-2's vocabulary, whose rows begin anywhere.
DECIDE = (Shape(4096, 128_256, 64), Shape(1024, 128_256, 64), Shape(4096, 50_257, 64))
QUICK = (Shape(256, 100, 10),)
DRY = (Shape(2, 45, 4),)  # for an interpreter: rows of a few octets and an edge
