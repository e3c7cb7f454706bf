"""Strategies that know more of the teacher's mistakes than their number: what they cost, or where they are.

Where they are comes from `LocalErrors`, as rates in `CandidatePool.errors` and `CandidatePool.caps`. All of them are
functions of each example's own gain and rates, and of thresholds that one pass over the pool can find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distilbeam.selection.checks import Floats
from distilbeam.selection.games.capped import capped_marginals
from distilbeam.selection.rounding import Bools, dep_round
from distilbeam.selection.strategies.selectors import CandidatePool, Selector, mask


@dataclass(frozen=True)
class RadLoss(Selector):
    """Choose by the game in which a wrong label costs the median gain (RAD-Loss, arXiv 2210.01213).

    Attributes:
      wrong: k, the number of wrong labels the teacher would give in this pool.
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
    """

    name: ClassVar[str] = "rad-loss"
    reads: ClassVar[tuple[str, ...]] = ("gains",)
    wrong: float = 0.0
    gain: str = "margin"

    def probabilities(self, pool: CandidatePool, budget: int) -> Floats:
        """Return the marginals of the game."""
        gains = pool.gains_by(self.gain, self.name)
        return capped_marginals(gains, 1.0, self.wrong, budget, np.median(gains)).probabilities

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        return dep_round(self.probabilities(pool, budget), rng)


@dataclass(frozen=True)
class RadCapped(Selector):
    """Choose by the game whose adversary is bound to believable local error rates; k is the pool's expected errors.

    Attributes:
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
    """

    name: ClassVar[str] = "rad-capped"
    reads: ClassVar[tuple[str, ...]] = ("gains", "errors", "caps")
    gain: str = "margin"

    def probabilities(self, pool: CandidatePool, budget: int) -> Floats:
        """Return the marginals of the game."""
        gains, caps = pool.gains_by(self.gain, self.name), pool.require_rates("caps", self.name)
        wrong = float(pool.require_rates("errors", self.name).sum())
        return capped_marginals(gains, caps, wrong, budget).probabilities

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        return dep_round(self.probabilities(pool, budget), rng)


@dataclass(frozen=True)
class CorrectGain(Selector):
    """Choose the largest expected gains of right labels, gain times (1 - error rate); ties by chance.

    Attributes:
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
    """

    name: ClassVar[str] = "correct-gain"
    reads: ClassVar[tuple[str, ...]] = ("gains", "errors")
    gain: str = "margin"

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        gains = pool.gains_by(self.gain, self.name)
        worth: Floats = gains * (1 - pool.require_rates("errors", self.name))
        return mask(np.lexsort((rng.random(pool.size), -worth))[:budget], pool.size)
