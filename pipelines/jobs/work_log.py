"""The work log of a run or a labelling job: what its phases cost, kept beside it and shown at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box

from distilbeam.pipelines.engine.counters import MICROSECONDS
from distilbeam.pipelines.engine.phase import PhaseReport
from distilbeam.pipelines.labelling.shard_plan import Task
from distilbeam.storage.files import read_json, write_json
from distilbeam.teacher.softlabels import read_manifest
from distilbeam.teacher.softlabels.manifest import manifest_files
from distilbeam.teacher.softlabels.plain_table import PlainTable

_TIMES = ("read", "score", "teacher", "encode", "write")


def add_work(path: Path, phase: str, done: PhaseReport) -> None:
    """Add what a phase cost to a JSON file of costs by phase; work that was killed is not in it."""
    log = read_json(path) if path.exists() else {}
    former = log.get(phase, {})
    now = {"items": done.items, "retried": done.retried, "seconds": done.seconds, **_in_seconds(done.counts)}
    if done.items:
        log[phase] = {name: former.get(name, 0) + now.get(name, 0) for name in {*former, *now}}
        write_json(path, log)


def with_counts_of(done: PhaseReport, dataset: Path, tasks: Sequence[Task]) -> PhaseReport:
    """Fill in, from the manifest, the counts of a label phase whose runner keeps no metrics."""
    if done.counts or not done.items or not manifest_files(dataset):
        return done
    keys = {shard.key for task in tasks for shard in task.shards}
    entries = [entry for entry in read_manifest(dataset).entries if entry.key in keys]
    counts = Counter(rows_labelled=sum(e.rows for e in entries), bytes_written=sum(e.bytes for e in entries))
    for name, fact in (("teacher_calls", "calls"), ("teacher_requests", "requests"), ("dead_letters", "failed")):
        counts[name] = sum(entry.extra[fact] for entry in entries)
    return replace(done, counts=counts)


def work_table(log: Mapping[str, Mapping[str, Any]]) -> PlainTable:
    """Show what each phase cost: rows, rate, and the seconds that workers spent on what."""
    table = PlainTable(
        title="Work, and seconds by kind", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0
    )
    table.collapse_padding = True
    for name in ("", "rows", "rows/s", "calls", "failed", "again", "MB", *_TIMES):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for phase, cost in log.items():
        rows = cost.get("rows_labelled", 0) + cost.get("rows_scored", 0)
        table.add_row(
            phase,
            f"{rows:,}",
            f"{rows / cost['seconds']:,.0f}" if cost["seconds"] else "–",
            f"{cost.get('teacher_calls', 0):,}",
            f"{cost.get('dead_letters', 0):,}",
            f"{cost['retried']:,}",
            f"{cost.get('bytes_written', 0) / 1e6:,.1f}",
            *(f"{cost.get(f'{name}_s', 0):.1f}" for name in _TIMES),
        )
    return table


def _in_seconds(counts: Mapping[str, int]) -> dict[str, float]:
    return {
        name.replace(MICROSECONDS, "_s"): value / 1e6 if name.endswith(MICROSECONDS) else value
        for name, value in counts.items()
    }
