"""The restriction of a source without an end: where its reading stands, cut nowhere else."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider

END = "end"  # the position that is claimed last


class Tracker(RestrictionTracker):
    """A restriction ((partition, next offset), ...) that is only ever cut at where it stands: an end is not known."""

    def __init__(self, restriction: tuple[tuple[int, int], ...]) -> None:
        self.start, self.at = restriction, dict(restriction)
        self.stopped = self.ended = False

    def current_restriction(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(self.at.items()))

    def current_progress(self) -> RestrictionProgress:
        # with completed= and remaining= Beam divides by the bytes written, 0 / 0 before the first
        return RestrictionProgress(fraction=0.5)

    def is_bounded(self) -> bool:
        return False

    def check_done(self) -> None:
        if not (self.stopped or self.ended):
            raise ValueError("a topic's reading must be deferred or ended")

    def try_claim(self, position: Any) -> bool:
        if self.stopped:
            return False
        if position == END:
            self.ended = True
        else:  # the next offsets, by partition
            self.at.update(position)
        return True

    def try_split(self, fraction_of_remainder: float) -> Any:
        # any other fraction of [next offset, 2^63) lies where no message will be for ages
        if fraction_of_remainder != 0 or self.stopped or self.ended:
            return None
        self.stopped = True
        return self.start, self.current_restriction()


class Provider(RestrictionProvider):
    def initial_restriction(self, element: Any) -> Any:
        return element

    def create_tracker(self, restriction: Any) -> Tracker:
        return Tracker(restriction)

    def restriction_size(self, element: Any, restriction: Any) -> int:  # noqa: ARG002
        return 1

    def restriction_coder(self) -> Any:
        return beam.coders.FastPrimitivesCoder()

    def truncate(self, element: Any, restriction: Any) -> None:  # noqa: ARG002
        return None  # a drained pipeline reads no further


RESTRICTION: Any = beam.DoFn.RestrictionParam(Provider())
WATERMARK: Any = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider())
