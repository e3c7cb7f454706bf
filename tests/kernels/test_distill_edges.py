"""distill_loss at its edges: masks, padding, saturation, nothing at all, and every message."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import DenseLabels, HardLabels, SampledLabels, TopKLabels, distill_loss
from distilbeam.kernels.distillation.shapes import ODD

ROWS, CLASSES = 7, 11


def extra_of(objective, mixing):
    slam = {"accuracy": 0.75, "candidates": 3, "mixing": mixing}
    return {"objective": objective, **(slam if objective == "slam" else {})}


def value_and_gradient(logits, labels, **options):
    leaf = logits.detach().clone().requires_grad_()
    value = distill_loss(leaf, labels, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def narrowed(labels, classes):
    """The same teacher for a network with more, non-existent, classes."""
    if not isinstance(labels, DenseLabels):
        return labels
    return DenseLabels(torch.nn.functional.pad(labels.logprobs, (0, classes), value=-torch.inf))


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("objective", ["truncated_kl", "tail", "renormalised", "reverse_kl", "jsd", "tv"])
def test_odd_shapes_in_float32_are_within_rounding_of_float64(implementation, objective, shape, rng):
    rows, classes, k = shape
    top = torch.randn(rows, classes, generator=rng, dtype=torch.float64).log_softmax(1).topk(k, dim=1)
    labels, logits = TopKLabels(top.values, top.indices), torch.randn(rows, classes, generator=rng)
    options = {"objective": objective, "temperature": 2.0}
    value, slope = value_and_gradient(logits, labels, implementation=implementation, **options)
    exact, true_slope = value_and_gradient(logits.double(), labels, implementation="reference", **options)
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), true_slope, rtol=1e-5, atol=2e-7)


def test_one_row_with_a_vanishing_bucket_changes_no_other(rng):
    """The softmax over all classes loses such a bucket, so the whole batch is computed in the other way."""
    logits = torch.randn(5, 40, generator=rng)
    top = torch.randn(5, 40, generator=rng).log_softmax(1).topk(3, dim=1)
    labels = TopKLabels(top.values, top.indices)
    one = logits.clone()
    one[2].scatter_(0, top.indices[2], 90.0)  # the rest of this row has a probability of e^-90
    options = {"objective": "tail", "reduction": "none", "implementation": "chunked"}
    leaf = one.clone().requires_grad_()
    found = distill_loss(leaf, labels, **options)
    exact = distill_loss(one.double(), labels, **{**options, "implementation": "reference"})
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=1e-6)
    slope = torch.autograd.grad(found.sum(), leaf)[0]
    assert float(slope[2].scatter(0, top.indices[2], 0).sum()) == pytest.approx(
        -float(labels_tail(labels)[2]), rel=1e-4
    )
    others = distill_loss(logits, labels, **options)
    keep = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(found.detach()[keep], others[keep], rtol=1e-5, atol=1e-6)


def labels_tail(labels):
    return 1 - labels.logprobs.exp().sum(dim=1)


def test_shifting_a_row_changes_nothing(implementation, setting, make_labels, rng):
    objective, kind, mixing = setting
    labels = make_labels(kind, ROWS, CLASSES)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    shift = 30 * torch.randn(ROWS, 1, generator=rng, dtype=torch.float64)
    options = {**extra_of(objective, mixing), "temperature": 1.7, "implementation": implementation}
    value, slope = value_and_gradient(logits, labels, **options)
    shifted_value, shifted_slope = value_and_gradient(logits + shift, labels, **options)
    torch.testing.assert_close(value, shifted_value)
    torch.testing.assert_close(slope, shifted_slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope.sum(1), torch.zeros(ROWS, dtype=torch.float64), atol=1e-12, rtol=0)


def test_padded_classes_are_absent_classes(implementation, setting, make_labels, rng):
    objective, kind, mixing = setting
    labels = make_labels(kind, ROWS, CLASSES)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    padded = torch.nn.functional.pad(logits, (0, 5), value=-torch.inf)
    options = {**extra_of(objective, mixing), "temperature": 2.0, "implementation": implementation}
    value, slope = value_and_gradient(logits, labels, **options)
    padded_value, padded_slope = value_and_gradient(padded, narrowed(labels, 5), **options)
    torch.testing.assert_close(padded_value, value)
    torch.testing.assert_close(padded_slope[:, :CLASSES], slope)
    assert padded_slope[:, CLASSES:].abs().max() == 0


def test_an_empty_rest_takes_no_target(implementation, rng):
    teacher = torch.randn(3, 4, generator=rng, dtype=torch.float64).log_softmax(1)
    top = teacher.topk(4, dim=1)
    logits = torch.nn.functional.pad(torch.randn(3, 4, generator=rng, dtype=torch.float64), (0, 2), value=-torch.inf)
    labels = TopKLabels(top.values, top.indices, torch.full((3,), -30.0, dtype=torch.float64))
    value, slope = value_and_gradient(logits, labels, objective="tail", implementation=implementation)
    dense, dense_slope = value_and_gradient(logits[:, :4], DenseLabels(teacher), implementation="reference")
    torch.testing.assert_close(value, dense)
    torch.testing.assert_close(slope[:, :4], dense_slope)
    assert slope[:, 4:].abs().max() == 0


def test_rows_that_do_not_count_are_never_touched(implementation, setting, make_labels, rng):
    objective, kind, mixing = setting
    labels = make_labels(kind, ROWS, CLASSES)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, False, True, True])
    options = {**extra_of(objective, mixing), "implementation": implementation}
    poisoned = logits.masked_fill(~mask[:, None], torch.nan)
    value, slope = value_and_gradient(poisoned, labels, mask=mask, **options)
    rows, _ = value_and_gradient(logits, labels, mask=mask, **{**options, "reduction": "sum"})
    torch.testing.assert_close(value, rows / 5)
    assert slope[~mask].abs().max() == 0
    assert slope[mask].abs().max() > 0


def test_nothing_that_counts_gives_zero(implementation, setting, make_labels):
    objective, kind, mixing = setting
    labels = make_labels(kind, ROWS, CLASSES)
    options = {**extra_of(objective, mixing), "implementation": implementation}
    logits = torch.full((ROWS, CLASSES), torch.nan)
    value, slope = value_and_gradient(logits, labels, mask=torch.zeros(ROWS, dtype=torch.bool), **options)
    assert float(value) == 0
    assert slope.abs().max() == 0


def test_an_empty_batch_gives_zero(implementation, setting, make_labels):
    objective, kind, mixing = setting
    labels = make_labels(kind, 0, CLASSES)
    options = {**extra_of(objective, mixing), "implementation": implementation}
    value, slope = value_and_gradient(torch.empty(0, CLASSES), labels, **options)
    assert float(value) == 0
    assert slope.shape == (0, CLASSES)
    assert distill_loss(torch.empty(0, CLASSES), labels, reduction="none", **options).shape == (0,)


def test_saturated_logits_stay_finite_and_exact(implementation, setting, make_labels):
    objective, kind, mixing = setting
    labels = make_labels(kind, ROWS, CLASSES)
    options = {**extra_of(objective, mixing), "implementation": implementation}
    logits = torch.zeros(ROWS, CLASSES)
    logits[:, 0], logits[:, 1] = 500.0, -500.0
    value, slope = value_and_gradient(logits, labels, **options)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(slope).all())
    exact, exact_slope = value_and_gradient(logits.double(), labels, **{**options, "implementation": "reference"})
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "classes", "k"), [(1, 2, 1), (3, 5, 5), (2, 257, 3), (65, 33, 17), (5, 1025, 64)])
def test_odd_shapes(implementation, rows, classes, k, rng):
    logits = torch.randn(rows, classes, generator=rng)
    top = torch.randn(rows, classes, generator=rng).log_softmax(1).topk(k, dim=1)
    labels = TopKLabels(top.values, top.indices)
    value, slope = value_and_gradient(logits, labels, objective="tail", implementation=implementation)
    exact, exact_slope = value_and_gradient(logits.double(), labels, objective="tail", implementation="reference")
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=2e-5, atol=1e-7)


def test_strides_and_storage_do_not_matter(implementation, make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    wide = torch.randn(2 * CLASSES, ROWS, generator=rng)
    logits = wide[::2].T
    assert not logits.is_contiguous()
    options = {"objective": "tail", "implementation": implementation}
    found, expected = (
        value_and_gradient(logits, labels, **options),
        value_and_gradient(logits.contiguous(), labels, **options),
    )
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_inputs_are_left_as_they_were(implementation, make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    logits = torch.randn(ROWS, CLASSES, generator=rng)
    before = logits.clone()
    copies = [x.clone() for x in (labels.logprobs, labels.classes, labels.tail_logmass)]
    value_and_gradient(logits, labels, objective="tail", implementation=implementation)
    distill_loss(logits, labels, objective="slam", accuracy=0.8, implementation=implementation)
    assert torch.equal(logits, before)
    assert all(
        torch.equal(a, b) for a, b in zip((labels.logprobs, labels.classes, labels.tail_logmass), copies, strict=True)
    )


def test_equal_distributions_have_no_loss_and_no_gradient(implementation, rng):
    teacher = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    top = teacher.log_softmax(1).topk(3, dim=1)
    for labels, objective in (
        (DenseLabels(teacher), "kl"),
        (TopKLabels(top.values, top.indices), "tail"),
        (TopKLabels(top.values, top.indices), "renormalised"),
    ):
        value, slope = value_and_gradient(
            teacher, labels, objective=objective, temperature=2.0, implementation=implementation
        )
        assert abs(float(value)) < 1e-12
        assert slope.abs().max() < 1e-12


def test_uniform_and_peaked_teachers(implementation):
    logits = torch.zeros(1, 4)
    uniform = DenseLabels(torch.full((1, 4), 0.25).log())
    peaked = DenseLabels(torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]))
    assert float(distill_loss(logits, uniform, implementation=implementation)) == pytest.approx(0, abs=1e-7)
    assert float(distill_loss(logits, peaked, implementation=implementation)) == pytest.approx(1.386294, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"objective": "KL"},
            "objective must be one of kl, ce, tail, truncated_kl, renormalised, sampled, slam, reverse_kl, jsd, .*tv, got 'KL'",
        ),
        ({"mixing": "none"}, "mixing must be one of plain, normalised, forward, got 'none'"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"hard_share": 1.5}, "hard_share must be between 0 and 1, got 1.5"),
        ({"objective": "slam"}, "objective 'slam' needs accuracy"),
        ({"objective": "sampled"}, "objective 'sampled' needs sampled labels, got top-k labels: use 'tail'"),
        ({"weight": torch.ones(3)}, r"weight must have one value per row, \[2\], got \[3\]"),
        ({"mask": torch.ones(2, 1)}, r"mask must have one value per row, \[2\], got \[2, 1\]"),
        (
            {"objective": "tail", "hard": torch.tensor([1, 5])},
            "classes of the labels must be below the 3 classes of the logits, got 5",
        ),
        (
            {"objective": "slam", "accuracy": torch.ones(3)},
            r"accuracy must be a number or have one value per row, \[2\], got \[3\]",
        ),
        (
            {"implementation": "chuncked"},
            "implementation of distill_loss must be one of .*chunked.* or None, got 'chuncked'; did you mean 'chunked'",
        ),
    ],
)
def test_each_mistake_is_named(change, message):
    labels = TopKLabels(torch.full((2, 2), 0.25).log(), torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match=message):
        distill_loss(torch.zeros(2, 3), labels, **change)


def test_mistakes_in_the_labels_are_named():
    half = torch.full((2, 2), 0.25).log()
    for labels, message in (
        (lambda: DenseLabels(half), "dense labels must have the 3 classes of the logits, got 2"),
        (lambda: DenseLabels(half[:1]), "labels must have the 2 rows of the batch, got 1"),
        (lambda: DenseLabels(half[0]), "logprobs must be floating with 2 dimensions"),
        (lambda: TopKLabels(half, torch.tensor([[0, 1], [1, 3]])), "below the 3 classes of the logits, got 3"),
        (lambda: TopKLabels(half, torch.zeros(2, 2)), "classes must be integers of the shape of logprobs"),
        (lambda: TopKLabels(half, torch.zeros(2, 2).long(), half), r"tail_logmass must have one value per row, \[2\]"),
        (lambda: TopKLabels(*(2 * [torch.zeros(2, 4)])[:1], torch.zeros(2, 4).long()), "at most the 3 classes"),
        (lambda: HardLabels(torch.zeros(2)), r"hard labels must be integers of shape \[B\]"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_loss(torch.zeros(2, 3), labels())
    with pytest.raises(ValueError, match="sampled labels have none: use 'sampled'"):
        distill_loss(torch.zeros(2, 3), SampledLabels(half, torch.tensor([[0, 1], [1, 2]])), objective="tail")
    with pytest.raises(ValueError, match=r"logits must be floating \[examples, classes\], got torch.int64 \[3\]"):
        distill_loss(torch.zeros(3).long(), DenseLabels(half))
