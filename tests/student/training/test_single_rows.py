"""Batch norms get at least two rows in every step, in every process, or the training says so before its first step."""

from __future__ import annotations

import pytest
import torch
from small_trainings import NAMES, write_vectors
from torch import nn

from distilbeam.student.checkpoint import load_student
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.batches import fewest_rows, open_sources
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.single_rows import require_room_for_norms
from distilbeam.student.training.train import train

VECTORS = {"columns": ["x"]}
OWN = StudentConfig(kind="test_single_rows:normed", input=VECTORS)
RESNET = StudentConfig(kind="resnet", depth=8, width=0.25, input={"columns": ["x"], "shape": [1, 2, 2]})


def normed(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "test_single_rows", __import__("sys").modules[__name__])


def fit(tmp_path, rows, student=OWN, labelled=False, **training):
    data = write_vectors(tmp_path / "labels", rows)
    data.pop("validation_teacher")
    if not labelled:
        data["labelled"] = None
    return train(student, TrainConfig(epochs=2, **training), **data, directory=tmp_path / "student", seed=0)


@pytest.mark.parametrize("student", [OWN, RESNET])
@pytest.mark.parametrize(("rows", "batch_size"), [(65, 64), (33, 16), (9, 4), (7, 3)])
def test_a_row_beyond_whole_steps_ends_no_training(tmp_path, student, rows, batch_size):
    result = fit(tmp_path, rows, student, batch_size=batch_size)
    assert result.metrics["steps"] == 2 * -(-rows // batch_size)
    assert torch.isfinite(next(load_student(result.directory).module.parameters())).all()


@pytest.mark.parametrize(("rows", "batch_size"), [(6, 1), (5, 2)])
def test_steps_of_one_row_are_refused_before_the_first(tmp_path, rows, batch_size):
    with pytest.raises(
        ValueError,
        match=rf"training.batch_size must leave every process at least two rows .* got {batch_size} for {rows} rows and 1 process",
    ):
        fit(tmp_path, rows, batch_size=batch_size)
    assert not (tmp_path / "student.training").exists()
    without = StudentConfig(kind="mlp", hidden=(8,), input=VECTORS)
    assert fit(tmp_path / "mlp", rows, without, batch_size=batch_size).metrics["soft_rows"] == rows


def test_human_labels_make_room_in_a_step(tmp_path):
    assert fit(tmp_path, 6, labelled=True, batch_size=4).metrics["hard_rows"] == 30


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("rows", "hard", "batch_size"), [(50, 0, 16), (13, 0, 6), (40, 30, 8), (0, 30, 7), (2, 30, 8)])
def test_the_fewest_rows_of_a_step_are_counted_as_they_are_dealt_out(tmp_path, rows, hard, batch_size, size):
    data = write_vectors(tmp_path / "labels", max(rows, 2))
    student, training = StudentConfig(kind="linear", input=VECTORS), TrainConfig(batch_size=batch_size)
    found, everyone = [], []
    for rank in range(size):
        processes = _Counted(torch.device("cpu"), rank, size)
        sources = open_sources(
            student,
            training,
            classes=NAMES,
            labelled=data["labelled"] if hard else None,
            label_column="label",
            soft_labels=data["soft_labels"] if rows else [],
            validation=None,
            seed=3,
            processes=processes,
        )
        found.append(fewest_rows(sources))
        everyone += [len(step) for step in sources.epoch(0, 0)]
    assert found == [min(count for count in everyone if count)] * size


class _Counted(Processes):
    """One of several processes, looked at alone."""

    def sum(self, value: float) -> float:
        return value


def test_the_look_at_the_network_changes_nothing(tmp_path):
    data = write_vectors(tmp_path / "labels", 6)
    training = TrainConfig(batch_size=1)
    sources = open_sources(
        RESNET,
        training,
        classes=NAMES,
        labelled=None,
        label_column="label",
        soft_labels=data["soft_labels"],
        validation=None,
        seed=0,
        processes=Processes(torch.device("cpu")),
    )
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"training\.batch_size"):
        require_room_for_norms(module, sources, RESNET)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_dataset_shares_the_end_of_an_epoch(tmp_path):
    data = write_vectors(tmp_path / "labels", 257 - 1)
    dataset = SoftLabelDataset(data["soft_labels"], 100, 0)
    assert [len(batch["row"]) for batch in dataset] == [100, 78, 78]
    assert len(dataset) == 3
