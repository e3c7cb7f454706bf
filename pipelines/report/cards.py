"""The model cards of a run's students: what their training could not know, the data, the teacher and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distilbeam.pipelines.jobs.final_result import final_student
from distilbeam.pipelines.jobs.run import Run
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.export.export import card_of
from distilbeam.student.model_card import CARD, Card

_MEASURES = ("examples", "accuracy", "nll", "ece", "agreement")


def write_cards(run: Run, results: Mapping[str, Any]) -> None:
    """Write the model cards of a run's own students into their folders.

    Args:
      run: the run.
      results: its figures, as `report/metrics.json` has them.
    """
    where, name = run.directory, str(results["evaluated_on"])
    rows = {
        where.student(n): row for n, row in zip(where.trained(run.config.run.rounds), results["students"], strict=True)
    }
    best = final_student(run) or where.student(results["kept"]["round"])
    if "final" in results and "row" in results["final"]:
        rows[best] = results["final"]["row"]
    for directory, row in rows.items():
        card = replace(
            card_of(load_student(directory)),
            facts=run_facts(run, row["labels"]),
            figures={name: {key: row[key] for key in _MEASURES if key in row}},
            per_class=results["classes"] if directory == best else (),
            on=f"the {name} set",
        )
        write_card(directory, card)


def run_facts(run: Run, labels: int | None = None) -> dict[str, Any]:
    """Say what a run's students are made from.

    Args:
      run: the run.
      labels: how many the student could learn; those of all rounds without it.
    """
    rounds = range(run.config.run.rounds)
    summaries = [run.directory.summary(run.directory.labels(number)) for number in rounds]
    bought = sum(read_json(path)["rows"] for path in summaries if path.exists())
    facts: dict[str, Any] = {
        "data": f"a pool of {run.inputs.pool.rows:,} unlabelled rows, {run.inputs.labelled.plan.rows:,} labelled ones to begin with",
        "labels bought": f"{bought if labels is None else labels:,}, chosen by {run.config.selection.method}",
    }
    if run.was_asked("validation"):
        facts["teacher"] = f"{run.fingerprint}, wrong on {run.wrong_share:.1%} of the validation set"
        facts["temperature of its labels"] = f"{run.temperature:.3g}"
    return facts


def write_card(directory: Path, card: Card) -> None:
    """Write a model card into a folder that is there, in one step."""
    with replacing(directory / CARD) as temporary:
        temporary.write_text(card.text())
