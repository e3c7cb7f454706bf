"""Last layer and loss in one operation: the same loss and gradients as apart, for every network; and when it is chosen."""

from __future__ import annotations

import logging

import pytest
import torch
from small_steps import CLASSES, CPU, HARD, NUMBERS, SOFT, TOKENS, config_of, rows_of
from torch import nn

from distilbeam.kernels.labels import DenseLabels, SampledLabels, TopKLabels
from distilbeam.kernels.linear_distillation.choice import why_apart
from distilbeam.student.networks.build import build_student
from distilbeam.student.training.augment import Mixture
from distilbeam.student.training.batches import StepRows
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.loss import likeliest_classes, step_loss
from distilbeam.student.training.wrap import UpToLastLayer, make_network, precisions
from distilbeam.teacher.softlabels import SoftLabelSpec

STUDENTS = [
    ({"kind": "linear", "input": NUMBERS}, (5,)),
    ({"kind": "mlp", "hidden": (8, 8), "residual": "laurel-rw+lr", "norm": "rms", "input": NUMBERS}, (5,)),
    ({"kind": "cnn", "width": 0.1, "input": NUMBERS}, (3, 8, 8)),
    ({"kind": "resnet", "depth": 8, "width": 0.3, "input": NUMBERS}, (3, 8, 8)),
    ({"kind": "text", "dim": 8, "hidden": (8,), "input": TOKENS}, (8,)),
    ({"kind": "transformer", "dim": 8, "heads": 2, "layers": 1, "input": TOKENS}, (8,)),
]


def step(module, config, training, rows, spec, weight=None, mixture=None):
    network = make_network(module, config, training, Processes(CPU), spec)
    loss = step_loss(network, training, rows, spec, weight, mixture, CPU)
    return network, loss, torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize(("student", "shape"), STUDENTS, ids=lambda x: x["kind"] if isinstance(x, dict) else "")
@pytest.mark.parametrize(("kind", "objective"), [("top_k", "distill"), ("dense", "slam")])
def test_a_step_is_the_same_together_and_apart(student, shape, kind, objective):
    torch.manual_seed(0)
    config, (rows, spec) = config_of(student), rows_of(shape, kind)
    module = build_student(config, shape, CLASSES).eval()  # batch norms would be moved by the first of the steps
    weight = torch.rand(SOFT) if objective == "distill" else None
    found = {}
    for last_layer in ("apart", "together"):
        training = TrainConfig(objective=objective, temperature=2.0, hard_weight=0.6, last_layer=last_layer)
        network, loss, slopes = step(module, config, training, rows, spec, weight)
        assert isinstance(network, UpToLastLayer) == (last_layer == "together")
        found[last_layer] = loss.detach(), slopes
    torch.testing.assert_close(found["together"][0], found["apart"][0])
    for a, b in zip(found["together"][1], found["apart"][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


OWN = {  # of the teacher's p and the student's q, from their definitions
    "reverse_kl": ({}, lambda p, q: (q * (q / p).log()).sum(1)),
    "jsd": (
        {"beta": 0.3},
        lambda p, q: (0.3 * p * (p / (0.3 * p + 0.7 * q)).log() + 0.7 * q * (q / (0.3 * p + 0.7 * q)).log()).sum(1),
    ),
    "skew_kl": ({"alpha": 0.2}, lambda p, q: (p * (p / (0.2 * p + 0.8 * q)).log()).sum(1)),
    "skew_reverse_kl": ({}, lambda p, q: (q * (q / (0.9 * p + 0.1 * q)).log()).sum(1)),
    "tv": ({}, lambda p, q: (p - q).abs().sum(1) / 2),
    "distill": ({}, lambda p, q: (p * (p / q).log()).sum(1)),
}


@pytest.mark.parametrize("objective", OWN)
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_a_step_of_another_divergence_and_a_share_of_the_likeliest_class(objective, kind):
    torch.manual_seed(0)
    (student, shape), (settings, formula) = STUDENTS[1], OWN[objective]
    config, (rows, spec) = config_of(student), rows_of(shape, kind)
    module = build_student(config, shape, CLASSES)
    logits = module(rows.inputs())
    p, q = rows.soft["teacher_logprobs"].exp(), logits[:SOFT].softmax(1)
    likeliest = p.argmax(1)
    if kind == "top_k":  # the kept classes and one bucket of all others
        kept = rows.soft["teacher_classes"]
        likeliest = kept.gather(1, likeliest[:, None])[:, 0]
        p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q.gather(1, kept)))
    hard = nn.functional.cross_entropy(logits[SOFT:], rows.hard.classes, reduction="sum")
    for share in (0.0, 0.4):
        sure = nn.functional.cross_entropy(logits[:SOFT], likeliest, reduction="none")
        expected = (((1 - share) * formula(p, q) + share * sure).sum() + 0.6 * hard) / (SOFT + HARD)
        slopes = torch.autograd.grad(expected, list(module.parameters()), retain_graph=True)
        for last_layer in ("apart", "together"):
            training = TrainConfig(
                objective=objective, hard_weight=0.6, hard_share=share, last_layer=last_layer, **settings
            )
            _, loss, found = step(module, config, training, rows, spec)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
            for a, b in zip(found, slopes, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_likeliest_class_of_every_kind_of_label():
    logprobs, classes = (
        torch.tensor([[0.2, 0.5], [0.7, 0.3], [1.0, 0.0]]).log(),
        torch.tensor([[4, 2], [3, 1], [-1, -1]]),
    )
    for made in (TopKLabels, SampledLabels):
        assert likeliest_classes(made(logprobs, classes)).tolist() == [2, 3, -100]
    assert likeliest_classes(SampledLabels(torch.zeros(1, 2), torch.tensor([[-1, 5]]))).tolist() == [5]
    assert likeliest_classes(DenseLabels(logprobs)).tolist() == [1, 0, 0]


def test_a_step_is_its_definition():
    """The sum over rows of weight times loss, and of hard_weight times cross-entropy, over the rows of all processes."""
    torch.manual_seed(0)
    (student, shape), training = STUDENTS[1], TrainConfig(hard_weight=0.6)
    config, (rows, spec) = config_of(student), rows_of(shape, "dense")
    module, weight = build_student(config, shape, CLASSES), torch.rand(SOFT)
    rows = StepRows(rows.soft, rows.hard, 40, 2)
    logits = module(rows.inputs())
    teacher = rows.soft["teacher_logprobs"]
    kl = (teacher.exp() * (teacher - logits[:SOFT].log_softmax(1))).sum(1)
    hard = nn.functional.cross_entropy(logits[SOFT:], rows.hard.classes, reduction="sum")
    expected = ((weight * kl).sum() + 0.6 * hard) * 2 / 40
    for last_layer in ("apart", "together"):
        network = make_network(
            module, config, training.model_copy(update={"last_layer": last_layer}), Processes(CPU), spec
        )
        torch.testing.assert_close(step_loss(network, training, rows, spec, weight, None, CPU), expected)


def test_mixed_examples_together_and_apart():
    torch.manual_seed(0)
    student, shape = STUDENTS[0]
    config, (rows, spec) = config_of(student), rows_of(shape, "top_k")
    module, mixture = build_student(config, shape, CLASSES), Mixture(0.3, torch.randperm(SOFT + HARD))
    for share in (0.3, 0.0, 1.0):
        mixture = Mixture(share, mixture.partner)
        losses = [
            step(module, config, TrainConfig(last_layer=way), rows, spec, mixture=mixture)[1]
            for way in ("apart", "together")
        ]
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("last_layer", ["apart", "together"])
def test_a_process_without_rows_takes_part(last_layer):
    student, shape = STUDENTS[0]
    config, (rows, spec) = config_of(student), rows_of(shape, "top_k")
    module = build_student(config, shape, CLASSES)
    nothing = StepRows({n: x[:0] for n, x in rows.soft.items()}, None, 5, 2)
    _, loss, slopes = step(module, config, TrainConfig(last_layer=last_layer), nothing, spec)
    assert loss.item() == 0
    assert all(slope.abs().max() == 0 for slope in slopes)


def test_the_table_chooses_and_says_why():
    student = config_of({"kind": "linear", "input": NUMBERS})
    module = build_student(student, (5,), 20_000)
    sparse = SoftLabelSpec(20_000, kind="top_k", k=3, teacher="t")
    dense = SoftLabelSpec(20_000, kind="dense", teacher="t")
    for spec, changes, expected in (
        (sparse, {}, True),
        (None, {}, True),
        (dense, {}, False),
        (sparse, {"batch_size": 64}, False),
        (sparse, {"precision": "bf16"}, False),
        (sparse, {"augment": {"label_smoothing": 0.1}}, False),
    ):
        training = TrainConfig.model_validate({"batch_size": 256, **changes})
        network = make_network(module, student, training, Processes(CPU), spec)
        assert isinstance(network, UpToLastLayer) == expected
    for rows, device, dtype, reason in (
        (256, "cpu", torch.float32, None),
        (16, "cpu", torch.float32, "16 x 20,000 logits are fewer than 4,000,000"),
        (256, "cpu", torch.bfloat16, "on a CPU its sums are float32, which takes longer than bfloat16"),
        (256, "cuda", torch.bfloat16, "256 x 20,000 logits are fewer than 1,073,741,824"),
        (256, "meta", torch.bfloat16, "together is not known to pay on meta"),
    ):
        assert why_apart(rows, 20_000, torch.device(device), dtype, sparse=True) == reason


def test_what_cannot_be_taken_together_is_refused():
    config = config_of(STUDENTS[0][0])
    with pytest.raises(ValueError, match=r"last_layer cannot be 'together': label smoothing needs the logits"):
        make_network(
            build_student(config, (5,), CLASSES),
            config,
            TrainConfig(last_layer="together", augment={"label_smoothing": 0.1}),
            Processes(CPU),
        )
    with pytest.raises(ValueError, match=r"last_layer cannot be 'together': the student has no linear last layer"):
        make_network(nn.Sequential(nn.Linear(5, 7)), config, TrainConfig(last_layer="together"), Processes(CPU))


def test_what_ran_in_what_is_said_in_a_line(caplog):
    config = config_of({"kind": "mlp", "hidden": (16, 16), "residual": "plain", "input": NUMBERS})
    lines = {
        "fp32": "everything in float32",
        "bf16": "all matrix products in bfloat16, parameters, norms, residuals and losses in float32",
        "fp8": "1 of 3 linear layers in fp8 by reference (layers.1), all other matrix products in bfloat16, parameters,",
        "int8": "1 of 3 linear layers in int8 by reference (layers.1), all other matrix products in bfloat16, parameters,",
    }
    for precision, line in lines.items():
        caplog.clear()
        module = build_student(config, (5,), CLASSES)
        training = TrainConfig(precision=precision, precision_gate="sizes", last_layer="together")
        with caplog.at_level(logging.INFO, "distilbeam"):
            make_network(module, config, training, Processes(CPU))
        assert f"precision {precision}: {line}" in caplog.text
        assert "; the last layer and the loss in one operation by chunked, without logits" in caplog.text
    apart = TrainConfig(precision="bf16", last_layer="apart")
    assert precisions(module, apart, together=False).endswith("losses in float32; the loss by chunked")
