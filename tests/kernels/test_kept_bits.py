"""The bits of kept classes: by hand, in parts, and with the sign bit."""

from __future__ import annotations

import torch

from distilbeam.kernels.distillation.kept_bits import kept_bits


def test_bits_by_hand():
    classes = torch.tensor([[0, 31, 32], [5, 5, 5]])  # the second row repeats its first class: padding
    assert kept_bits(classes, 0, 40).tolist() == [[1 - 2**31, 1], [1 << 5, 0]]
    assert kept_bits(classes, 31, 9).tolist() == [[0b11], [0]]


def test_parts_tile_the_whole():
    generator = torch.Generator().manual_seed(0)
    classes = torch.stack([torch.randperm(200, generator=generator)[:40] for _ in range(5)])
    expected = torch.zeros(5, 200, dtype=torch.bool).scatter_(1, classes, True)
    for width in (7, 32, 100, 200):
        found = []
        for first in range(0, 200, width):
            size = min(width, 200 - first)
            words = kept_bits(classes, first, size)
            found.append(((words[:, :, None] >> torch.arange(32)) & 1).flatten(1)[:, :size].bool())
        assert torch.equal(torch.cat(found, 1), expected)
