"""Structured pruning: what is cut, that the rest is a student like any other, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from distilbeam.inputs.config import InputConfig
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.export.export import export_student
from distilbeam.student.export.prune import prune_student, pruned_network
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train

INPUT = InputConfig(columns=("x",))


def _saved(tmp_path, config, input_shape, classes=("red", "green", "blue")):
    torch.manual_seed(0)
    module = build_student(config, input_shape, len(classes))
    return save_student(tmp_path / "s", module, config, classes, input_shape, {"seed": 1})


@pytest.mark.parametrize("residual", ["none", "plain"])
def test_half_the_channels_of_a_cnn(tmp_path, residual):
    config = StudentConfig(
        kind="cnn", width=0.25, residual=residual, input=InputConfig(columns=("x",), shape=(3, 8, 8))
    )
    former = load_student(_saved(tmp_path, config, (3, 8, 8)))
    pruned = load_student(prune_student(tmp_path / "s", 0.5, tmp_path / "p"))
    # channels 32, 16, 32 and a dense layer of 128 become 16, 8, 16 and 64; the image is 1 x 1 after three pools
    channels = [3, 16, 16, 8, 8, 16, 16]
    convolutions = sum(9 * a * b + 3 * b for a, b in pairwise(channels))
    assert pruned.num_parameters == convolutions + (16 * 64 + 64) + (64 * 3 + 3)
    assert pruned.extra["pruned"] == {"ratio": 0.5, "from": former.fingerprint()}
    assert pruned.extra["seed"] == 1
    assert pruned.fingerprint() != former.fingerprint()
    assert pruned.config.options["network"] == config.model_dump(mode="json")


def test_channels_of_no_weight_are_taken_and_change_nothing(tmp_path):
    config = StudentConfig(kind="mlp", hidden=(8, 8), input=INPUT)
    module = build_student(config, (2,), 3)
    with torch.no_grad():
        for layer in module.layers:
            layer.weight[1::2] *= 1e-6  # every second hidden unit says nothing
            layer.bias[1::2] = 0
        module.layers[1].weight[:, 1::2] *= 1e-6
        module.head.weight[:, 1::2] *= 1e-6
    save_student(tmp_path / "s", module, config, "abc", (2,))
    pruned = load_student(prune_student(tmp_path / "s", 0.5, tmp_path / "p"))
    assert [layer.weight.shape for layer in pruned.module.layers] == [(4, 2), (4, 4)]
    assert [layer.out_features for layer in pruned.module.layers] == [4, 4]
    inputs = np.random.default_rng(0).standard_normal((50, 2), np.float32)
    expected = load_student(tmp_path / "s").logits_of_inputs(inputs)
    np.testing.assert_allclose(pruned.logits_of_inputs(inputs), expected, atol=1e-4)


def test_a_pruned_student_is_trained_pruned_again_and_exported(tmp_path, problem):
    config = StudentConfig(kind="mlp", hidden=(64, 64), input=INPUT)
    data = {
        "classes": ("red", "green", "blue"),
        "labelled": problem(300, 0).table(),
        "label_column": "label",
        "soft_labels": [],
        "validation": problem(100, 1).table(),
        "seed": 0,
    }
    train(config, TrainConfig(epochs=8), directory=tmp_path / "s", **data)
    prune_student(tmp_path / "s", 0.9, tmp_path / "p")
    test = problem(1000, 2)

    def accuracy(name):
        return evaluate(load_student(tmp_path / name).logits_of_inputs(test.x), test.y)["accuracy"]

    pruned = load_student(tmp_path / "p")
    tuning = TrainConfig(epochs=30, lr=1e-2)
    train(pruned.config, tuning, directory=tmp_path / "t", init=tmp_path / "p", **data)
    # 7 of 64 units a layer are enough for three clusters, which nobody tells apart better than the true posterior
    best = evaluate(test.teacher_logits(), test.y)["accuracy"]
    assert load_student(tmp_path / "t").num_parameters < 0.03 * load_student(tmp_path / "s").num_parameters
    assert accuracy("s") > best - 0.03
    assert accuracy("t") > best - 0.03
    assert accuracy("p") < best - 0.1
    twice = load_student(prune_student(tmp_path / "t", 0.5, tmp_path / "again"))
    assert twice.config.options["network"] == config.model_dump(mode="json")
    assert twice.num_parameters < load_student(tmp_path / "t").num_parameters
    found = json.loads((export_student(tmp_path / "again", "pt2", tmp_path / "e") / "export.json").read_text())
    assert found["student"]["parameters"] == twice.num_parameters


def test_what_is_refused(tmp_path, monkeypatch):
    config = StudentConfig(kind="mlp", hidden=(8, 8), residual="laurel-rw", input=INPUT)
    _saved(tmp_path, config, (2,))
    with pytest.raises(ValueError, match="ratio must be a share of the channels between 0 and 1, got 1"):
        prune_student(tmp_path / "s", 1, tmp_path / "p")
    with pytest.raises(ValueError, match="not through learned residuals; got 'laurel-rw'"):
        prune_student(tmp_path / "s", 0.5, tmp_path / "p")
    linear = StudentConfig(kind="linear", input=INPUT)
    save_student(tmp_path / "l", build_student(linear, (2,), 3), linear, "abc", (2,))
    with pytest.raises(ValueError, match=r"has no hidden channels that could be taken away at ratio 0\.5"):
        prune_student(tmp_path / "l", 0.5, tmp_path / "p")
    plain = StudentConfig(kind="mlp", hidden=(8,), input=INPUT)
    with pytest.raises(ValueError, match=r"shapes must make tensors of the network smaller, got head.weight \[3, 9\]"):
        pruned_network((2,), 3, plain.model_dump(), {"head.weight": [3, 9]})
    save_student(tmp_path / "m", build_student(plain, (2,), 3), plain, "abc", (2,))
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r"pruning needs torch-pruning; install distilbeam\[compress\]"):
        prune_student(tmp_path / "m", 0.5, tmp_path / "p")
    assert not (tmp_path / "p").exists()
