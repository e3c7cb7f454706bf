"""SelectExamples: exactly the budget of each window, in bounded memory.

    batches ── score ──┬── gains ── gather per window ── solve ── one threshold per window ──┐
                       └── batches by shard (hash of the content) ───────────────────────────┴── round the shard
    shards' carries ── per window ── round the carries

Only gains meet at one worker, as a sketch when they are many. A batch waits at its shard until the window closes and its
threshold is known; the shard rounds its own marginals down to at most one carry, and the carries are rounded together, so
that exactly the budget is chosen, each example with its marginal. Everything random is seeded by seed, window and shard:
a repeated bundle chooses the same rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.transforms.trigger import DefaultTrigger
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.windowed_value import PaneInfoTiming

from distilbeam.pipelines.acquisition.usable_answers import ask_student
from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.pool.reserved_names import require_free_names
from distilbeam.pipelines.transforms.combine_gains import Floats32, GatheredGains, GatherGains
from distilbeam.selection.gains import gain_named
from distilbeam.selection.rounding import round_carries, round_shard, shard_rng
from distilbeam.selection.sketch.threshold import Threshold
from distilbeam.student.trust import trusted

log = logging.getLogger(__name__)

_ADDED = ("gain", "inclusion_probability")
_Bools = npt.NDArray[np.bool_]
_Carry = tuple[str, float, pa.RecordBatch]  # shard, probability, the row with its two columns


class SelectExamples(beam.PTransform):
    """Choose exactly `budget` examples of each window by Robust Active Distillation (arXiv 2210.01213).

    A window with fewer examples is chosen whole. The chosen rows come out in their batches, with two more columns: `gain`
    and `inclusion_probability` (float32). Examples that come when their window is closed are counted (`late_rows`) and left
    out, since the window's budget is spent. So are rows that the student cannot read (`unusable_rows`).

    Args:
      student: directory of the student that scores the examples.
      budget: examples to choose in each window.
      wrong_share: expected share of wrong teacher labels, in [0, 1]: one minus its accuracy on a validation set.
      gain: one of `selection.gains.GAINS`: margin, entropy, least_confidence.
      seed: of the rounding.
      shards: parts in which a window's batches wait; a worker holds one part in memory.
      trust: modules whose code the student may call, besides what this process trusts; see `student.trust`.

    Raises:
      ValueError: an argument is out of range; when applied, windows that merge or fire more than once, or a stream without
        windows; in a batch, a column that has the name of one of the two.
    """

    def __init__(
        self,
        student: str | Path,
        budget: int,
        *,
        wrong_share: float,
        gain: str = "margin",
        seed: int = 0,
        shards: int = 16,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value in (("budget", budget), ("shards", shards)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= wrong_share <= 1:
            raise ValueError(f"wrong_share must be between 0 and 1, got {wrong_share}")
        gain_named(gain)
        self.student, self.budget, self.wrong_share = str(student), budget, wrong_share
        self.gain, self.seed, self.shards = gain, seed, shards
        self.trust = (*trusted(), *trust)

    def expand(self, batches: Any) -> Any:
        require_windows_that_fire_once(batches)
        scored = batches | "Score" >> beam.ParDo(_ScoreBatch(self.student, self.gain, self.shards, self.trust))
        thresholds = (
            scored
            | "GainsOnly" >> beam.Map(_gains_only)
            | "GatherPerWindow" >> beam.CombineGlobally(GatherGains()).without_defaults()
            | "Solve" >> beam.ParDo(_Solve(self.budget, self.wrong_share, self.shards))
        )
        rounded = (
            {"batches": scored, "thresholds": thresholds}
            | "MeetThreshold" >> beam.CoGroupByKey()
            | "RoundShard" >> beam.ParDo(_RoundShard(self.seed))
        )
        chosen = rounded | "Chosen" >> beam.FlatMap(_chosen_batches)
        won = (
            rounded
            | "Carries" >> beam.FlatMap(_carries)
            | "MeetCarries" >> beam.GroupByKey()
            | "RoundCarries" >> beam.ParDo(_RoundCarries(self.seed))
        )
        return (chosen, won) | "ChosenAndWon" >> beam.Flatten()


def require_windows_that_fire_once(batches: Any) -> None:
    """Refuse a collection whose windows would each be given more than one budget, or none.

    Raises:
      ValueError: merging windows, a trigger besides the default one, allowed lateness, or an unbounded global window.
    """
    windowing = batches.windowing
    if windowing.windowfn.is_merging():
        raise ValueError(
            "windows must not merge, since a window has one budget and its examples wait in several places, got "
            f"{type(windowing.windowfn).__name__}; use FixedWindows"
        )
    if windowing.triggerfn != DefaultTrigger() or windowing.allowed_lateness.micros:
        raise ValueError(
            "windows must fire once: each firing would be given the window's budget again; leave the trigger at its "
            f"default and allowed_lateness at 0, got {type(windowing.triggerfn).__name__} and {windowing.allowed_lateness.micros / 1e6:g} s"
        )
    if not batches.is_bounded and isinstance(windowing.windowfn, GlobalWindows):
        raise ValueError(
            "a stream must have windows: the global one never ends; apply WindowInto(FixedWindows(seconds))"
        )


def window_name(window: Any) -> str:
    """Name a window by its bounds, in letters that a file name may have: `20260131T020000Z-20260131T030000Z`."""
    if isinstance(window, GlobalWindow):
        return "global"
    return f"{_time_name(window.start)}-{_time_name(window.end)}"


def batch_digest(batch: pa.RecordBatch) -> str:
    """Hash a batch's content, 32 hexadecimal digits."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()


def _time_name(timestamp: Any) -> str:
    return str(timestamp.to_utc_datetime().strftime("%Y%m%dT%H%M%S.%fZ").replace(".000000Z", "Z"))


class _ScoreBatch(beam.DoFn):
    """Batch -> (shard, (digest, batch, gains)), of the rows that the student can read."""

    def __init__(self, student: str, gain: str, shards: int, trust: tuple[str, ...]) -> None:
        self.student, self.gain, self.shards, self.trust = student, gain, shards, trust
        self.unusable_rows = Metrics.counter("SelectExamples", "unusable_rows")

    def process(self, batch: pa.RecordBatch) -> Iterator[tuple[int, tuple[str, pa.RecordBatch, Floats32]]]:
        require_free_names([name for name in batch.schema.names if name in _ADDED], "SelectExamples")
        with threads(1):
            said = ask_student(cached_student(self.student, self.trust), batch)
        if said.reasons:
            self.unusable_rows.inc(len(said.reasons))
            log.warning("%d row(s) left out, the first: %s", len(said.reasons), next(iter(said.reasons.values())))
            batch = batch.take(pa.array(said.rows))
        if batch.num_rows:
            gains = gain_named(self.gain)(said.logits).astype(np.float32)
            digest = batch_digest(batch)
            yield int(digest[:8], 16) % self.shards, (digest, batch, gains)


def _gains_only(item: tuple[int, tuple[str, pa.RecordBatch, Floats32]]) -> Floats32:
    return item[1][2]


class _Solve(beam.DoFn):
    """The window's gains -> its threshold, for every shard."""

    def __init__(self, budget: int, wrong_share: float, shards: int) -> None:
        self.budget, self.wrong_share, self.shards = budget, wrong_share, shards
        self.late_rows = Metrics.counter("SelectExamples", "late_rows")

    def process(
        self, gathered: GatheredGains, pane: Any = beam.DoFn.PaneInfoParam
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if pane.timing == PaneInfoTiming.LATE:  # some runners drop late rows before they come here
            self.late_rows.inc(gathered.count)
            return
        threshold = gathered.solve(self.wrong_share, self.budget).to_json()
        yield from ((shard, threshold) for shard in range(self.shards))


class _RoundShard(beam.DoFn):
    """A shard's batches and the threshold -> the batches' chosen rows, and the row that is still undecided."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def process(
        self,
        element: tuple[int, Mapping[str, Iterable[Any]]],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[tuple[pa.RecordBatch | None, _Carry | None]]:
        shard, parts = element
        scored = sorted(parts["batches"], key=lambda item: item[0])  # runners group in any order
        threshold = next(iter(parts["thresholds"]), None)
        if scored and threshold is not None and pane.timing != PaneInfoTiming.LATE:
            name = f"{window_name(window)}/{shard}"
            yield from _round(scored, Threshold.from_json(threshold), name, self.seed)


def _round(
    scored: list[tuple[str, pa.RecordBatch, Floats32]], threshold: Threshold, name: str, seed: int
) -> Iterator[tuple[pa.RecordBatch | None, _Carry | None]]:
    gains = np.concatenate([part for _, _, part in scored])
    marginals = threshold.marginals(gains)
    selected, carry, probability = round_shard(marginals, shard_rng(seed, 0, name))
    start = 0
    for _, batch, part in scored:
        here = slice(start, start + len(part))
        rows = _with_choice(batch, part, marginals[here])
        if here.start <= carry < here.stop:
            yield None, (name, probability, rows.slice(carry - start, 1))
        if selected[here].any():
            yield rows.filter(pa.array(selected[here])), None
        start = here.stop


class _RoundCarries(beam.DoFn):
    """The undecided rows of a window's shards -> those that are chosen."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def process(
        self, element: tuple[None, Iterable[_Carry]], window: Any = beam.DoFn.WindowParam
    ) -> Iterator[pa.RecordBatch]:
        carries = sorted(element[1], key=lambda carry: carry[0])
        rng = shard_rng(self.seed, 0, f"{window_name(window)}/carries")
        won: _Bools = round_carries([probability for _, probability, _ in carries], rng)
        yield from (row for (_, _, row), taken in zip(carries, won, strict=True) if taken)


def _chosen_batches(item: tuple[pa.RecordBatch | None, _Carry | None]) -> list[pa.RecordBatch]:
    return [] if item[0] is None else [item[0]]


def _carries(item: tuple[pa.RecordBatch | None, _Carry | None]) -> list[tuple[None, _Carry]]:
    return [] if item[1] is None else [(None, item[1])]


def _with_choice(batch: pa.RecordBatch, gains: Floats32, marginals: npt.NDArray[np.float64]) -> pa.RecordBatch:
    batch = batch.append_column("gain", pa.array(gains))
    return batch.append_column("inclusion_probability", pa.array(marginals.astype(np.float32)))
