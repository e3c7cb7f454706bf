"""Training: each objective learns, the result is the seed's alone, and what cannot be trained is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from on_step import OnStep

from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train

CLASSES = ("red", "green", "blue")
SHORT = TrainConfig(epochs=12, batch_size=32, lr=1e-2)


@pytest.fixture
def fit(tmp_path, problem, student_config):
    """Train with sensible defaults."""

    def run(name="student", **changes):
        arguments = {
            "classes": CLASSES,
            "labelled": problem(30, 1).table(),
            "label_column": "label",
            "soft_labels": [],
            "validation": problem(300, 2).table(),
            "directory": tmp_path / name,
            "seed": 0,
            **changes,
        }
        return train(changes.pop("student", student_config), arguments.pop("training", SHORT), **_without(arguments))

    return run


def _without(arguments):
    return {name: value for name, value in arguments.items() if name != "student"}


def accuracy(directory, problem, rows=3000):
    data = problem(rows, 99)
    batch = data.table().combine_chunks().to_batches()[0]
    return evaluate(load_student(directory).logits(batch), data.y)


def best_possible(problem, rows=3000):
    data = problem(rows, 99)
    return evaluate(data.teacher_logits(), data.y)


@pytest.mark.parametrize(
    ("objective", "labels"),
    [
        ("distill", {}),
        ("distill", {"kind": "top_k", "k": 2}),
        ("distill", {"kind": "sampled", "k": 8}),
        ("weighted", {}),
        ("slam", {}),
        ("slam", {"kind": "top_k", "k": 2}),
        ("slam+weighted", {}),
        ("reverse_kl", {}),
        ("jsd", {"kind": "top_k", "k": 2}),
        ("skew_kl", {}),
        ("skew_reverse_kl", {"kind": "top_k", "k": 2}),
        ("tv", {}),
    ],
)
def test_every_objective_learns_from_soft_labels(objective, labels, fit, write_labels, problem):
    result = fit(
        soft_labels=[write_labels([[400, 300], [500]], seed=5, **labels)],
        training=SHORT.model_copy(update={"objective": objective}),
    )
    reached, possible = accuracy(result.directory, problem), best_possible(problem)
    # mixing with alpha as low as 0.6 learns a sharper student than the posterior: its likelihood is not the target
    assert reached["accuracy"] >= possible["accuracy"] - 0.02
    if objective in ("distill", "weighted"):
        assert reached["nll"] <= possible["nll"] + 0.03


def test_human_labels_alone_are_enough(fit, problem):
    result = fit(labelled=problem(400, 1).table())
    assert accuracy(result.directory, problem)["accuracy"] >= best_possible(problem)["accuracy"] - 0.02
    assert result.metrics["hard_rows"] == 400
    assert result.metrics["soft_rows"] == 0


def test_soft_labels_improve_on_few_human_labels(fit, write_labels, problem):
    few = fit("few")
    more = fit("more", soft_labels=[write_labels([[800]], seed=5)])
    assert accuracy(more.directory, problem)["nll"] < accuracy(few.directory, problem)["nll"] - 0.02


def test_soft_labels_alone_need_no_human_labels_or_validation(fit, write_labels, problem):
    result = fit(soft_labels=[write_labels([[400]], seed=5)], labelled=None, validation=None)
    assert result.metrics["best_epoch"] == SHORT.epochs
    assert not any(name.startswith("validation") for name in result.metrics)
    assert accuracy(result.directory, problem)["accuracy"] >= best_possible(problem)["accuracy"] - 0.03


def test_several_rounds_are_read_together(fit, write_labels):
    paths = [write_labels([[30]], name="a"), write_labels([[20], [10]], name="b", seed=1, first=30)]
    assert fit(soft_labels=paths).metrics["soft_rows"] == 60


def test_one_seed_gives_one_student(fit, write_labels):
    labels = [write_labels([[60], [40]])]
    dropout = StudentConfig(kind="mlp", hidden=(16, 16), dropout=0.3, residual="laurel-rw+lr", input={"columns": ["x"]})
    prints = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(prints))  # what the global generator did before must not matter
        prints.append(load_student(fit(name, soft_labels=labels, seed=seed, student=dropout).directory).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_training_leaves_the_global_generator_alone(fit):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit()
    assert torch.equal(torch.rand(1), expected)


def test_the_epoch_with_the_best_validation_loss_is_kept(fit, problem):
    overfitting = TrainConfig(epochs=60, batch_size=8, lr=0.05, weight_decay=0, schedule="constant", clip=None)
    wide = StudentConfig(kind="mlp", hidden=(128,), input={"columns": ["x"]})
    result = fit(labelled=problem(12, 8).table(), training=overfitting, student=wide)
    history = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [epoch["validation_nll"] for epoch in history]
    assert len(losses) == 60
    assert result.metrics["best_epoch"] == 1 + int(np.argmin(losses)) < 60
    assert result.metrics["validation_nll"] == min(losses) < losses[-1] - 0.05
    data = problem(300, 2)
    kept = load_student(result.directory)
    found = evaluate(kept.logits(data.table().combine_chunks().to_batches()[0]), data.y)
    assert found["nll"] == pytest.approx(min(losses), rel=1e-5)
    stopped = fit(
        "stopped",
        labelled=problem(12, 8).table(),
        training=overfitting.model_copy(update={"patience": 3}),
        student=wide,
    )
    assert stopped.metrics["epochs"] == stopped.metrics["best_epoch"] + 3 < 60


def test_progress_is_reported_after_every_step(fit, write_labels):
    calls = []
    result = fit(soft_labels=[write_labels([[70]])], progress=OnStep(lambda *call: calls.append(call)))
    steps = 12 * math.ceil(70 / round(32 * 70 / 100))
    assert [done for done, _, _ in calls] == list(range(1, steps + 1))
    assert {total for _, total, _ in calls} == {steps}
    assert result.metrics["steps"] == steps
    assert all(math.isfinite(float(note.removeprefix("loss "))) for _, _, note in calls)


def test_training_goes_on_from_another_student(fit, problem, student_config):
    first = fit("first", labelled=problem(400, 1).table())
    barely = TrainConfig(epochs=1, lr=1e-9)
    second = fit("second", init=first.directory, training=barely)
    assert accuracy(second.directory, problem)["accuracy"] == accuracy(first.directory, problem)["accuracy"]
    with pytest.raises(ValueError, match="init must be a student of the same network"):
        fit("third", init=first.directory, student=student_config.model_copy(update={"hidden": (5,)}))


def test_weights_decide_whom_the_student_believes(fit, problem, tmp_path):
    """Two contradicting datasets: the student follows the one with the weight."""
    from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

    data = problem(400, 5)
    lies = np.roll(data.teacher_logits(), 1, axis=1)
    spec = SoftLabelSpec(3, classes=CLASSES, teacher="t", carried=("x",))
    for name, heavy in (("truth", 1.0), ("lie", 0.0)):
        for shard, logits, weight in (("a", data.teacher_logits(), heavy), ("b", lies, 1 - heavy)):
            columns = data.table().select(["x"])
            labels = encode(logits, spec)
            table = pa.table(
                {
                    "example_id": [f"{shard}{i}" for i in range(400)],
                    "x": columns["x"],
                    **dict(zip(labels.schema.names, labels.columns, strict=True)),
                    "weight": np.full(400, weight + 1e-3, np.float32),
                }
            )
            write_shard(tmp_path / name, shard, table, spec, shard)
    training = SHORT.model_copy(update={"objective": "weighted"})
    found = {
        name: accuracy(
            fit(
                f"student-{name}", soft_labels=[tmp_path / name], labelled=None, validation=None, training=training
            ).directory,
            problem,
        )["accuracy"]
        for name in ("truth", "lie")
    }
    assert found["truth"] > 0.8
    assert found["lie"] < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.05},
        {"precision": "bf16"},
        {"schedule": "constant", "clip": None, "warmup": 0.0},
        {"temperature": 2.0},
    ],
)
def test_other_settings_train_too(changes, fit, write_labels, problem):
    training = SHORT.model_copy(update=changes)
    result = fit(soft_labels=[write_labels([[600]], seed=5)], training=training)
    assert accuracy(result.directory, problem)["accuracy"] >= best_possible(problem)["accuracy"] - 0.03


def _of_a_newer_format(dataset):
    """Say in a dataset's manifest that a release to come wrote it."""
    for entry in (dataset / "_manifest").iterdir():
        data = json.loads(entry.read_text())
        spec = json.loads(data["spec"]) if isinstance(data["spec"], str) else data["spec"]
        spec = {**spec, "version": "9.0"}
        entry.write_text(json.dumps({**data, "spec": json.dumps(spec) if isinstance(data["spec"], str) else spec}))
    return dataset


def test_what_cannot_be_trained_is_refused(fit, write_labels, problem, tmp_path):
    table = problem(10, 0).table()
    unknown = table.set_column(1, "label", pa.array(["red"] * 9 + ["mauve"]))
    cases = [
        ({"labelled": None}, "training needs labelled examples or soft labels, got neither"),
        ({"labelled": unknown}, "must hold one of the 3 classes red, green, blue, got 'mauve' in row 9"),
        ({"labelled": table, "label_column": "class"}, "label column 'class' must be one of x, label"),
        ({"labelled": table.slice(0, 0)}, "labelled examples must have at least one row, got none"),
        (
            {"soft_labels": [write_labels([[4]], name="four", num_classes=3, classes=("red", "blue", "green"))]},
            "class 1 is 'blue' there and 'green' here",
        ),
        (
            {
                "soft_labels": [write_labels([[4]], name="bare", estimates=False)],
                "training": TrainConfig(objective="slam"),
            },
            "objective 'slam' needs the columns alpha and candidates beside the soft labels",
        ),
        (
            {
                "soft_labels": [write_labels([[4]], name="draws", kind="sampled", k=8)],
                "training": TrainConfig(objective="jsd"),
            },
            "training.objective must be 'distill' with labels of kind 'sampled', .* got 'jsd'; label with kind 'top_k'",
        ),
        (
            {"classes": ("red", "green"), "soft_labels": [write_labels([[4]])], "labelled": None, "validation": None},
            "the soft labels must have the student's 2 classes, got 3",
        ),
        (
            {"soft_labels": [write_labels([[4]], name="ours"), write_labels([[4]], name="theirs", teacher="another")]},
            "soft labels that are read together must mean the same, .*ours and .*theirs differ in teacher",
        ),
        (
            {"soft_labels": [write_labels([[4]], name="dense"), write_labels([[4]], name="k", kind="top_k", k=2)]},
            "must mean the same, .*dense and .*k differ in kind",
        ),
        (
            {"soft_labels": [_of_a_newer_format(write_labels([[4]], name="newer"))]},
            "soft labels of format version 9.0 cannot be read",
        ),
        (
            {"training": TrainConfig(lr=1e30, optimizer="sgd", clip=None, schedule="constant")},
            r"(the training loss became (nan|inf) in step \d+ of 12|logits stopped being numbers); lower training.lr",
        ),
    ]
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            fit(f"refused-{number}", **changes)
        assert not (tmp_path / f"refused-{number}").exists()
    fit("there")
    with pytest.raises(FileExistsError, match="already holds a student"):
        fit("there")


def test_examples_of_different_shapes_are_refused(fit, problem):
    wide = problem(10, 0)
    table = pa.table({"x": pa.array([[0.0] * 3] * 10, pa.list_(pa.float32(), 3)), "label": wide.y})
    with pytest.raises(ValueError, match=r"one shape, got labelled \[2\], validation \[3\]"):
        fit(validation=table)
