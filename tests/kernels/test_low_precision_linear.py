"""fp8_linear and int8_linear: exact on numbers that eight bits hold, within a computed error elsewhere, value and gradients."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import QuantizedRows, fp8_linear, int8_linear, quantize_rowwise

OPERATIONS = {"fp8": fp8_linear, "int8": int8_linear}
FORMAT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.fixture(params=["fp8", "int8"])
def form(request):
    return request.param


def bound(a, b, form, step=None):
    """|ab - a'b'| for operands rounded by rows: relative steps, and absolute ones where a format has them."""
    relative, absolute = {"fp8": (2**-4, 2**-10 / 448), "int8": (0.0, 0.5 / 127)}[form]
    error_a = (relative if step is None else step) * a.abs() + absolute * a.abs().amax(1, keepdim=True)
    error_b = relative * b.abs() + absolute * b.abs().amax(1, keepdim=True)
    return a.abs() @ error_b.T + error_a @ b.abs().T + error_a @ error_b.T + 1e-5


def test_small_whole_numbers_are_exact(form, rng):
    largest = {"fp8": 7.0, "int8": 127.0}[form]  # the scale maps 7 to 448, a power of two, and 127 to itself
    x = torch.randint(-int(largest), int(largest) + 1, (5, 7), generator=rng).float()
    w = torch.randint(-int(largest), int(largest) + 1, (3, 7), generator=rng).float()
    x[:, 0], w[:, 0] = largest, largest * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(OPERATIONS[form](x, w), x @ w.T, rtol=1e-6, atol=0)


def test_outputs_are_within_the_rounding_of_their_operands(form, rng):
    x, w, bias = (torch.randn(shape, generator=rng) for shape in ((31, 64), (17, 64), (17,)))
    error = (OPERATIONS[form](x, w, bias) - torch.nn.functional.linear(x, w, bias)).abs()
    assert bool((error <= bound(x, w, form)).all())
    assert error.max() > 0


def test_gradients_are_those_of_what_was_computed(form, rng):
    x, w, bias = (torch.randn(shape, generator=rng).requires_grad_() for shape in ((31, 64), (17, 64), (17,)))
    upstream = torch.randn(31, 17, generator=rng)
    wide = {"gradients": "bf16"} if form == "fp8" else {}
    dx, dw, db = torch.autograd.grad(OPERATIONS[form](x, w, bias, **wide), (x, w, bias), upstream)
    rounded_x, rounded_w = (q.values.double() * q.scale for q in (quantize_rowwise(t, FORMAT[form]) for t in (x, w)))
    for found, a, b in ((dx, upstream, rounded_w.T), (dw, upstream.T, rounded_x.T)):
        to_bfloat16 = 2**-8 * (a.abs().double() @ b.abs().T) + 1e-6  # of the upstream gradient with its scale
        error = (found.double() - a.double() @ b.T).abs()
        assert bool((error <= to_bfloat16).all())
        assert error.max() > 1e-4
    torch.testing.assert_close(db, upstream.sum(0))


def test_gradients_in_eight_bits_are_within_their_rounding(rng):
    x, w = (torch.randn(shape, generator=rng).requires_grad_() for shape in ((31, 64), (17, 64)))
    upstream = torch.randn(31, 17, generator=rng)
    exact, rounded = (
        torch.autograd.grad(fp8_linear(x, w, gradients=kind), (x, w), upstream) for kind in ("bf16", "fp8")
    )
    for a, b, slope, other in zip(exact, rounded, (upstream, upstream.T), (w.T, x.T), strict=True):
        assert bool(((a - b).abs() <= 1.1 * 2**-4 * (slope.abs() @ other.abs().T) + 0.05).all())
        assert 0.005 < (a - b).norm() / a.norm() < 0.05


def test_quantised_rows_are_taken_as_they_are(form, rng):
    x, w = (torch.randn(shape, generator=rng).requires_grad_() for shape in ((2, 5, 32), (16, 32)))
    rows = quantize_rowwise(x, FORMAT[form])
    upstream = torch.randn(2, 5, 16, generator=rng)
    outputs = [OPERATIONS[form](given, w) for given in (rows, x)]
    assert torch.equal(*outputs)
    slopes = [torch.autograd.grad(y, (x, w), upstream) for y in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))
    bare = QuantizedRows(rows.values, rows.scale)
    assert torch.equal(OPERATIONS[form](bare, w), outputs[0])


def test_an_empty_batch_and_leading_dimensions(form, rng):
    w, bias = torch.randn(3, 4, generator=rng).requires_grad_(), torch.ones(3)
    assert OPERATIONS[form](torch.empty(0, 4), w, bias).shape == (0, 3)
    assert OPERATIONS[form](torch.randn(2, 5, 4, generator=rng).bfloat16(), w).dtype == torch.bfloat16
    OPERATIONS[form](torch.empty(0, 4), w).sum().backward()
    assert w.grad.abs().max() == 0


def test_what_cannot_run_gives_every_reason():
    x, w = torch.zeros(2, 24), torch.zeros(16, 24)
    with pytest.raises(NotImplementedError, match=r"scaled_mm: the tensors are not on a CUDA device.*; reference can"):
        fp8_linear(x, w, implementation="scaled_mm")
    with pytest.raises(ValueError, match="gradients must be 'bf16' or 'fp8', got 'int8'"):
        fp8_linear(x, w, gradients="int8")
    with pytest.raises(ValueError, match=r"weight must be \[outputs, 24\] to fit input, got \[16, 23\]"):
        fp8_linear(x, w[:, 1:])
    with pytest.raises(ValueError, match=r"bias must have one value per output, \[16\], got \[3\]"):
        fp8_linear(x, w, torch.zeros(3))
    with pytest.raises(ValueError, match=r"the rows of int8_linear must be torch.int8, got torch.float8_e4m3fn"):
        int8_linear(quantize_rowwise(x, torch.float8_e4m3fn), w)
