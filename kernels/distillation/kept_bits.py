"""Which classes a sparse label keeps, as one bit per class: what a kernel reads beside the logits, 1/16 of their size."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_bits(classes_BK: Tensor, first: int, size: int) -> Tensor:
    """Mark the kept classes among some of all.

    Args:
      classes_BK: the kept classes, int64 [B, k], distinct but for padding, which repeats the row's first.
      first: first class of the part.
      size: classes of the part.

    Returns:
      int32 [B, ceil(size / 32)]; bit j mod 32 of word j // 32 is set when class first + j is kept.
    """
    local_BK = classes_BK - first
    counts_BK = (local_BK >= 0) & (local_BK < size)
    counts_BK[:, 1:] &= classes_BK[:, 1:] != classes_BK[:, :1]
    local_BK = torch.where(counts_BK, local_BK, 0)
    bits_BK = torch.where(counts_BK, torch.ones_like(local_BK) << (local_BK % 32), 0)
    words_BW = bits_BK.new_zeros(len(bits_BK), -(-size // 32))
    words_BW.scatter_add_(1, local_BK // 32, bits_BK)  # distinct bits: adding sets them
    return torch.where(words_BW > 2**31 - 1, words_BW - 2**32, words_BW).to(torch.int32)
