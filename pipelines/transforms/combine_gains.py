"""The gains of one window in bounded memory: exact while they are few, a sketch when they are many."""

from __future__ import annotations

from collections.abc import Iterable

import apache_beam as beam
import numpy as np
import numpy.typing as npt

from distilbeam.selection.sketch.gain_sketch import GainSketch
from distilbeam.selection.sketch.threshold import Threshold

Floats32 = npt.NDArray[np.float32]
KEPT_GAINS = 131_072  # half a megabyte, as much as a sketch


class GatheredGains:
    """Gains, added and merged in any order.

    Up to `KEPT_GAINS` gains are kept as they are, and the solution is exact. More are added to a sketch: the marginals
    still sum to the budget, single ones are within the width of a bin (0.8 %).
    """

    def __init__(self) -> None:
        self._kept: list[Floats32] = []
        self._sketch: GainSketch | None = None

    @property
    def count(self) -> int:
        """Number of gains."""
        return sum(map(len, self._kept)) if self._sketch is None else self._sketch.count

    def add(self, gains: Floats32) -> GatheredGains:
        """Add gains, float32 [n]."""
        if self._sketch is not None:
            self._sketch.add(gains)
            return self
        self._kept.append(gains)
        if self.count > KEPT_GAINS:
            self._sketch, self._kept = self._sketched(), []
        return self

    def merge(self, other: GatheredGains) -> GatheredGains:
        """Add another part's gains."""
        for gains in other._kept:
            self.add(gains)
        if other._sketch is not None:
            sketch = self._sketch or self._sketched()
            sketch.merge(other._sketch)
            self._sketch, self._kept = sketch, []
        return self

    def solve(self, wrong_share: float, budget: int) -> Threshold:
        """Solve the game for min(budget, count) labels; see `GainSketch.solve`.

        Args:
          wrong_share: expected share of wrong labels, in [0, 1].
          budget: labels to buy.
        """
        sketch = self._sketch or self._sketched()
        threshold = sketch.solve(wrong_share * sketch.count, min(budget, sketch.count))
        while self._kept and (refinement := threshold.refinement()) is not None:
            for gains in self._kept:
                refinement.add(gains)
            threshold = refinement.solve()
        return threshold

    def _sketched(self) -> GainSketch:
        sketch = GainSketch()
        for gains in self._kept:
            sketch.add(gains)
        return sketch


class GatherGains(beam.CombineFn):
    """Gather arrays of gains."""

    def create_accumulator(self) -> GatheredGains:
        return GatheredGains()

    def add_input(self, accumulator: GatheredGains, gains: Floats32) -> GatheredGains:
        return accumulator.add(gains)

    def merge_accumulators(self, accumulators: Iterable[GatheredGains]) -> GatheredGains:
        merged = GatheredGains()
        for accumulator in accumulators:
            merged.merge(accumulator)
        return merged

    def extract_output(self, accumulator: GatheredGains) -> GatheredGains:
        return accumulator
