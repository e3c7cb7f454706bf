"""The model that predicts: a student, an export of one, or the student that a run has kept."""

from __future__ import annotations

from pathlib import Path

from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import Student
from distilbeam.student.export.load import ExportedStudent, load_model

Model = Student | ExportedStudent


def open_model(directory: Path) -> tuple[Path, Model]:
    """Load the model of a directory.

    Args:
      directory: of a student, an export or a run.

    Returns:
      The directory of the model itself, and the model.

    Raises:
      ValueError: it holds none, or a run without figures, which say what student is kept.
    """
    if not directory.is_dir():
        raise ValueError(
            f"STUDENT must be the directory of a student, an export or a run, got {directory}: none is there"
        )
    if (directory / "students").is_dir() and (directory / "config.toml").exists():
        directory = kept_in(directory)
    return directory, load_model(directory)


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
