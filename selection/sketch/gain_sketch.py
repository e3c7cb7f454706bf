"""Robust Active Distillation over a pool that fits no machine: a mergeable sketch of its gains.

Gains never travel. Each shard adds its gains to a histogram over the top bits of their float32 bit pattern
(`distilbeam.selection.sketch.bins`); of each bin it keeps an integer count and an integer sum that defines the sum of 1/g. Integer
sums are the same in whatever order shards are merged. From them the game is solved once, on the bins
(`distilbeam.selection.sketch.levels`): only the bins that hold the level and the cut are approximate, which leaves an error of
about 1e-6 in the value and none in the expected number of labels bought. One further pass over the gains, the refinement,
counts the distinct gains of these bins and makes the solution exact:

    sketch = GainSketch()
    for gains in shards: sketch.add(gains)              # or add in parallel and merge
    threshold = sketch.solve(wrong, budget)
    while (refinement := threshold.refinement()) is not None:      # once, as a rule
        for gains in shards: refinement.add(gains)
        threshold = refinement.solve()
    for gains in shards: ... round_shard(threshold.marginals(gains), rng)

Cost: a few nanoseconds for each gain and half a megabyte, however large the pool; serialised, 18 bytes for each bin that
is not empty. A bin holds up to 2^39 gains.
References: arXiv 2210.01213 for the game; the distributed solution is this project's.
"""

from __future__ import annotations

import struct
from typing import SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import as_budget, as_wrong
from distilbeam.selection.sketch.bins import BINS, FIRST_BIN, Ints, as_float32_gains, histogram
from distilbeam.selection.sketch.refinement import Refinement
from distilbeam.selection.sketch.threshold import Threshold as Threshold

_HEADER = struct.Struct("<4sI")
_MAGIC = b"DBG1"


class GainSketch:
    """A histogram of gains that is exact under merging and from which the game is solved.

    Example:
      >>> left, right = GainSketch(), GainSketch()
      >>> left.add([4.0, 3.0])
      >>> right.add([2.0, 1.0])
      >>> left.merge(right)
      >>> left.solve(wrong=1, budget=2).marginals([4.0, 3.0, 2.0, 1.0]).round(6)
      array([0.461538, 0.615385, 0.923077, 0.      ])
    """

    def __init__(self) -> None:
        self.counts: Ints = np.zeros(BINS, np.int64)
        self.deficits: Ints = np.zeros(BINS, np.int64)

    @property
    def count(self) -> int:
        """Number of gains added."""
        return int(self.counts.sum())

    @property
    def positive(self) -> int:
        """Number of positive gains added (at least 2^-126)."""
        return int(self.counts[FIRST_BIN:].sum())

    def add(self, gains: npt.ArrayLike) -> None:
        """Add gains.

        Args:
          gains: float [n], >= 0; rounded to float32. An empty array adds nothing.

        Raises:
          ValueError: a gain is negative, NaN, infinite or beyond float32; nothing has been added then.
        """
        counts, sums = histogram(as_float32_gains(gains))
        self.counts += counts
        self.deficits += sums

    def merge(self, other: GainSketch) -> None:
        """Add another sketch's gains; any order of merging gives the same sketch, bit by bit."""
        self.counts += other.counts
        self.deficits += other.deficits

    def solve(self, wrong: SupportsFloat, budget: SupportsIndex) -> Threshold:
        """Solve the game of buying `budget` labels of which `wrong` may be wrong, without replacement.

        Args:
          wrong: k >= 0, the number of wrong labels in the sketched pool; real.
          budget: b, whole number of labels, between 1 and the number of gains.

        Returns:
          The threshold; its `refinement` makes it exact.

        Raises:
          ValueError: the sketch is empty, k is negative or not finite, or b is out of range.
        """
        if not self.count:
            raise ValueError("gains must be added to the sketch before it is solved, got none")
        return Refinement(self, as_wrong(wrong), as_budget(budget, self.count), ()).solve()

    def copy(self) -> GainSketch:
        """Return an independent copy."""
        twin = GainSketch()
        twin.merge(self)
        return twin

    def to_bytes(self) -> bytes:
        """Serialise the bins that are not empty, 18 bytes each, little-endian."""
        used = np.flatnonzero(self.counts)
        columns = (used.astype("<u2"), self.counts[used].astype("<i8"), self.deficits[used].astype("<i8"))
        return _HEADER.pack(_MAGIC, len(used)) + b"".join(column.tobytes() for column in columns)

    @classmethod
    def from_bytes(cls, data: bytes) -> GainSketch:
        """Rebuild a sketch from `to_bytes`'s bytes.

        Raises:
          ValueError: the bytes are not a whole sketch of this version.
        """
        magic, used = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (b"", 0)
        if magic != _MAGIC or len(data) != _HEADER.size + 18 * used:
            raise ValueError(f"data must be the bytes of GainSketch.to_bytes, got {len(data):,} bytes that are not")
        numbers = np.frombuffer(data, "<u2", used, _HEADER.size)
        sums = np.frombuffer(data, "<i8", 2 * used, _HEADER.size + 2 * used)
        sketch = cls()
        sketch.counts[numbers], sketch.deficits[numbers] = sums[:used], sums[used:]
        return sketch

    def __eq__(self, other: object) -> bool:
        """Tell whether both hold the same counts and sums."""
        if not isinstance(other, GainSketch):
            return NotImplemented
        return np.array_equal(self.counts, other.counts) and np.array_equal(self.deficits, other.deficits)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Say how much was added."""
        return f"GainSketch(count={self.count:,}, positive={self.positive:,})"
