"""The last layer's products on a CPU: right by either library, and by which of them they are made."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels.linear_distillation import products

SHAPES = [(1, 1, 1), (3, 5, 7), (96, 33, 3001), (256, 4096, 24)]


def within_rounding(found, a, b, bias, dtype):
    """Sums of K products differ from the exact ones by K + 1 roundings of the sum of their sizes, at most."""
    exact = a.double() @ b.double().T + (0 if bias is None else bias.double())
    sizes = a.double().abs() @ b.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = (a.shape[1] + 1) * torch.finfo(dtype).eps * sizes
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("library", ["oneDNN", "torch.mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_within_rounding(shape, dtype, library, rng, monkeypatch):
    if library == "torch.mm":
        monkeypatch.setattr(products, "_of_one_dnn", lambda: None)
    monkeypatch.setattr(products, "LEAST", 0)
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, generator=rng).to(dtype), torch.randn(columns, inner, generator=rng).to(dtype)
    bias = torch.randn(columns, generator=rng).to(dtype)
    within_rounding(products.times_transposed(a, b, bias), a, b, bias, dtype)
    within_rounding(products.times_transposed(a, b), a, b, None, dtype)
    across = b.T.contiguous().T
    within_rounding(products.times_transposed(a.T.contiguous().T, across, bias), a, b, bias, dtype)


def test_what_does_not_exist_stays_absent(rng):
    a, b, bias = torch.randn(64, 64, generator=rng), torch.randn(4096, 64, generator=rng), torch.zeros(4096)
    bias[::3] = -torch.inf
    found = products.times_transposed(a, b, bias)
    assert bool(torch.isneginf(found[:, ::3]).all())
    assert bool(found[:, 1::3].isfinite().all())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_large_float32_products_are_one_dnns(monkeypatch):
    asked = []
    real = products._of_one_dnn()
    assert real is not None

    def watched(a, *arguments):
        asked.append(tuple(a.shape))
        return real(a, *arguments)

    monkeypatch.setattr(products, "_of_one_dnn", lambda: watched)
    large, small = torch.ones(64, 64), torch.ones(4, 64)
    weight = torch.ones(products.LEAST // (64 * 64), 64)
    products.times_transposed(large, weight)
    assert asked == [(64, 64)]
    products.times_transposed(small, weight)
    products.times_transposed(large.double(), weight.double())
    assert asked == [(64, 64)]
