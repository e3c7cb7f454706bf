"""The Pallas kernels: interpreted on the CPU against float64, and compiled for TPUs by their own compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distilbeam.kernels import DenseLabels, distill_loss, linear_distill_loss
from distilbeam.kernels.resolve import has_torch_tpu, pallas_reasons

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
ROWS, FEATURES, CLASSES = 37, 24, 300
OBJECTIVES = [
    ("truncated_kl", "top_k"),
    ("tail", "top_k"),
    ("renormalised", "top_k"),
    ("sampled", "sampled"),
    ("slam", "top_k"),
    ("ce", "hard"),
    ("reverse_kl", "top_k"),
    ("jsd", "top_k"),
    ("skew_kl", "top_k"),
    ("skew_reverse_kl", "top_k"),
    ("tv", "top_k"),
]
# what a kernel does depends on the objective by the temperature of the rest alone; one of each kind in bfloat16
CASES = [(torch.float32, *setting) for setting in OBJECTIVES] + [
    (torch.bfloat16, *setting) for setting in OBJECTIVES[:2]
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
@pytest.mark.parametrize(("dtype", "objective", "kind"), CASES)
def test_every_objective(objective, kind, dtype, make_labels, rng):
    extra = {"accuracy": 0.7, "candidates": 3} if objective == "slam" else {}
    labels = make_labels(kind, ROWS, CLASSES)
    check(layer(rng, dtype), labels, objective=objective, temperature=1.5, **extra)


@needs_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "objective", "kind"), CASES)
def test_every_objective_of_given_logits(objective, kind, dtype, make_labels, rng):
    extra = {"accuracy": 0.7, "candidates": 3} if objective == "slam" else {}
    labels = make_labels(kind, ROWS, CLASSES)
    logits = (2 * torch.randn(ROWS, CLASSES, generator=rng)).to(dtype)
    check_logits(logits, labels, objective=objective, temperature=1.5, **extra)


def check_logits(logits, labels, **options):
    """Every row's value and the gradient for upstream gradients other than one, against float64."""
    exact, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    upstream = torch.randn(len(logits), generator=torch.Generator().manual_seed(2))
    truth = distill_loss(exact, labels, reduction="none", implementation="reference", **options)
    found = distill_loss(leaf, labels, reduction="none", implementation="pallas", **options)
    torch.testing.assert_close(found.detach().double(), truth.detach(), rtol=3e-5, atol=3e-6)
    slope = torch.autograd.grad(found, leaf, upstream)[0].double()
    true_slope = torch.autograd.grad(truth, exact, upstream.double())[0]
    rtol = max(1e-5, torch.finfo(logits.dtype).eps)
    torch.testing.assert_close(slope, true_slope, rtol=rtol, atol=3e-7)


@needs_jax
@pytest.mark.usefixtures("interpreted")
def test_given_logits_with_absent_classes_and_rows_that_do_not_count(make_labels, rng, monkeypatch):
    from distilbeam.kernels.distillation import pallas_kernels

    monkeypatch.setattr(pallas_kernels, "BLOCK_CLASSES", 128)  # ragged: two blocks and 44 classes
    logits = torch.randn(ROWS, CLASSES, generator=rng)
    logits[:, 290:] = -torch.inf
    logits[3] = torch.nan
    mask = torch.rand(ROWS, generator=rng) > 0.3
    mask[3] = False
    hard = torch.randint(0, 290, (ROWS,), generator=rng)
    hard[::2] = -100
    check_logits(logits, make_labels("top_k", ROWS, 290), objective="tail", mask=mask, hard=hard, hard_share=0.4)
    empty = torch.empty(0, 40, requires_grad=True)
    loss = distill_loss(empty, make_labels("top_k", 0, 40), objective="tail", implementation="pallas")
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 40)


@needs_jax
@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "torch.tpu"])
def test_the_operations_are_registered_soundly_and_a_training_step_is_one_graph(package):
    if package == "torch.tpu" and importlib.util.find_spec("torch_tpu") is None:
        pytest.skip("torch_tpu is not installed")
    program = Path(__file__).parents[1] / "support" / "torch_tpu_operations.py"
    loaded = {"TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(package == "torch.tpu")), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", **loaded}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1:] == [f"sound {package}"], done.stderr[-3000:]


@needs_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_padding_masks_and_true_classes(make_labels, rng):
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


def test_a_tpu_needs_torch_to_know_it():
    tensor = SimpleNamespace(device=SimpleNamespace(type="tpu"))
    assert has_torch_tpu() == hasattr(torch, "tpu")
    reasons = [reason for reason in pallas_reasons(tensor) if "jax" not in reason]
    assert reasons == ([] if has_torch_tpu() else ["torch.tpu is not loaded, which the package torch_tpu does"])


def test_without_a_tpu_the_reasons_are_given(make_labels, rng, monkeypatch):
    monkeypatch.delenv("DISTILBEAM_PALLAS_INTERPRET", raising=False)
    operands, labels = layer(rng, torch.float32), make_labels("top_k", ROWS, CLASSES)
    with pytest.raises(NotImplementedError, match=r"pallas: no TPU device; DISTILBEAM_PALLAS_INTERPRET=1 interprets"):
        linear_distill_loss(*operands, labels, objective="tail", implementation="pallas")
    with pytest.raises(NotImplementedError, match="pallas: dense labels need no kernel there: XLA fuses plain torch"):
        distill_loss(torch.zeros(2, 4), DenseLabels(torch.zeros(2, 4)), implementation="pallas")
    with pytest.raises(NotImplementedError, match="pallas: dense labels hold a value for every class anyway"):
        linear_distill_loss(*operands, DenseLabels(torch.zeros(ROWS, CLASSES)), implementation="pallas")


@needs_jax
@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_accepts_the_kernels():
    rows, classes, kept = 1024, 65_536, 8
    program = Path(__file__).parents[1] / "support" / "pallas_ahead_of_time.py"
    command = [sys.executable, program, f"{rows},{classes},{kept}", "v5e:2x2", "v6e:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kernels = {(report["chip"], report["work"]): report["kernels"] for report in reports}
    assert kernels == {(chip, f): 1 for chip in ("v5e:2x2", "v6e:2x2") for f in ("logit_buckets", "logit_gradient")}
    temporary = {report["work"]: report["temporary_bytes"] for report in reports}
    logits_bytes = 4 * rows * classes
    assert temporary["logit_buckets"] < logits_bytes / 8
    assert temporary["logit_gradient"] <= 1.01 * logits_bytes  # the scatter's copy in float32
