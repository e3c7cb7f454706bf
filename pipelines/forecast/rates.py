"""The rates of a forecast: what a row costs in time, bytes and money, from footers and, where wanted, one timed sample.

The sample labels some rows for good and keeps their labels, and measures seconds and bytes per row as the rest of the work will
have them: read, teacher, encoding, writing. Training and the start of a cluster are not in the forecast.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, WorkerOptions
from rich import box

from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.labelling.label_rows import Labelled
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.shard_plan import Part, Shard, read_rows
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.pipelines.sections import PricesSection
from distilbeam.teacher.softlabels.plain_table import PlainTable

_WARM_UP = 256  # rows: the first calls load and compile
_PARTS = 3  # of a sample, whose median counts
_SMALL = 8  # a shard this much smaller tells the cost of a shard from that of its rows
_READING_S = 2.0


class Scoring(Protocol):
    """The work of a score phase."""

    def __call__(self, unit: Unit) -> Iterator[tuple[Path, Path]]:
        """Score a unit, when iterated."""
        ...


@dataclass(frozen=True)
class Rates:
    """What rows and shards cost one worker.

    Attributes:
      label_s: seconds to label a row.
      shard_s: further seconds for each shard: opening, flushing, committing.
      label_bytes: bytes of a row's labels.
      shard_bytes: further bytes of each shard: its footer.
      score_s: seconds to score a row; 0 where nothing is scored.
    """

    label_s: float = 0.0
    shard_s: float = 0.0
    label_bytes: float = 0.0
    shard_bytes: float = 0.0
    score_s: float = 0.0


@dataclass(frozen=True)
class Line:
    """What one step will cost.

    Attributes:
      what: the step.
      rows: rows that it goes over.
      calls: rows that the teacher is asked about.
      shards: files with labels.
      bytes: bytes of labels.
      seconds: wall time with all workers.
    """

    what: str
    rows: int
    calls: int = 0
    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """The steps that are left, and what they cost together.

    Attributes:
      lines: a line per step.
      workers: workers that share the work.
      sampled: rows that were asked about to measure.
      prices: what things cost.
    """

    lines: tuple[Line, ...]
    workers: int
    sampled: int
    prices: PricesSection

    @property
    def total(self) -> Line:
        """All steps together."""
        names = ("rows", "calls", "shards", "bytes", "seconds")
        return Line("total", **{name: sum(getattr(line, name) for line in self.lines) for name in names})

    @property
    def money(self) -> dict[str, float]:
        """What the teacher's calls, the workers' time and a month of storage cost."""
        total, prices = self.total, self.prices
        return {
            "calls": total.calls / 1000 * prices.per_1000_calls,
            "workers": total.seconds / 3600 * self.workers * prices.per_worker_hour,
            "storage for a month": total.bytes / 1e9 * prices.per_gb_month,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as JSON values."""
        lines = [asdict(line) for line in (*self.lines, self.total)]
        return {"lines": lines, "workers": self.workers, "sampled": self.sampled, "money": self.money}


def measure_rates(label: Label, shard: Shard) -> Rates:
    """Label a small shard for good and time it: reading, asking and writing each by itself, as other shards are much larger.

    Args:
      label: the label phase's work.
      shard: rows of one unit.

    Returns:
      The rates.

    Raises:
      ValueError: the teacher answers none of the rows.
    """
    unit = shard.parts[0].unit
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory, threads(1):
        read_s = _reading_s(label, unit, shard.rows)
        reader = RowReader(label.columns, label.rows_at_once)
        sample = pa.concat_tables([table for part in shard.parts for table in read_rows(reader, part, None)])
        warm_up = min(_WARM_UP, sample.num_rows // 4)
        timed, rest = _requests(sample.slice(warm_up), label.labelling.teacher_batch)
        first = [label.labelling(sample.slice(0, warm_up))] if warm_up else []
        labelled, ask_s = zip(*(_asked(label, part) for part in timed), strict=True)
        parts = [*first, *labelled, *(label.labelling(part) for part in rest)]
        if not any(part.table.num_rows for part in parts):
            raise ValueError(f"the teacher answers none of the {sample.num_rows:,} rows of the sample")
        label.keep(shard, parts)
        answered = pa.concat_tables([part.table for part in parts if part.table.num_rows])
        write_s, shard_s, file = _write(replace(label, output=directory), unit, answered)
        row_bytes, shard_bytes = _bytes(file)
    return Rates(read_s + statistics.median(ask_s) + write_s, shard_s, row_bytes, shard_bytes)


def _reading_s(label: Label, unit: Unit, rows: int) -> float:
    """Read at least `rows` rows of a unit, a row group where that does not take long.

    Returns:
      Seconds per row; without the first table's, which opening the file is part of, where there are others.
    """
    marks: list[tuple[int, float]] = []  # rows read until then, and when
    start = time.perf_counter()
    for table in read_rows(RowReader(label.columns, label.rows_at_once), Part(unit, 0, unit.rows), None):
        count = table.num_rows + (marks[-1][0] if marks else 0)
        marks.append((count, time.perf_counter()))
        if count >= max(rows, unit.sizes[0]) or (count >= rows and marks[-1][1] - start > _READING_S):
            break
    since_rows, since = marks[0] if len(marks) > 1 else (0, start)
    return (marks[-1][1] - since) / (marks[-1][0] - since_rows)


def _requests(sample: pa.Table, teacher_batch: int) -> tuple[list[pa.Table], list[pa.Table]]:
    """Cut a sample into parts of whole requests, whose median a moment in which a processor is busy does not change.

    Returns:
      The parts, and what is left.
    """
    rows = sample.num_rows // _PARTS
    rows -= rows % teacher_batch if rows > teacher_batch else 0
    if not rows:
        return [sample], []
    rest = sample.slice(_PARTS * rows)
    return [sample.slice(i * rows, rows) for i in range(_PARTS)], [rest] if rest.num_rows else []


def _asked(label: Label, rows: pa.Table) -> tuple[Labelled, float]:
    start = time.perf_counter()
    labelled = label.labelling(rows)
    return labelled, (time.perf_counter() - start) / rows.num_rows


def _write(label: Label, unit: Unit, labelled: pa.Table) -> tuple[float, float, Path]:
    """Write a large and a small shard; return the seconds of a row, the further ones of a shard, and the large one's file."""
    sizes = labelled.num_rows, max(1, labelled.num_rows // _SMALL)
    seconds: list[float] = []
    for size in sizes:
        shard = Shard(f"sample-{size}", (Part(unit, 0, unit.rows),))
        times = []
        for _ in range(_PARTS):
            start = time.perf_counter()
            label.place(shard, labelled.slice(0, size), {})
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    row_s = max(0.0, seconds[0] - seconds[1]) / max(1, sizes[0] - sizes[1])
    return row_s, max(0.0, seconds[1] - sizes[1] * row_s), Path(label.output) / f"sample-{sizes[0]}.parquet"


def _bytes(file: Path) -> tuple[float, float]:
    """Return the bytes of a row and those that do not depend on the number of rows."""
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    data = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    return data / metadata.num_rows, float(file.stat().st_size - data)


def measure_scoring(score: Callable[[Path], Scoring], units: Sequence[Unit]) -> float:
    """Score the smallest unit and return the seconds per row."""
    unit = min(units, key=lambda unit: unit.rows)
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory, threads(1):
        times = []
        for name in ("warm-up", "timed"):
            start = time.perf_counter()
            list(score(Path(directory) / name)(unit))
            times.append(time.perf_counter() - start)
    return times[-1] / unit.rows


def workers_of(options: PipelineOptions) -> int:
    """Return the number of workers that the options ask for."""
    direct = options.view_as(DirectOptions)
    local = direct.direct_num_workers if direct.direct_running_mode in ("multi_threading", "multi_processing") else 1
    return int(options.view_as(WorkerOptions).num_workers or local or 1)


def forecast_table(forecast: Forecast) -> PlainTable:
    """Lay a forecast out for reading."""
    table = PlainTable(title="What is left", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.collapse_padding = True
    for name in ("", "rows", "teacher calls", "shards", "MB", "time"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for line in (*forecast.lines, *([forecast.total] if len(forecast.lines) > 1 else [])):
        seconds = duration(line.seconds) if forecast.sampled else "?"
        table.add_row(
            line.what, f"{line.rows:,}", f"{line.calls:,}", f"{line.shards:,}", f"{line.bytes / 1e6:,.1f}", seconds
        )
    return table


def money_sentence(forecast: Forecast) -> str | None:
    """Say what it costs, where the configuration has prices."""
    costs = {name: cost for name, cost in forecast.money.items() if cost}
    if not costs:
        return None
    parts = ", ".join(f"{cost:,.2f} for {name}" for name, cost in costs.items())
    return f"{sum(costs.values()):,.2f} {forecast.prices.currency}: {parts}."


def duration(seconds: float) -> str:
    """Format a time for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
