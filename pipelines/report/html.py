"""The report of a run: a table for the console, and one HTML file that opens offline, with its plots inside."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box

from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.final_result import final_sentence
from distilbeam.pipelines.jobs.kept_student import worse_sentence
from distilbeam.pipelines.report.tables import (
    CLASS_COLUMNS,
    CLASSES_SHOWN,
    EXPORT_COLUMNS,
    LATENCIES,
    PARETO_COLUMNS,
    class_rows,
    export_rows,
    pareto_rows,
)
from distilbeam.progress import Progress
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json
from distilbeam.teacher.softlabels.plain_table import PlainTable

_CAPTIONS = {
    "accuracy.png": "Accuracy against the number of labels bought. The dashed line is the teacher.",
    "bought.png": "Where the labels were bought: the gains of what was left of the pool and of what was chosen, "
    "and how often the teacher is right on validation examples of such a gain.",
    "footprint.png": "Size and latency against accuracy.",
    "pareto.png": "Students of several sizes: accuracy against cost. No student is better and cheaper than one on the "
    "front, which is that of the validation set.",
}
_COLUMNS = ("", "labels", "accuracy", "NLL", "ECE", "weights", "size", "ms", "ms/64")


def write_report(where: RunDirectory, progress: Progress) -> None:
    """Draw the plots and write `report/report.html`."""
    # with Matplotlib, half a second that every start would pay
    from distilbeam.pipelines.report.plots import draw_pareto, draw_plots

    results = read_json(where.metrics)
    exports, pareto = _exports(where), _optional(where.root / "pareto" / "pareto.json")
    plots = draw_plots(results, where.report)
    if pareto is not None:
        plots.append(draw_pareto(pareto, where.report))
    progress.step(1, 2)
    environment = Environment(
        loader=PackageLoader("distilbeam.pipelines.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"pct": "{:.1%}".format, "count": "{:,}".format}
    html = environment.get_template("report.html.j2").render(
        results=results,
        columns=_COLUMNS,
        rows=table_rows(results),
        sentences=_sentences(results),
        plots=[(base64.b64encode(path.read_bytes()).decode(), path.name, _CAPTIONS[path.name]) for path in plots],
        class_columns=CLASS_COLUMNS,
        shown=CLASSES_SHOWN,
        classes=class_rows(results.get("classes", []), results.get("worst", [])),
        export_columns=EXPORT_COLUMNS,
        exports=export_rows(exports, results["evaluated_on"]),
        pareto_columns=PARETO_COLUMNS,
        pareto=[] if pareto is None else pareto_rows(pareto),
        config=where.config.read_text(),
    )
    with replacing(where.report / "report.html") as temporary:
        temporary.write_text(html)
    progress.step(2, 2)


def _sentences(results: dict[str, Any]) -> list[str]:
    """Say below the table what was paid, what the last student is, and what its training ran in."""
    ran = [f"The last student's training ran {results['ran']}."] if "ran" in results else []
    variant = [f"{results['variant']}."] if "variant" in results else []
    return [*calls_sentences(results), *variant, *ran]


def _exports(where: RunDirectory) -> list[dict[str, Any]]:
    """Read the exports of the last student that was exported: its figures and those of each of its exports."""
    tables = sorted((where.root / "exports").glob("*/results.json"))
    return read_json(tables[-1])["rows"] if tables else []


def _optional(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def results_table(results: dict[str, Any]) -> PlainTable:
    """Return the final table for the console."""
    title = f"On the {results['evaluated_on']} set (ms: latency for one example, and for 64)"
    table = PlainTable(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    shown = [i for i, column in enumerate(_COLUMNS) if column != "ECE"]  # a console has 80 columns
    for i in shown:
        table.add_column(_COLUMNS[i], justify="right" if i else "left", no_wrap=True)
    for row in table_rows(results):
        table.add_row(*(row[i] for i in shown))
    return table


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Format a row for the teacher, each student, the uniform comparison, beside another student the run's own, and the baseline."""
    rows = [
        results["teacher"],
        *results["students"],
        *([results["final"]["row"]] if "row" in results.get("final", {}) else []),
        *(results[name] for name in ("uniform", "own") if name in results),
        *([results["baseline"]] if "accuracy" in results.get("baseline", {}) else []),
    ]
    return [
        (
            row["name"],
            f"{row['labels']:,}" if "labels" in row else "–",
            f"{row['accuracy']:.1%}",
            f"{row['nll']:.3f}",
            f"{row['ece']:.3f}",
            _count(row["parameters"]),
            _bytes(row["size_bytes"]),
            *("–" if row[name] is None else f"{row[name]:.2f}" for name in LATENCIES),
        )
        for row in rows
    ]


def calls_sentences(results: dict[str, Any]) -> list[str]:
    """Say in sentences what the teacher was asked, and what it was spared."""
    calls, pool = results["calls"], results["pool_rows"]
    failed = sum(entry["summary"]["failed"] for entry in results["rounds"])
    labelled = calls.get("labelled", calls["labels"])
    # identical rows are asked once, and rows of the uniform comparison may have been asked before
    copied = f" in {calls['labels']:,} calls" if calls["labels"] < labelled else ""
    sentences = [
        f"The teacher labelled {labelled:,} of the {pool:,} examples of the pool ({labelled / pool:.0%}){copied}; "
        f"{calls['saved']:,} calls saved.",
        f"It is wrong on {results['wrong_share']:.1%} of the validation set; its labels have the temperature "
        f"{results.get('temperature', 1):.3g}.",
    ]
    if note := results.get("temperature_note"):
        sentences.append(f"{note[0].upper()}{note[1:]}.")
    asked = [
        f"{calls[name]:,} for the {what}"
        for name, what in (("validation", "validation set"), ("test", "test set"), ("uniform", "uniform comparison"))
        if name in calls
    ]
    sentences.append(f"Asked besides: {', '.join(asked)}.")
    if failed:
        sentences.append(f"It had no answer for {failed:,} rows; they are in deadletter/.")
    standing = results.get("standing")
    if standing is not None and standing["lead"] < standing["least_lead"]:
        learned = (
            "its labels were pooled with the student's beliefs" if standing["pooled"] else "its labels are as it said"
        )
        sentences.append(
            f"The teacher was weak: {standing['teacher']:.1%} of the validation set right, {standing['student']:.1%} by the student "
            f"before; {learned}."
        )
    sentences += [f"{worse_sentence(found)}." for found in results.get("kept", {}).get("worse", [])]
    if (baseline := results.get("baseline")) is not None and "why" in baseline:
        sentences.append(f"There is no baseline ({baseline['name']}): {baseline['why']}.")
    elif baseline is not None and baseline["accuracy"] >= (best := _last_accuracy(results)):
        sentences.append(
            f"{baseline['name']} on the same labels is right on {baseline['accuracy']:.1%}, the last student on {best:.1%}: this "
            "student is not worth its trouble yet; 'distilbeam tune CONFIG' looks for better settings."
        )
    if said := final_sentence(results["final"]) if "final" in results else "":
        sentences.append(f"{said}.")
    if unusable := results.get("unusable", {}).get("rows"):
        lists = ", ".join(results["unusable"]["lists"])
        sentences.append(
            f"The student cannot read {unusable:,} row(s) of the pool, which were left out; they are in {lists}."
        )
    return sentences


def _last_accuracy(results: dict[str, Any]) -> float:
    """Return the accuracy of the student that is kept."""
    kept = results["final"]["row"] if "row" in results.get("final", {}) else None
    return float((kept or results["students"][-1])["accuracy"])


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _bytes(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} KB"
