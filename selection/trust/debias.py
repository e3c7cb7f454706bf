"""Weighted Distillation: weights that undo the bias of a noisy teacher.

On x the teacher's label is true with probability p(x), and distortion(x) = loss(wrong label) / loss(true label) under the
student. With

    w(x) = 1 / (1 + (1 - p(x)) (distortion(x) - 1)),    w (p l_true + (1 - p) l_wrong) = l_true:

the weighted loss on the teacher's labels equals the loss on true labels in expectation. 0 < w <= 1/p; w < 1 where the
student agrees with the truth already, w > 1 where it does not; w = 1 for a perfect teacher. Weights move emphasis, they
cannot flip a label where p < 1/2. They depend on the student: estimate them again as it changes.

Estimation: in the plane of confidences e(x) = (student margin, teacher margin), over the K = max(1, round(sqrt(|V|)/2))
nearest validation points, p is the mean mass that the teacher gives to the truth (0 or 1 for hard labels), and the distortion
the mean, over the mass it gives to wrong classes, of their loss over the loss of the truth. Validation points that are as far
away as the K-th count in equal parts for the places that are left: what a random order of them gives in the mean. (A student
that is equally unsure of everything puts all points into one place: K of them, the same for everybody, would decide.)
Cost: a k-d tree over the distinct points of the validation set; about K log |V| for each example.

References:
  Iliopoulos, Kontonis, Baykal, Menghani, Trinh, Vee: Weighted Distillation with Unlabeled Examples, NeurIPS 2022,
  arXiv 2210.06711 (formula and neighbours recalled; that the weight debiases is proved in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from distilbeam.selection.checks import (
    Floats,
    as_labels,
    as_log_probabilities,
    as_scores,
    require_each,
    require_same_length,
)
from distilbeam.selection.margins import ranks_of, top_margins
from distilbeam.selection.trust.ties import SAME

_CLIP = 1e-6  # student probabilities stay in [1e-6, 1 - 1e-6]
_AS_FAR = 1e-7  # distances in the plane that differ by less are one; rounding moves them by 1e-12, and places by `SAME`
_CHUNK = 1 << 14  # examples whose neighbours are looked up at a time


def debias_weight(accuracy: npt.ArrayLike, distortion: npt.ArrayLike) -> Floats:
    """Compute w = 1 / (1 + (1 - accuracy) (distortion - 1)).

    Args:
      accuracy: float, any shape, p in [0, 1]: how often the teacher's label is true.
      distortion: float, broadcast against it, >= 0: loss of a wrong label over loss of the true one.

    Returns:
      float64 weights of the broadcast shape, positive, at most 1/p.

    Raises:
      ValueError: an accuracy is outside [0, 1], a distortion negative or not finite, or both are 0, where no weight exists.

    Example:
      >>> debias_weight(0.8, [21.854345, 1.0]).round(6)
      array([0.193391, 1.      ])

    References:
      arXiv 2210.06711, the debiasing weight.
    """
    p, d = np.broadcast_arrays(np.asarray(accuracy, np.float64), np.asarray(distortion, np.float64))
    require_each("accuracy", p.ravel(), ((p >= 0) & (p <= 1)).ravel(), "probabilities from 0 to 1")
    require_each("distortion", d.ravel(), (np.isfinite(d) & (d >= 0)).ravel(), "finite and at least 0")
    mixed = p + (1 - p) * d
    require_each("accuracy", p.ravel(), (mixed > 0).ravel(), "above 0 where the distortion is 0")
    return np.asarray(1.0 / mixed)


@dataclass(frozen=True)
class DebiasEstimator:
    """Nearest neighbours of a validation set in the plane of student and teacher margins.

    Attributes:
      points: float64 [n, 2], the validation examples' student and teacher margins.
      wrong: float64 [n], the teacher's mass on wrong classes.
      distortions: float64 [n], loss of that mass over loss of the truth, 1 where there is none.
      notes: what the estimate falls back to, one sentence each.
    """

    points: Floats
    wrong: Floats
    distortions: Floats
    notes: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        student_logits: npt.ArrayLike,
        teacher_logprobs: npt.ArrayLike,
        labels: npt.ArrayLike,
        soft: bool = False,
    ) -> DebiasEstimator:
        """Fit on a validation set that neither model was trained on.

        Args:
          student_logits: float [n, C], of the student whose loss is to be weighted.
          teacher_logprobs: float [n, C], log-probabilities.
          labels: int [n], true classes.
          soft: whether the student learns from the teacher's probabilities (True) or from its most probable class (False).

        Returns:
          The estimator; `notes` says when the teacher is never wrong or labels are few.

        Raises:
          ValueError: shapes differ, probabilities do not sum to one, a label is not a class, or there are no labels.
        """
        losses, teacher = _student_losses(student_logits), as_log_probabilities("teacher_logprobs", teacher_logprobs)
        _require_same_classes(losses, teacher)
        truth = as_labels(labels, *losses.shape)
        if not len(truth):
            raise ValueError("labels must hold at least one validation example, got none")
        masses = np.exp(teacher) if soft else np.eye(teacher.shape[1])[teacher.argmax(axis=1)]
        rows = np.arange(len(truth))
        true_loss = losses[rows, truth]
        masses[rows, truth] = 0.0
        wrong = masses.sum(axis=1)
        ratio = np.divide((masses * losses).sum(axis=1), wrong * true_loss, out=np.ones(len(truth)), where=wrong > 0)
        points = _confidences(student_logits, teacher)
        return cls(points, wrong, ratio, _notes(len(truth), bool((ranks_of(teacher, truth) == 0).all())))

    @property
    def neighbours(self) -> int:
        """K, the number of neighbours."""
        return max(1, round(math.sqrt(len(self.points)) / 2))

    def weights(self, student_logits: npt.ArrayLike, teacher_logprobs: npt.ArrayLike) -> Floats:
        """Estimate the debiasing weights of examples with a teacher's label.

        Args:
          student_logits: float [n, C].
          teacher_logprobs: float [n, C], log-probabilities.

        Returns:
          float64 [n], positive; 1 where no neighbour is wrong. Where all are, p is taken as 1/(K+1), so that no weight exceeds
          K + 1. Their mean is not 1: `rescale` makes it so.

        Raises:
          ValueError: shapes differ, or probabilities do not sum to one.
        """
        queries = _confidences(student_logits, as_log_probabilities("teacher_logprobs", teacher_logprobs))
        parts = [self._weights(queries[start : start + _CHUNK]) for start in range(0, len(queries), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        names = ("points", "wrong", "distortions")
        return {**{name: getattr(self, name).tolist() for name in names}, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DebiasEstimator:
        """Rebuild an estimator from `to_json`'s data."""
        points, wrong, distortions = (np.asarray(data[name], np.float64) for name in ("points", "wrong", "distortions"))
        return cls(points, wrong, distortions, tuple(data["notes"]))

    @cached_property
    def _places(self) -> _Places:
        return _Places.of(self.points, self.wrong, self.distortions)

    def _weights(self, queries: Floats) -> Floats:
        count = self.neighbours
        total, spread = self._places.sums(queries, count)
        distortion = np.divide(spread, total, out=np.ones(len(queries)), where=total > 0)
        return debias_weight(np.clip(1 - total / count, 1 / (count + 1), 1), distortion)


class _Places(NamedTuple):
    """Distinct points of the plane, in each of which one or more examples lie.

    Attributes:
      tree: scipy's cKDTree of the places.
      counts: int64 [p], examples in each.
      wrong, spread: float64 [p], sums of their wrong mass, and of it times its distortion.
    """

    tree: Any
    counts: npt.NDArray[np.int64]
    wrong: Floats
    spread: Floats

    @classmethod
    def of(cls, points: Floats, wrong: Floats, distortions: Floats) -> _Places:
        from scipy.spatial import cKDTree  # a third of a second, which every worker would pay

        # points that rounding leaves in neighbouring cells are two places here, and at equal distance for `sums`
        _, first, place = np.unique(np.round(points / SAME), axis=0, return_index=True, return_inverse=True)
        place = place.ravel()
        counts = np.bincount(place)
        masses = [np.bincount(place, weights).astype(np.float64) for weights in (wrong, wrong * distortions)]
        return cls(cKDTree(points[first]), counts, masses[0], masses[1])

    def sums(self, queries: Floats, count: int) -> tuple[Floats, Floats]:
        """Sum the wrong mass, and it times its distortion, over the `count` nearest examples of each query."""
        asked = min(count, len(self.counts))
        while True:
            distances, near = self.tree.query(queries, k=[*range(1, asked + 1)])
            reached = np.cumsum(self.counts[near], axis=1)
            edge = np.take_along_axis(distances, (reached >= count).argmax(axis=1)[:, None], axis=1)
            # were the last place at the edge too, there could be more of them behind it
            if asked == len(self.counts) or (distances[:, -1] > edge[:, 0] + _AS_FAR).all():
                break
            asked = min(2 * asked, len(self.counts))
        inside, tied = distances < edge - _AS_FAR, np.abs(distances - edge) <= _AS_FAR
        here = self.counts[near]
        left = count - (here * inside).sum(axis=1, keepdims=True)
        share = inside + tied * (left / (here * tied).sum(axis=1, keepdims=True))
        return (share * self.wrong[near]).sum(axis=1), (share * self.spread[near]).sum(axis=1)


def rescale(weights: npt.ArrayLike) -> Floats:
    """Scale weights to mean 1, so that they change emphasis and not the step size of gradient descent.

    Args:
      weights: float [n], > 0.

    Returns:
      float64 [n] with mean 1.

    Raises:
      ValueError: a weight is not finite or not positive.
    """
    array = np.asarray(weights, np.float64)
    require_each("weights", array, np.isfinite(array) & (array > 0), "finite and above 0")
    return np.asarray(array / array.mean()) if array.size else array


def _student_losses(student_logits: npt.ArrayLike) -> Floats:
    """Return the cross-entropy of each class under the student, its probabilities clipped."""
    probabilities = np.exp(log_softmax(as_scores("student_logits", student_logits), axis=1))
    return np.asarray(-np.log(np.clip(probabilities, _CLIP, 1 - _CLIP)))


def _confidences(student_logits: npt.ArrayLike, teacher_logprobs: Floats) -> Floats:
    student = log_softmax(as_scores("student_logits", student_logits), axis=1)
    _require_same_classes(student, teacher_logprobs)
    return np.stack([top_margins(student), top_margins(teacher_logprobs)], axis=1)


def _require_same_classes(student: Floats, teacher: Floats) -> None:
    require_same_length(student_logits=student, teacher_logprobs=teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logprobs must have the student's {student.shape[1]:,} classes, got {teacher.shape[1]:,}"
        )


def _notes(count: int, never_wrong: bool) -> tuple[str, ...]:
    notes = {
        f"the teacher is never wrong on {count:,} validation labels": never_wrong,
        f"the weights rest on only {count:,} validation labels": count < 100,
    }
    return tuple(note for note, applies in notes.items() if applies)
