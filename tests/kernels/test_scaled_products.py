"""The 8-bit products against torch's own on the same operands."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import fp8_linear, int8_linear, quantize_rowwise
from distilbeam.kernels.low_precision import products

SHAPES = [(16, 16, 16), (64, 256, 48), (33, 512, 80)]


def operands(rows: int, width: int, out: int, dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator).to(device)
    w = torch.randn(out, width, generator=generator).to(device)
    return x, w, quantize_rowwise(x, dtype), quantize_rowwise(w, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_products_equal_torch_s_scaled_mm_up_to_the_order_of_sums(shape):
    _, w, a, b = operands(*shape, torch.float8_e4m3fn)
    theirs = torch._scaled_mm(
        a.values, b.values.T, scale_a=a.scale, scale_b=b.scale.T.contiguous(), out_dtype=torch.bfloat16
    )
    again = products.reference(a.values, a.scale, b.values, b.scale, None, torch.bfloat16)
    # float32 sums of K products in two orders differ by at most K 2^-24 of the sum of magnitudes, then round to bfloat16
    magnitude = (a.values.float().abs() * a.scale) @ (b.values.float().abs() * b.scale).T
    bound = shape[1] * 2.0**-24 * magnitude + 2.0**-8 * theirs.float().abs()
    assert ((again.float() - theirs.float()).abs() <= bound).all()
    assert (again == theirs).float().mean() > 0.99, "nearly all results are the same bit by bit"
    layer = fp8_linear(a, w, implementation="reference")  # quantises the weight by itself
    assert torch.equal(layer.to(torch.bfloat16), again)


@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 100, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_are_no_multiples_of_sixteen_are_padded(shape, dtype):
    x, w, a, b = operands(*shape, torch.float8_e4m3fn)
    bias = torch.linspace(-1, 1, shape[2])
    found = products.scaled_mm(a.values, a.scale, b.values, b.scale, bias, dtype)
    again = products.reference(a.values, a.scale, b.values, b.scale, bias, torch.float32)
    assert found.dtype == dtype
    magnitude = x.abs() @ w.abs().T + 1
    assert ((found.float() - again).abs() <= 2.0**-8 * again.abs() + 1e-5 * magnitude + 2.0**-9 * bias.abs()).all()


@pytest.mark.parametrize("shape", [(32, 64, 16), (48, 256, 32)])
def test_int8_products_equal_torch_s_int_mm_bit_by_bit(shape):
    x, w, a, b = operands(*shape, torch.int8)
    theirs = torch._int_mm(a.values, b.values.T).float() * a.scale * b.scale.T
    assert torch.equal(int8_linear(x, w, implementation="reference"), theirs)
    assert torch.equal(products.int_mm(a.values, a.scale, b.values, b.scale, None, torch.float32), theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(64, 256, 48), (1024, 4096, 1024)])
def test_on_a_gpu_the_layers_are_torch_s_products_bit_by_bit(shape):
    x, w = (one.bfloat16() for one in operands(*shape, torch.float8_e4m3fn, "cuda")[:2])
    a, b = quantize_rowwise(x, torch.float8_e4m3fn), quantize_rowwise(w, torch.float8_e4m3fn)
    theirs = torch._scaled_mm(
        a.values, b.values.T, scale_a=a.scale, scale_b=b.scale.T.contiguous(), out_dtype=torch.bfloat16
    )
    assert torch.equal(fp8_linear(x, w, implementation="scaled_mm"), theirs)
    x, w, a, b = operands(*shape, torch.int8, "cuda")
    theirs = torch._int_mm(a.values, b.values.T).float() * a.scale * b.scale.T
    assert torch.equal(int8_linear(x, w, implementation="int_mm"), theirs)
