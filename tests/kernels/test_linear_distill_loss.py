"""linear_distill_loss: the same loss and gradients as a linear layer followed by the definition."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import DenseLabels, TopKLabels, distill_loss, linear_distill_loss
from distilbeam.kernels.linear_distillation import chunked
from distilbeam.kernels.linear_distillation.shapes import ODD

ROWS, FEATURES, CLASSES = 7, 5, 130
ORDERS = {"by rows": (1, 3 * CLASSES), "by classes": (10**9, 4 * CLASSES)}


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """Force one order of the sweep, in several blocks of odd sizes."""
    fewest, elements = ORDERS[request.param]
    monkeypatch.setattr(chunked, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(chunked, "BUFFER_ELEMENTS", elements)
    return request.param


def layer(rng, dtype=torch.float64):
    shapes = (ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def options_of(objective, mixing, rng):
    slam = {"accuracy": 0.8, "candidates": 3, "mixing": mixing}
    return {
        "objective": objective,
        "temperature": 1.7,
        "example_weight": torch.rand(ROWS, generator=rng, dtype=torch.float64),
        **(slam if objective == "slam" else {}),
    }


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("order")
def test_values_and_gradients_are_those_of_the_two_steps(setting, reduction, make_labels, rng):
    objective, kind, mixing = setting
    labels, options = make_labels(kind, ROWS, CLASSES), options_of(objective, mixing, rng)
    hidden, weight, bias = layer(rng)
    upstream = torch.randn((ROWS,) if reduction == "none" else (), generator=rng, dtype=torch.float64)
    found = linear_distill_loss(hidden, weight, bias, labels, reduction=reduction, implementation="chunked", **options)
    two = {**options, "weight": options["example_weight"], "reduction": reduction, "implementation": "reference"}
    del two["example_weight"]
    expected = distill_loss(hidden @ weight.T + bias, labels, **two)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight, bias), upstream),
        torch.autograd.grad(expected, (hidden, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes_in_float32_are_within_rounding_of_float64(shape, rng):
    rows, features, classes, k = shape
    operands = [torch.randn(size, features, generator=rng) for size in (rows, classes)]
    top = torch.randn(rows, classes, generator=rng, dtype=torch.float64).log_softmax(1).topk(k, dim=1)
    labels = TopKLabels(top.values, top.indices)
    exact = [x.double().requires_grad_() for x in operands]
    leaves = [x.requires_grad_() for x in operands]
    found = linear_distill_loss(*leaves, None, labels, objective="tail")
    truth = linear_distill_loss(*exact, None, labels, objective="tail", implementation="reference")
    assert found.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-6)
    for slope, true in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(slope.double(), true, rtol=1e-4, atol=2e-6)


@pytest.mark.usefixtures("order")
def test_masked_rows_may_hold_anything(make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    hidden, weight, bias = layer(rng)
    mask = torch.tensor([True, False, True, True, True, False, True])
    hard = torch.tensor([1, 2, -100, 4, -100, 6, 7])
    poisoned = hidden.detach().masked_fill(~mask[:, None], torch.nan).requires_grad_()
    options = {"objective": "tail", "mask": mask, "hard": hard}
    found = linear_distill_loss(poisoned, weight, bias, labels, implementation="chunked", **options)
    expected = linear_distill_loss(hidden, weight, bias, labels, implementation="reference", **options)
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(found, (poisoned, weight, bias))
    for a, b in zip(slopes, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)
    rows = linear_distill_loss(poisoned, weight, bias, labels, reduction="none", implementation="chunked", **options)
    assert rows.shape == (ROWS,)
    assert rows[~mask].abs().max() == 0


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.usefixtures("order")
def test_a_bias_of_minus_infinity_removes_a_class(implementation, make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    hidden, weight, bias = layer(rng)
    wide = torch.cat([weight.detach(), torch.randn(9, FEATURES, generator=rng, dtype=torch.float64)]).requires_grad_()
    padded = torch.nn.functional.pad(bias.detach(), (0, 9), value=-torch.inf)
    found = linear_distill_loss(hidden, wide, padded, labels, objective="tail", implementation=implementation)
    expected = linear_distill_loss(hidden, weight, bias, labels, objective="tail", implementation="reference")
    torch.testing.assert_close(found, expected)
    slope = torch.autograd.grad(found, wide)[0]
    torch.testing.assert_close(slope[:CLASSES], torch.autograd.grad(expected, weight)[0])
    assert slope[CLASSES:].abs().max() == 0


@pytest.mark.usefixtures("order")
def test_bfloat16_layers_accumulate_in_float32(make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    hidden, weight, bias = layer(rng, torch.bfloat16)
    found = linear_distill_loss(hidden, weight, bias, labels, objective="tail", implementation="chunked")
    exact_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    exact = linear_distill_loss(*exact_leaves, labels, objective="tail", implementation="reference")
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    naive_leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    naive = distill_loss(torch.nn.functional.linear(*naive_leaves), labels, objective="tail")
    for a, b, c in zip(
        torch.autograd.grad(found, (hidden, weight, bias)),
        torch.autograd.grad(exact, exact_leaves),
        torch.autograd.grad(naive, naive_leaves),
        strict=True,
    ):
        assert a.dtype == torch.bfloat16
        rounding = (b.bfloat16().double() - b).abs().max()
        assert (a.double() - b).abs().max() <= (c.double() - b).abs().max() + rounding


@pytest.mark.usefixtures("order")
def test_no_bias_frozen_parts_and_an_empty_batch(make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    hidden, weight, _ = layer(rng)
    found = linear_distill_loss(hidden, weight.detach(), None, labels, objective="tail", implementation="chunked")
    expected = linear_distill_loss(hidden, weight, None, labels, objective="tail", implementation="reference")
    torch.testing.assert_close(
        torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, hidden)[0], rtol=1e-9, atol=1e-12
    )
    empty = linear_distill_loss(
        hidden[:0], weight, None, make_labels("top_k", 0, CLASSES), objective="tail", implementation="chunked"
    )
    slopes = torch.autograd.grad(empty, (hidden, weight))
    assert float(empty.detach()) == 0
    assert all(slope.abs().max() == 0 for slope in slopes)


def test_gradients_of_the_result_are_scaled_by_what_comes_from_above(make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    hidden, weight, bias = layer(rng)
    loss = linear_distill_loss(hidden, weight, bias, labels, objective="tail", implementation="chunked")
    one = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss * -3, weight)[0], -3 * one)


def test_the_logits_of_the_whole_batch_are_never_held(monkeypatch):
    """The largest tensor made has the size of the buffer, far below examples x classes."""
    rows, features, classes, k = 512, 8, 40_000, 4
    monkeypatch.setattr(chunked, "BUFFER_ELEMENTS", 1 << 19)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator).requires_grad_()
    weight = torch.randn(classes, features, generator=generator).requires_grad_()
    kept = torch.randn(rows, k, generator=generator).log_softmax(1) - 1
    labels = TopKLabels(kept, torch.arange(rows * k).reshape(rows, k) % classes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_distill_loss(hidden, weight, None, labels, objective="tail", implementation="chunked").backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty"))
    assert largest <= 4 * max(1 << 19, classes * features)
    assert largest < 4 * rows * classes / 20


@pytest.mark.parametrize(
    ("classes", "rows"), [(1, 1 << 22), (100, 41_920), (32_000, 128), (65_536, 64), (128_256, 64), (262_144, 32)]
)
def test_the_buffer_holds_rows_enough_for_a_product(classes, rows):
    """16 MiB of logits; where that are few rows, up to 64 in 32 MiB, and never fewer than a sweep by rows needs."""
    assert chunked.rows_at_once(classes) == rows >= chunked.FEWEST_ROWS
    assert chunked.rows_at_once(262_145) < chunked.FEWEST_ROWS


def test_each_mistake_is_named(make_labels):
    labels = make_labels("top_k", 2, CLASSES)
    hidden, weight = torch.zeros(2, 3), torch.zeros(CLASSES, 3)
    with pytest.raises(ValueError, match=r"weight must be \[classes, 3\] to fit hidden, got \[130, 4\]"):
        linear_distill_loss(hidden, torch.zeros(CLASSES, 4), None, labels)
    with pytest.raises(ValueError, match=r"bias must have one value per class, \[130\], got \[3\]"):
        linear_distill_loss(hidden, weight, torch.zeros(3), labels)
    with pytest.raises(ValueError, match=r"hidden must be floating \[examples, features\]"):
        linear_distill_loss(hidden[0], weight, None, labels)
    with pytest.raises(ValueError, match="dense labels must have the 130 classes of the logits, got 4"):
        linear_distill_loss(hidden, weight, None, DenseLabels(torch.zeros(2, 4)))
