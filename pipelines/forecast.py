"""What a run or a labelling job will cost, before anything is spent: from footers and one timed sample.

The sample labels some rows for good, into a folder that is thrown away, and measures seconds and bytes per row as the real
work will have them: read, teacher, encoding, writing. Training and the start of a cluster are not in the forecast.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, WorkerOptions
from rich import box
from rich.table import Table

from distilbeam.pipelines.config import PricesSection
from distilbeam.pipelines.label import Label
from distilbeam.pipelines.phases import threads
from distilbeam.pipelines.score import Score
from distilbeam.pipelines.shards import Part, Shard, Task
from distilbeam.pipelines.units import Unit

_WARM_UP = 256  # rows: the first calls load and compile
_SMALL = 8  # a sample this much smaller tells the cost of a shard from that of its rows


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


def measure_rates(work: Callable[[Path, Path], Label], units: Sequence[Unit], rows: int) -> tuple[Rates, int]:
    """Label a sample and time it.

    Args:
      work: makes the label phase's work for an output and a dead-letter directory.
      units: the units to take the sample from.
      rows: rows to time; some more are labelled first to warm up.

    Returns:
      The rates and the rows asked about. All rates are 0 where `rows` is 0.

    Raises:
      ValueError: the teacher answers none of the sample.
    """
    if rows == 0 or not units:
        return Rates(), 0
    unit = max(units, key=lambda unit: unit.rows)
    large = min(rows, unit.rows)
    small = max(1, large // _SMALL)
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory, threads(1):
        label = work(Path(directory) / "labels", Path(directory) / "dead")
        _timed(label, "warm-up", unit, min(_WARM_UP, unit.rows))
        few_s, many_s = _timed(label, "small", unit, small), _timed(label, "large", unit, large)
        files = sorted(Path(label.output).glob("*.parquet"), key=lambda file: file.stem != "large")
        if not files:
            raise ValueError(f"the teacher answers none of the {large:,} rows of the sample")
        row_bytes, shard_bytes = _bytes(files[0])
    label_s = max(0.0, many_s - few_s) / (large - small) if large > small else many_s / large
    rates = Rates(label_s, max(0.0, few_s - small * label_s), row_bytes, shard_bytes)
    return rates, min(_WARM_UP, unit.rows) + small + large


def _timed(label: Label, key: str, unit: Unit, rows: int) -> float:
    start = time.perf_counter()
    label(Task((Shard(key, (Part(unit, unit.rows - rows, unit.rows),)),)))
    return time.perf_counter() - start


def _bytes(file: Path) -> tuple[float, float]:
    """Return the bytes of a row and those that do not depend on the number of rows."""
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    data = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    return data / metadata.num_rows, float(file.stat().st_size - data)


def measure_scoring(score: Callable[[Path], Score], units: Sequence[Unit]) -> float:
    """Score the smallest unit and return the seconds per row."""
    unit = min(units, key=lambda unit: unit.rows)
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory, threads(1):
        times = []
        for name in ("warm-up", "timed"):
            start = time.perf_counter()
            score(Path(directory) / name)(unit)
            times.append(time.perf_counter() - start)
    return times[-1] / unit.rows


def workers_of(options: PipelineOptions) -> int:
    """Return the number of workers that the options ask for."""
    direct = options.view_as(DirectOptions)
    local = direct.direct_num_workers if direct.direct_running_mode in ("multi_threading", "multi_processing") else 1
    return int(options.view_as(WorkerOptions).num_workers or local or 1)


def forecast_table(forecast: Forecast) -> Table:
    """Lay a forecast out for reading."""
    table = Table(title="What is left", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
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
