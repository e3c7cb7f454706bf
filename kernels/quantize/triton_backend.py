"""Launch the Triton kernel of rowwise quantisation; imported when it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from distilbeam.kernels.quantize.formats import Format
from distilbeam.kernels.quantize.triton_kernels import quantize_rows
from distilbeam.kernels.sizes import cdiv, next_power_of_2


def quantize(x: Tensor, target: Format) -> tuple[Tensor, Tensor]:
    """Quantise each row; see `reference.quantize`."""
    rows_MD = x.reshape(-1, x.shape[-1])
    if rows_MD.stride(-1) != 1:
        rows_MD = rows_MD.contiguous()
    count, dim = rows_MD.shape
    values = torch.empty(x.shape, dtype=target.dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    tile = tile_of(dim)
    if count:
        quantize_rows[(cdiv(count, tile["ROWS"]),)](
            rows_MD, values, scale, count, dim, rows_MD.stride(0), **tile, **constants(target)
        )
    return values, scale


def tile_of(dim: int) -> dict[str, int | bool]:
    """Choose the tile for rows of a length: a row in registers where it fits, several where it is short."""
    block = min(8192, max(16, next_power_of_2(dim)))
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "ONCE": dim <= block, "num_warps": max(1, min(8, rows * block // 512))}


def constants(target: Format) -> dict[str, float | bool]:
    """Give a format's constants as the kernels take them."""
    whole = target.dtype == torch.int8
    return {"LARGEST": target.largest, "RECIPROCAL": target.reciprocal, "WHOLE": whole}
