"""Trackers get the figures that metrics.jsonl has, into a folder that goes with the student; a stopped training goes on in its run."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from distilbeam.student.training.config import FREE, TrainConfig
from distilbeam.student.training.metrics_log import Observer
from distilbeam.student.training.trackers import open_tracker, trackers_of


class Silent:
    """A progress that nobody sees."""

    def step(self, *_: object) -> None: ...

    def epoch(self, *_: object) -> None: ...


def train(folder: Path, training: TrainConfig, done: int, epochs: range) -> None:
    with Observer(folder, training, 40, done, 0.0, Silent(), silent=False) as observer:  # type: ignore[arg-type]
        for epoch in epochs:
            observer.step(10 * epoch, 1.0 / epoch, 0.01, None, 64)
            observer.epoch(10 * epoch, {"epoch": epoch, "validation_nll": 1.0 / epoch})


def figures(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_nll"]) for line in lines]


def test_which_trackers_are_meant() -> None:
    assert trackers_of(TrainConfig()) == ()
    assert trackers_of(TrainConfig(tensorboard=True)) == ("tensorboard",)
    assert trackers_of(TrainConfig(tensorboard=True, track="mlflow")) == ("tensorboard", "mlflow")
    assert trackers_of(TrainConfig(tensorboard=True, track="tensorboard")) == ("tensorboard",)
    assert "track" in FREE  # what is told does not change what is learned


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of MLflow and what it stands on
def test_mlflow_has_the_figures_of_both_halves_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    training = TrainConfig(track="mlflow", lr=0.02)
    train(tmp_path, training, 0, range(1, 3))
    train(tmp_path, training, 20, range(3, 5))
    with sqlite3.connect(tmp_path / "mlflow/mlflow.db") as database:
        rows = database.execute("select step, value from metrics where key = 'validation_nll' order by step").fetchall()
        assert rows == figures(tmp_path)
        assert [step for step, _ in rows] == [10, 20, 30, 40]
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        assert database.execute("select value from params where key = 'lr'").fetchone() == ("0.02",)


def log_records(log: bytes, block: int = 32_768, header: int = 7) -> Iterator[bytes]:
    """Read the records of a log in LevelDB's format, which an offline run of Weights & Biases is behind its first seven bytes."""
    place, record = header, b""
    while place + header <= len(log):
        if block - place % block < header:  # too few bytes for a header: the rest of a block is empty
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", log, place)
        record += log[place + header : place + header + size]
        place += header + size
        if kind in (1, 4):  # whole, or the last of several
            yield record
            record = b""


def test_wandb_has_the_figures_of_both_halves_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "online")  # nothing is sent all the same
    training = TrainConfig(track="wandb", lr=0.02)
    train(tmp_path, training, 0, range(1, 3))
    train(tmp_path, training, 20, range(3, 5))
    wandb.teardown()  # its process writes in its own time
    ids, rows, settings = set(), [], {}
    for file in sorted((tmp_path / "wandb").rglob("*.wandb")):
        for data in log_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows += [(record.history.step.num, items["validation_nll"])] if "validation_nll" in items else []
    assert sorted(rows) == figures(tmp_path)
    assert len(ids) == 1
    assert settings["lr"] == 0.02


@pytest.mark.parametrize(
    ("name", "module"),
    [("mlflow", "mlflow.tracking"), ("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")],
)
def test_one_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        ValueError, match=rf"^training.track = '{name}' needs its package; pip install 'distilbeam\[{name}\]'"
    ):
        open_tracker(name, tmp_path, 0, {})
