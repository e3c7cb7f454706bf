"""Launch the Triton kernels of the learned augmented residual; imported when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distilbeam.kernels.laurel.operands import Gradients, Kept, Made, Operands, Slopes, Wanted
from distilbeam.kernels.laurel.triton_kernels import column_sums, residual_rows, slope_rows
from distilbeam.kernels.quantize.formats import Format
from distilbeam.kernels.quantize.triton_backend import constants
from distilbeam.kernels.sizes import cdiv, next_power_of_2

ARGUMENTS = 4  # earlier residuals
PROGRAMS = 512  # of the sums over rows: enough to fill a GPU


def forward(operands: Operands, target: Format | None, ahead: int | None = None) -> Made:
    """Compute x' and what was asked for besides; see `chunked.forward`."""
    f, x, coefficients, down, up, norm_weight, previous = operands
    f, x, previous = f.contiguous(), x.contiguous(), [p.contiguous() for p in previous]
    rows, dim = f.shape
    rank = 0 if down is None else down.shape[1]
    stream = operands.stream
    made = Made(
        total=torch.empty_like(f, dtype=stream),
        low=f.new_empty(rows, rank, dtype=torch.float32) if rank else None,
        inverse=f.new_empty(rows, 1, dtype=torch.float32) if norm_weight is not None else None,
        normed=torch.empty_like(f) if norm_weight is not None and target is None else None,
        values=None if target is None else torch.empty(f.shape, dtype=target.dtype, device=f.device),
        scale=None if target is None else f.new_empty(rows, 1, dtype=torch.float32),
    )
    if not f.numel():
        return made
    tile = row_tile(rows, dim, rank, stream == torch.float32, norm_weight is not None, ahead)
    formed = {"LARGEST": 1.0, "RECIPROCAL": 1.0, "WHOLE": False} if target is None else constants(target)
    given = [_or(one, f) for one in (coefficients, _dense(down), _dense(up), norm_weight)]
    results = [_or(one, f) for one in (made.total, made.low, made.inverse)]
    residual_rows[(cdiv(rows, tile["BM"]),)](
        f, x, *given, *_padded(previous, f), *results,
        _or(made.normed if made.values is None else made.values, f), _or(made.scale, f), rows, dim, rank,
        RANK=padded_rank(rank), COUNT=len(previous), PRECISION=precision(stream), NORM=norm_weight is not None,
        QUANTIZE=target is not None, **formed, **tile,
    )  # fmt: skip
    return made


def backward(kept: Kept, slopes: Slopes, wanted: Wanted, ahead: int | None = None) -> Gradients:
    """Compute the gradients that are wanted; see `chunked.backward`."""
    given = slopes.total if slopes.normed is None else slopes.normed
    assert given is not None
    rank = 0 if kept.down is None else kept.down.shape[1]
    given = given.contiguous()
    slopes = Slopes(*(None if one is None else one.contiguous() for one in slopes))
    d_update = torch.empty_like(given, dtype=kept.dtypes[0]) if wanted.update else None
    d_residual = torch.empty_like(given, dtype=kept.dtypes[1]) if wanted.residual else None
    d_previous = [torch.empty_like(given, dtype=kind) for kind in kept.dtypes[2:]] if wanted.previous else []
    low = given.new_empty(len(given), rank, dtype=torch.float32)
    means = given.new_empty(len(given), dtype=torch.float32)
    if given.numel():
        _slopes(kept, slopes, given, rank, (d_update, d_residual, d_previous), low, means, ahead)
    sums = _sums(kept, slopes, given, rank, wanted, low, means, ahead)
    return Gradients(d_update, d_residual, *sums, previous=d_previous)


def row_tile(rows: int, dim: int, rank: int, exact: bool, norm: bool, ahead: int | None = None) -> dict[str, Any]:
    """Choose the tile of a walk over rows.

    Args:
      rows: M.
      dim: D.
      rank: r; with maps, taller blocks read these less often.
      exact: whether the rows are float32, whose products are made of three and take as many registers.
      norm: whether there is a norm, for which more tensors are read ahead into shared memory.
      ahead: tiles to read ahead of their use; None leaves it to the compiler.

    Returns:
      The tile: the fastest of those measured on an H200 in bfloat16 without a norm; else one that fits the registers.
    """
    width = max(16, next_power_of_2(dim))
    if not rank:
        return {"BM": 4, "BD": min(512, width), "num_warps": 4, "num_stages": 2, "AHEAD": ahead}
    if exact or norm:  # not measured
        tall = 64 if rows >= 16_384 and rank <= 32 else 32 if rows >= 4096 else 16
        narrow, wide = 16 if tall == 64 or rank > 32 else 32, 64 if rank > 32 else 4096 // tall
        return {
            "BM": tall,
            "BD": min(narrow if exact else wide, width),
            "num_warps": 4,
            "num_stages": 2,
            "AHEAD": ahead,
        }
    tall = 32 if rows >= 4096 else 16
    return {"BM": tall, "BD": min(4096 // tall, width), "num_warps": 4, "num_stages": 3, "AHEAD": ahead}


def column_tile(rows: int, dim: int, rank: int, exact: bool, norm: bool, ahead: int | None = None) -> dict[str, Any]:
    """Choose the tile of the sums over rows, and how many blocks of rows a program adds up; see `row_tile`."""
    width = max(16, next_power_of_2(dim))
    tall, wide, warps, stages, programs = 32, min(128, width), 8 if rank > 32 else 4, 3, PROGRAMS
    if exact or norm:
        tall, wide, warps, stages = 16 if exact else 32, min(64 if rank <= 32 else 32, width), 8, 2
    elif ahead is not None:
        tall, programs = 16, 2 * PROGRAMS
    blocks, columns = cdiv(rows, tall), cdiv(dim, wide)
    split = max(1, cdiv(blocks, max(1, min(blocks, programs // columns))))
    return {"BM": tall, "BD": wide, "num_warps": warps, "num_stages": stages, "AHEAD": ahead, "SPLIT": split}


def padded_rank(rank: int) -> int:
    """Bring the rank to what the matrix instructions take; 0 stays 0."""
    return max(16, next_power_of_2(rank)) if rank else 0


def precision(stream: torch.dtype) -> str:
    """Name the precision of the low-rank products."""
    return "tf32x3" if stream == torch.float32 else "tf32"


def _slopes(
    kept: Kept,
    slopes: Slopes,
    given: Tensor,
    rank: int,
    out: tuple[Tensor | None, Tensor | None, Sequence[Tensor]],
    low: Tensor,
    means: Tensor,
    ahead: int | None,
) -> None:
    rows, dim = given.shape
    tile = row_tile(rows, dim, rank, kept.stream == torch.float32, slopes.normed is not None, ahead)
    d_update, d_residual, d_previous = out
    operands = [_or(x, given) for x in (slopes.total, slopes.normed, kept.total, kept.inverse, kept.norm_weight)]
    maps = [_or(_dense(x), given) for x in (kept.down, kept.up)]
    slope_rows[(cdiv(rows, tile["BM"]),)](
        *operands, kept.coefficients, *maps, _or(d_update, given), _or(d_residual, given),
        *_padded(d_previous, given), low, means, rows, dim, rank,
        RANK=padded_rank(rank), PRECISION=precision(kept.stream), DIRECT=slopes.total is not None,
        NORM=slopes.normed is not None, UPDATE=d_update is not None, RESIDUAL=d_residual is not None,
        COUNT=len(d_previous), **tile,
    )  # fmt: skip


def _sums(
    kept: Kept,
    slopes: Slopes,
    given: Tensor,
    rank: int,
    wanted: Wanted,
    slope_low: Tensor,
    means: Tensor,
    ahead: int | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Sum up over rows: gradients of the coefficients, A, B and the norm's weight."""
    rows, dim = given.shape
    count = len(kept.previous) if wanted.gamma else 0
    maps, weight = wanted.maps and rank > 0, wanted.norm_weight and slopes.normed is not None
    learned = wanted.alpha or wanted.beta or wanted.gamma
    if not (maps or weight or learned):
        return None, None, None, None
    tile = column_tile(rows, dim, rank, kept.stream == torch.float32, slopes.normed is not None, ahead)
    columns, parts = cdiv(dim, tile["BD"]), cdiv(cdiv(rows, tile["BM"]), tile["SPLIT"])

    # one buffer, one sum over the parts: A's gradient, B's, the norm weight's, the coefficients'
    of_map, of_weight = dim * rank if maps else 0, dim if weight else 0
    width = 2 * of_map + of_weight + columns * (2 + count)
    new = given.new_empty if given.numel() else given.new_zeros
    sums_PW = new(parts, width, dtype=torch.float32)
    slopes_and_norm = (slopes.total, slopes.normed, kept.total, kept.inverse, means, kept.norm_weight)
    operands = [_or(_dense(x), given) for x in (*slopes_and_norm, kept.update, kept.residual)]
    if given.numel():
        first_W = sums_PW[0]
        column_sums[(columns, parts)](
            *operands, *_padded([_dense(p) for p in kept.previous[:count]], given), _or(kept.low, given), slope_low,
            first_W, first_W[of_map:], first_W[2 * of_map :], first_W[2 * of_map + of_weight :], rows, dim, rank, width,
            RANK=padded_rank(rank) or 16, PRECISION=precision(kept.stream), DIRECT=slopes.total is not None,
            NORM=slopes.normed is not None, MAPS=maps, WEIGHT=weight, ALPHA=wanted.alpha, BETA=wanted.beta,
            INNER=wanted.beta and rank > 0, COUNT=count, **tile,
        )  # fmt: skip
    total_W = sums_PW.sum(dim=0)
    of_maps = kept.coefficients[1] * total_W[: 2 * of_map] if maps else total_W
    factors = total_W[2 * of_map + of_weight :].view(columns, 2 + count).sum(dim=0) if learned else None
    if factors is not None and len(factors) < len(kept.coefficients):
        factors = torch.nn.functional.pad(factors, (0, len(kept.coefficients) - len(factors)))
    return (
        factors,
        of_maps[:of_map].view(dim, rank) if maps else None,
        of_maps[of_map:].view(rank, dim) if maps else None,
        total_W[2 * of_map : 2 * of_map + of_weight] if weight else None,
    )


def _dense(x: Any) -> Any:
    return None if x is None else x.contiguous()


def _or(x: Tensor | None, otherwise: Tensor) -> Tensor:
    """Give a tensor, or any other where the kernel will not look."""
    return otherwise if x is None else x


def _padded(tensors: Sequence[Tensor], otherwise: Tensor) -> list[Tensor]:
    return [*tensors, *[otherwise] * (ARGUMENTS - len(tensors))]
