"""A small step is computed on one thread, a large one on as many as torch has; the choice follows from network and batch."""

from __future__ import annotations

import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from small_trainings import write_vectors
from torch import Tensor, nn

from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.batches import open_sources
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.threads import SMALL_STEP, step_operations
from distilbeam.student.training.train import train

INPUT = {"columns": ["x"]}
SMALL = StudentConfig(kind="mlp", hidden=(8,), input=INPUT)


class Watched(nn.Module):
    """A network that writes down how many threads each of its training steps has."""

    seen: ClassVar[list[int]] = []

    def __init__(self, inputs: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(torch.get_num_threads())
        logits: Tensor = self.layers(x)
        return logits


def watched(input_shape: tuple[int, ...], num_classes: int, hidden: int) -> nn.Module:
    return Watched(input_shape[0], num_classes, hidden)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_threads", sys.modules[__name__])
    monkeypatch.setattr(Watched, "seen", [])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def sources_of(tmp_path, student, **training):
    given = TrainConfig(epochs=1, **training)
    data = {key: value for key, value in write_vectors(tmp_path / "labels", 40).items() if key != "validation_teacher"}
    processes = Processes(device=torch.device("cpu"), rank=0, size=1)
    sources = open_sources(student, given, **data, seed=0, processes=processes)
    return build_student(student, sources.input_shape, 3), sources


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("hidden", "threads"), [(8, 1), (SMALL_STEP // 300 // 8, 2)])
def test_steps_of_a_training(tmp_path, hidden, threads):
    data = write_vectors(tmp_path / "labels", 40)
    data.pop("validation_teacher")
    student = StudentConfig(kind="test_threads:watched", options={"hidden": hidden}, input=INPUT)
    train(student, TrainConfig(epochs=1), **data, directory=tmp_path / "student", seed=0)
    assert set(Watched.seen) == {threads}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_are_given_back_after_an_error(tmp_path):
    data = write_vectors(tmp_path / "labels", 40)
    data.pop("validation_teacher")
    student = StudentConfig(kind="test_threads:watched", options={"hidden": 8}, input=INPUT)
    with pytest.raises(ValueError, match=r"stopped being|became"):
        train(student, TrainConfig(epochs=3, lr=1e30, clip=1e30), **data, directory=tmp_path / "student", seed=0)
    assert torch.get_num_threads() == 2


def test_operations_are_those_of_the_layers(tmp_path):
    module, sources = sources_of(tmp_path, SMALL, batch_size=16)
    inputs = int(np.prod(sources.input_shape))
    products = 2 * 16 * (inputs * 8 + 8 * 3)
    parameters = inputs * 8 + 8 + 8 * 3 + 3
    assert step_operations(module, sources, SMALL) == 3 * products + 300 * parameters


def test_a_network_that_refuses_zeros_keeps_torchs_threads(tmp_path):
    module, sources = sources_of(tmp_path, SMALL)
    module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no zeros")))
    assert step_operations(module, sources, SMALL) == float("inf")
