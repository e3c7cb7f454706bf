"""The solution of a sketched game: which gains are bought with which probability.

The optimum of the capped game is a function of the gain alone, with a level L and a cut v (see
`distilbeam.selection.sketch.levels`):

    q(g) = L/g for large g,  1 where L/g would exceed 1,  one probability at the cut,  0 below it.

In a sketch the level and the cut fall into a bin each; the gains of such a bin share one probability, their mean, so that
the marginals of the sketched pool sum to exactly the budget, before a refinement as well as after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats
from distilbeam.selection.sketch.bins import SMALLEST, as_float32_gains, chunks, reciprocals

if TYPE_CHECKING:
    from distilbeam.selection.sketch.refinement import Refinement


@dataclass(frozen=True)
class Threshold:
    """Probabilities of being bought as a function of the gain, with the guarantee that they give.

    Gains g (in float32) are bought with probability level/g if g >= share_from, straddle if g >= full_from + the bin of
    the level, and so on downwards; the edges are lower edges of bins, or single gains after a refinement.

    Attributes:
      budget: b, the number of labels; the marginals of the sketched pool sum to it.
      wrong: k, the number of wrong labels the game was solved for.
      value: the guaranteed gain V_b, in the unit of the gains.
      level: L, the common value of q g among the gains that share.
      share_from: smallest gain with q = level/g.
      straddle_from, straddle: gains from here up to share_from have this probability (the bin that holds the level).
      full_from: gains from here up to straddle_from have probability 1.
      cut_from, cut: gains from here up to full_from have this probability (the bin, or the gain, at the cut).
      zero: probability of gains without value (below 2^-126).
      exact: whether a refinement would change nothing.
      fallback: why another rule than the game's was used, empty if none was.
    """

    budget: int
    wrong: float
    value: float
    level: float
    share_from: float
    straddle_from: float
    straddle: float
    full_from: float
    cut_from: float
    cut: float
    zero: float
    exact: bool
    fallback: str = ""
    _refinement: Refinement | None = field(default=None, repr=False, compare=False)

    def marginals(self, gains: npt.ArrayLike) -> Floats:
        """Compute the probabilities of being bought.

        Args:
          gains: float [n], >= 0; rounded to float32 as in the sketch. May be any part of the sketched pool.

        Returns:
          float64 [n] in [0, 1]; over the whole sketched pool they sum to the budget.

        Raises:
          ValueError: a gain is negative, NaN or infinite.
        """
        array = as_float32_gains(gains)
        q, start = np.empty(len(array)), 0
        for chunk in chunks(array):
            self._fill(q[start : start + len(chunk)], chunk)
            start += len(chunk)
        return q

    def refinement(self) -> Refinement | None:
        """Return an empty second-level sketch that makes the solution exact, or None if it is exact already.

        Every gain of the sketched pool is to be added to it, in any order and on any machine; its `solve` gives the exact
        threshold.

        Raises:
          ValueError: the threshold came from JSON, which does not hold the sketch, and is not exact.
        """
        if self._refinement is None and not self.exact:
            raise ValueError(
                "refinement must be asked of a threshold that GainSketch.solve returned, not of one read from JSON"
            )
        return None if self._refinement is None else self._refinement.fresh()

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; floats as hexadecimal text, so that none is rounded."""
        data = {item.name: getattr(self, item.name) for item in fields(self) if not item.name.startswith("_")}
        return {name: value.hex() if isinstance(value, float) else value for name, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Threshold:
        """Rebuild a threshold from `to_json`'s data.

        Raises:
          ValueError: a field is missing or unknown.
        """
        kinds = {item.name: item.type for item in fields(cls) if not item.name.startswith("_")}
        if set(data) != set(kinds):
            names = ", ".join(sorted(set(data) ^ set(kinds)))
            raise ValueError(f"a threshold must have the fields {', '.join(kinds)}; missing or unknown: {names}")
        values: dict[str, Any] = {
            name: float.fromhex(data[name]) if kind == "float" else data[name] for name, kind in kinds.items()
        }
        return cls(**values)

    def _fill(self, q: Floats, gains: npt.NDArray[np.float32]) -> None:
        reciprocals(gains, out=q)
        np.minimum(np.multiply(q, self.level, out=q), 1.0, out=q)
        q[gains < self.share_from] = 0.0
        for low, high, probability in (
            (self.straddle_from, self.share_from, self.straddle),
            (self.full_from, self.straddle_from, 1.0),
            (self.cut_from, self.full_from, self.cut),
            (0.0, SMALLEST, self.zero),
        ):
            if low < high:
                q[(gains >= low) & (gains < high)] = probability
