"""The field's selectors of examples to label, behind one interface, so that they can be compared.

    selector("rad", wrong=120).select(pool, budget, rng)  ->  bool [n], exactly `budget` of them True

| name | what it buys | needs | pool |
|---|---|---|---|
| uniform | chance | nothing | distributes |
| margin, entropy, least-confidence | the largest gains | logits | distributes |
| rad | the game against the teacher's mistakes | logits, the number of wrong labels | distributes |
| rad-loss | the game in which a wrong label also costs | logits, the number of wrong labels | distributes |
| rad-capped | the game with local bounds of the error rate | logits, local errors and caps | distributes |
| correct-gain | the largest expected gains of right labels | logits, local errors | distributes |
| k-center | points that cover the embedding space | embeddings | in memory |
| cluster-margin | small margins, spread over clusters | logits, embeddings | candidates in memory |
| herding | what covers the uncertain examples | logits, embeddings | in memory |
| badge | large gradients in different directions | logits, embeddings | in memory |

Those that distribute are functions of each point's own gain and one threshold (`distilbeam.selection.sketch.gain_sketch`); this module
computes them on one machine. The others compare points with each other; they refuse pools beyond their `limit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats, as_budget, as_scores, require_each, require_same_length
from distilbeam.selection.gains import entropy_gain, least_confidence_gain, margin_gain
from distilbeam.selection.games.rad import rad_marginals
from distilbeam.selection.rounding import Bools, dep_round

GAINS: dict[str, Callable[[npt.ArrayLike], Floats]] = {
    "margin": margin_gain,
    "entropy": entropy_gain,
    "least-confidence": least_confidence_gain,
}


@dataclass(frozen=True)
class CandidatePool:
    """The unlabelled examples as selectors see them.

    Attributes:
      size: n, the number of examples.
      logits: float [n, C], the student's, or None.
      embeddings: float [n, d], for instance the student's last hidden layer, or None.
      labelled_embeddings: float [m, d] of the examples that have a label already; None counts as none.
      errors: float [n] in [0, 1], the teacher's estimated error rate at each example (`LocalErrors`), or None.
      caps: float [n] in [0, 1], the largest error rate that is believable at each example, or None.
    """

    size: int
    logits: npt.NDArray[np.floating] | None = None
    embeddings: npt.NDArray[np.floating] | None = None
    labelled_embeddings: npt.NDArray[np.floating] | None = None
    errors: npt.NDArray[np.floating] | None = None
    caps: npt.NDArray[np.floating] | None = None

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

    def require_embeddings(self, selector: str) -> Floats:
        """Return the embeddings in float64.

        Raises:
          ValueError: there are none, their number is not n, or one is not finite.
        """
        if self.embeddings is None:
            raise ValueError(f"embeddings must be given for the selector {selector}, got none")
        return _as_embeddings("embeddings", self.embeddings, self.size)

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

    def centres(self, dimension: int) -> Floats:
        """Return the labelled embeddings in float64, [0, dimension] if there are none."""
        if self.labelled_embeddings is None:
            return np.zeros((0, dimension))
        labelled = _as_embeddings("labelled_embeddings", self.labelled_embeddings, len(self.labelled_embeddings))
        if labelled.shape[1] != dimension:
            raise ValueError(
                f"labelled_embeddings must have the pool's {dimension} dimensions, got {labelled.shape[1]}"
            )
        return labelled


class Selector(ABC):
    """A rule for choosing examples.

    Attributes:
      name: as in `selector`.
      distributes: whether it needs no more of the pool at a time than a shard.
      limit: largest pool that it accepts, None if any.
    """

    name: ClassVar[str]
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
            raise ValueError(
                f"pool must hold at most {self.limit:,} examples for the selector {self.name}, which compares examples "
                f"with each other in memory, got {pool.size:,}; use {', '.join(distributing())}, or a random part of the pool"
            )
        selected = self._select(pool, budget, rng)
        assert selected.sum() == budget, f"{self.name} chose {selected.sum()} of {budget}"
        return selected

    @abstractmethod
    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools: ...


class Uniform(Selector):
    """Choose by chance, every set of `budget` examples alike."""

    name = "uniform"

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        return mask(rng.choice(pool.size, budget, replace=False), pool.size)


@dataclass(frozen=True)
class TopGain(Selector):
    """Choose the largest gains; ties by chance.

    Attributes:
      gain: a key of `GAINS`.
    """

    name: ClassVar[str] = "margin"
    gain: str = "margin"

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        gains = GAINS[self.gain](pool.require_logits(self.gain))
        return mask(np.lexsort((rng.random(pool.size), -gains))[:budget], pool.size)


@dataclass(frozen=True)
class Rad(Selector):
    """Choose by the game against the teacher's mistakes (arXiv 2210.01213).

    Attributes:
      wrong: k, the number of wrong labels the teacher would give in this pool.
      gain: a key of `GAINS`.
    """

    name: ClassVar[str] = "rad"
    wrong: float = 0.0
    gain: str = "margin"

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        gains = GAINS[self.gain](pool.require_logits(self.name))
        return dep_round(rad_marginals(gains, self.wrong, budget).probabilities, rng)


def selector(name: str, **options: Any) -> Selector:
    """Make a selector by name.

    Args:
      name: one of `names()`.
      options: the selector's own fields, for instance `wrong` for "rad".

    Returns:
      The selector.

    Raises:
      ValueError: the name is unknown, or an option is.

    Example:
      >>> pool = CandidatePool(4, logits=np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [9.0, 0.0]]))
      >>> selector("margin").select(pool, 2, np.random.default_rng(0))
      array([ True, False,  True, False])
    """
    makers = _makers()
    if name not in makers:
        raise ValueError(f"selector must be one of {', '.join(makers)}, got {name}")
    try:
        return makers[name](**options)
    except TypeError:
        raise ValueError(f"the selector {name} does not take all of the options {', '.join(options)}") from None


def names() -> tuple[str, ...]:
    """Return the names of all selectors."""
    return tuple(_makers())


def distributing() -> tuple[str, ...]:
    """Return the names of the selectors that distribute."""
    return tuple(name for name, make in _makers().items() if make().distributes)


def mask(indices: npt.NDArray[np.integer], size: int) -> Bools:
    """Return bool [size], True at the indices."""
    result = np.zeros(size, bool)
    result[indices] = True
    return result


def _makers() -> dict[str, Callable[..., Selector]]:
    from distilbeam.selection.strategies.diverse import Badge, ClusterMargin, KCenter  # these three import this module
    from distilbeam.selection.strategies.herding import Herding
    from distilbeam.selection.strategies.robust import CorrectGain, RadCapped, RadLoss

    def top(gain: str) -> Callable[[], Selector]:
        return lambda: TopGain(gain=gain)

    gains: dict[str, Callable[..., Selector]] = {gain: top(gain) for gain in GAINS}
    diverse = {"k-center": KCenter, "cluster-margin": ClusterMargin, "badge": Badge, "herding": Herding}
    robust = {"rad": Rad, "rad-loss": RadLoss, "rad-capped": RadCapped, "correct-gain": CorrectGain}
    return {"uniform": Uniform, **gains, **robust, **diverse}


def _as_embeddings(field: str, embeddings: npt.ArrayLike, size: int) -> Floats:
    array = np.asarray(embeddings, np.float64)
    if array.ndim != 2 or len(array) != size:
        raise ValueError(f"{field} must have shape [{size:,} examples, dimensions], got {array.shape}")
    require_each(field, array, np.asarray(np.isfinite(array).all(axis=1)), "finite in each row")
    return array
