"""Triton kernels of low precision against their references: on a CUDA GPU, else in Triton's interpreter.

`test_triton_interpreted.py` starts the latter.
"""

from __future__ import annotations

import laurel_problem
import pytest
import torch
from laurel_problem import Case
from triton_device import DEVICE, INTERPRETED, MARKS, needs_fp8

from distilbeam.kernels import fp8_linear, int8_linear, laurel_residual, quantize_rowwise

pytestmark = MARKS
E4M3 = pytest.param(torch.float8_e4m3fn, marks=needs_fp8, id="e4m3")
DTYPES = [pytest.param(torch.int8, id="int8"), E4M3, pytest.param(torch.float8_e5m2, id="e5m2")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 100), (3, 5, 33), (2, 9000), (4, 1), (0, 7)], ids=str)
def test_quantisation_has_the_bits_of_the_reference(dtype, source, shape, rng):
    x = torch.randn(shape, generator=rng) * torch.exp(4 * torch.randn(shape, generator=rng))
    if shape[0]:
        x[..., 0, 0], x[..., 1, -1], x[-1] = torch.nan, torch.inf, 1e-38 * x[-1]
    exact = quantize_rowwise(x.to(source), dtype, implementation="reference")
    found = quantize_rowwise(x.to(source).to(DEVICE), dtype, implementation="triton")
    assert torch.equal(found.values.view(torch.uint8).cpu(), exact.values.view(torch.uint8))
    assert torch.equal(found.scale.view(torch.int32).cpu(), exact.scale.view(torch.int32))


def test_rows_that_lie_apart_are_quantised_as_they_are(rng):
    x = torch.randn(6, 40, generator=rng)
    found = quantize_rowwise(x.to(DEVICE)[::2, :17], torch.int8, implementation="triton")
    assert torch.equal(found.values.cpu(), quantize_rowwise(x[::2, :17], torch.int8).values)


LAYERS = [pytest.param("fp8", "fp8", marks=needs_fp8), ("int8", "bf16")]


@pytest.mark.parametrize(("form", "gradients"), LAYERS)
@pytest.mark.parametrize("shape", [(5, 7, 3), (70, 200, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_agree_with_the_reference(form, gradients, shape, dtype, rng):
    rows, inputs, outputs = shape
    x, w = torch.randn(rows, inputs, generator=rng).to(dtype), torch.randn(outputs, inputs, generator=rng)
    bias, above = torch.randn(outputs, generator=rng), torch.randn(rows, outputs, generator=rng).to(dtype)
    options = {"gradients": gradients} if form == "fp8" else {}
    found = {}
    for implementation, device in (("reference", "cpu"), ("triton", DEVICE)):
        leaves = [t.to(device).requires_grad_() for t in (x, w, bias)]
        y = {"fp8": fp8_linear, "int8": int8_linear}[form](*leaves, implementation=implementation, **options)
        slopes = torch.autograd.grad(y, leaves, above.to(device))
        found[implementation] = [t.detach().double().cpu() for t in (y, *slopes)]
    # int8 sums are whole numbers; those of fp8 differ by their order, and on Hopper by 13 bits within an instruction
    sums = 2e-6 if form == "int8" or INTERPRETED else 2e-3
    # torch's fp8 product comes in bfloat16
    products = (torch.bfloat16,) * 3 if form == "fp8" else (dtype, dtype, torch.float32)
    for a, b, kind in zip(*found.values(), (*products, torch.float32), strict=True):
        assert (a - b).abs().max() <= (torch.finfo(kind).eps + sums) * a.abs().max()


@needs_fp8
@pytest.mark.parametrize("shape", [(37, 100), (16, 48), (70, 9000)], ids=str)
def test_rows_quantised_both_ways_have_the_bits_of_the_reference(shape, rng):
    from distilbeam.kernels.low_precision import triton_fp8

    x = torch.randn(shape, generator=rng) * torch.exp(4 * torch.randn(shape, generator=rng))
    x[0, 0], x[1, -1], x[-1] = torch.nan, torch.inf, 1e-38 * x[-1]
    exact = quantize_rowwise(x, torch.float8_e4m3fn, implementation="reference")
    for found in (triton_fp8.quantize(x.to(DEVICE)), triton_fp8.transposed(exact)):
        assert torch.equal(found.values.view(torch.uint8).cpu(), exact.values.view(torch.uint8))
        assert torch.equal(found.scale.view(torch.int32).cpu(), exact.scale.view(torch.int32))
        columns = found.transposed.view(torch.uint8).cpu()
        assert columns.shape[1] % 16 == 0
        assert torch.equal(columns[:, : shape[0]], exact.values.view(torch.uint8).T)
        assert not columns[:, shape[0] :].any()


@needs_fp8
def test_a_layer_all_in_fp8_reads_rows_that_are_quantised_already(rng):
    x, w = torch.randn(2, 5, 32, generator=rng).to(DEVICE), torch.randn(16, 32, generator=rng).to(DEVICE)
    x, w = x.requires_grad_(), w.requires_grad_()
    above = torch.randn(2, 5, 16, generator=rng).to(DEVICE)
    rows = quantize_rowwise(x, torch.float8_e4m3fn)
    found = [torch.autograd.grad(fp8_linear(given, w, implementation="triton"), (x, w), above) for given in (rows, x)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(NotImplementedError, match="triton: all of its products are in fp8, gradients in bf16 are not"):
        fp8_linear(x, w, gradients="bf16", implementation="triton")


CASES = [
    Case(37, 50, 4),
    Case(70, 130, 16, 2, norm=True),
    Case(20, 70, 3, 3, norm=True, quantize="int8"),
    Case(5, 33, 0, 1, norm=True, quantize="int8"),
    Case(9, 20, 0),
    Case(37, 50, 4, dtype=torch.bfloat16),
    Case(70, 130, 40, 4, norm=True, dtype=torch.bfloat16),
    Case(20, 70, 3, 1, norm=True, quantize="int8", dtype=torch.float16),
    pytest.param(Case(20, 70, 3, 1, norm=True, quantize="fp8", dtype=torch.bfloat16), marks=needs_fp8),
]


@pytest.mark.parametrize("case", CASES[1::3], ids=str)
def test_residuals_whose_tiles_are_read_ahead_agree_with_float64(case):
    laurel_problem.check(case, "pipelined", DEVICE)


def test_tiles_of_high_ranks_are_not_read_ahead():
    x, wide = torch.zeros(2, 40, device=DEVICE), torch.zeros(40, 33, device=DEVICE)
    with pytest.raises(NotImplementedError, match="pipelined: with tiles read ahead the rank is at most 32, got 33"):
        laurel_residual(x, x, down=wide, up=wide.T, implementation="pipelined")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_residuals_agree_with_float64(case):
    laurel_problem.check(case, "triton", DEVICE)


def test_residuals_in_several_parts_of_the_sums(monkeypatch):
    from distilbeam.kernels.laurel import triton_backend

    monkeypatch.setattr(triton_backend, "PROGRAMS", 6)  # several blocks of rows to a program, and several programs
    laurel_problem.check(Case(150, 70, 4, 1, norm=True), "triton", DEVICE)


def test_only_some_gradients_wanted(rng):
    f, x, norm = (torch.randn(shape, generator=rng).to(DEVICE).requires_grad_() for shape in ((9, 20), (9, 20), (20,)))
    out = laurel_residual(
        f, x.detach(), alpha=torch.tensor(0.5, device=DEVICE), norm_weight=norm, implementation="triton"
    )
    (slope,) = torch.autograd.grad(out.residual.sum(), f, retain_graph=True)
    assert torch.equal(slope, torch.full_like(f, 0.5))
    plain = torch.nn.functional.rms_norm(0.5 * f + x, (20,), norm, eps=1e-6)
    pairs = (torch.autograd.grad(y.sum(), (f, norm)) for y in (out.normed, plain))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_residuals_without_rows():
    f = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    down, up = torch.ones(8, 2, device=DEVICE, requires_grad=True), torch.ones(2, 8, device=DEVICE)
    out = laurel_residual(f, f, down=down, up=up, norm_weight=up[0], quantize="int8", implementation="triton")
    assert out.normed.values.shape == (0, 8)
    assert torch.autograd.grad(out.residual.sum(), down)[0].abs().max() == 0


def test_what_the_kernels_cannot_do_is_said():
    f = torch.zeros(2, 80, device=DEVICE)
    with pytest.raises(NotImplementedError, match="triton: it computes in float32, the update is float64"):
        laurel_residual(f.double(), f.double(), implementation="triton")
    with pytest.raises(NotImplementedError, match="triton: the rank is at most 64 there, got 65"):
        laurel_residual(f, f, down=f.new_zeros(80, 65), up=f.new_zeros(65, 80), implementation="triton")
    with pytest.raises(NotImplementedError, match="at most 4 earlier residuals are added there, got 5"):
        laurel_residual(f, f, previous=[f] * 5, gamma=f.new_zeros(5), implementation="triton")
    with pytest.raises(NotImplementedError, match="triton: it computes in float32, the input is float64"):
        quantize_rowwise(f.double(), torch.int8, implementation="triton")
