"""Losses that are looked at a step late, as on a GPU: in their order, before anything is saved, with nothing else changed."""

from __future__ import annotations

import json

import pytest
import torch
from small_trainings import settings, write_vectors

from distilbeam.progress import Progress
from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training import taken
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.taken import TakenStep, TakenSteps, lateness
from distilbeam.student.training.train import train


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def step(self, done, total, note=""):
        self.lines.append((done, total, note))

    def epoch(self, number, figures):
        self.lines.append((number, dict(figures)))


@pytest.fixture
def late(monkeypatch):
    """Look a step late on a CPU too."""

    def switch(steps):
        monkeypatch.setattr(taken, "lateness", lambda _: steps)

    return switch


@pytest.mark.parametrize("steps", [0, 1])
def test_steps_are_looked_at_in_their_order(steps, late):
    late(steps)
    seen, after = [], []
    waiting = TakenSteps(torch.device("cpu"), lambda step, loss, norm: seen.append((step.number, loss, norm)))
    for number in range(3):
        waiting.add(TakenStep(number, torch.tensor(number + 0.5), torch.tensor(2.0) if number else None, None, 0.1))
        after.append(len(seen))
    assert after == [1 - steps, 2 - steps, 3 - steps]
    waiting.finish()
    assert seen == [(0, 0.5, None), (1, 1.5, 2.0), (2, 2.5, 2.0)]


def test_a_gpu_is_waited_for_a_step_late():
    assert [lateness(torch.device(kind)) for kind in ("cpu", "cuda", "xla")] == [0, 1, 1]


def test_a_training_is_the_same_whenever_its_losses_are_looked_at(tmp_path, late):
    vectors = write_vectors(tmp_path / "labels")
    student, training = settings("vectors")
    found = {}
    for steps in (0, 1):
        late(steps)
        told, folder = Told(), tmp_path / f"late by {steps}"
        train(student, training, **vectors, directory=folder, seed=0, progress=told)
        state = load_student(folder).module.state_dict()
        found[steps] = told.lines, {name: x.tolist() for name, x in state.items()}
    assert found[0] == found[1]
    assert len(found[0][0]) > 2 * training.epochs


@pytest.mark.parametrize("steps", [0, 1])
def test_a_gradient_that_is_no_number_is_found_before_it_is_saved(steps, tmp_path, late):
    late(steps)
    vectors = write_vectors(tmp_path / "labels")
    student = StudentConfig(kind="small_trainings:EndlessGradient", input={"columns": ["x"]})
    for every in (1, 1000):
        folder = tmp_path / f"every {every}"
        with pytest.raises(
            ValueError, match=r"the norm of the gradient became nan in step 1 of \d+; lower training.lr"
        ):
            train(student, TrainConfig(checkpoint_steps=every), **vectors, directory=folder, seed=0)
        kept = tmp_path / f"every {every}.training"
        assert {path.name for path in kept.iterdir()} == {".lock", "metrics.jsonl", "stopped-at.safetensors"}
        assert [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()] == []
