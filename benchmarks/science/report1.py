"""The report of study 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.science.buying import BOUNDS, OTHERS, OURS, PUBLISHED
from benchmarks.science.command import KEPT_ASIDE, Arguments
from benchmarks.science.comparing import aggregates, verdicts
from benchmarks.science.report import accuracy_table, by_setting, curves, table, write_markdown, write_parquet

ORDER = (*PUBLISHED, *OTHERS, *OURS, *BOUNDS)
COMPETITORS = (*PUBLISHED, *OTHERS, *OURS)
REFERENCES = ("uniform", "margin")
SETTING = ("dataset", "teacher", "budget", "labels")


def write_report(given: Arguments, rows: Sequence[dict[str, Any]]) -> None:
    """Write study1.parquet, study1.md and the plots."""
    frame = pd.DataFrame(rows)
    write_parquet(given.out / "study1.parquet", frame.drop(columns="rows", errors="ignore"))
    parts = []
    last = frame[frame["budget"].isin((0.1, 0.5))]
    for (name, schedule, labels), here in frame.groupby(["dataset", "schedule", "labels"], sort=False):
        end = here[here["budget"] == here["budget"].max()]
        results = by_setting(end, ("teacher",), "method")
        accuracies = end.groupby("teacher")["teacher_accuracy"].mean()
        aside = ", kept aside" if name == KEPT_ASIDE else ""
        picture = f"study1-{name}-{schedule}-{labels}.png"
        parts += [
            f"## {name}{aside}, {100 * end['budget'].iloc[0]:g} % of the pool, {labels} labels",
            f"Student's test accuracy, %, ± half the 95 % t-interval over {end['seed'].nunique()} seeds.",
            accuracy_table(results, ORDER, lambda teacher, a=accuracies: f"{teacher} ({100 * a[teacher]:.0f} %)"),
            _bought(end),
        ]
        panels = list(dict.fromkeys(end["teacher"]))[:6]
        curves(given.out / picture, here, ORDER, panels, f"{name}, {labels} labels")
        parts.append(f"![{name}]({picture})")
    soft, hard = last[last["labels"] == "calibrated"], last[last["labels"] == "hard"]
    groups = dict(list(soft.groupby("dataset", sort=False)))
    groups |= {f"{name}, hard labels": rows for name, rows in hard.groupby("dataset", sort=False)}
    parts += aggregates(groups, SETTING, ORDER, REFERENCES, given.out / "study1")
    parts += verdicts(last, SETTING, COMPETITORS)
    parts += _all_budgets(given, frame[frame["labels"] == "calibrated"])
    parts += _joint(given, last)
    write_markdown(given.out / "study1.md", "Study 1: which labels to buy", parts)


def _all_budgets(given: Arguments, frame: pd.DataFrame) -> list[str]:
    """Compare selectors over every dataset, teacher and budget, the earlier rounds' too, and over all of them together."""
    groups = dict(list(frame.groupby("dataset", sort=False))) | {"all together": frame}
    found = aggregates(groups, SETTING, ORDER, REFERENCES, given.out / "study1-all-budgets")
    return ["# All budgets, calibrated labels", *found, *verdicts(frame, SETTING, COMPETITORS)]


def _joint(given: Arguments, last: pd.DataFrame) -> list[str]:
    """Compare selectors together with the labels that the student learns from."""
    joint = last.assign(method=last["method"] + ", " + last["labels"])
    names = [f"{method}, {labels}" for method in ORDER for labels in joint["labels"].unique()]
    pooled = joint[joint["method"].isin(joint.loc[joint["labels"] == "pooled", "method"])]
    if pooled.empty:
        return []
    groups = dict(list(joint.groupby("dataset", sort=False)))
    setting = ("dataset", "teacher", "budget")
    fair = [name for name in names if name.partition(",")[0] not in BOUNDS]
    found = aggregates(
        groups, setting, names, ("uniform, calibrated", "margin, calibrated"), given.out / "study1-joint"
    )
    return ["# Selectors and labels together", *found, *verdicts(joint, setting, fair)]


def _bought(end: pd.DataFrame) -> str:
    columns = {
        "teacher_error": "teacher's error among the bought, %",
        "gain_expected": "expected correct gain of the last round, %",
        "gain_correct": "realised correct gain, %",
        "select_s": "choosing, s of a core",
    }
    means = end.groupby("method")[list(columns)].mean()
    rows = []
    for method in (name for name in ORDER if name in means.index):
        values = means.loc[method]
        rows.append([method, *(f"{100 * values[name]:.1f}" for name in list(columns)[:3]), f"{values['select_s']:.2f}"])
    return "Means over the teachers, last round:\n\n" + table(["method", *columns.values()], rows)
