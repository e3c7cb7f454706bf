"""Metrics of a student: accuracy, likelihood and calibration, by class too, and its size and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax

from distilbeam.selection.trust.calibration import expected_calibration_error
from distilbeam.student.checkpoint import Student
from distilbeam.student.evaluation.footprint import named_latencies

Logits = npt.NDArray[np.floating]
_LEAST_LOG_PROBABILITY = -60.0
Labels = npt.NDArray[np.integer]


def evaluate(
    logits: Logits,
    labels: Labels,
    teacher_logprobs: Logits | None = None,
    bins: int = 15,
) -> dict[str, float]:
    """Measure predictions against the truth.

    Args:
      logits: float [n, C]; any rows of logits or log-probabilities.
      labels: true classes, integer [n].
      teacher_logprobs: the teacher's, float [n, C], for the agreement; a row with NaN was not answered and does not
        count.
      bins: equally wide bins of the calibration error.

    Returns:
      `examples`; `accuracy`; `nll`, the mean negative log-likelihood in nats, where a class of probability 0 that turns out
      true costs 60 (as in `selection.calibration`) and not infinitely much; `ece`, the expected calibration error;
      `agreement`, the share of rows whose top class is the teacher's, when it answered any.

    Raises:
      ValueError: there is no row, the numbers of rows differ, a label is no class, or a logit is NaN.

    References:
      Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, section 2 (expected calibration error).
    """
    _require_logits(logits, labels)
    logprobs = log_softmax(np.asarray(logits, np.float64), axis=1)
    predicted = logprobs.argmax(axis=1)
    result = {
        "examples": len(labels),
        "accuracy": float((predicted == labels).mean()),
        "nll": float(-np.maximum(logprobs[np.arange(len(labels)), labels], _LEAST_LOG_PROBABILITY).mean()),
        "ece": expected_calibration_error(logprobs, labels, bins),
    }
    if teacher_logprobs is not None:
        if len(teacher_logprobs) != len(labels):
            raise ValueError(
                f"teacher_logprobs must have a row for each of the {len(labels)} labels, got {len(teacher_logprobs)}"
            )
        answered = ~np.isnan(teacher_logprobs).any(axis=1)
        if answered.any():
            same = predicted[answered] == np.asarray(teacher_logprobs)[answered].argmax(axis=1)
            result["agreement"] = float(same.mean())
    return result


def per_class(logits: Logits, labels: Labels, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Measure each class by itself.

    Args:
      logits: float [n, C].
      labels: true classes, integer [n].
      classes: names of the C classes in the order of the logits.

    Returns:
      For each class `class`, `examples` that are truly of it, `predicted` as it, and `recall`, `precision` and `f1`,
      which are None where they are not defined: no example, or none predicted.

    Raises:
      ValueError: as in `evaluate`, or there are not as many names as logits.
    """
    from sklearn.metrics import precision_recall_fscore_support  # a second, which every start would pay

    predicted = _predicted(logits, labels, classes)
    numbers = np.arange(len(classes))
    precision, recall, f1, examples = precision_recall_fscore_support(
        labels, predicted, labels=numbers, zero_division=np.nan
    )
    counts = np.bincount(predicted, minlength=len(classes))
    columns = zip(classes, examples, counts, recall, precision, f1, strict=True)
    return [
        {
            "class": name,
            "examples": int(n),
            "predicted": int(p),
            "recall": _known(r),
            "precision": _known(s),
            "f1": _known(f),
        }
        for name, n, p, r, s, f in columns
    ]


def worst_classes(
    logits: Logits, labels: Labels, classes: Sequence[str], worst: int = 5, shown: int = 3
) -> list[dict[str, Any]]:
    """Say what the classes with the lowest recall are mistaken for.

    Args:
      logits: float [n, C].
      labels: true classes, integer [n].
      classes: names of the C classes in the order of the logits.
      worst: most classes to describe; those with a mistake, the lowest recall first.
      shown: most other classes to name for each.

    Returns:
      For each class `class`, `examples`, `recall`, and `mistaken_for`: `class` and number of `examples`, the most
      frequent first.

    Raises:
      ValueError: as in `per_class`.
    """
    from sklearn.metrics import confusion_matrix

    predicted = _predicted(logits, labels, classes)
    confusion_CC = confusion_matrix(labels, predicted, labels=np.arange(len(classes)))
    examples, right = confusion_CC.sum(axis=1), confusion_CC.diagonal()
    with_mistakes = np.flatnonzero(right < examples)
    order = with_mistakes[np.argsort(right[with_mistakes] / examples[with_mistakes], kind="stable")]
    return [
        {
            "class": classes[c],
            "examples": int(examples[c]),
            "recall": float(right[c] / examples[c]),
            "mistaken_for": _most_frequent(confusion_CC[c], c, classes, shown),
        }
        for c in order[:worst]
    ]


def footprint(student: Student, repeats: int = 30) -> dict[str, float]:
    """Measure what a student costs in this process; `footprint.measure` does it in a fresh one, with its memory.

    Args:
      student: a loaded student.
      repeats: timed calls per batch size, after five untimed ones.

    Returns:
      `parameters`; `size_bytes` of its weights; `latency_ms_batch1` and `latency_ms_batch64`, medians of a forward pass
      in milliseconds, and `..._p95`, their 95th percentiles.
    """
    with torch.inference_mode():
        latencies = named_latencies(lambda rows: _forward(student, rows), repeats)
    return {"parameters": student.num_parameters, "size_bytes": student.size_bytes, **latencies}


def _forward(student: Student, rows: int) -> Callable[[], object]:
    inputs = student.zeros(rows)
    return lambda: student.module(inputs)


def _require_logits(logits: Logits, labels: Labels) -> None:
    if not len(logits) or len(logits) != len(labels):
        raise ValueError(
            f"evaluation needs as many labels as logits, at least one, got {len(labels)} and {len(logits)}"
        )
    wrong = (np.asarray(labels) < 0) | (np.asarray(labels) >= logits.shape[1])
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"labels must be classes from 0 to {logits.shape[1] - 1:,}, row {row} has {labels[row]}")
    if np.isnan(logits).any():
        raise ValueError(f"logits must be numbers, row {np.isnan(logits).any(axis=1).argmax()} has NaN")


def _predicted(logits: Logits, labels: Labels, classes: Sequence[str]) -> npt.NDArray[np.intp]:
    _require_logits(logits, labels)
    if logits.shape[1] != len(classes):
        raise ValueError(f"classes must name the {logits.shape[1]} columns of the logits, got {len(classes)} names")
    predicted: npt.NDArray[np.intp] = np.asarray(logits).argmax(axis=1)
    return predicted


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _most_frequent(
    counts_C: npt.NDArray[np.integer], own: int, classes: Sequence[str], shown: int
) -> list[dict[str, Any]]:
    others = [int(c) for c in np.argsort(-counts_C, kind="stable") if c != own and counts_C[c]]
    return [{"class": classes[c], "examples": int(counts_C[c])} for c in others[:shown]]
