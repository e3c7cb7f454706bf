"""A folder that holds no student is refused with what it holds instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distilbeam.student.checkpoint import load_student
from distilbeam.student.export.load import load_export, load_model


def labels(folder: Path) -> None:
    (folder / "_manifest").mkdir(parents=True)


def run(folder: Path) -> None:
    (folder / "students" / "round=000").mkdir(parents=True)
    (folder / "config.toml").write_text("")


def job(folder: Path) -> None:
    (folder / "labels" / "_manifest").mkdir(parents=True)


def predictions(folder: Path) -> None:
    folder.mkdir()
    (folder / "_predict.json").write_text("{}")


def several(folder: Path) -> None:
    for name in ("onnx", "int8"):
        (folder / name).mkdir(parents=True)
        (folder / name / "export.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (labels, "it holds soft labels, which students learn from"),
        (run, "it is the directory of a run, whose students are in .*given/students"),
        (job, "it is the directory of a labelling job, which trains no student"),
        (predictions, "it holds predictions"),
        (several, "name one of those inside it, such as .*given/int8"),
        (Path.touch, "it is a file"),
    ],
)
@pytest.mark.parametrize("read", [load_student, load_export, load_model])
def test_it_is_said(make: Callable[[Path], object], said: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "given")
    with pytest.raises(ValueError, match=rf"given .*; {said}$"):
        read(tmp_path / "given")


def test_nothing_is_guessed_of_what_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no student: student\.json is missing$"):
        load_student(tmp_path)
