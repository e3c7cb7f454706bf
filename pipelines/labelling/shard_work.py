"""Labelling one shard: portion by portion, with what was paid kept when the clock says so and when anything goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.engine.counters import timed
from distilbeam.pipelines.engine.stopping import cannot_be_written, require_going_on, stop_everybody
from distilbeam.pipelines.labelling import saved_answers
from distilbeam.pipelines.labelling.in_flight import Flight, InFlight
from distilbeam.pipelines.labelling.label_rows import Labelled, Labelling
from distilbeam.pipelines.labelling.portions import Portions
from distilbeam.pipelines.labelling.saved_answers import Answered, PartRows
from distilbeam.pipelines.labelling.shard_plan import Shard

COSTS = ("calls", "requests", "reused")
_kept: set[tuple[str, str]] = set()  # datasets and keys of which this process has seen saved answers


@dataclass(frozen=True)
class ShardSettings:
    """What the work on a shard depends on.

    Attributes:
      labelling: how rows are labelled.
      output: directory of the soft-label dataset.
      shard: the shard.
      flush_s: seconds after which answers are saved.
      flights: folder of the files that say what is in flight; None where there are none.
      suspects: what was in flight in this shard when its process died.
      require_few: raises `ValueError` where that many rows without an answer are too many.
    """

    labelling: Labelling
    output: str
    shard: Shard
    flush_s: float
    flights: Path | None
    suspects: Sequence[Flight]
    require_few: Callable[[int, str], None]


class ShardWork:
    """The answers to a shard's rows, as far as they are known."""

    def __init__(self, settings: ShardSettings) -> None:
        self._settings = settings
        self._parts: list[Answered] = []
        self._saved_parts = 0  # of `_parts`, those that are in saved files
        self._current: _Current | None = None
        self._costs = dict.fromkeys(COSTS, 0)
        self._done = np.zeros(settings.shard.rows, bool)
        self._flight = _opened_flight(settings)
        self._flushed = time.monotonic()

    def resume(self, answered: Answered) -> None:
        """Take up answers that were saved; those to rows that are there already are passed over."""
        _kept.add((self._settings.output, self._settings.shard.key))
        fresh = np.flatnonzero(~self._done[answered.places])
        self._done[answered.places] = True
        table = answered.table if len(fresh) == answered.table.num_rows else answered.table.take(fresh)
        failures = [f for f in answered.failures if not self._done[f["place"]]]
        for failure in failures:
            self._done[failure["place"]] = True
        self._parts.append(Answered(table, answered.places[fresh], failures, answered.costs))
        self._saved_parts += 1
        self._count(answered.costs)

    def ask(self, rows: pa.Table, places: npt.NDArray[np.int64]) -> None:
        """Ask about rows of the shard, and label them."""
        require_going_on()
        settings = self._settings
        try:
            asking = settings.labelling.asking(rows, self._suspected(places))
        except Exception:
            stop_everybody()
            raise
        self._current = current = _Current(rows, places, asking)
        failed = self._failed
        self._look_at_failures(0)
        while self._ask_portion(current):
            self._look_at_failures(failed)
            failed = self._failed
            if time.monotonic() - self._flushed >= settings.flush_s:
                self.save()
        self._parts.append(self._labelled(current, slice(0, rows.num_rows)))
        self._current = None

    def save(self) -> None:
        """Save the answers that are in no file yet.

        Raises:
          OSError: nothing takes them.
        """
        pieces = self._parts[self._saved_parts :]
        current = self._current
        if current is not None and current.asking.done > current.saved:
            pieces = [*pieces, self._labelled(current, slice(current.saved, current.asking.done))]
        if pieces:
            shard, spec = self._settings.shard, self._settings.labelling.spec.to_json()
            saved_answers.save(self._settings.output, shard.key, spec, part_rows(shard), pieces)
            _kept.add((self._settings.output, self._settings.shard.key))
            self._saved_parts = len(self._parts)
            if current is not None:
                current.saved = max(current.saved, current.asking.done)
            self.clear_suspects()
        self._flushed = time.monotonic()

    def result(self) -> Answered:
        """Return the labelled rows in the shard's order, and those that failed."""
        parts = [part for part in self._parts if part.table.num_rows]
        failures = sorted((f for part in self._parts for f in part.failures), key=lambda failure: failure["place"])
        table = pa.concat_tables([part.table for part in parts]) if parts else pa.table({})
        places = np.concatenate([part.places for part in parts]) if parts else np.empty(0, np.int64)
        if (np.diff(places) < 0).any():
            order = np.argsort(places)
            table, places = table.take(order), places[order]
        return Answered(table, places, failures, dict(self._costs))

    def clear_suspects(self) -> None:
        """Forget what was in flight when a process died, where it is answered now."""
        for flight in self._settings.suspects:
            if self._done[flight.start : flight.stop].all():
                flight.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Say that nothing is in flight."""
        if self._flight is not None:
            self._flight.close()

    @property
    def _failed(self) -> int:
        current = len(self._current.asking.errors) if self._current is not None else 0
        return current + sum(len(part.failures) for part in self._parts)

    def _look_at_failures(self, before: int) -> None:
        if self._failed > before and self._current is not None and self._current.asking.errors:
            self._fly(0, 0)
            self._settings.require_few(self._failed, self._current.asking.errors[-1].error)

    def _ask_portion(self, current: _Current) -> bool:
        require_going_on()
        start, stop = current.asking.next_rows
        if stop > start:
            self._fly(int(current.places[start]), int(current.places[stop - 1]) + 1)
        try:
            with timed("teacher"):
                asked = current.asking.ask_next()
        except Exception:
            stop_everybody()  # of whatever is no row's fault the next item would die, too, and be paid for before
            raise
        self._fly(0, 0)
        return asked

    def _fly(self, start: int, stop: int) -> None:
        if self._flight is not None:
            self._flight.write(start, stop, self._failed)

    def _suspected(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
        apart = np.zeros(len(places), bool)
        for flight in self._settings.suspects:
            apart |= (places >= flight.start) & (places < flight.stop)
        return apart if apart.any() else None

    def _labelled(self, current: _Current, piece: slice) -> Answered:
        labelled = self._settings.labelling.labelled(current.rows, current.asking, piece)
        places = current.places[piece]
        self._done[places] = True
        failures = [{**f, "place": int(places[row])} for f, row in zip(labelled.failures, labelled.bad, strict=True)]
        costs = _costs_of(labelled)
        self._count(costs)
        return Answered(labelled.table, places[labelled.good], failures, costs)

    def _count(self, costs: dict[str, int]) -> None:
        for name in COSTS:
            self._costs[name] += costs.get(name, 0)


@dataclass
class _Current:
    """The rows that are being asked about; of those before `saved` the answers are in a file."""

    rows: pa.Table
    places: npt.NDArray[np.int64]
    asking: Portions
    saved: int = 0


def _opened_flight(settings: ShardSettings) -> InFlight | None:
    """Open the file that says what is in flight; file systems without locks have none."""
    if settings.flights is None:
        return None
    try:
        return InFlight(settings.flights, settings.shard.key)
    except OSError as e:
        if cannot_be_written(e):
            stop_everybody()
            raise
        return None


def part_rows(shard: Shard) -> tuple[PartRows, ...]:
    """Name the rows of a shard's parts by their units; a part with gaps is several."""
    found: list[PartRows] = []
    for part in shard.parts:
        edges = part.ranges or (part.start, part.stop)
        found += [(part.unit.uid, start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return tuple(found)


def has_kept(output: str, key: str) -> bool:
    """Tell whether this process has seen saved answers of a shard."""
    return (output, key) in _kept


def _costs_of(labelled: Labelled) -> dict[str, Any]:
    return {name: getattr(labelled, name) for name in COSTS}
