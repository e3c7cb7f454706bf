"""The soft labels that a place stands for: a dataset's own, or those of a run's or a labelling job's directory, by their use."""

from __future__ import annotations

from pathlib import Path

from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.settings import read_toml
from distilbeam.storage.paths import is_remote
from distilbeam.teacher.softlabels.class_columns import ID
from distilbeam.teacher.softlabels.manifest import FOLDER

_ABOVE = 2  # folders between a round's labels and the run


def splits_of(place: str) -> dict[str, list[str]]:
    """Find the labels of a place.

    Args:
      place: a soft-label dataset, or the directory of a run or a labelling job.

    Returns:
      Names of splits and the datasets of each: `train`, and of a run also `validation` and `test`, the teacher's answers for
      these sets.

    Raises:
      ValueError: a directory without labels.
    """
    root = Path(place)
    if is_remote(place) or (root / FOLDER).is_dir():
        return {"train": [place]}
    if (root / "labels" / FOLDER).is_dir():  # a labelling job
        return {"train": [str(root / "labels")]}
    where = RunDirectory(root)
    bought = [str(path) for path in sorted((root / "labels").glob("round=???")) if where.summary(path).exists()]
    if not bought:
        raise ValueError(
            f"{place} has no soft labels: name a dataset, such as run/labels/round=000, or the directory of a run or a "
            "labelling job"
        )
    asked = {name: where.asked(name) for name in ("validation", "test")}
    return {"train": bought, **{name: [str(path)] for name, path in asked.items() if where.summary(path).exists()}}


def id_of(place: str) -> str:
    """Find the name of the user's column of ids: `data.id` of the run or the job that a place is or lies in, else `example_id`."""
    root = Path(place).absolute()
    for directory in () if is_remote(place) else (root, *list(root.parents)[:_ABOVE]):
        if (directory / "config.toml").exists():
            return str(read_toml(directory / "config.toml").get("data", {}).get("id") or ID)
    return ID
