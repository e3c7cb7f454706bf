"""Launch the Triton kernel of the int8 product; imported when it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from distilbeam.kernels.low_precision.triton_kernels import scaled_product
from distilbeam.kernels.sizes import cdiv

TILE = {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}
SMALL_TILE = {"BM": 64, "BN": 64, "BK": 128, "GROUP": 8}
SMALL_TILE_BLOCKS = 128  # with fewer large tiles than a GPU has multiprocessors, small ones keep more of them busy
LAUNCH = {"num_warps": 8, "num_stages": 3}


def product(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply a by b transposed; see `products.reference`."""
    a_MK, b_NK = a_MK.contiguous(), b_NK.contiguous()
    (rows, inner), outputs = a_MK.shape, len(b_NK)
    y_MN = torch.empty(rows, outputs, dtype=dtype, device=a_MK.device)
    tile = tile_of(rows, outputs)
    grid = (cdiv(rows, tile["BM"]) * cdiv(outputs, tile["BN"]),)
    scaled_product[grid](
        a_MK, b_NK, scale_a.contiguous(), scale_b.contiguous(), scale_b if bias_N is None else bias_N, y_MN,
        rows, outputs, inner, BIAS=bias_N is not None, **tile, **LAUNCH,
    )  # fmt: skip
    return y_MN


def tile_of(rows: int, outputs: int) -> dict[str, int]:
    """Choose the tile of a product."""
    blocks = cdiv(rows, TILE["BM"]) * cdiv(outputs, TILE["BN"])
    return TILE if blocks >= SMALL_TILE_BLOCKS else SMALL_TILE
