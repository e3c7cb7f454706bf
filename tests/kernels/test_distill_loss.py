"""Values and gradients of distill_loss: the published vectors, an oracle in probabilities, and identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distilbeam.kernels import DenseLabels, HardLabels, SampledLabels, TopKLabels, distill_loss

ROWS, CLASSES = 7, 11


def options(objective, mixing, rng):
    if objective != "slam":
        return {"objective": objective}
    accuracy = 0.3 + 0.7 * torch.rand(ROWS, generator=rng, dtype=torch.float64)
    return {
        "objective": "slam",
        "mixing": mixing,
        "accuracy": accuracy,
        "candidates": torch.tensor([1, 2, 3, 4, 2, 3, 2]),
    }


def gradient(loss, *tensors):
    return torch.autograd.grad(loss, tensors)[0] if len(tensors) == 1 else torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize(
    ("candidates", "mixing", "loss"),
    [
        (2, "normalised", 1.060392),
        (3, "normalised", 1.363542),
        (3, "plain", 1.024724),
        (4, "normalised", 1.470267),
        (4, "plain", 0.945702),
    ],
)
def test_student_label_mixing_gives_the_published_values(implementation, candidates, mixing, loss):
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    teacher = torch.tensor([[0.1, 0.6, 0.25, 0.05]]).log()
    value = distill_loss(
        logits,
        DenseLabels(teacher),
        objective="slam",
        accuracy=0.7,
        candidates=candidates,
        mixing=mixing,
        implementation=implementation,
    )
    assert float(value) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("normalised", [0.172455, -0.158982, -0.010905, -0.002568]),
        ("plain", [0.094474, -0.072526, 0.001158, -0.023105]),
    ],
)
def test_student_label_mixing_gives_the_published_gradients(implementation, mixing, expected):
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().requires_grad_()
    teacher = DenseLabels(torch.tensor([[0.1, 0.6, 0.25, 0.05]]).log())
    value = distill_loss(
        logits,
        teacher,
        objective="slam",
        accuracy=0.7,
        candidates=3,
        mixing=mixing,
        implementation=implementation,
    )
    torch.testing.assert_close(gradient(value, logits)[0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_values_and_gradients_agree_with_the_oracle(implementation, setting, temperature, make_labels, oracle, rng):
    objective, kind, mixing = setting
    labels, extra = make_labels(kind, ROWS, CLASSES), options(objective, mixing, rng)
    logits = 2 * torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)

    def expected(z):
        arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
        return oracle(z, labels, temperature=temperature, **arrays)

    leaf = logits.clone().requires_grad_()
    rows = distill_loss(leaf, labels, temperature=temperature, reduction="none", implementation=implementation, **extra)
    np.testing.assert_allclose(rows.detach(), expected(logits.numpy()), rtol=1e-9, atol=1e-12)

    upstream = torch.randn(ROWS, generator=rng, dtype=torch.float64)
    found = gradient((rows * upstream).sum(), leaf)
    step, difference = 1e-6, torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    for j in range(CLASSES):  # rows do not touch each other, so a column is nudged in all of them at once
        nudge = torch.zeros(CLASSES, dtype=torch.float64)
        nudge[j] = step
        difference[:, j] = torch.from_numpy(
            (expected((logits + nudge).numpy()) - expected((logits - nudge).numpy())) / (2 * step)
        )
    torch.testing.assert_close(found, difference * upstream[:, None], atol=2e-8, rtol=1e-6)


def test_the_reference_passes_gradcheck_to_second_order(setting, make_labels, rng):
    objective, kind, mixing = setting
    labels, extra = make_labels(kind, ROWS, CLASSES), options(objective, mixing, rng)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()

    def loss(z):
        return distill_loss(z, labels, temperature=1.5, implementation="reference", **extra)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_cost_no_more_than_the_naive_formula(implementation, dtype, rng):
    rows, classes, k = 33, 1003, 16
    teacher = (3 * torch.randn(rows, classes, generator=rng)).log_softmax(1)
    top = teacher.topk(k, dim=1)
    labels = TopKLabels(top.values, top.indices)
    logits = (3 * torch.randn(rows, classes, generator=rng)).to(dtype)

    def naive(z):
        kept = z.log_softmax(1).gather(1, top.indices)
        t, rest = top.values.to(z.dtype), torch.log1p(-top.values.exp().sum(1)).to(z.dtype)
        student_rest = torch.log((1 - kept.exp().sum(1)).clamp(min=1e-7))
        return ((t.exp() * (t - kept)).sum(1) + rest.exp() * (rest - student_rest)).mean()

    exact_leaf, leaf, naive_leaf = (logits.to(d).requires_grad_() for d in (torch.float64, dtype, dtype))
    exact = distill_loss(
        exact_leaf, TopKLabels(top.values.double(), top.indices), objective="tail", implementation="reference"
    )
    found = distill_loss(leaf, labels, objective="tail", implementation=implementation)
    plain = naive(naive_leaf)
    assert found.dtype == torch.float32
    assert abs(found.item() - exact.item()) <= abs(plain.item() - exact.item()) + 2e-6
    true_gradient = gradient(exact, exact_leaf)
    rounding = (true_gradient.to(dtype).double() - true_gradient).abs().max()
    error = (gradient(found, leaf).double() - true_gradient).abs().max()
    naive_error = (gradient(plain, naive_leaf).double() - true_gradient).abs().max()
    assert error <= naive_error + rounding + 1e-8


@pytest.mark.parametrize("objective", ["kl", "tail", "truncated_kl", "renormalised", "sampled", "slam", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_keeping_every_class_equals_the_dense_loss(implementation, objective, temperature, rng):
    teacher = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).log_softmax(1)
    top = teacher.topk(CLASSES, dim=1)
    sparse = (
        SampledLabels(top.values, top.indices)
        if objective == "sampled"
        else TopKLabels(top.values, top.indices, torch.full((ROWS,), -16.1, dtype=torch.float64))
    )
    dense_objective = objective if objective in ("slam", "ce") else "kl"
    extra = {"accuracy": 0.8, "candidates": 3} if objective == "slam" else {}
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = distill_loss(
        a, sparse, objective=objective, temperature=temperature, implementation=implementation, **extra
    )
    dense = distill_loss(
        b,
        DenseLabels(teacher),
        objective=dense_objective,
        temperature=temperature,
        implementation="reference",
        **extra,
    )
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(found, a), gradient(dense, b), rtol=1e-10, atol=1e-14)


def test_temperature_squared_is_in_value_and_gradient(implementation, rng):
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    T = 4.0
    loss = distill_loss(logits, DenseLabels(teacher), temperature=T, implementation=implementation)
    f, y = (logits.detach() / T).softmax(1), (teacher / T).softmax(1)
    assert loss.item() == pytest.approx(float(T**2 * (y * (y.log() - f.log())).sum(1).mean()), rel=1e-12)
    torch.testing.assert_close(gradient(loss, logits), T * (f - y) / ROWS)


def test_the_tail_gradient_is_the_difference_of_probabilities_on_kept_classes(implementation, rng):
    logits = torch.randn(1, 50, generator=rng, dtype=torch.float64).requires_grad_()
    top = torch.randn(1, 50, generator=rng, dtype=torch.float64).log_softmax(1).topk(5, dim=1)
    loss = distill_loss(logits, TopKLabels(top.values, top.indices), objective="tail", implementation=implementation)
    found = gradient(loss, logits).gather(1, top.indices)
    torch.testing.assert_close(found, logits.detach().softmax(1).gather(1, top.indices) - top.values.exp())


def test_a_truncated_target_pulls_towards_its_normalised_self_and_the_tail_does_not():
    top = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64).log().topk(2, dim=1)
    labels = TopKLabels(top.values, top.indices)
    for objective, expected in (("truncated_kl", [5 / 7, 2 / 7]), ("tail", [0.5, 0.2])):
        logits = torch.zeros(1, 4, dtype=torch.float64).requires_grad_()
        for _ in range(700):
            (slope,) = torch.autograd.grad(distill_loss(logits, labels, objective=objective), logits)
            logits = (logits - 3 * slope).detach().requires_grad_()
        kept = logits.softmax(1).gather(1, top.indices)[0]
        torch.testing.assert_close(kept, torch.tensor(expected, dtype=torch.float64), atol=2e-3, rtol=0)


def test_sampled_labels_have_the_gradient_of_the_dense_loss_on_average():
    draws, repeats, classes = 50, 400, 30
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(classes, generator=generator, dtype=torch.float64).softmax(0)
    logits = torch.randn(1, classes, generator=generator, dtype=torch.float64).expand(repeats, -1)
    torch.manual_seed(0)
    counts = torch.distributions.Multinomial(draws, p).sample((repeats,))
    order = counts.argsort(dim=1, descending=True)
    kept = counts.gather(1, order)
    labels = SampledLabels((kept / draws).log(), torch.where(kept > 0, order, -1))
    leaf = logits.clone().requires_grad_()
    found = gradient(distill_loss(leaf, labels, objective="sampled", reduction="sum"), leaf)
    exact = logits[0].softmax(0) - p
    # the mean of repeats x draws independent indicators: six standard errors, 30 classes, failure below 1e-7
    bound = 6 * (p * (1 - p) / (repeats * draws)).sqrt()
    assert bool(((found.mean(0) - exact).abs() <= bound).all())


@pytest.mark.parametrize("mixing", ["plain", "normalised", "forward"])
def test_an_infallible_teacher_makes_mixing_plain_distillation(implementation, mixing, rng):
    teacher = DenseLabels(torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64))
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    logits[0, 0] += 60  # a student that is confidently wrong still learns
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mixed = distill_loss(
        a,
        teacher,
        objective="slam",
        accuracy=1.0,
        candidates=3,
        mixing=mixing,
        implementation=implementation,
    )
    plain = distill_loss(b, teacher, objective="ce", implementation="reference")
    torch.testing.assert_close(mixed, plain)
    torch.testing.assert_close(gradient(mixed, a), gradient(plain, b))


def test_normalised_mixing_is_the_expected_label_of_a_teacher_that_errs_among_its_candidates():
    """Closed form: with one-hot truth, mix(truth) is a on the true class and (1 - a)/(m - 1) on the other candidates."""
    a, m = 0.7, 3
    truth = torch.full((1, 4), -40.0, dtype=torch.float64)
    truth[0, 1] = 0
    expected = torch.tensor([[0.15, 0.7, 0.15, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.2, 0.5, 0.29, 0.01]], dtype=torch.float64)  # its top 3 are classes 1, 2, 0
    found = distill_loss(truth, DenseLabels(teacher.log()), objective="slam", accuracy=a, candidates=m)
    by_hand = -(teacher[:, :3] * expected[:, :3].log()).sum() - teacher[0, 3] * (np.log(a) - 40)
    assert found.item() == pytest.approx(float(by_hand), rel=1e-9)


def test_hard_labels_are_cross_entropy_at_temperature_one(implementation, rng):
    logits = torch.randn(ROWS, CLASSES, generator=rng).requires_grad_()
    classes = torch.tensor([0, 3, -100, 10, 5, -100, 1])
    found = distill_loss(logits, classes, temperature=5.0, objective="slam", implementation=implementation)
    other = logits.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(other, classes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, other))


def test_true_classes_mix_in_by_their_share_where_they_are_known(implementation, make_labels, rng):
    labels = make_labels("top_k", ROWS, CLASSES)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()
    hard = torch.tensor([0, -100, 2, 3, -100, 5, 6])
    found = distill_loss(
        logits,
        labels,
        objective="tail",
        hard=hard,
        hard_share=0.3,
        reduction="none",
        implementation=implementation,
    )
    soft = distill_loss(logits, labels, objective="tail", reduction="none", implementation="reference")
    true = torch.nn.functional.cross_entropy(logits, hard, reduction="none")
    expected = torch.where(hard >= 0, 0.7 * soft + 0.3 * true, soft)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(ROWS, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(gradient(found @ upstream, logits), gradient(expected @ upstream, logits))


def test_weights_multiply_value_and_gradient_and_the_mean_divides_by_rows(implementation, setting, make_labels, rng):
    objective, kind, mixing = setting
    labels, extra = make_labels(kind, ROWS, CLASSES), options(objective, mixing, rng)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()
    weight = torch.rand(ROWS, generator=rng, dtype=torch.float64)
    rows = distill_loss(logits, labels, reduction="none", implementation="reference", **extra)
    for reduction, divisor, keywords in (
        ("mean", ROWS, {}),
        ("sum", 1, {}),
        ("mean", 40, {"normalizer": 40}),
    ):
        found = distill_loss(
            logits,
            labels,
            weight=weight,
            reduction=reduction,
            implementation=implementation,
            **keywords,
            **extra,
        )
        expected = rows @ weight / divisor
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(-2.5 * found, logits), gradient(-2.5 * rows @ weight / divisor, logits))
        rows = distill_loss(logits, labels, reduction="none", implementation="reference", **extra)


def test_a_plain_tensor_of_log_probabilities_or_of_classes_is_a_label():
    logits = torch.tensor([[1.0, 0.0]])
    assert float(distill_loss(logits, torch.tensor([[0.5, 0.5]]).log())) == pytest.approx(0.120115, abs=1e-6)
    assert float(distill_loss(logits, torch.tensor([0]))) == pytest.approx(0.313262, abs=1e-6)
    assert float(distill_loss(logits, HardLabels(torch.tensor([1])))) == pytest.approx(1.313262, abs=1e-6)
