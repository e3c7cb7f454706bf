"""The learned augmented residual a block of rows at a time, on any device.

With g the gradient of x', u = x A and v = g B^T:

    df = alpha g      dx = beta (g + v A^T)      dA = beta x^T v      dB = beta u^T g      dp_j = gamma_j g
    dalpha = <g, f>   dbeta = <g, x> + <u, v>    dgamma_j = <g, p_j>

    through the norm, h = x' / rms:   g += (w dn - h mean(w dn h)) / rms,   dw = sum over rows of dn h

A block stays in the cache from its first operation to its last, where eager torch walks through memory once for each;
beyond the operands the backward pass is given u alone, r numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distilbeam.kernels.laurel.operands import EPSILON, Gradients, Kept, Made, Operands, Slopes, Wanted, width_of
from distilbeam.kernels.quantize import reference as quantizing
from distilbeam.kernels.quantize.formats import Format

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32 for each of the few tensors in work
FEWEST_ROWS = 64  # of a block, so that reading A and B stays cheap beside reading the rows


def forward(operands: Operands, target: Format | None) -> Made:
    """Compute x' and what was asked for besides.

    Args:
      operands: contiguous in their last dimension.
      target: format to quantise the normalised form to, or None.

    Returns:
      What was made.
    """
    f, x, coefficients, down, _, norm_weight, _ = operands
    dtype, rows = width_of(operands.stream), len(f)
    made = Made(
        total=torch.empty(f.shape, dtype=operands.stream, device=f.device),
        low=None if down is None else x.new_empty(rows, down.shape[1], dtype=dtype),
        inverse=None if norm_weight is None else x.new_empty(rows, 1, dtype=dtype),
        normed=torch.empty_like(f) if norm_weight is not None and target is None else None,
        values=None if target is None else torch.empty(f.shape, dtype=target.dtype, device=f.device),
        scale=None if target is None else x.new_empty(rows, 1, dtype=torch.float32),
    )
    wide = _widened(operands, dtype)
    factors = coefficients.tolist()
    for block in _blocks(f):
        total = _sum_block(wide, factors, made, block)
        if norm_weight is not None:
            _norm_block(total, wide, made, target, block)
    return made


def backward(kept: Kept, slopes: Slopes, wanted: Wanted) -> Gradients:
    """Compute the gradients that are wanted.

    Args:
      kept: of the forward pass.
      slopes: from above.
      wanted: which ones.

    Returns:
      The gradients.
    """
    given = slopes.total if slopes.normed is None else slopes.normed
    assert given is not None
    sums = _Sums(kept, given, wanted)
    for block in _blocks(given):
        sums.add(block, sums.slope(block, slopes))
    return sums.result()


def _blocks(x: Tensor) -> list[slice]:
    step = max(FEWEST_ROWS, BLOCK_ELEMENTS // max(1, x.shape[1]))
    return [slice(first, first + step) for first in range(0, len(x), step)]


def _widened(operands: Operands, dtype: torch.dtype) -> Operands:
    """Bring the small operands to the dtype of the computation."""
    f, x, coefficients, *small, previous = operands
    down, up, norm_weight = (None if one is None else one.to(dtype) for one in small)
    return Operands(f, x, coefficients, down, up, norm_weight, previous)


def _sum_block(operands: Operands, factors: list[float], made: Made, block: slice) -> Tensor:
    """Write a block of x' and give it back in the dtype of the computation, as it is stored."""
    alpha, beta, *gammas = factors
    dtype = width_of(made.total.dtype)
    x, stored = operands.residual[block].to(dtype), made.total[block]
    total = stored if stored.dtype == dtype else torch.empty_like(x)
    if operands.down is None or operands.up is None:
        torch.mul(x, beta, out=total)
    else:
        assert made.low is not None
        low = torch.mm(x, operands.down, out=made.low[block])
        torch.addmm(x, low, operands.up, beta=beta, alpha=beta, out=total)
    total.add_(operands.update[block], alpha=alpha)
    for gamma, earlier in zip(gammas, operands.previous, strict=True):
        total.add_(earlier[block], alpha=gamma)
    if total is stored:
        return total
    stored.copy_(total)
    return total.copy_(stored)


def _norm_block(total: Tensor, operands: Operands, made: Made, target: Format | None, block: slice) -> None:
    assert made.inverse is not None
    assert operands.norm_weight is not None
    mean = torch.linalg.vector_norm(total, dim=1, keepdim=True).square_().div_(max(1, total.shape[1]))
    inverse = torch.rsqrt(mean.add_(EPSILON), out=made.inverse[block])
    normed = (total * inverse).mul_(operands.norm_weight)
    if target is None:
        assert made.normed is not None
        made.normed[block] = normed
        return
    assert made.values is not None
    assert made.scale is not None
    made.values[block], made.scale[block] = quantizing.quantize(normed, target)


class _Sums:
    """The gradients, filled block by block."""

    def __init__(self, kept: Kept, like: Tensor, wanted: Wanted) -> None:
        self.kept, self.wanted, self.dtype = kept, wanted, width_of(kept.stream)
        self.factors: list[float] = kept.coefficients.tolist()

        def zeros(shape: Any, when: bool) -> Tensor | None:
            return like.new_zeros(shape, dtype=self.dtype) if when else None

        self.down, self.up, self.weight = (
            None if x is None else x.to(self.dtype) for x in (kept.down, kept.up, kept.norm_weight)
        )
        of_rows = [torch.empty_like(like, dtype=dtype) if want else None for dtype, want in _rows(kept, wanted)]
        self.update, self.residual = of_rows[:2]
        self.previous = [x for x in of_rows[2:] if x is not None]
        self.d_coefficients = torch.zeros(len(self.factors), dtype=torch.float64, device=like.device)
        self.d_down = zeros(None if kept.down is None else kept.down.shape, wanted.maps and kept.down is not None)
        self.d_up = zeros(None if kept.up is None else kept.up.shape, wanted.maps and kept.up is not None)
        self.d_weight = zeros(like.shape[1:], wanted.norm_weight)

    def slope(self, block: slice, slopes: Slopes) -> Tensor:
        """Give the gradient of a block of x' in the dtype of the computation; nobody may write to it."""
        direct = None if slopes.total is None else slopes.total[block].to(self.dtype)
        if slopes.normed is None:
            assert direct is not None
            return direct
        assert self.kept.total is not None
        assert self.kept.inverse is not None
        assert self.weight is not None
        inverse, d_normed = self.kept.inverse[block], slopes.normed[block].to(self.dtype)
        normal = self.kept.total[block] * inverse
        if self.d_weight is not None:
            self.d_weight += (d_normed * normal).sum(dim=0)
        slope = d_normed * self.weight
        mean = (slope * normal).mean(dim=1, keepdim=True)
        slope.sub_(normal.mul_(mean)).mul_(inverse)
        return slope if direct is None else slope.add_(direct)

    def add(self, block: slice, g: Tensor) -> None:
        """Take in a block with the gradient g of its x'."""
        alpha, beta, *gammas = self.factors
        self._add_coefficients(block, g)
        if self.update is not None:
            _write(self.update[block], g, alpha)
        for gamma, earlier in zip(gammas, self.previous, strict=False):
            _write(earlier[block], g, gamma)
        self._add_maps(block, g, beta)

    def _add_maps(self, block: slice, g: Tensor, beta: float) -> None:
        if self.down is None or self.up is None:
            if self.residual is not None:
                _write(self.residual[block], g, beta)
            return
        v = g @ self.up.T
        if self.residual is not None:
            place = self.residual[block]
            if place.dtype == g.dtype:
                torch.addmm(g, v, self.down.T, beta=beta, alpha=beta, out=place)
            else:
                place.copy_(torch.addmm(g, v, self.down.T, beta=beta, alpha=beta))
        if self.d_down is not None and self.d_up is not None:
            assert self.kept.residual is not None
            assert self.kept.low is not None
            self.d_down.addmm_(self.kept.residual[block].to(self.dtype).T, v, alpha=beta)
            self.d_up.addmm_(self.kept.low[block].T, g, alpha=beta)
        if self.wanted.beta:
            assert self.kept.low is not None
            self.d_coefficients[1] += _dot(self.kept.low[block], v)

    def _add_coefficients(self, block: slice, g: Tensor) -> None:
        pairs: list[tuple[int, Tensor]] = []
        if self.wanted.alpha:
            assert self.kept.update is not None
            pairs.append((0, self.kept.update))
        if self.wanted.beta:
            assert self.kept.residual is not None
            pairs.append((1, self.kept.residual))
        if self.wanted.gamma:
            pairs += list(enumerate(self.kept.previous, start=2))
        for place, other in pairs:
            self.d_coefficients[place] += _dot(g, other[block])

    def result(self) -> Gradients:
        """Give what was wanted."""
        coefficients = None
        if self.wanted.alpha or self.wanted.beta or self.wanted.gamma:
            coefficients = self.d_coefficients
        return Gradients(self.update, self.residual, coefficients, self.d_down, self.d_up, self.d_weight, self.previous)


def _rows(kept: Kept, wanted: Wanted) -> list[tuple[torch.dtype, bool]]:
    """Give the dtypes of the rows' gradients, and whether they are wanted."""
    asked = [wanted.update, wanted.residual, *[wanted.previous] * (len(kept.dtypes) - 2)]
    return list(zip(kept.dtypes, asked, strict=True))


def _write(place: Tensor, x: Tensor, factor: float) -> None:
    """Write factor * x, without a tensor in between where the dtypes agree."""
    if place.dtype == x.dtype:
        torch.mul(x, factor, out=place)
    else:
        place.copy_(x * factor)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1).to(a.dtype))
