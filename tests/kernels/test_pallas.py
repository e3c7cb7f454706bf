"""The Pallas kernels: interpreted on the CPU against float64, and compiled for TPUs by their own compiler."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distilbeam.kernels import DenseLabels, distill_loss, linear_distill_loss

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
ROWS, FEATURES, CLASSES = 37, 24, 300
OBJECTIVES = [
    ("kl", "top_k"),
    ("tail", "top_k"),
    ("renormalised", "top_k"),
    ("sampled", "sampled"),
    ("slam", "top_k"),
    ("ce", "hard"),
]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("DISTILBEAM_PALLAS_INTERPRET", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def layer(rng, dtype):
    shapes = (ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    return [torch.randn(shape, generator=rng).mul(FEATURES**-0.25).to(dtype) for shape in shapes]


def check(operands, labels, **options):
    """Value within rounding of float64; gradients no further off than a layer whose logits are in the layer's dtype."""
    exact = [x.double().requires_grad_() for x in operands]
    leaves, naive = ([x.clone().requires_grad_() for x in operands] for _ in range(2))
    truth = linear_distill_loss(*exact, labels, implementation="reference", **options)
    found = linear_distill_loss(*leaves, labels, implementation="pallas", **options)
    plain = distill_loss(torch.nn.functional.linear(*naive), labels, implementation="reference", **options)
    torch.testing.assert_close(found.detach().double(), truth.detach(), rtol=1e-5, atol=3e-6)
    triples = zip(*(torch.autograd.grad(*x) for x in ((found, leaves), (truth, exact), (plain, naive))), strict=True)
    for slope, true, simple in triples:
        rounding = torch.finfo(slope.dtype).eps * true.abs().max()
        error = (slope.double() - true).abs().max()
        assert error <= (simple.double() - true).abs().max() + rounding + 1e-8


@needs_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("objective", "kind"), OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_objective(objective, kind, dtype, make_labels, rng):
    extra = {"accuracy": 0.7, "candidates": 3} if objective == "slam" else {}
    labels = make_labels(kind, ROWS, CLASSES)
    check(layer(rng, dtype), labels, objective=objective, temperature=1.5, **extra)


@needs_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_parts_padding_masks_and_true_classes(make_labels, rng, monkeypatch):
    from distilbeam.kernels.linear_distillation import pallas_kernels

    monkeypatch.setattr(pallas_kernels, "PART_CLASSES", 130)
    monkeypatch.setattr(pallas_kernels, "block_classes", lambda _: 128)  # ragged: 130 is a block and two classes
    operands = layer(rng, torch.float32)
    operands[2][290:] = -torch.inf
    mask = torch.rand(ROWS, generator=rng) > 0.3
    hard = torch.randint(0, 290, (ROWS,), generator=rng)
    hard[::2] = -100
    check(operands, make_labels("top_k", ROWS, 290), objective="tail", mask=mask, hard=hard, hard_share=0.4)


@needs_jax
@pytest.mark.usefixtures("interpreted")
def test_an_empty_batch(make_labels, rng):
    hidden, weight, bias = (x.requires_grad_() for x in layer(rng, torch.float32))
    labels = make_labels("top_k", 0, CLASSES)
    loss = linear_distill_loss(hidden[:0], weight, bias, labels, objective="tail", implementation="pallas")
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, weight)[0].abs().max() == 0


def test_without_a_tpu_the_reasons_are_given(make_labels, rng, monkeypatch):
    monkeypatch.delenv("DISTILBEAM_PALLAS_INTERPRET", raising=False)
    operands = layer(rng, torch.float32)
    with pytest.raises(NotImplementedError, match=r"pallas: no TPU device; DISTILBEAM_PALLAS_INTERPRET=1 interprets"):
        linear_distill_loss(*operands, make_labels("top_k", ROWS, CLASSES), implementation="pallas")
    with pytest.raises(NotImplementedError, match="pallas: dense labels hold a value for every class anyway"):
        linear_distill_loss(*operands, DenseLabels(torch.zeros(ROWS, CLASSES)), implementation="pallas")


@needs_jax
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_accepts_the_kernels_and_holds_no_logits():
    rows, features, classes, kept = 1024, 256, 65_536, 8
    program = Path(__file__).parents[1] / "support" / "pallas_ahead_of_time.py"
    shape = f"{rows},{features},{classes},{kept}"
    command = [sys.executable, program, shape, "v5e:2x2", "v6e:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = {(report["chip"], report["function"]): report["kernels"] for report in reports}
    assert kernels == {
        (chip, f): n for chip in ("v5e:2x2", "v6e:2x2") for f, n in (("first_pass", 1), ("gradients", 2))
    }
    logits_bytes = 4 * rows * classes
    assert max(report["temporary_bytes"] for report in reports) < logits_bytes / 2
