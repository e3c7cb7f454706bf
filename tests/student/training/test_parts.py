"""Parts of a training against their definitions: learning rate, moving average, weights, precision, blind phases."""

from __future__ import annotations

import functools
import json
import logging
import math
import sys
import types

import numpy as np
import pytest
import small_trainings
import torch
from problem import CLASSES, make_table
from safetensors.torch import load_file

from distilbeam.selection.trust.debias import DebiasEstimator, rescale
from distilbeam.student.checkpoint import load_student
from distilbeam.student.data.labelled import read_examples
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.blind import second_phase, train_blind
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes, end_step
from distilbeam.student.training.optimizer import make_optimizer, moving_average, set_lr
from distilbeam.student.training.rng import generator_state, own_generators, set_generator_state
from distilbeam.student.training.sample_weights import Reestimation
from distilbeam.student.training.train import train

CPU = torch.device("cpu")
STUDENT = StudentConfig(kind="mlp", hidden=(16,), input={"columns": ["x"]})


@pytest.fixture
def vectors(tmp_path):
    return small_trainings.write_vectors(tmp_path / "labels")


def fit(tmp_path, data, training, student=STUDENT, name="student", **more):
    return train(student, training, **{**data, **more}, directory=tmp_path / name, seed=7)


def accuracy(directory):
    table = make_table(2000, 50, labelled=True).combine_chunks()
    return evaluate(load_student(directory).logits(table.to_batches()[0]), table["label"].to_numpy())["accuracy"]


def test_the_learning_rate_rises_and_falls():
    training = TrainConfig(lr=2.0, warmup=0.2, optimizer="sgd")
    optimizer = make_optimizer(torch.nn.Linear(2, 2), training)
    found = [set_lr(optimizer, training, done, 10) for done in range(10)]
    expected = [1.0, 2.0, *(1 + math.cos(math.pi * i / 8) for i in range(8))]
    assert found == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == found[-1]
    constant = training.model_copy(update={"schedule": "constant", "warmup": 0.0})
    assert [set_lr(optimizer, constant, done, 4) for done in range(4)] == [2.0] * 4


def test_weight_decay_is_for_matrices():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    decays = {
        g["weight_decay"]: sum(p.numel() for p in g["params"])
        for g in make_optimizer(module, TrainConfig()).param_groups
    }
    assert decays == {0.01: 6, 0.0: 9}


def test_the_moving_average_is_that_of_its_recursion():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = moving_average(module, 0.5)
    expected = {name: value.clone().double() for name, value in module.state_dict().items()}
    rng = np.random.default_rng(0)
    for update in range(1, 30):
        with torch.no_grad():
            for value in module.state_dict().values():
                value.copy_(torch.from_numpy(rng.integers(0, 50, value.shape)))
        average.update_parameters(module)
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in module.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
            found = average.module.state_dict()[name]
            if name == "1.num_batches_tracked":
                assert found == value  # a count is copied
            else:
                torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-5)
    assert moving_average(module, None) is None


def test_the_average_is_what_is_kept(tmp_path, vectors):
    training = TrainConfig(epochs=1, ema=0.99999999, lr=0.1)
    kept = load_file(fit(tmp_path, vectors, training, validation=None).directory / "model.safetensors")
    plain = load_file(
        fit(tmp_path, vectors, training.model_copy(update={"ema": None}), name="plain", validation=None).directory
        / "model.safetensors"
    )
    with own_generators(7, CPU):
        start = build_student(STUDENT, (4,), CLASSES).state_dict()
    for name in kept:
        assert 0 < (kept[name] - start[name]).abs().max() < (plain[name] - start[name]).abs().max()


def test_generators_go_on_where_they_were():
    with own_generators(3, CPU):
        torch.rand(5), np.random.normal(size=3)  # noqa: NPY002 - an odd number leaves one normal behind
        state = generator_state(CPU)
        expected = torch.rand(4), np.random.normal(size=4)  # noqa: NPY002
        torch.rand(9), np.random.rand(9)  # noqa: NPY002
        set_generator_state(state, CPU)
        found = torch.rand(4), np.random.normal(size=4)  # noqa: NPY002
    assert torch.equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_numpys_generator_is_left_alone(tmp_path, vectors):
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    fit(tmp_path, vectors, TrainConfig(epochs=1))
    np.testing.assert_array_equal(np.random.rand(3), expected)  # noqa: NPY002


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled"])
def test_weights_are_those_of_the_estimator(kind, tmp_path):
    data = small_trainings.write_vectors(tmp_path / "labels", kind=kind)
    torch.manual_seed(0)
    module = build_student(STUDENT, (4,), CLASSES)
    held_out = read_examples(data["validation"], "label", small_trainings.NAMES, STUDENT.input)
    teacher = data["validation_teacher"].copy()
    teacher[5] = np.nan  # a row that the teacher did not answer
    soft = SoftLabelDataset(data["soft_labels"], 32, 1, input=STUDENT.input, columns=())
    found = Reestimation(soft, held_out, teacher, 2).weights(module, CPU, Processes(CPU))

    pool = make_table(90, 1, labelled=False)
    x = torch.from_numpy(np.stack(pool["x"].to_numpy()))
    answered = np.arange(60) != 5
    with torch.no_grad():
        logits, held = module(x).numpy(), module(held_out.inputs).numpy()[answered]
    estimator = DebiasEstimator.fit(held, teacher[answered], held_out.classes.numpy()[answered], soft=True)
    dense = small_trainings.teacher_logits(pool)
    if kind == "sampled":  # what was drawn is what is known
        batches = list(SoftLabelDataset(data["soft_labels"], 90, 1, input=STUDENT.input))
        dense = np.full((90, CLASSES), -np.inf)
        for row, classes, values in zip(
            *(batches[0][n].numpy() for n in ("row", "teacher_classes", "teacher_logprobs")), strict=True
        ):
            dense[row, classes[classes >= 0]] = values[classes >= 0]
    logprobs = dense - np.log(np.exp(dense).sum(1, keepdims=True))
    expected = rescale(estimator.weights(logits, logprobs))
    # labels are stored rounded to half precision, which moves a margin and, rarely, a nearest neighbour
    assert np.mean(np.isclose(found.numpy(), expected, rtol=1e-3)) > 0.9
    assert found.mean() == pytest.approx(1, abs=1e-5)
    assert found.std() > 0.01


def test_weights_are_estimated_again_every_few_epochs():
    due = [Reestimation(None, None, None, 3).due(epoch) for epoch in range(8)]
    assert due == [False, False, False, True, False, False, True, False]


def test_estimated_weights_change_what_is_learned_from_then_on(tmp_path, vectors):
    training = TrainConfig(epochs=4, objective="weighted", reestimate_epochs=2)
    found = fit(tmp_path, vectors, training)
    once = fit(tmp_path, vectors, training.model_copy(update={"reestimate_epochs": None}), name="once")
    lines = [
        [json.loads(line)["validation_nll"] for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
        for result in (found, once)
    ]
    assert lines[0][:2] == lines[1][:2]
    assert lines[0][2] != lines[1][2]


def test_estimation_needs_its_validation_set(tmp_path, vectors):
    training = TrainConfig(objective="weighted", reestimate_epochs=2)
    with pytest.raises(
        ValueError, match="reestimate_epochs needs a validation set and the teacher's log-probabilities"
    ):
        fit(tmp_path, vectors, training, validation_teacher=None)
    with pytest.raises(ValueError, match=r"reestimate_epochs is for the objectives weighted and slam\+weighted, got"):
        TrainConfig(reestimate_epochs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.5}, "beta is for the objective jsd, got 'distill'"),
        ({"objective": "jsd", "alpha": 0.1}, "alpha is for the objectives skew_kl and skew_reverse_kl, got 'jsd'"),
        ({"objective": "slam", "hard_share": 0.5}, "hard_share must be 0 with objective 'slam', which takes .*got 0.5"),
        ({"objective": "jsd", "beta": 1.5}, "less than or equal to 1"),
        ({"objective": "skew_kl", "alpha": 1.0}, "less than 1"),
    ],
)
def test_settings_of_another_objective_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
    assert TrainConfig(objective="jsd", beta=0.25, hard_share=0.5).beta == 0.25


@pytest.mark.parametrize("changes", [{"flip": True}, {"crop": 1}])
def test_images_alone_can_be_flipped(changes, tmp_path, vectors):
    with pytest.raises(ValueError, match=r"augment.flip and augment.crop need images .* got \[4\]"):
        fit(tmp_path, vectors, TrainConfig(augment=changes))


@pytest.mark.parametrize(("precision", "most"), [("fp8", 0.05), ("int8", 0.05)])
def test_low_precision_says_which_layers_have_it(precision, most, tmp_path, vectors, caplog):
    student = StudentConfig(kind="mlp", hidden=(32, 32), input={"columns": ["x"]})
    training = TrainConfig(epochs=6, precision=precision, precision_gate="sizes")
    result = fit(tmp_path, vectors, training, student)
    assert f"precision {precision}: 1 of 3 linear layers run in 8 bits" in caplog.text
    shapes = {"4 -> 32": "bfloat16", "32 -> 32": precision, "32 -> 3 ": "bfloat16"}  # everything else is under autocast
    for shape, runs_in in shapes.items():
        [line] = [line for line in caplog.text.splitlines() if f" {shape}" in line]
        assert f" {runs_in} " in line
    float_student = fit(tmp_path, vectors, TrainConfig(epochs=6), student, name="float")
    moved = load_file(result.directory / "model.safetensors")
    exact = load_file(float_student.directory / "model.safetensors")
    difference = max(float((moved[name] - exact[name]).abs().max()) for name in exact)
    assert difference > 0  # 8 bits leave their mark
    assert accuracy(result.directory) >= accuracy(float_student.directory) - most


def test_layers_that_eight_bits_would_slow_down_are_left_and_named(tmp_path, vectors, caplog):
    with caplog.at_level(logging.WARNING, "distilbeam"):
        fit(tmp_path, vectors, TrainConfig(epochs=1, precision="int8"))
    assert "precision int8: 0 of 2 linear layers run in 8 bits" in caplog.text


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(tmp_path, vectors, monkeypatch):
    """Traced forward and backward, without the half minute of compiling them to machine code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    training = TrainConfig(epochs=2, compile=True)
    compiled = load_file(fit(tmp_path, vectors, training).directory / "model.safetensors")
    plain = load_file(
        fit(tmp_path, vectors, training.model_copy(update={"compile": False}), name="plain").directory
        / "model.safetensors"
    )
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_a_lazy_device_carries_out_every_step(tmp_path, vectors, monkeypatch):
    """Only the calls are tested: there is no TPU here, so the device that answers to its name is the CPU."""
    steps, asked = [], []
    fake = types.SimpleNamespace(device=lambda: CPU, sync=lambda: steps.append(1))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    end_step(CPU)
    assert steps == []  # a CPU is not lazy
    end_step(torch.device("xla"))
    assert steps == [1]
    monkeypatch.setattr("distilbeam.student.training.train.end_step", asked.append)
    result = fit(tmp_path, vectors, TrainConfig(epochs=1, device="tpu"))
    assert asked == [CPU] * int(result.metrics["steps"])


def test_mixing_weights_choose_what_is_seen(tmp_path, vectors):
    other = small_trainings.write_vectors(tmp_path / "other", 30)
    both = [*vectors["soft_labels"], *other["soft_labels"]]
    alone = fit(tmp_path, vectors, TrainConfig(epochs=2), soft_labels=both, mixing_weights=(1, 0), labelled=None)
    mixed = fit(tmp_path, vectors, TrainConfig(epochs=2), name="mixed", soft_labels=both, labelled=None)
    assert alone.metrics["soft_rows"] == mixed.metrics["soft_rows"] == 120
    assert small_trainings.weights(alone.directory) != small_trainings.weights(mixed.directory)


BLIND = TrainConfig(epochs=20, lr=1e-2, finetune={"epochs": 10, "lr": 1e-3}, objective="weighted")


def test_blind_distillation_goes_through_both_phases(tmp_path, vectors):
    """A pool shifted away from the data: the first phase sees it alone, the second brings the student home."""
    answers = small_trainings.write_vectors(tmp_path / "answers", 30)["soft_labels"]
    data = {name: vectors[name] for name in ("classes", "labelled", "label_column", "validation")}
    arguments = {**data, "pool_labels": vectors["soft_labels"], "labelled_answers": answers, "seed": 7}
    result = train_blind(STUDENT, BLIND, **arguments, directory=tmp_path / "student")
    blind = load_student(tmp_path / "student.blind")
    assert blind.extra["metrics"]["hard_rows"] == 0
    assert blind.extra["metrics"]["soft_rows"] == 90
    assert "validation_nll" not in blind.extra["metrics"]  # the first phase looks at no true class
    final = load_student(result.directory)
    assert final.extra["metrics"]["hard_rows"] == 30
    assert final.extra["metrics"]["soft_rows"] == 30
    assert final.extra["training"]["epochs"] == 10
    assert accuracy(result.directory) > 0.6
    before = (tmp_path / "student.blind/model.safetensors").stat().st_mtime_ns
    second = train_blind(STUDENT, BLIND, **arguments, directory=tmp_path / "again")
    assert small_trainings.weights(second.directory) == small_trainings.weights(result.directory)
    assert (tmp_path / "student.blind/model.safetensors").stat().st_mtime_ns == before


def test_a_finished_blind_phase_is_not_repeated(tmp_path, vectors, monkeypatch):
    data = {name: vectors[name] for name in ("classes", "labelled", "label_column", "validation")}
    arguments = {**data, "pool_labels": vectors["soft_labels"], "labelled_answers": (), "seed": 7}
    calls = []

    def failing(*configs, **more):
        calls.append(more["directory"].name)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return train(*configs, **more)

    monkeypatch.setattr("distilbeam.student.training.blind.train", failing)
    with pytest.raises(RuntimeError, match="killed"):
        train_blind(STUDENT, BLIND, **arguments, directory=tmp_path / "student")
    train_blind(STUDENT, BLIND, **arguments, directory=tmp_path / "student")
    assert calls == ["student.blind", "student", "student"]


def test_the_second_phase_is_plain_and_slow():
    training = second_phase(BLIND)
    assert (training.epochs, training.lr, training.objective) == (10, 1e-3, "distill")
    assert (training.schedule, training.warmup, training.finetune) == ("cosine", 0.0, None)
    assert training.batch_size == BLIND.batch_size


def test_blind_distillation_says_what_it_needs(tmp_path, vectors):
    data = {name: vectors[name] for name in ("classes", "labelled", "label_column", "validation")}
    arguments = {**data, "labelled_answers": (), "directory": tmp_path / "s", "seed": 0}
    with pytest.raises(ValueError, match=r"needs the settings of its second phase: give training.finetune"):
        train_blind(STUDENT, TrainConfig(), pool_labels=vectors["soft_labels"], **arguments)
    with pytest.raises(ValueError, match="needs soft labels of the pool for its first phase, got none"):
        train_blind(STUDENT, BLIND, pool_labels=(), **arguments)
    with pytest.raises(ValueError, match="finetune is the second phase of blind distillation, which train_blind does"):
        fit(tmp_path, vectors, BLIND)
