"""Tables about students for the console and the report: exports, trials, the sweep, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box

from distilbeam.student.search.tuning import Search
from distilbeam.teacher.softlabels.plain_table import PlainTable

EXPORT_COLUMNS = (
    "", "accuracy", "NLL", "ECE", "agreement", "weights", "size", "ms", "p95", "ms/64", "p95/64", "memory", "runtime"
)  # fmt: skip
PARETO_COLUMNS = ("", "strategy", "width", "form", "validation", "test", "weights", "size", "ms", "ms/64", "front")
CLASS_COLUMNS = ("class", "examples", "recall", "precision", "F1", "mistaken for")
CLASSES_SHOWN = 20  # of many, those with the lowest recall
_LEFT_OUT = {"ECE", "p95", "p95/64", "runtime", "strategy", "width", "form"}  # a console has 80 columns
_WORDS = {"class", "mistaken for"}
DASH = "–"


def console_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> PlainTable:
    """Lay rows out for the console, the first column to the left."""
    table = PlainTable(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    shown = [i for i, column in enumerate(columns) if column not in _LEFT_OUT]
    for i in shown:
        words = columns[i] in _WORDS  # names of classes, which may be long: they take more lines, figures never do
        table.add_column(
            columns[i],
            justify="right" if i and not words else "left",
            no_wrap=not words,
            overflow="fold" if words else "ellipsis",
        )
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def export_rows(rows: Sequence[Mapping[str, Any]], evaluated_on: str | None) -> list[tuple[str, ...]]:
    """Format a row for a student and each of its exports.

    Args:
      rows: figures as `exports.write_exports` gives them.
      evaluated_on: name of the set whose quality is shown; None when there was none.

    Returns:
      Cells in the order of `EXPORT_COLUMNS`.
    """
    return [
        (
            row["name"],
            *_quality(row.get(evaluated_on, {}) if evaluated_on else {}),
            f"{row['parameters']:,}",
            size_text(row["size_bytes"]),
            *(f"{row[name]:.2f}" for name in _LATENCIES),
            size_text(row["peak_memory_bytes"]),
            size_text(row["memory_bytes"]),
        )
        for row in rows
    ]


def pareto_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Format a row for each point of a sweep, the cheapest first, in the order of `PARETO_COLUMNS`."""
    points = sorted(results["points"], key=lambda point: (point[results["cost"]], point["name"]))
    return [
        (
            point["name"],
            point["strategy"],
            f"{point['width']:g}",
            point["form"],
            f"{point['accuracy']:.1%}",
            f"{point['test_accuracy']:.1%}" if "test_accuracy" in point else DASH,
            f"{point['parameters']:,}",
            size_text(point["size_bytes"]),
            f"{point['latency_ms_batch1']:.2f}",
            f"{point['latency_ms_batch64']:.2f}",
            "●" if point["on_front"] else "",
        )
        for point in points
    ]


def trial_table(found: Search, metric: str, shown: int = 10) -> PlainTable:
    """Lay the best trials of a search out."""
    sign = 1 if metric == "nll" else -1
    complete = [trial for trial in found.trials if trial.state == "complete" and trial.value is not None]
    best = sorted(complete, key=lambda trial: sign * (trial.value or 0.0))[:shown]
    names = list(found.best.settings)
    counts = {state: sum(trial.state == state for trial in found.trials) for state in ("complete", "cut", "failed")}
    title = f"{len(found.trials)} trials: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}"
    rows = [(f"{t.value:.4f}", *(_value(t.settings[name]) for name in names)) for t in best]
    return console_table(title, (f"validation {metric}", *(name.removeprefix("training.") for name in names)), rows)


def class_rows(classes: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Format a row for each class that was met, the lowest recall first, in the order of `CLASS_COLUMNS`."""
    mistaken = {row["class"]: ", ".join(f"{m['class']} {m['examples']}" for m in row["mistaken_for"]) for row in worst}
    met = sorted((row for row in classes if row["examples"]), key=lambda row: row["recall"])
    return [
        (
            row["class"],
            f"{row['examples']:,}",
            *(DASH if row[name] is None else f"{row[name]:.1%}" for name in ("recall", "precision", "f1")),
            mistaken.get(row["class"], ""),
        )
        for row in met
    ]


def class_table(classes: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]]) -> PlainTable:
    """Lay out the classes for a terminal; of many those with the lowest recall, so that the figures above them stay in sight."""
    rows = class_rows(classes, worst)
    some = f"{CLASSES_SHOWN} of {len(rows):,} classes" if len(rows) > CLASSES_SHOWN else "Classes"
    return console_table(f"{some}, the lowest recall first", CLASS_COLUMNS, rows[:CLASSES_SHOWN])


def size_text(size: float | None) -> str:
    """Write a number of bytes in KB or MB."""
    if size is None:
        return DASH
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} KB"


LATENCIES = ("latency_ms_batch1", "latency_ms_batch64")
_LATENCIES = ("latency_ms_batch1", "latency_ms_batch1_p95", "latency_ms_batch64", "latency_ms_batch64_p95")


def _quality(metrics: Mapping[str, float]) -> tuple[str, ...]:
    formats = {"accuracy": "{:.1%}", "nll": "{:.3f}", "ece": "{:.3f}", "agreement": "{:.1%}"}
    return tuple(text.format(metrics[name]) if name in metrics else DASH for name, text in formats.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
