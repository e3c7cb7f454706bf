"""How good a student is, and how large and slow."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax

from distilbeam.selection.calibration import expected_calibration_error
from distilbeam.student.checkpoint import Student


def evaluate(
    logits: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    teacher_logprobs: npt.NDArray[np.floating] | None = None,
    bins: int = 15,
) -> dict[str, float]:
    """Measure predictions against the truth.

    Args:
      logits: float [n, C]; any rows of logits or log-probabilities.
      labels: true classes, integer [n].
      teacher_logprobs: the teacher's, float [n, C], for the agreement.
      bins: equally wide bins of the calibration error.

    Returns:
      `examples`; `accuracy`; `nll`, the mean negative log-likelihood in nats; `ece`, the expected calibration error;
      `agreement`, the share of rows whose top class is the teacher's, when its log-probabilities are given.

    Raises:
      ValueError: there is no row, the numbers of rows differ, or a logit is NaN.

    References:
      Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, section 2 (expected calibration error).
    """
    if not len(logits) or len(logits) != len(labels):
        raise ValueError(
            f"evaluation needs as many labels as logits, at least one, got {len(labels)} and {len(logits)}"
        )
    if np.isnan(logits).any():
        raise ValueError(f"logits must be numbers, row {np.isnan(logits).any(axis=1).argmax()} has NaN")
    logprobs = log_softmax(np.asarray(logits, np.float64), axis=1)
    predicted = logprobs.argmax(axis=1)
    result = {
        "examples": len(labels),
        "accuracy": float((predicted == labels).mean()),
        "nll": float(-logprobs[np.arange(len(labels)), labels].mean()),
        "ece": expected_calibration_error(logprobs, labels, bins),
    }
    if teacher_logprobs is not None:
        result["agreement"] = float((predicted == np.asarray(teacher_logprobs).argmax(axis=1)).mean())
    return result


def footprint(student: Student, repeats: int = 30) -> dict[str, float]:
    """Measure what a student costs where it runs.

    Args:
      student: a loaded student.
      repeats: timed calls per batch size, after three untimed ones.

    Returns:
      `parameters`; `size_bytes` of its weights; `latency_ms_batch1` and `latency_ms_batch64`, medians of a forward pass
      in milliseconds.
    """
    latency = {f"latency_ms_batch{size}": _median_ms(_forward(student, size), repeats) for size in (1, 64)}
    return {"parameters": student.num_parameters, "size_bytes": student.size_bytes, **latency}


def _forward(student: Student, size: int) -> Callable[[], object]:
    inputs = student.zeros(size)
    return lambda: student.module(inputs)


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 3):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[3:]))
