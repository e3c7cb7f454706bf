"""The base class of acquisition strategies, the pool as they see it, and the three plain ones: chance, largest gains, the game.

    selector("rad", wrong=120).select(pool, budget, rng)  ->  bool [n], exactly `budget` of them True

`registry` lists them all. Those that distribute are functions of each point's own gain and one threshold
(`distilbeam.selection.sketch.gain_sketch`); this module computes them on one machine. The others compare points with each
other; they refuse pools beyond their `limit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats, as_budget, as_scores, require_each, require_same_length
from distilbeam.selection.gains import gain_named
from distilbeam.selection.games.rad import rad_marginals
from distilbeam.selection.rounding import Bools, dep_round


@dataclass(frozen=True)
class CandidatePool:
    """The unlabelled examples as selectors see them.

    Attributes:
      size: n, the number of examples without a label.
      logits: float [n, C], the student's, or None.
      embeddings: float [n, d], for instance the student's last hidden layer, or None.
      labelled_embeddings: float [m, d] of the examples that have a label already; None counts as none.
      errors: float [n] in [0, 1], the teacher's estimated error rate at each example (`LocalErrors`), or None.
      caps: float [n] in [0, 1], the largest error rate that is believable at each example, or None.
      gains: float [n], non-negative, where they are known already; None to compute a strategy's own from the logits.
    """

    size: int
    logits: npt.NDArray[np.floating] | None = None
    embeddings: npt.NDArray[np.floating] | None = None
    labelled_embeddings: npt.NDArray[np.floating] | None = None
    errors: npt.NDArray[np.floating] | None = None
    caps: npt.NDArray[np.floating] | None = None
    gains: npt.NDArray[np.floating] | None = None

    def gains_by(self, gain: str, selector: str) -> Floats:
        """Return the gains in float64: those that are known, else those of a name in `gains.GAINS`.

        Raises:
          ValueError: there are neither gains nor logits, their number is not n, or the name is unknown.
        """
        if self.gains is None:
            return gain_named(gain)(self.require_logits(selector))
        gains = np.asarray(self.gains, np.float64)
        require_same_length(pool=np.empty(self.size), gains=gains)
        return gains

    def require_logits(self, selector: str) -> Floats:
        """Return the logits in float64.

        Raises:
          ValueError: there are none, or their number is not n.
        """
        if self.logits is None:
            raise ValueError(f"logits must be given for the selector {selector}, got none")
        logits = as_scores("logits", self.logits)
        require_same_length(pool=np.empty(self.size), logits=logits)
        return logits

    def require_embeddings(self, selector: str, dtype: type[np.floating] | None = np.float64) -> npt.NDArray[Any]:
        """Return the embeddings, in float64 or in the type given; None keeps the one they have.

        Raises:
          ValueError: there are none, their number is not n, or one is not finite.
        """
        if self.embeddings is None:
            raise ValueError(f"embeddings must be given for the selector {selector}, got none")
        return _as_embeddings("embeddings", self.embeddings, self.size, dtype)

    def require_rates(self, field: str, selector: str) -> Floats:
        """Return `errors` or `caps` in float64.

        Raises:
          ValueError: there are none, their number is not n, or one is outside [0, 1].
        """
        rates = getattr(self, field)
        if rates is None:
            raise ValueError(f"{field} must be given for the selector {selector}, got none; LocalErrors estimates them")
        array = np.asarray(rates, np.float64)
        require_same_length(pool=np.empty(self.size), **{field: array})
        require_each(field, array, (array >= 0) & (array <= 1), "between 0 and 1")
        return array

    def centres(self, dimension: int, dtype: type[np.floating] | None = np.float64) -> npt.NDArray[Any]:
        """Return the labelled embeddings, in float64 or as `require_embeddings`; [0, dimension] if there are none."""
        if self.labelled_embeddings is None:
            return np.zeros((0, dimension), dtype or np.float32)
        labelled = self.labelled_embeddings
        labelled = _as_embeddings("labelled_embeddings", labelled, len(labelled), dtype)
        if labelled.shape[1] != dimension:
            raise ValueError(
                f"labelled_embeddings must have the pool's {dimension} dimensions, got {labelled.shape[1]}"
            )
        return labelled


class Selector(ABC):
    """A rule for choosing examples.

    A rule of one's own is a subclass with `name`, `reads` and `_select`; a line in `registry.STRATEGIES`, or its name
    `module:Class`, leads there from a run's `selection.method`.

    Attributes:
      name: the name by which `selector` and `selection.method` find it.
      reads: which fields of a `CandidatePool` it reads, of "gains" (or the logits that they follow from), "logits",
        "embeddings", "errors" and "caps".
      distributes: whether it needs no more of the pool at a time than a shard.
      limit: largest pool that it accepts, None if any.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    distributes: ClassVar[bool] = True
    limit: int | None = None

    def select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        """Choose examples.

        Args:
          pool: the unlabelled examples.
          budget: how many to choose, between 1 and the size of the pool.
          rng: the only source of randomness; ties are broken by it.

        Returns:
          bool [n] with exactly `budget` entries True.

        Raises:
          ValueError: what the rule needs is missing, the budget is out of range, or the pool exceeds the limit.
        """
        budget = as_budget(budget, pool.size)
        if self.limit is not None and pool.size > self.limit:
            from distilbeam.selection.strategies.registry import distributing  # which names the classes of this module

            raise ValueError(
                f"pool must hold at most {self.limit:,} examples for the selector {self.name}, which compares examples "
                f"with each other in memory, got {pool.size:,}; use {', '.join(distributing())}, or a random part of the pool"
            )
        selected = self._select(pool, budget, rng)
        assert selected.sum() == budget, f"{self.name} chose {selected.sum()} of {budget}"
        return selected

    def probabilities(self, pool: CandidatePool, budget: int) -> Floats | None:  # noqa: ARG002
        """Return with which probability each example is chosen, float64 [n]; None where the rule takes the best ones."""
        return None

    def wrong_in_game(self, examples: int, wrong_share: float) -> float | None:  # noqa: ARG002
        """Return k of the game whose threshold is this rule, so that a run plays it on sketches; None for other rules.

        Args:
          examples: n, the size of the pool.
          wrong_share: expected share of wrong labels, in [0, 1].
        """
        return None

    @abstractmethod
    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools: ...


class Uniform(Selector):
    """Choose by chance, every set of `budget` examples alike."""

    name = "uniform"

    def probabilities(self, pool: CandidatePool, budget: int) -> Floats:
        """Return budget / n for each."""
        return np.full(pool.size, budget / pool.size)

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        return mask(rng.choice(pool.size, budget, replace=False), pool.size)


@dataclass(frozen=True)
class TopGain(Selector):
    """Choose the largest gains; ties by chance.

    Attributes:
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
    """

    name: ClassVar[str] = "greedy"
    reads: ClassVar[tuple[str, ...]] = ("gains",)
    gain: str = "margin"

    def wrong_in_game(self, examples: int, wrong_share: float) -> float:  # noqa: ARG002
        """Return 0: the game without a wrong label takes the largest gains."""
        return 0.0

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        gains = pool.gains_by(self.gain, self.gain)
        return mask(np.lexsort((rng.random(pool.size), -gains))[:budget], pool.size)


@dataclass(frozen=True)
class Rad(Selector):
    """Choose by the game against the teacher's mistakes (arXiv 2210.01213).

    Attributes:
      wrong: k, the number of wrong labels the teacher would give in this pool.
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
    """

    name: ClassVar[str] = "rad"
    reads: ClassVar[tuple[str, ...]] = ("gains",)
    wrong: float = 0.0
    gain: str = "margin"

    def wrong_in_game(self, examples: int, wrong_share: float) -> float:
        """Return the expected number of wrong labels."""
        return examples * wrong_share

    def probabilities(self, pool: CandidatePool, budget: int) -> Floats:
        """Return the marginals of the game."""
        return rad_marginals(pool.gains_by(self.gain, self.name), self.wrong, budget).probabilities

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        return dep_round(self.probabilities(pool, budget), rng)


def mask(indices: npt.NDArray[np.integer], size: int) -> Bools:
    """Return bool [size], True at the indices."""
    result = np.zeros(size, bool)
    result[indices] = True
    return result


def _as_embeddings(
    field: str, embeddings: npt.ArrayLike, size: int, dtype: type[np.floating] | None
) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.asarray(embeddings, dtype)
    if array.ndim != 2 or len(array) != size:
        raise ValueError(f"{field} must have shape [{size:,} examples, dimensions], got {array.shape}")
    require_each(field, array, np.asarray(np.isfinite(array).all(axis=1)), "finite in each row")
    return array
