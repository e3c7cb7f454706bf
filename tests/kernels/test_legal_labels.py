"""Labels that a codec writes and people do write, one by one: what they are worth, and what is refused in a sentence."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import DenseLabels, HardLabels, SampledLabels, TopKLabels, distill_loss, linear_distill_loss

LOGITS = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
NOTHING = -torch.inf


def value_and_gradient(logits, labels, **options):
    leaf = logits.clone().requires_grad_()
    value = distill_loss(leaf, labels, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("labels", ["top_k", "sampled", "dense"])
@pytest.mark.parametrize("objective", ["tail", "kl", "truncated_kl", "ce", "renormalised", "sampled"])
def test_a_kept_class_of_probability_zero(implementation, labels, objective):
    """The teacher is sure of class 2: minus the log of the student's .6308."""
    made = {
        "top_k": TopKLabels(torch.tensor([[0.0, NOTHING]]), torch.tensor([[2, 1]]), torch.tensor([NOTHING])),
        "sampled": SampledLabels(torch.tensor([[0.0, NOTHING]]), torch.tensor([[2, 1]])),
        "dense": DenseLabels(torch.tensor([[NOTHING, NOTHING, 0.0, NOTHING]])),
    }[labels]
    if (labels, objective) in {
        ("top_k", "sampled"),
        ("top_k", "kl"),
        ("sampled", "tail"),
        ("sampled", "truncated_kl"),
    }:
        pytest.skip("refused")
    value, slope = value_and_gradient(LOGITS, made, objective=objective, implementation=implementation)
    f = LOGITS.softmax(1)
    if objective == "renormalised" and labels != "dense":
        f = LOGITS[:, 1:3].softmax(1)
        f = torch.stack([f.new_zeros(1), f[:, 0], f[:, 1], f.new_zeros(1)], dim=1)
    torch.testing.assert_close(value, -f[0, 2].log(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope, f - torch.tensor([[0.0, 0.0, 1.0, 0.0]]), rtol=1e-5, atol=1e-7)
    assert float(value) == pytest.approx(
        0.4608 if objective != "renormalised" or labels == "dense" else 0.3133, abs=1e-4
    )


def test_one_such_row_of_ninety_leaves_the_others_as_they_are(implementation):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 20, generator=generator)
    top = torch.randn(90, 20, generator=generator).log_softmax(1).topk(4, dim=1)
    labels = TopKLabels(top.values, top.indices)
    options = {"objective": "tail", "reduction": "none", "implementation": implementation}
    before, slope_before = value_and_gradient(logits, labels, **options)
    labels.logprobs[17] = torch.tensor([0.0, NOTHING, NOTHING, NOTHING])
    after, slope_after = value_and_gradient(logits, labels, **options)
    others = torch.arange(90) != 17
    torch.testing.assert_close(after[others], before[others])
    torch.testing.assert_close(slope_after[others], slope_before[others])
    assert bool(after.isfinite().all())


@pytest.mark.parametrize("objective", ["renormalised", "slam", "truncated_kl", "tail", "ce", "jsd", "reverse_kl", "tv"])
@pytest.mark.parametrize("mixing", ["plain", "normalised", "forward"])
@pytest.mark.parametrize("k", [2, 4])
def test_a_masked_row_of_nothing_has_no_gradient(implementation, objective, mixing, k):
    logits = torch.cat([LOGITS, torch.full((1, 4), NOTHING)])
    top = LOGITS.log_softmax(1).expand(2, -1).topk(k, dim=1)
    mask = torch.tensor([True, False])
    slam = {"accuracy": 0.7, "candidates": 3, "mixing": mixing} if objective == "slam" else {}
    value, slope = value_and_gradient(
        logits,
        TopKLabels(top.values, top.indices),
        objective=objective,
        mask=mask,
        implementation=implementation,
        **slam,
    )
    assert bool(value.isfinite())
    assert bool(slope.isfinite().all())
    assert slope[1].abs().max() == 0


def test_a_row_none_of_whose_buckets_exists_has_no_loss(implementation):
    logits = torch.tensor([[NOTHING, NOTHING, 3.0, 0.5]])
    labels = TopKLabels(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0, 1]]), torch.tensor([NOTHING]))
    value, slope = value_and_gradient(logits, labels, objective="renormalised", implementation=implementation)
    assert (float(value), float(slope.abs().max())) == (0, 0)
    slam = {"objective": "slam", "accuracy": 0.7, "mixing": "forward", "implementation": implementation}
    value, slope = value_and_gradient(logits, labels, **slam)  # no candidate exists
    assert bool(value.isfinite())
    assert bool(slope.isfinite().all())


def test_padding_may_stand_anywhere(implementation):
    logprobs = torch.tensor([[0.6, 0.3]]).log()
    tail = torch.tensor([0.1]).log()
    for objective in ("tail", "truncated_kl", "renormalised", "reverse_kl", "skew_kl", "tv"):
        expected = value_and_gradient(
            LOGITS,
            TopKLabels(logprobs, torch.tensor([[2, 1]]), tail),
            objective=objective,
            implementation=implementation,
        )
        padded = torch.tensor([[torch.nan, logprobs[0, 0], 0.0, logprobs[0, 1]]])
        labels = TopKLabels(padded, torch.tensor([[-1, 2, -7, 1]]), tail)
        found = value_and_gradient(LOGITS, labels, objective=objective, implementation=implementation)
        torch.testing.assert_close(found, expected)
        assert found[1][0, 0] > 0 or objective == "renormalised"  # class 0 is not kept and learns that it is not


def test_a_row_of_padding_alone_has_no_target(implementation):
    labels = SampledLabels(torch.full((1, 2), NOTHING), torch.tensor([[-1, -1]]))
    for objective in ("sampled", "renormalised", "ce"):
        value, slope = value_and_gradient(LOGITS, labels, objective=objective, implementation=implementation)
        assert (float(value), float(slope.abs().max())) == (0, 0)


@pytest.mark.parametrize(
    "objective", ["tail", "truncated_kl", "slam", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"]
)
def test_a_class_named_twice_counts_as_two(implementation, objective):
    """As if there were a fifth class with the third one's logit."""
    labels = TopKLabels(torch.tensor([[0.5, 0.2, 0.2]]).log(), torch.tensor([[2, 1, 2]]), torch.tensor([0.1]).log())
    apart = TopKLabels(labels.logprobs, torch.tensor([[2, 1, 4]]), labels.tail_logmass)
    extra = {"accuracy": 0.8} if objective == "slam" else {}
    options = {"objective": objective, "temperature": 2.0, "implementation": implementation, **extra}
    value, slope = value_and_gradient(LOGITS, labels, **options)
    expected, of_five = value_and_gradient(torch.cat([LOGITS, LOGITS[:, 2:3]], dim=1), apart, **options)
    torch.testing.assert_close(value, expected)
    of_five[:, 2] += of_five[:, 4]
    torch.testing.assert_close(slope, of_five[:, :4])


@pytest.mark.parametrize(
    "objective", ["tail", "truncated_kl", "renormalised", "slam", "reverse_kl", "jsd", "skew_kl", "tv"]
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_offset_that_a_row_shares_takes_no_digits(implementation, objective, temperature):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 300, generator=generator) + 1e4  # rounded to 2^-10, as the exact ones are
    top = torch.randn(8, 300, generator=generator).log_softmax(1).topk(5, dim=1)
    labels = TopKLabels(top.values, top.indices)
    extra = {"accuracy": 0.8} if objective == "slam" else {}
    options = {"objective": objective, "temperature": temperature, **extra}
    _, slope = value_and_gradient(logits, labels, implementation=implementation, **options)
    _, exact = value_and_gradient(logits.double(), labels, implementation="reference", **options)
    assert (slope.double() - exact).abs().max() < 3e-7 * temperature


def test_a_negative_true_class_is_refused():
    with pytest.raises(ValueError, match=r"true classes must be at least 0, or ignore_index \(-100\) where .* got -1"):
        distill_loss(LOGITS, HardLabels(torch.tensor([-1])))
    with pytest.raises(ValueError, match=r"true classes must be at least 0.*got -3"):
        distill_loss(LOGITS, LOGITS, hard=torch.tensor([-3]))
    with pytest.raises(ValueError, match=r"true classes must be at least 0.*got -1"):
        linear_distill_loss(LOGITS, torch.zeros(5, 4), None, torch.tensor([-1]))
    assert float(distill_loss(LOGITS, HardLabels(torch.tensor([-1]), ignore_index=-1))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": torch.inf}, "temperature must be between 0.0001 and 10,000, got inf"),
        ({"temperature": 1e30}, "temperature must be between 0.0001 and 10,000, got 1e"),
        ({"temperature": torch.nan}, "temperature must be positive, got nan"),
        ({"accuracy": 1.7}, "accuracy must be between 0 and 1, got 1.7"),
        ({"accuracy": torch.tensor([0.5, -0.1])}, "accuracy must be between 0 and 1, got -0.1"),
        ({"accuracy": torch.nan}, "accuracy must be between 0 and 1, got nan"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1, got 0"),
        ({"candidates": 1.5}, "candidates must be a whole number of at least 1, got 1.5"),
        ({"candidates": torch.tensor([2, 0])}, "candidates must be a whole number of at least 1, got 0"),
        ({"normalizer": 0}, "normalizer must be more than 0, got 0"),
        ({"normalizer": torch.tensor(torch.nan)}, "normalizer must be more than 0, got nan"),
        ({"hard_share": torch.nan}, "hard_share must be between 0 and 1, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    labels = DenseLabels(LOGITS.expand(2, -1).log_softmax(1))
    arguments = {"objective": "slam", "accuracy": 0.7, **change}
    with pytest.raises(ValueError, match=message):
        distill_loss(LOGITS.expand(2, -1), labels, **arguments)
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(torch.zeros(2, 3), torch.zeros(4, 3), None, labels, **arguments)


def test_what_rows_that_do_not_count_say_is_not_looked_at():
    labels = DenseLabels(LOGITS.expand(2, -1).log_softmax(1))
    options = {"objective": "slam", "mask": torch.tensor([True, False])}
    found = distill_loss(
        LOGITS.expand(2, -1),
        labels,
        accuracy=torch.tensor([0.7, torch.nan]),
        candidates=torch.tensor([2, 0]),
        **options,
    )
    assert float(found) == pytest.approx(float(distill_loss(LOGITS.expand(2, -1), labels, accuracy=0.7, **options)))


def test_labels_that_keep_nothing_are_refused():
    with pytest.raises(ValueError, match=r"sparse labels must keep at least one class, got \[2, 0\]"):
        TopKLabels(torch.zeros(2, 0), torch.zeros(2, 0).long())


def test_the_mean_of_several_processes(implementation):
    """Two processes whose gradients are averaged, and the same rows in one."""
    generator = torch.Generator().manual_seed(5)
    logits, teacher = torch.randn(2, 9, 7, generator=generator).unbind()
    _, whole = value_and_gradient(logits, DenseLabels(teacher), implementation=implementation)
    parts = [slice(0, 3), slice(3, 9)]
    slopes = [
        value_and_gradient(
            logits[p], DenseLabels(teacher[p]), normalizer=len(logits) / 2, implementation=implementation
        )[1]
        for p in parts
    ]
    torch.testing.assert_close(torch.cat(slopes) / 2, whole)


@pytest.mark.parametrize(
    ("kind", "step"), [("dense", "_log_softmax_backward_data"), ("top_k", "scatter_add_"), ("hard", "mul_")]
)
def test_no_gradient_is_made_where_nobody_asks_for_one(kind, step, make_labels, rng):
    logits, labels = torch.randn(64, 40, generator=rng), make_labels(kind, 64, 40)
    objective = "tail" if kind == "top_k" else "kl"

    def run(leaf):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            value = distill_loss(leaf, labels, objective=objective)
        return value.detach(), sum(event.name == f"aten::{step}" for event in profile.events())

    (alone, without), (together, with_gradient) = run(logits), run(logits.requires_grad_())
    torch.testing.assert_close(alone, together)
    assert without < with_gradient
