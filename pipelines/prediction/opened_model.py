"""The model that predicts: a student, an export of one, the student that a run has kept, or a Hugging Face classifier."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from distilbeam.pipelines.prediction.huggingface import HuggingFaceClassifier, kind_of
from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import DESCRIPTION
from distilbeam.student.export.load import load_model
from distilbeam.student.predictions import Predictor
from distilbeam.student.trust import trust as trust_code

Model = Predictor
_lock = threading.Lock()
_models: dict[tuple[str, str | None], Model] = {}


def open_model(directory: Path, column: str | None = None) -> tuple[Path, Model]:
    """Load the model of a directory.

    Args:
      directory: of a student, an export, a run, or a Hugging Face classifier.
      column: of the texts or images, for a Hugging Face classifier, which does not say it.

    Returns:
      The directory of the model itself, and the model.

    Raises:
      ValueError: it holds none, or a run without figures, which say what student is kept; or a column for a student.
    """
    if not directory.is_dir():
        raise ValueError(
            f"STUDENT must be the directory of a student, an export, a run or a Hugging Face classifier, got {directory}: "
            + ("it is a file" if directory.is_file() else "none is there")
        )
    own = (directory / DESCRIPTION).exists() or (directory / "export.json").exists()
    if not own and kind_of(directory) is not None:
        return directory, HuggingFaceClassifier(directory, column)
    if column is not None:
        raise ValueError(
            f"--input-column is for a Hugging Face folder, a student knows its columns; leave {column} out"
        )
    if is_run(directory):
        directory = kept_in(directory)
    return directory, load_model(directory)


def is_run(directory: Path) -> bool:
    """Tell whether a directory is a run's."""
    return (directory / "students").is_dir() and (directory / "config.toml").exists()


def cached_model(directory: str, column: str | None = None, trust: Sequence[str] = ()) -> Model:
    """Return this process's copy of the model of a directory, which its threads share; a process keeps the last one.

    Args:
      directory, column: see `open_model`.
      trust: modules whose code it may call besides what this process trusts; see `student.trust`.
    """
    with _lock:
        if (directory, column) not in _models:
            trust_code(*trust)
            _models.clear()
            _models[directory, column] = open_model(Path(directory), column)[1]
        return _models[directory, column]


def kept_in(run: Path) -> Path:
    """Find the student that a run's figures are about: that of the last training, or that of the round that was kept.

    Raises:
      ValueError: there are no figures yet, or their student is gone.
    """
    figures = run / "report" / "metrics.json"
    if not figures.exists():
        raise ValueError(
            f"{run} has no figures yet, which say what student is kept: 'distilbeam evaluate CONFIG' does what is left, or name "
            f"a student, such as {run / 'students' / 'round=000'}"
        )
    found = read_json(figures)
    final = found.get("final")
    student: Path
    if final is not None and final.get("student") is not None:
        student = run / final["directory"] / final["student"]
    else:
        student = run / "students" / f"round={found['kept']['round']:03d}"
    if not student.is_dir():
        raise ValueError(f"{student}, which {figures} says is kept, is not there; name another student of the run")
    return student
