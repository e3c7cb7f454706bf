"""fp8_linear: exact on numbers that eight bits hold, within a computed error elsewhere, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import fp8_linear
from distilbeam.kernels.fp8.scaling import BACKWARD, FORWARD, LARGEST, to_fp8


def test_small_whole_numbers_are_exact(rng):
    x = torch.randint(-8, 9, (5, 7), generator=rng).float()
    w = torch.randint(-8, 9, (3, 7), generator=rng).float()
    x[:, 0], w[:, 0] = 7.0, 7.0 * torch.tensor([1.0, -1.0, 1.0])  # the scale maps 7 to 448: a power of two
    x, w = x.clamp(-7, 7), w.clamp(-7, 7)
    torch.testing.assert_close(fp8_linear(x, w), x @ w.T)


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_outputs_and_gradients_are_within_the_rounding_of_their_operands(scaling, rng):
    x = torch.randn(31, 64, generator=rng).requires_grad_()
    w = torch.randn(17, 64, generator=rng).requires_grad_()
    bias = torch.randn(17, generator=rng).requires_grad_()
    upstream = torch.randn(31, 17, generator=rng)
    y = fp8_linear(x, w, bias, scaling=scaling)
    exact = torch.nn.functional.linear(x, w, bias)

    def bound(a, b, step_a):
        # |ab - a'b'| <= (u + v + uv) |a||b| summed, u and v the relative rounding errors of the two operands, and a
        # floor for numbers below the smallest normal one, which are rounded to a step of 2^-9 (e4m3) of the scale
        u, v = step_a, 2**-4
        relative = (u + v + u * v) * (a.abs() @ b.abs().T)
        floor = 2**-9 / 448 * (a.abs().amax() * b.abs().sum(1) + b.abs().amax() * a.abs().sum(1, keepdim=True))
        return relative + floor + 1e-5

    assert bool(((y - exact).abs() <= bound(x, w, 2**-4)).all())
    dx, dw, db = torch.autograd.grad(y, (x, w, bias), upstream)
    assert bool(((dx - upstream @ w).abs() <= bound(upstream, w.T, 2**-3)).all())
    assert bool(((dw - upstream.T @ x).abs() <= bound(upstream.T, x.T, 2**-3)).all())
    torch.testing.assert_close(db, upstream.sum(0))


def test_a_scale_per_row_is_better_when_rows_differ_in_size(rng):
    x = torch.randn(8, 64, generator=rng) * torch.logspace(-6, 0, 8)[:, None]
    w = torch.randn(16, 64, generator=rng)
    exact = x @ w.T

    def error(scaling):
        return ((fp8_linear(x, w, scaling=scaling) - exact).norm(dim=1) / exact.norm(dim=1)).max()

    assert error("row") < 0.06
    assert error("tensor") > 2 * error("row")


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_scaling_uses_the_whole_range_and_keeps_zeros(dtype):
    x = torch.tensor([[1e-3, -2e-3, 0.0], [0.0, 0.0, 0.0], [3e4, 1.0, -3e4]])
    values, scale = to_fp8(x, dtype, "row")
    assert values.float().abs().amax(1).tolist() == [LARGEST[dtype], 0.0, LARGEST[dtype]]
    torch.testing.assert_close((values.float() * scale)[:, 0], x[:, 0])


def test_an_empty_batch_and_leading_dimensions(rng):
    w = torch.randn(3, 4, generator=rng).requires_grad_()
    assert fp8_linear(torch.empty(0, 4), w).shape == (0, 3)
    assert fp8_linear(torch.randn(2, 5, 4, generator=rng).bfloat16(), w).shape == (2, 5, 3)
    fp8_linear(torch.empty(0, 4), w).sum().backward()
    assert w.grad.abs().max() == 0


def test_what_cannot_run_gives_every_reason():
    x, w = torch.zeros(2, 24), torch.zeros(16, 24)
    with pytest.raises(NotImplementedError, match=r"scaled_mm: the tensors are not on a CUDA device.*multiple of 16"):
        fp8_linear(x, w, implementation="scaled_mm")
    with pytest.raises(ValueError, match="scaling must be 'row' or 'tensor', got 'block'"):
        fp8_linear(x, w, scaling="block")
    with pytest.raises(ValueError, match=r"weight must be \[outputs, 24\] to fit input, got \[16, 23\]"):
        fp8_linear(x, w[:, 1:])
    with pytest.raises(ValueError, match=r"bias must have one value per output, \[16\], got \[3\]"):
        fp8_linear(x, w, torch.zeros(3))
