"""The low-precision Triton kernels compiled for GPUs that need not be here: registers, spills, shared memory, instructions.

Bounds hold for triton 3.7.1. What spills nothing and leaves two blocks' worth of shared memory is taken to be sound;
whether it is fast, only a GPU says.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from distilbeam.kernels.laurel.backends import MOST_RANK_AHEAD
from distilbeam.kernels.quantize.formats import FORMATS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets and cannot compile"),
]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have; the compiler does not check
HELD = {"fp8": "*fp8e4nv", "int8": "*i8", None: "*bf16"}
ROWS = (
    "f",
    "x",
    "p0",
    "p1",
    "p2",
    "p3",
    "total",
    "d_total",
    "d_normed",
    "d_update",
    "d_residual",
    "d0",
    "d1",
    "d2",
    "d3",
)
SIZES = ("M", "N", "K", "D", "R", "row_stride", "stride")


def signature(kernel, constants, rows="*bf16", **special):
    """Types of the arguments: rows, sizes, and float32 for all that is neither nor constant."""
    kinds = {**dict.fromkeys(ROWS, rows), **dict.fromkeys(SIZES, "i32"), **special}
    return {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name not in constants}


def compiled(capability, kernel, constants, **kinds):
    from triton_ahead_of_time import compile_for

    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    return compile_for(capability, kernel, signature(kernel, constants, **kinds), constants, **options)


@pytest.mark.parametrize(("capability", "form"), [(80, "int8"), (90, "int8"), (90, "fp8")])
@pytest.mark.parametrize("dim", [256, 16_384])
def test_quantisation_moves_sixteen_bytes_at_a_time(capability, form, dim):
    from distilbeam.kernels.quantize.triton_backend import constants, tile_of
    from distilbeam.kernels.quantize.triton_kernels import quantize_rows

    every = {**tile_of(dim), **constants(FORMATS[form])}
    found = compiled(capability, quantize_rows, every, x="*bf16", values=HELD[form])
    assert found.spills == 0
    assert found.registers <= 128
    assert found.shared <= 1024
    assert found.count("LDG.E.128") >= 2
    assert found.count("STG.E.128") >= 1
    assert (found.count("F2FP.SATFINITE.E4M3") > 0) == (form == "fp8")
    assert found.count("BAR.SYNC") <= 5
    assert sum(found.instructions.values()) <= 1024
    if dim <= 8192:  # a row is read once
        assert found.count("LDG") == found.count("LDG.E.128") == max(2, dim // 2048)


def test_an_a100_has_no_e4m3():
    from distilbeam.kernels.quantize.triton_backend import constants, tile_of
    from distilbeam.kernels.quantize.triton_kernels import quantize_rows

    with pytest.raises(Exception, match="type fp8e4nv not supported in this architecture"):
        compiled(80, quantize_rows, {**tile_of(256), **constants(FORMATS["fp8"])}, x="*bf16", values=HELD["fp8"])


def test_on_an_a100_fp8_is_refused_with_its_reason(monkeypatch):
    from distilbeam.kernels.quantize import interface

    class Elsewhere:
        dtype, is_cuda, device = torch.bfloat16, True, torch.device("cuda")

    monkeypatch.setattr(interface, "triton_reasons", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    (reason,) = interface.triton_refusals(FORMATS["fp8"], Elsewhere())
    assert reason == "the GPU has no float8_e4m3fn (compute capability 8.0)"
    assert interface.triton_refusals(FORMATS["int8"], Elsewhere()) == []


@pytest.mark.parametrize("name", ["both_ways", "slope_sizes", "slopes"])
def test_matrices_are_quantised_both_ways_sixteen_bytes_at_a_time(name):
    from distilbeam.kernels.low_precision import triton_both_ways, triton_fp8

    kernel = getattr(triton_both_ways, name)
    tile = triton_fp8.ROWS if name == "both_ways" else triton_fp8.SLOPES
    constants = {**tile, **({} if name == "slope_sizes" else triton_fp8.CONSTANTS)}
    narrow = dict.fromkeys(("values", "transposed", "by_rows", "by_columns"), HELD["fp8"])
    found = compiled(90, kernel, constants, x="*bf16", dy="*bf16", padded="i32", **narrow)
    assert found.spills == 0
    assert found.registers <= 128
    assert found.shared <= 64 * 1024
    assert found.count("LDG.E.128") >= 1
    assert (found.count("F2FP.SATFINITE.E4M3") > 0) == (name != "slope_sizes")
    assert found.count("BAR.SYNC") <= 12
    assert sum(found.instructions.values()) <= 1280
    if name != "slope_sizes":  # rows, and columns through shared memory
        assert found.count("STG.E.128") + found.count("STG.E.64") >= 2
        assert found.count("BAR.SYNC") >= 1


PRODUCTS = [(80, "IMMA.16832.S8.S8"), (90, "IGMMA")]


@pytest.mark.parametrize(("capability", "product"), PRODUCTS)
@pytest.mark.parametrize("size", ["TILE", "SMALL_TILE"])
def test_layers_multiply_eight_bits_on_the_tensor_cores(capability, product, size):
    from distilbeam.kernels.low_precision import triton_backend
    from distilbeam.kernels.low_precision.triton_kernels import scaled_product

    constants = {**getattr(triton_backend, size), **triton_backend.LAUNCH, "BIAS": True}
    found = compiled(capability, scaled_product, constants, a=HELD["int8"], b=HELD["int8"], out="*bf16")
    assert found.spills == 0
    assert found.registers <= 184
    assert found.shared <= 98_304 < SHARED[capability]
    assert found.count(product) >= 4
    assert found.count("LDGSTS.E.BYPASS.128") >= 12  # operands reach shared memory 16 bytes at a time, ahead of use
    assert found.count("STG.E.128") >= 2
    assert found.count("BAR.SYNC") <= 6
    assert sum(found.instructions.values()) <= 960


A100, H100 = (
    [(8192, 4096, 16), (1024, 8192, 64)],
    [(1024, 1024, 16), (65_536, 8192, 16), (65_536, 4096, 64), (65_536, 4096, 0)],
)
RESIDUALS = [
    *((80, shape, "int8", "*bf16") for shape in A100),
    *((90, shape, "fp8", "*bf16") for shape in H100),
    (90, (65_536, 8192, 16), None, "*bf16"),
    (80, (8192, 1024, 64), "int8", "*fp32"),
    (90, (1024, 1024, 16), "int8", "*fp32"),
]


@pytest.mark.parametrize("ahead", [None, 2])
@pytest.mark.parametrize(("capability", "shape", "form", "rows"), RESIDUALS, ids=str)
def test_residuals_fit_their_registers(capability, shape, form, rows, ahead):
    from distilbeam.kernels.laurel import triton_backend, triton_kernels
    from distilbeam.kernels.quantize.triton_backend import constants

    count, dim, rank = shape
    if ahead is not None and rank > MOST_RANK_AHEAD:
        pytest.skip("refused")
    exact = rows == "*fp32"
    formed = {"LARGEST": 1.0, "RECIPROCAL": 1.0, "WHOLE": False} if form is None else constants(FORMATS[form])
    tile = triton_backend.row_tile(count, dim, rank, exact, form is not None, ahead)
    shared = {"PRECISION": "tf32x3" if exact else "tf32", "NORM": form is not None}
    forward = {
        **tile,
        **shared,
        **formed,
        "RANK": triton_backend.padded_rank(rank),
        "COUNT": 0,
        "QUANTIZE": form is not None,
    }
    slope = {**tile, **shared, "RANK": triton_backend.padded_rank(rank), "COUNT": 0, "DIRECT": True, "UPDATE": True}
    sums = {
        **triton_backend.column_tile(count, dim, rank, exact, form is not None, ahead),
        **shared,
        "RANK": triton_backend.padded_rank(rank) or 16,
    }
    sums |= {"COUNT": 0, "DIRECT": True, "MAPS": rank > 0, "WEIGHT": form is not None, "ALPHA": True, "BETA": True}
    sums |= {"INNER": rank > 0}
    normed = HELD[form] if form or not exact else "*fp32"
    found = {
        "forward": compiled(capability, triton_kernels.residual_rows, forward, rows=rows, normed=normed),
        "slope": compiled(capability, triton_kernels.slope_rows, {**slope, "RESIDUAL": True}, rows=rows),
        "sums": compiled(capability, triton_kernels.column_sums, sums, rows=rows),
    }
    for name, one in found.items():
        assert one.spills == 0, name
        assert one.registers <= (255 if name == "sums" else 190 if ahead is None else 208), name
        assert one.shared <= (64 if ahead is None else 96) * 1024 < SHARED[capability], name
        assert one.count("LDG.E.128") + one.count("LDGSTS.E.BYPASS.128") >= 2, name
        assert (one.count("HMMA") + one.count("HGMMA") > 0) == (rank > 0), name
        assert one.count("BAR.SYNC") <= (48 if ahead is None else 32 if name == "sums" else 24), name
        assert sum(one.instructions.values()) <= 2640, name
        # tiles that nobody waits for
        assert ahead is None or name == "sums" or one.count("LDGSTS") >= 14, name
    assert found["forward"].count("STG.E.128") >= 1
