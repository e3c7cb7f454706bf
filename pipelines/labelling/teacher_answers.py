"""The teacher's answers for a labelled set, as arrays in the set's own row order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from distilbeam.pipelines.labelling.dead_letters import count_letters
from distilbeam.pipelines.labelling.label_cache import known_logits
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest


def read_answers(dataset: Path, spec: SoftLabelSpec, rows: int) -> npt.NDArray[np.float32]:
    """Read dense soft labels of temperature 1 by row of the set that was asked about.

    Args:
      dataset: directory of the soft-label dataset.
      spec: its specification.
      rows: number of rows of the set.

    Returns:
      float32 [rows, classes] log-probabilities; NaN in the rows that the teacher could not answer.
    """
    return known_logits([str(dataset)], spec, np.arange(rows))


def calibrated(logprobs: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """Say answers as soft labels of a temperature do.

    Args:
      logprobs: float [rows, classes], of temperature 1; rows may be NaN.
      temperature: of the soft labels.

    Returns:
      float32 [rows, classes] log-probabilities.
    """
    divided: npt.NDArray[np.float32] = log_softmax(logprobs / np.float32(temperature), axis=1)
    return divided


def tally(dataset: Path, failed: int) -> dict[str, Any]:
    """Add up what a dataset's manifest entries say about the work.

    Args:
      dataset: directory of the soft-label dataset.
      failed: number of rows in its dead letters.

    Returns:
      Numbers of rows labelled, failed and reused, of teacher calls (rows asked) and requests, bytes written, seconds of work.
    """
    entries = read_manifest(dataset).entries
    totals = {name: sum(entry.extra[name] for entry in entries) for name in ("calls", "requests", "reused", "seconds")}
    return {**totals, "failed": failed, "rows": sum(e.rows for e in entries), "bytes": sum(e.bytes for e in entries)}


def count_dead_letters(directory: Path) -> int:
    """Return the number of rows in a directory of dead letters."""
    return count_letters(directory)
