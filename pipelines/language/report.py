"""The report of a run of a language model: tables for the console, one HTML file that opens offline, and the same as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.report.tables import DASH, console_table, size_text
from distilbeam.progress import Progress
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json
from distilbeam.teacher.softlabels.plain_table import PlainTable

COLUMNS = ("", "tokens learned", "bits/byte", "KL", "agrees", "weights", "size", "tokens/s")
ROUND_COLUMNS = (
    "round",
    "chosen by",
    "left",
    "bought",
    "no answer",
    "asked",
    "gain left",
    "gain bought",
    "bytes/token",
    "seconds",
)
_CAPTIONS = {
    "quality.png": "Bits per byte and KL to the teacher against the tokens that it labelled. The dashed line is the teacher.",
    "chosen.png": "Where blocks were bought: the gains of what was left of the pool and of what was chosen.",
}


def write_token_report(where: RunDirectory, progress: Progress) -> None:
    """Draw the plots and write `report/report.html` and `report/report.md`."""
    from distilbeam.pipelines.language.plots import (
        draw_plots,
    )  # with Matplotlib, half a second that every start would pay

    results = read_json(where.metrics)
    plots = draw_plots(results, where.report)
    progress.step(1, 2)
    environment = Environment(
        loader=PackageLoader("distilbeam.pipelines.report", "."), autoescape=True, undefined=StrictUndefined
    )
    config = where.config.read_text()
    html = environment.get_template("language.html.j2").render(
        lead=lead(results),
        columns=COLUMNS,
        rows=table_rows(results),
        sentences=sentences(results),
        lines=line_rows(results),
        plots=[(base64.b64encode(path.read_bytes()).decode(), path.name, _CAPTIONS[path.name]) for path in plots],
        round_columns=ROUND_COLUMNS,
        rounds=round_rows(results),
        config=config,
    )
    with replacing(where.report / "report.md") as temporary:
        temporary.write_text(_markdown(results, config))
    with replacing(where.report / "report.html") as temporary:
        temporary.write_text(html)
    progress.step(2, 2)


def token_results_table(results: dict[str, Any]) -> PlainTable:
    """Return the final table for the console."""
    title = f"On the {results['evaluated_on']} blocks, {results['evaluated_tokens']:,.0f} tokens (KL to the teacher, nats a token)"
    return console_table(title, COLUMNS, table_rows(results))


def lead(results: dict[str, Any]) -> str:
    """Say the result in a sentence."""
    last, teacher = results["students"][-1], results["teacher"]["bits_per_byte"]
    said = f"{last['bits_per_byte']:.3f} bits per byte after {len(results['rounds']):,} rounds"
    if "plain" in results:
        said += f", {results['plain']['bits_per_byte']:.3f} with the text of the same blocks alone"
    if teacher is not None:
        said += f"; the teacher has {teacher:.3f}"
    optimism = ""
    if results["evaluated_on"] == "validation":
        optimism = ", since no test blocks were given; no student learned them, and none was chosen by them"
    return f"{said}. Measured on the {results['evaluated_on']} blocks{optimism}."


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Format a row for the teacher, each student and each comparison, in the order of `COLUMNS`."""
    rows = [
        results["teacher"],
        *results["students"],
        *(results[name] for name in ("plain", "uniform") if name in results),
    ]
    return [
        (
            row["name"],
            _whole(row.get("labels")),
            _number(row.get("bits_per_byte"), "{:.3f}"),
            _number(row.get("kl"), "{:.3f}"),
            _number(row.get("agreement"), "{:.1%}"),
            _whole(row.get("parameters")),
            size_text(row.get("size_bytes")),
            _whole(row.get("tokens_per_s")),
        )
        for row in rows
    ]


def round_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Format a row for each round, in the order of `ROUND_COLUMNS`."""
    return [
        (
            f"{number}",
            entry["method"],
            _whole(entry["examples"]),
            _whole(entry["rows"]),
            _whole(entry["failed"]),
            _whole(entry["calls"]),
            *(_number(entry.get("mean_gain", {}).get(name), "{:.3f}") for name in ("pool", "bought")),
            _number(entry["bytes"] / max(entry["labels"], 1), "{:.1f}"),
            _number(entry["seconds"], "{:.1f}"),
        )
        for number, entry in enumerate(results["rounds"], 1)
    ]


def line_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Give the beginning of a line, and how the teacher and the students go on."""
    rows = [("given", repr(results["given"]))]
    last, before = results["students"][-1], results["students"][0]
    for row in (results["teacher"], before, last, *(results[n] for n in ("plain", "uniform") if n in results)):
        if row["continued"] is not None:
            rows.append((row["name"], repr(row["continued"])))
    return rows


def sentences(results: dict[str, Any]) -> list[str]:
    """Say what was paid and what it takes."""
    bought, rounds = results["labels"], results["rounds"]
    blocks, labels = sum(e["rows"] for e in rounds), sum(e["labels"] for e in rounds)
    asked = sum(e["calls"] for e in rounds)
    kept = f"top {bought['k']}" if bought["kind"] == "top_k" else f"{bought['k']} draws"
    said = [
        f"The teacher labelled {labels:,} tokens in {blocks:,} of the pool's {results['pool_blocks']:,} blocks ({asked:,} asked), "
        f"{kept} of each: {bought['bytes'] / max(labels, 1):.1f} bytes a token with its text.",
    ]
    others = ", ".join(f"{calls:,} of {name}" for name, calls in results["asked"].items())
    said.append(f"Asked besides: {others} blocks.")
    teacher = results["teacher"]
    if teacher["tokens_per_s"]:
        said.append(f"It took {teacher['seconds']:,.1f} s to answer, {teacher['tokens_per_s']:,.0f} tokens a second.")
    if failed := sum(entry["failed"] for entry in rounds):
        said.append(f"It had no answer for {failed:,} blocks; they are in deadletter/.")
    if unusable := results["unusable"]["rows"]:
        lists = ", ".join(results["unusable"]["lists"])
        said.append(
            f"The student cannot score {unusable:,} block(s) of the pool, which were left out; they are in {lists}."
        )
    said += list(_comparisons(results))
    return said


def _comparisons(results: dict[str, Any]) -> list[str]:
    last = results["students"][-1]["bits_per_byte"]
    said = []
    plain, teacher = results.get("plain", {}).get("bits_per_byte"), results["teacher"].get("bits_per_byte")
    if plain is not None and last >= plain:
        said.append(
            "The student of the text alone has as few bits per byte: for these the labels are not worth their price; more draws, "
            "training.hard_share, or a better teacher may make them so."
        )
    if plain is not None and teacher is not None and teacher >= plain:
        said.append(
            f"The teacher is no better than the student of the text alone ({teacher:.3f} and {plain:.3f} bits per byte): learning what "
            "it says holds a student back; take a better teacher, or the text alone (training.hard_share = 1)."
        )
    if "uniform" in results and last >= results["uniform"]["bits_per_byte"]:
        said.append("As many uniformly chosen blocks were as good: the choice has gained nothing in bits per byte.")
    return said


def _markdown(results: dict[str, Any], config: str) -> str:
    parts = [
        "# From teacher to student, token by token",
        lead(results),
        _grid(COLUMNS, table_rows(results)),
        *sentences(results),
        "## A line, completed",
        _grid(("", "goes on"), line_rows(results)),
        "## Rounds",
        _grid(ROUND_COLUMNS, round_rows(results)),
        "## Configuration",
        f"```toml\n{config.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        columns,
        ["---", *["---:"] * (len(columns) - 1)],
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else form.format(value)


def _whole(value: float | None) -> str:
    return _number(value, "{:,.0f}")
