"""Shapes of a last layer that tests and benchmarks of `linear_distill_loss` share."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Hidden states [rows, features], a weight [classes, features] and labels that keep some classes."""

    rows: int
    features: int
    classes: int
    kept: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}x{self.classes}"


# Fewer classes than a tile and more, no size a multiple of one.
ODD = (Shape(1, 3, 2, 1), Shape(7, 33, 50, 50), Shape(13, 24, 130, 4), Shape(6, 48, 333, 17))

TARGET = (Shape(512, 256, 32_000, 64),)
# Those of Liger's own benchmarks (arXiv:2410.10989): the last layer of an 8-billion-parameter Llama 3.
LANGUAGE = tuple(Shape(rows, 4096, 128_256, 64) for rows in (1024, 2048, 4096, 8192))
# What GPU figures decide; the second has few features, so that moving the logits counts most.
DECIDE = (Shape(4096, 4096, 128_256, 64), Shape(4096, 256, 32_000, 64))
EXTREME = (Shape(256, 128, 300_000, 50),)
QUICK = (Shape(64, 32, 2_000, 16),)
DRY = (Shape(2, 16, 48, 4),)  # for an interpreter
