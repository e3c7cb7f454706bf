"""linear_distill_loss in bf16, int8 and fp8: the loss of the rounded layer, its gradients, and how far rounding takes it."""

from __future__ import annotations

import narrow_layer
import pytest
import torch

from distilbeam.kernels import (
    DenseLabels,
    HardLabels,
    TopKLabels,
    WeightCache,
    linear_distill_loss,
    loss_precision,
    quantize_rowwise,
)
from distilbeam.kernels.linear_distillation import precision as narrowing
from distilbeam.kernels.quantize.formats import QuantizedRows

ROWS, FEATURES, CLASSES = 9, 20, 70
FORMS = ["bf16", "int8", "fp8"]


def layer(rng, features=FEATURES):
    shapes = (ROWS, features), (CLASSES, features), (CLASSES,)
    return [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]


def sizes_of(setting):
    objective, kind, mixing = setting
    extra = {"accuracy": 0.8, "candidates": 3, "mixing": mixing} if objective == "slam" else {}
    return kind, {"objective": objective, "temperature": 1.7, **extra}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_the_rounded_layer(setting, form, implementation, make_labels, rng):
    kind, options = sizes_of(setting)
    operands, labels = layer(rng), make_labels(kind, ROWS, CLASSES)
    found = linear_distill_loss(*operands, labels, precision=form, implementation=implementation, **options)
    truth, slopes, sizes = narrow_layer.exact(operands, form, labels, **options)
    assert found.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-6)
    for slope, true, size in zip(torch.autograd.grad(found, operands), slopes, sizes, strict=True):
        assert slope.dtype == torch.float32
        assert ((slope.double() - true).abs() <= 2e-5 * size + 1e-7).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_do_not_count_and_losses_of_rows(form, make_labels, rng):
    operands, labels = layer(rng), make_labels("top_k", ROWS, CLASSES)
    upstream = torch.randn(ROWS, generator=rng)
    mask = torch.arange(ROWS) % 4 != 1
    options = {"objective": "tail", "mask": mask, "reduction": "none"}
    truth, slopes, sizes = narrow_layer.exact(operands, form, labels, upstream, **options)
    hidden = operands[0].detach().masked_fill(~mask[:, None], torch.nan).requires_grad_()
    found = linear_distill_loss(hidden, *operands[1:], labels, precision=form, **options)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    assert found[~mask].abs().max() == 0
    for slope, true, size in zip(
        torch.autograd.grad(found, (hidden, *operands[1:]), upstream), slopes, sizes, strict=True
    ):
        assert ((slope.double() - true).abs() <= 2e-5 * size + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_quantised_before_are_taken_as_they_are(dtype, make_labels, rng):
    """By the operation before, and once for several calls: the same numbers, and their gradients reach what was rounded."""
    form = "int8" if dtype == torch.int8 else "fp8"
    hidden, weight, bias = layer(rng)
    labels = make_labels("top_k", ROWS, CLASSES)
    expected = linear_distill_loss(hidden, weight, bias, labels, precision=form, objective="tail")
    rows, classes = quantize_rowwise(hidden, dtype), quantize_rowwise(weight, dtype)
    found = linear_distill_loss(rows, classes, bias, labels, precision=form, objective="tail")
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)
    kept = WeightCache().rows_of(weight, lambda w: quantize_rowwise(w, dtype))
    frozen = linear_distill_loss(hidden, kept, bias, labels, precision=form, objective="tail")
    assert torch.equal(frozen, expected)
    assert torch.autograd.grad(frozen, hidden)[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(linear_distill_loss(hidden, kept, bias, labels, precision=form, objective="tail"), weight)


def rounding_errors(x, form):
    """What `precision.py` says of the rounding errors of every number."""
    largest = x.abs().amax(dim=1, keepdim=True)
    if form == "int8":
        return (largest / 254).expand_as(x)
    return x.abs() * 2**-8 if form == "bf16" else torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10)


BOUNDED = [
    ("kl", "dense"),
    ("truncated_kl", "top_k"),
    ("ce", "hard"),
    ("tail", "top_k"),
    ("renormalised", "sampled"),
    ("sampled", "sampled"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(("objective", "kind"), BOUNDED)
def test_rounding_changes_the_loss_by_no_more_than_is_said(objective, kind, form, sharpness, make_labels, rng):
    kind, options = sizes_of((objective, kind, "normalised"))
    hidden, weight, bias = (x.detach() for x in layer(rng))
    weight = weight * sharpness * torch.exp(torch.randn(weight.shape, generator=rng))  # rows of uneven numbers
    labels = make_labels(kind, ROWS, CLASSES)
    found = linear_distill_loss(hidden, weight, bias, labels, precision=form, reduction="none", **options).double()
    exact = [x.double() for x in (hidden, weight, bias)]
    plain = linear_distill_loss(*exact, labels, reduction="none", implementation="reference", **options)
    x, w = exact[:2]
    dx, dw = rounding_errors(x, form), rounding_errors(w, form)
    logits = (x.abs() @ dw.T + dx @ (w.abs() + dw).T).amax(dim=1)
    temperature = 1.0 if kind == "hard" else options["temperature"]
    bound = 2 * temperature * logits
    assert ((found - plain).abs() <= 1.001 * bound + 1e-5).all()
    assert (found - plain).abs().max() > 1e-4 * bound.max()  # the bound is of the errors' size, and there are some


def test_the_weight_is_widened_a_tile_at_a_time(monkeypatch):
    """The largest float tensor has the size of the buffer or of a gradient that is wanted, never of the weight."""
    from distilbeam.kernels.linear_distillation import chunked

    rows, features, classes, k = 64, 128, 20_000, 4
    monkeypatch.setattr(chunked, "BUFFER_ELEMENTS", 1 << 18)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator).requires_grad_()
    weight = quantize_rowwise(torch.randn(classes, features, generator=generator), torch.int8)
    kept = torch.randn(rows, k, generator=generator).log_softmax(1) - 1
    labels = TopKLabels(kept, torch.arange(rows * k).reshape(rows, k) % classes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_distill_loss(hidden, weight, None, labels, objective="tail", precision="int8").backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::"))
    assert largest < 4 * classes * features / 4


def test_the_table_rounds_nothing_where_nothing_is_known_to_pay(make_labels, rng, monkeypatch):
    operands, labels = layer(rng), make_labels("top_k", ROWS, CLASSES)
    chosen, why = loss_precision(ROWS, FEATURES, CLASSES, torch.device("cpu"))
    assert chosen is None
    assert "no fp8 layer is known to pay on cpu; no int8 layer is known to pay on cpu" in why
    assert loss_precision(8192, 4096, 128_256, torch.device("cuda"))[0] is None
    own = linear_distill_loss(*operands, labels, objective="tail")
    assert torch.equal(linear_distill_loss(*operands, labels, objective="tail", precision="table"), own)
    monkeypatch.setattr(narrowing, "why_not", lambda form, *_: None if form == "int8" else "no")
    assert loss_precision(ROWS, FEATURES, CLASSES, torch.device("cpu"))[0] == "int8"
    chosen = linear_distill_loss(*operands, labels, objective="tail", precision="table")
    assert torch.equal(chosen, linear_distill_loss(*operands, labels, objective="tail", precision="int8"))
    assert not torch.equal(chosen, own)
    assert torch.equal(
        linear_distill_loss(*operands, labels, objective="tail"), own
    )  # None never rounds, whatever the table says


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch(form):
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    for labels in (HardLabels(torch.empty(0, dtype=torch.long)), DenseLabels(torch.empty(0, 5))):
        loss = linear_distill_loss(hidden, weight, None, labels, precision=form)
        assert float(loss.detach()) == 0
        assert torch.autograd.grad(loss, weight)[0].abs().max() == 0


def test_each_mistake_is_named(make_labels):
    labels, x, w = make_labels("top_k", 2, CLASSES), torch.zeros(2, 3), torch.zeros(CLASSES, 3)
    with pytest.raises(ValueError, match="precision must be one of bf16, fp8, int8, table or None, got 'int4'"):
        linear_distill_loss(x, w, None, labels, precision="int4")
    with pytest.raises(ValueError, match="precision must be 'int8' because weight is given in it, got None"):
        linear_distill_loss(x, quantize_rowwise(w, torch.int8), None, labels)
    with pytest.raises(ValueError, match="precision must be 'fp8' because hidden is given in it, got 'int8'"):
        linear_distill_loss(quantize_rowwise(x, torch.float8_e4m3fn), w, None, labels, precision="int8")
    with pytest.raises(ValueError, match=r"weight must be rows of torch.int8 or torch.float8_e4m3fn, got fp8-e5m2"):
        linear_distill_loss(x, quantize_rowwise(w, torch.float8_e5m2), None, labels, precision="fp8")
    with pytest.raises(ValueError, match="'bf16' rounds floats of at most 32 bits, hidden is float64"):
        linear_distill_loss(x.double(), w, None, labels, precision="bf16")
    with pytest.raises(ValueError, match=r"hidden must be floating \[examples, features\], got torch.int64"):
        linear_distill_loss(x.long(), w, None, labels)
    assert isinstance(quantize_rowwise(w, torch.int8), QuantizedRows)
