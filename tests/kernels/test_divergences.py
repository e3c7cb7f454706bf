"""The divergences besides forward KL: fixed points, whole-softmax autograd, bounds, direction, limits, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from distilbeam.kernels import DenseLabels, SampledLabels, TopKLabels, distill_loss, linear_distill_loss
from distilbeam.kernels.linear_distillation import chunked

OTHERS = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv")
BUCKETED = ("tail", *OTHERS)
ROWS, FEATURES, CLASSES, KEPT = 6, 5, 40, 7
BETA, ALPHA = 0.3, 0.2
MIXED = {"beta": BETA, "alpha": ALPHA}


def kl(a, b):
    """sum a log(a / b), with 0 log 0 = 0."""
    return torch.xlogy(a, a / b).sum(-1)


FORMULAS = {  # of the teacher's p and the student's q over the same buckets, as the papers write them
    "tail": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: BETA * kl(p, BETA * p + (1 - BETA) * q) + (1 - BETA) * kl(q, BETA * p + (1 - BETA) * q),
    "skew_kl": lambda p, q: kl(p, ALPHA * p + (1 - ALPHA) * q),
    "skew_reverse_kl": lambda p, q: kl(q, (1 - ALPHA) * p + ALPHA * q),
    "tv": lambda p, q: (p - q).abs().sum(-1) / 2,
}


def tempered(p, temperature):
    powers = p ** (1 / temperature)
    return powers / powers.sum(-1, keepdim=True)


def through_the_whole_softmax(logits, teacher, classes, objective, temperature):
    """Losses of rows: every class's probability, added up to buckets, tempered, compared; differentiated by autograd."""

    def buckets(whole):
        kept = whole.gather(1, classes)
        others = whole.scatter(1, classes, 0).sum(1, keepdim=True)
        return tempered(torch.cat([kept, others], 1) if classes.shape[1] < whole.shape[1] else kept, temperature)

    return temperature**2 * FORMULAS[objective](buckets(teacher), buckets(logits.softmax(1)))


def problem(rng, kept=KEPT, scale=2.0):
    teacher = (scale * torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)).softmax(1)
    top = teacher.topk(kept, dim=1)
    tail = torch.log1p(-top.values.sum(1)) if kept < CLASSES else None
    return teacher, TopKLabels(top.values.log(), top.indices, tail)


@pytest.mark.parametrize("objective", BUCKETED)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_values_and_gradients_are_those_of_autograd_through_the_whole_softmax(
    implementation, objective, temperature, rng
):
    teacher, labels = problem(rng)
    logits = 2 * torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options = {"objective": objective, "temperature": temperature, **MIXED}
    found = distill_loss(a, labels, reduction="none", implementation=implementation, **options)
    exact = through_the_whole_softmax(b, teacher, labels.classes, objective, temperature)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(ROWS, generator=rng, dtype=torch.float64)
    slopes = [torch.autograd.grad(x, leaf, upstream)[0] for x, leaf in ((found, a), (exact, b))]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("objective", OTHERS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_keeping_every_class_equals_the_dense_formula(implementation, objective, temperature, rng):
    teacher, labels = problem(rng, kept=CLASSES)
    options = {"objective": objective, "temperature": temperature, "implementation": implementation, **MIXED}
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    leaves = [logits.clone().requires_grad_() for _ in range(3)]
    exact = temperature**2 * FORMULAS[objective](tempered(teacher, temperature), (leaves[0] / temperature).softmax(1))
    every = torch.arange(CLASSES).expand(ROWS, -1)
    for leaf, label in zip(leaves[1:], (DenseLabels(teacher.log()), labels), strict=True):
        found = distill_loss(leaf, label, reduction="sum", **options)
        torch.testing.assert_close(found, exact.sum(), rtol=1e-12, atol=1e-14)
        slope, true = (
            torch.autograd.grad(found, leaf)[0],
            torch.autograd.grad(exact.sum(), leaves[0], retain_graph=True),
        )
        torch.testing.assert_close(slope, true[0], rtol=1e-11, atol=1e-14)
    assert torch.equal(labels.classes.sort(1).values, every)


def test_the_generalised_jensen_shannon_divergence_is_that_of_gkd(implementation, rng):
    """As its public trainers write it: log-probabilities, their mixture by logsumexp, and torch's kl_div."""
    teacher, labels = problem(rng, kept=CLASSES)
    student = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()
    log_q, log_p = student.log_softmax(1), teacher.log()
    mixture = torch.stack([log_q + math.log(1 - BETA), log_p + math.log(BETA)]).logsumexp(0)
    sums = [torch.nn.functional.kl_div(mixture, x, reduction="none", log_target=True).sum(1) for x in (log_p, log_q)]
    exact = (BETA * sums[0] + (1 - BETA) * sums[1]).mean()
    found = distill_loss(student, labels, objective="jsd", beta=BETA, implementation=implementation)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(exact, student)[0], rtol=1e-11, atol=1e-14
    )


@pytest.mark.parametrize("objective", BUCKETED)
def test_the_closed_forms_pass_gradcheck(objective, rng):
    _, labels = problem(rng)
    options = {"objective": objective, "temperature": 1.3, "implementation": "chunked", **MIXED}
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distill_loss(z, labels, **options), logits)
    shapes = (ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    layer = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, w, b: linear_distill_loss(x, w, b, labels, **options), layer)


@pytest.mark.parametrize("order", ["rows", "classes"])
@pytest.mark.parametrize("objective", OTHERS)
def test_the_fused_layer_has_the_gradients_of_the_whole_softmax(objective, order, rng, monkeypatch):
    monkeypatch.setattr(chunked, "FEWEST_ROWS", 1 if order == "rows" else 10**9)
    monkeypatch.setattr(chunked, "BUFFER_ELEMENTS", 3 * CLASSES)
    teacher, labels = problem(rng)
    shapes = (ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    layer = [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
    exact_layer = [x.detach().clone().requires_grad_() for x in layer]
    weight, mask = torch.rand(ROWS, generator=rng, dtype=torch.float64), torch.arange(ROWS) != 2
    hard = torch.tensor([1, -100, 3, 39, 5, -100])
    options = {"mask": mask, "hard": hard, "hard_share": 0.4, "normalizer": 9.0, "temperature": 1.7, **MIXED}
    found = linear_distill_loss(*layer, labels, objective=objective, example_weight=weight, **options)
    logits = torch.nn.functional.linear(*exact_layer)
    soft = through_the_whole_softmax(logits, teacher, labels.classes, objective, 1.7)
    true = torch.nn.functional.cross_entropy(logits, hard, reduction="none")
    share = 0.4 * (hard >= 0).double()
    exact = ((1 - share) * soft + share * true)[mask] @ weight[mask] / 9.0
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)
    for slope, best in zip(torch.autograd.grad(found, layer), torch.autograd.grad(exact, exact_layer), strict=True):
        torch.testing.assert_close(slope, best, rtol=1e-10, atol=1e-13)


def teacher_of_the_document():
    """1,024 classes, of which the best 16 have .426 of the mass."""
    generator = torch.Generator().manual_seed(1)
    kept = 0.426 * torch.randn(16, generator=generator, dtype=torch.float64).mul(0.5).softmax(0)
    others = 0.574 * torch.randn(1008, generator=generator, dtype=torch.float64).mul(0.5).softmax(0)
    p = torch.cat([kept, others])[None]
    top = p.topk(16, dim=1)
    assert float(top.values.sum()) == pytest.approx(0.426)
    return TopKLabels(top.values.log(), top.indices, torch.log1p(-top.values.sum(1)))


def kept_mass_of_free_logits(labels, objective):
    """Where a student goes that may become any distribution, from the uniform one."""
    z = torch.zeros(1, 1024, dtype=torch.float64, requires_grad=True)
    # steps of LBFGS; total variation, which has corners, goes down in small steps of a falling length
    smooth = objective != "tv"
    descent = torch.optim.LBFGS(
        [z], max_iter=400, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    small = torch.optim.Adam([z], lr=0.05)
    falling = torch.optim.lr_scheduler.ExponentialLR(small, 0.994)

    def loss():
        z.grad = None
        value = distill_loss(z, labels, objective=objective)
        value.backward()
        return value

    for _ in range(1 if smooth else 1500):
        (descent if smooth else small).step(loss)
        falling.step()
    return float(z.detach().softmax(1).gather(1, labels.classes).sum())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("objective", BUCKETED)
def test_with_the_tail_free_logits_find_the_teachers_mass(objective):
    assert kept_mass_of_free_logits(teacher_of_the_document(), objective) == pytest.approx(0.426, abs=2e-3)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_without_the_tail_they_do_not():
    """The truncated form takes all mass for the kept classes; renormalising both sides leaves it where it was, at 16 of 1,024."""
    labels = teacher_of_the_document()
    assert kept_mass_of_free_logits(labels, "truncated_kl") > 0.99
    assert kept_mass_of_free_logits(labels, "renormalised") == pytest.approx(0.015, abs=0.005)


def rows_of(p, q, objective, **options):
    return distill_loss(q.log(), DenseLabels(p.log()), objective=objective, reduction="none", **options)


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 20.0])
def test_bounds(implementation, sharpness, rng):
    p, q = (sharpness * torch.randn(2, 300, 6, generator=rng, dtype=torch.float64)).softmax(-1)
    for beta in (0.1, 0.5, 0.8):
        most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        found = rows_of(p, q, "jsd", beta=beta, implementation=implementation)
        assert bool(((found >= -1e-12) & (found <= most + 1e-12)).all())
    for alpha in (0.1, 0.5):
        for objective in ("skew_kl", "skew_reverse_kl"):
            found = rows_of(p, q, objective, alpha=alpha, implementation=implementation)
            assert bool(((found >= -1e-12) & (found <= -math.log(alpha) + 1e-12)).all())
    found = rows_of(p, q, "tv", implementation=implementation)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())


@pytest.mark.parametrize(
    ("objective", "bound"),
    [("jsd", math.log(2)), ("skew_kl", math.log(10)), ("skew_reverse_kl", math.log(10)), ("tv", 1.0)],
)
def test_distributions_that_share_nothing_reach_the_bound(implementation, objective, bound):
    p = torch.tensor([[1.0, 0.0, 0.0]])
    logits = torch.tensor([[-200.0, 0.0, -200.0]])
    found = distill_loss(logits, DenseLabels(p.log()), objective=objective, implementation=implementation)
    assert float(found) == pytest.approx(bound, rel=1e-6)


P, Q = (0.7, 0.2, 0.1), (0.2, 0.5, 0.3)


def by_hand(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mixed(share):
    return [share * x + (1 - share) * y for x, y in zip(P, Q, strict=True)]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("kl", by_hand(P, Q)),
        ("reverse_kl", by_hand(Q, P)),
        ("jsd", 0.25 * by_hand(P, mixed(0.25)) + 0.75 * by_hand(Q, mixed(0.25))),
        ("skew_kl", by_hand(P, mixed(0.4))),
        ("skew_reverse_kl", by_hand(Q, mixed(0.6))),
        ("tv", 0.5),
    ],
)
def test_the_direction_by_an_asymmetric_example(implementation, objective, expected):
    """P is the teacher's: KL(P, Q) is .583, KL(Q, P) .537, and no two of these figures are alike."""
    p, q = torch.tensor([P], dtype=torch.float64), torch.tensor([Q], dtype=torch.float64)
    found = rows_of(p, q, objective, beta=0.25, alpha=0.4, implementation=implementation)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert {round(by_hand(P, Q), 3), round(by_hand(Q, P), 3)} == {0.584, 0.537}


@pytest.mark.parametrize(
    ("objective", "setting", "limit"),
    [
        ("jsd", {"beta": 0.0}, "tail"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
        ("skew_kl", {"alpha": 0.0}, "tail"),
        ("skew_reverse_kl", {"alpha": 0.0}, "reverse_kl"),
    ],
)
def test_at_their_limits_they_are_the_two_kls(implementation, objective, setting, limit, rng):
    _, labels = problem(rng)
    z = torch.randn(ROWS, CLASSES, generator=rng)
    common = {"temperature": 1.4, "implementation": implementation}
    assert torch.equal(
        distill_loss(z, labels, objective=objective, **setting, **common),
        distill_loss(z, labels, objective=limit, **common),
    )


def test_near_their_limits_they_are_near_the_two_kls(implementation, rng):
    _, labels = problem(rng, scale=1.0)
    z = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    near = {"alpha": 1e-9, "beta": 1e-9, "implementation": implementation}
    forward, reverse = (distill_loss(z, labels, objective=x, **near) for x in ("tail", "reverse_kl"))
    # a Jensen-Shannon divergence itself vanishes with beta, and its quotient by beta is a KL
    torch.testing.assert_close(distill_loss(z, labels, objective="jsd", **near) / 1e-9, forward, rtol=1e-5, atol=0)
    torch.testing.assert_close(distill_loss(z, labels, objective="skew_kl", **near), forward, rtol=1e-7, atol=0)
    torch.testing.assert_close(distill_loss(z, labels, objective="skew_reverse_kl", **near), reverse, rtol=1e-7, atol=0)


@pytest.mark.parametrize("objective", ["tail", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_nothing_is_clamped_at_zero(implementation, objective, rng):
    """A student that is where the teacher is to float32's digits is as often below 0 as above, and still learns."""
    teacher = torch.randn(400, 50, generator=rng)
    top = teacher.log_softmax(1).topk(8, dim=1)
    labels = TopKLabels(top.values, top.indices, torch.log1p(-top.values.exp().sum(1)))
    z = (teacher + 1e-4 * torch.randn(400, 50, generator=rng)).requires_grad_()
    losses = distill_loss(z, labels, objective=objective, reduction="none", implementation=implementation)
    found = losses.detach()
    assert float((found == 0).float().mean()) < 0.5
    assert float(found.min()) < 0
    assert bool((torch.autograd.grad(losses.sum(), z)[0].abs().amax(1) > 0).all())


@pytest.mark.parametrize("objective", BUCKETED)
def test_more_rows_of_the_head_change_nothing(objective, rng):
    """A head padded by 128 rows, used as a view of the classes there are, or with biases of minus infinity."""
    _, labels = problem(rng)
    hidden = torch.randn(ROWS, FEATURES, generator=rng, dtype=torch.float64).requires_grad_()
    weight = torch.randn(CLASSES + 128, FEATURES, generator=rng, dtype=torch.float64).requires_grad_()
    exact = weight.detach()[:CLASSES].clone().requires_grad_()
    absent = torch.zeros(CLASSES + 128, dtype=torch.float64).index_fill(
        0, torch.arange(CLASSES, CLASSES + 128), -torch.inf
    )
    expected = linear_distill_loss(hidden, exact, None, labels, objective=objective, **MIXED)
    slopes = torch.autograd.grad(expected, (hidden, exact))
    for layer in ((weight[:CLASSES], None), (weight, absent)):
        found = linear_distill_loss(hidden, *layer, labels, objective=objective, **MIXED)
        torch.testing.assert_close(found, expected)
        of_hidden, of_weight = torch.autograd.grad(found, (hidden, weight))
        torch.testing.assert_close((of_hidden, of_weight[:CLASSES]), slopes)
        assert of_weight[CLASSES:].abs().max() == 0


@pytest.mark.parametrize("objective", BUCKETED)
def test_the_hard_gradient_is_alive_beside_the_soft_one(implementation, objective, rng):
    _, labels = problem(rng)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).requires_grad_()
    hard = labels.classes[:, 3].clone()
    common = {"objective": objective, "reduction": "sum", "implementation": implementation, **MIXED}

    def slope(**options):
        return torch.autograd.grad(distill_loss(logits, labels, **common, **options), logits)[0]

    true = logits.detach().softmax(1) - torch.nn.functional.one_hot(hard, CLASSES)
    torch.testing.assert_close(slope(hard=hard, hard_share=0.5), 0.5 * slope() + 0.5 * true)
    torch.testing.assert_close(slope(hard=hard, hard_share=1.0), true)


@pytest.mark.parametrize("objective", OTHERS)
def test_a_teacher_without_mass_on_what_the_student_has_gives_no_loss(implementation, objective):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0], [0.5, 1.0, 2.0]]).requires_grad_()
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    found = distill_loss(
        logits, DenseLabels(teacher), objective=objective, reduction="none", implementation=implementation
    )
    slope = torch.autograd.grad(found.sum(), logits)[0]
    assert float(found[0].detach()) == 0
    assert slope[0].abs().max() == 0
    assert float(found[1].detach()) > 0
    assert float(slope[1, 0]) < 0  # a probability of 0 elsewhere is finite, and pushes towards the class that has some
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("objective", ["jsd", "reverse_kl"])
def test_reverse_kl_of_a_probability_of_zero_is_that_of_the_least_float(implementation, objective):
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    labels = TopKLabels(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0, 1]]), torch.tensor([-torch.inf]))
    found = distill_loss(logits, labels, objective=objective, implementation=implementation)
    p, q = torch.tensor([0.6, 0.4, 2.0**-126], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    m = (p + q) / 2
    expected = kl(q, p) if objective == "reverse_kl" else 0.5 * kl(p, m) + 0.5 * kl(q, m)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("objective", OTHERS)
def test_low_precision_logits_lose_only_the_rounding_of_the_gradient(implementation, objective, dtype, rng):
    _, labels = problem(rng)
    logits = (3 * torch.randn(ROWS, CLASSES, generator=rng)).to(dtype)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    options = {"objective": objective, "reduction": "none", **MIXED}
    found = distill_loss(leaf, labels, implementation=implementation, **options)
    exact = distill_loss(exact_leaf, labels, implementation="reference", **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
    slope, true = torch.autograd.grad(found.sum(), leaf)[0], torch.autograd.grad(exact.sum(), exact_leaf)[0]
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.double(), true, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OTHERS)
def test_sampled_labels_are_refused(objective):
    labels = SampledLabels(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0, 2]]))
    message = (
        f"objective '{objective}' is biased on sampled labels, .* forward KL alone: use 'sampled', or top-k labels"
    )
    with pytest.raises(ValueError, match=message):
        distill_loss(torch.zeros(1, 3), labels, objective=objective)
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(torch.zeros(1, 2), torch.zeros(3, 2), None, labels, objective=objective)


def test_a_truncated_divergence_goes_by_its_own_name():
    labels = TopKLabels(torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0, 2]]))
    with pytest.raises(
        ValueError, match=r"objective 'kl' needs all 3 classes, top-k labels keep 2: use 'tail'.*'truncated_kl'"
    ):
        distill_loss(torch.zeros(1, 3), labels)
    with pytest.raises(
        ValueError, match="'truncated_kl' is for top-k labels, sampled labels leave nothing out: use 'sampled'"
    ):
        distill_loss(torch.zeros(1, 3), SampledLabels(labels.logprobs, labels.classes), objective="truncated_kl")
    whole = TopKLabels(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0, 2, 1]]))
    logits = torch.tensor([[0.3, -1.0, 0.5]])
    found = [distill_loss(logits, whole, objective=x) for x in ("kl", "tail", "truncated_kl")]
    torch.testing.assert_close(found, [found[0]] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -0.1}, r"beta must be between 0 \(forward KL\) and 1 \(reverse KL\), got -0.1"),
        ({"beta": math.nan}, "beta must be between 0"),
        ({"alpha": 1.0}, "alpha must be at least 0 and below 1, where nothing is compared, got 1.0"),
        ({"alpha": -1e-3}, "alpha must be at least 0 and below 1"),
    ],
)
def test_shares_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(torch.zeros(1, 3), torch.zeros(1, 3), objective="jsd", **change)
