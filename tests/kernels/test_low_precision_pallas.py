"""The low-precision Pallas kernels: interpreted on the CPU against their references, and compiled by the TPU's compiler."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import laurel_problem
import pytest
import torch
from laurel_problem import Case

from distilbeam.kernels import fp8_linear, int8_linear, laurel_residual, quantize_rowwise

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
DTYPES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("DISTILBEAM_PALLAS_INTERPRET", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


@needs_jax
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_quantisation_has_the_bits_of_the_reference(dtype, source, rng):
    x = torch.randn(3, 47, 100, generator=rng) * torch.exp(4 * torch.randn(3, 47, 100, generator=rng))
    x[0, 0, 0], x[0, 1, -1], x[-1] = torch.nan, torch.inf, 1e-38 * x[-1]
    exact = quantize_rowwise(x.to(source), dtype, implementation="reference")
    found = quantize_rowwise(x.to(source), dtype, implementation="pallas")
    same = found.values.view(torch.uint8) == exact.values.view(torch.uint8)
    if dtype == torch.float8_e5m2:  # of its NaNs, JAX takes another
        same |= found.values.float().isnan() & exact.values.float().isnan()
    assert bool(same.all())
    assert torch.equal(found.scale.view(torch.int32), exact.scale.view(torch.int32))


@pytest.mark.usefixtures("interpreted")
def test_layers_have_no_kernel_there():
    x = torch.zeros(2, 16)
    for layer in (fp8_linear, int8_linear):
        with pytest.raises(
            NotImplementedError, match=r"pallas: layers in 8 bits have no kernel there.*; reference can"
        ):
            layer(x, x, implementation="pallas")


CASES = [
    Case(70, 50, 4),
    Case(70, 130, 16, 2, norm=True),
    Case(40, 70, 3, 1, norm=True, quantize="int8"),
    Case(9, 20, 0, 1),
    Case(70, 50, 4, 1, norm=True, dtype=torch.bfloat16),
    Case(40, 33, 0, norm=True, quantize="fp8", dtype=torch.bfloat16),
]


@needs_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residuals_agree_with_float64(case, monkeypatch):
    from distilbeam.kernels.laurel import pallas_kernels

    monkeypatch.setattr(pallas_kernels, "BLOCK_ELEMENTS", 1)  # blocks of 32 rows
    laurel_problem.check(case, "pallas")


@needs_jax
@pytest.mark.usefixtures("interpreted")
def test_residuals_without_rows():
    f = torch.empty(0, 8, requires_grad=True)
    down, up = torch.ones(8, 2, requires_grad=True), torch.ones(2, 8)
    out = laurel_residual(f, f, down=down, up=up, norm_weight=up[0], quantize="int8", implementation="pallas")
    assert out.normed.values.shape == (0, 8)
    assert torch.autograd.grad(out.residual.sum(), down)[0].abs().max() == 0


@needs_jax
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_accepts_the_kernels_and_needs_no_room_beside_them():
    chips = ["v5e:2x2", "v6e:2x2"]
    program = Path(__file__).parents[1] / "support" / "low_precision_ahead_of_time.py"
    done = subprocess.run([sys.executable, program, *chips], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    forms = ["quantize-int8", "quantize-fp8"]
    expected = {(chip, work) for chip in chips for work in [*forms, "residual", "residual-int8", "gradients"]}
    assert {(report["chip"], report["work"]) for report in reports} == expected
    assert {report["kernels"] for report in reports} == {1}  # one pass over memory
    assert max(report["temporary_bytes"] for report in reports) == 0
