"""quantize_rowwise: every value the nearest that the format has, found by enumeration; edges, gradients, messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbeam.kernels import QuantizedRows, dequantize_rowwise, quantize_rowwise

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(params=LARGEST, ids=str)
def dtype(request):
    return request.param


def representable(dtype):
    """Every finite number of a format, and whether its last bit is even."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.int8) if dtype == torch.int8 else codes.view(dtype)
    numbers, even = values.double().numpy(), (codes.numpy() % 2 == 0)
    keep = np.isfinite(numbers) & (np.abs(numbers) <= LARGEST[dtype])
    return numbers[keep], even[keep]


def nearest(x, dtype):
    """Round by looking at every number of the format; of two equally near ones, the even one."""
    numbers, even = representable(dtype)
    distance = np.abs(np.clip(x, numbers.min(), numbers.max())[:, None] - numbers)
    best = distance.min(axis=1, keepdims=True)
    choice = np.where(distance == best, np.where(even, 2, 1), 0).argmax(axis=1)
    return numbers[choice]


def test_every_value_is_the_nearest(dtype, rng):
    x = torch.randn(40, 64, generator=rng) * torch.logspace(-20, 20, 40)[:, None]
    rows = quantize_rowwise(x, dtype)
    assert rows.scale.shape == (40, 1)
    for i in range(40):
        # the product that is rounded is itself made in float32
        scaled = x[i].numpy() * (np.float32(1) / rows.scale[i].numpy())
        assert np.array_equal(rows.values[i].double().numpy(), nearest(scaled.astype(np.float64), dtype))
    expected = x.abs().amax(dim=1, keepdim=True).double() / LARGEST[dtype]
    torch.testing.assert_close(rows.scale.double(), expected, rtol=1.2e-7, atol=0)
    assert torch.equal(rows.values.float().abs().amax(dim=1), torch.full((40,), LARGEST[dtype]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9), st.sampled_from(list(LARGEST)))
def test_what_comes_back_is_within_half_a_step(numbers, dtype):
    x = torch.tensor([numbers])
    rows = quantize_rowwise(x, dtype)
    back = dequantize_rowwise(rows).double()
    bounded = x.double().clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    relative, absolute = {torch.int8: (0, 0.5), FLOATS[0]: (2**-4, 2**-10), FLOATS[1]: (2**-3, 2**-17)}[dtype]
    step = relative * bounded.abs() + absolute * rows.scale.double()
    assert bool(((back - bounded).abs() <= step * (1 + 1e-6) + 1e-6 * bounded.abs()).all())


def test_infinities_saturate_and_leave_the_others_alone(dtype):
    rows = quantize_rowwise(torch.tensor([[torch.inf, -torch.inf, 3e38, 0.0]]), dtype)
    assert rows.values[0, :2].float().tolist() == [LARGEST[dtype], -LARGEST[dtype]]
    assert bool(torch.isfinite(rows.scale).all())
    assert rows.values[0, 2].float() > 0.8 * LARGEST[dtype]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_nan_stays_one_and_the_others_do_not_notice(dtype):
    x = torch.tensor([[1.0, torch.nan, -2.0], [1.0, -torch.nan, -2.0], [1.0, 0.0, -2.0]])
    rows = quantize_rowwise(x, dtype)
    assert rows.values.float().isnan().tolist() == [[False, True, False]] * 2 + [[False] * 3]
    assert rows.values.view(torch.uint8)[0, 1] == rows.values.view(torch.uint8)[1, 1] == 0x7F
    assert torch.equal(rows.values[:, ::2].float(), rows.values[2:, ::2].float().expand(3, 2))
    assert torch.equal(rows.scale, rows.scale[2:].expand(3, 1))


def test_int8_keeps_a_nan_in_the_rows_scale():
    rows = quantize_rowwise(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), torch.int8)
    assert rows.values.tolist() == [[127, 0], [64, 127]]
    assert dequantize_rowwise(rows).isnan().tolist() == [[True, True], [False, False]]


def test_zeros_and_subnormal_numbers_become_zeros(dtype):
    x = torch.tensor([[0.0, 0.0], [1e-40, -1e-39], [2.0**-126, 2.0**-120]])
    rows = quantize_rowwise(x, dtype)
    assert rows.values.float().abs().max() == 0
    assert bool((rows.scale == 2.0**-100).all())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4), (5,), (2, 3, 4)])
def test_shapes(dtype, shape, rng):
    rows = quantize_rowwise(torch.randn(shape, generator=rng).bfloat16(), dtype)
    assert rows.values.shape == rows.shape == shape
    assert rows.scale.shape == (*shape[:-1], 1)


def test_the_gradient_passes_as_if_nothing_were_rounded(dtype, rng):
    x = torch.randn(3, 4, generator=rng).bfloat16().requires_grad_()
    rows = quantize_rowwise(x, dtype)
    assert rows.straight.untyped_storage().nbytes() <= 4
    upstream = torch.randn(3, 4, generator=rng)
    (slope,) = torch.autograd.grad(dequantize_rowwise(rows), x, upstream)
    assert torch.equal(slope, upstream.bfloat16())
    with torch.no_grad():
        assert quantize_rowwise(x, dtype).straight is None
    assert not dequantize_rowwise(QuantizedRows(rows.values, rows.scale)).requires_grad


def test_each_mistake_is_named():
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float8_e4m3fn, .*torch.int8, got torch.uint8"):
        quantize_rowwise(torch.zeros(2, 2), torch.uint8)
    with pytest.raises(ValueError, match=r"x must be floating \[..., D\], got torch.int64 \[2\]"):
        quantize_rowwise(torch.zeros(2, dtype=torch.int64), torch.int8)
    with pytest.raises(NotImplementedError, match=r"pallas: no TPU device.*reference can"):
        quantize_rowwise(torch.zeros(2, 2), torch.int8, implementation="pallas")
