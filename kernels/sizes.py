"""Whole numbers of tiles; Triton's own functions of these names take ten microseconds a call."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """Count the tiles of a size that cover `count`."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Give the least power of two that is no less than `count`, which is positive."""
    return 1 << (count - 1).bit_length()
