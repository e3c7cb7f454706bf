"""What a training of a file would take, said before any of it is done: rows, epochs, and what is there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from distilbeam.storage.paths import to_path
from distilbeam.student.training.checkpoints import SUFFIX
from distilbeam.teacher.softlabels import read_manifest


def plan_launch(
    soft_labels: Sequence[str], labelled: str | None, directory: str, epochs: int, batch_size: int, unit: str = "row"
) -> str:
    """Say what a training would learn from, how long, and whether it has begun; nothing is trained and no network is built.

    Args:
      soft_labels: folders of soft-label datasets.
      labelled: Parquet of human-labelled examples, or None.
      directory: where the student appears.
      epochs, batch_size: of the training; the batch is that of all processes together.
      unit: what a row of the soft labels is.

    Raises:
      ValueError: there are no soft labels in one of the folders.
      FileNotFoundError: the labelled examples are not there.
    """
    soft = sum(entry.rows for place in soft_labels for entry in read_manifest(to_path(place)).entries)
    human = 0 if labelled is None else pq.read_metadata(labelled).num_rows
    there = Path(directory)
    learned = [f"{soft:,} labelled {unit}(s) of {len(soft_labels):,} dataset(s)"] if soft_labels else []
    learned += [f"{human:,} human-labelled row(s)"] if labelled is not None else []
    state = "nothing of it is done yet"
    if there.exists() and any(there.iterdir()):
        state = "the student is there already, and is left alone"
    elif there.with_name(there.name + SUFFIX).exists():
        state = "a stopped training is there, which would go on"
    return (
        f"{epochs:,} epoch(s) of {' and '.join(learned) or 'nothing'}, {batch_size:,} at a time, into {there}: {state}. No teacher is "
        "asked; nothing was trained."
    )
