"""The report of study 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.science.command import KEPT_ASIDE, Arguments
from benchmarks.science.comparing import aggregates, verdicts
from benchmarks.science.losses import BOUNDS, OURS, PUBLISHED
from benchmarks.science.report import accuracy_table, by_setting, write_markdown, write_parquet
from benchmarks.science.synthetic import synthetic

ORDER = (*PUBLISHED, *OURS, *BOUNDS)
REFERENCES = ("calibrated", "hard")
SETTING = ("dataset", "teacher", "buyer")


def write_report(given: Arguments, rows: Sequence[dict[str, Any]]) -> None:
    """Write study2.parquet, study2.md and the plots."""
    frame = pd.DataFrame(rows)
    write_parquet(given.out / "study2.parquet", frame)
    parts = [_calibration(frame)]
    for (name, buyer), here in frame.groupby(["dataset", "buyer"], sort=False):
        accuracies = here.groupby("teacher")["teacher_accuracy"].mean()
        errors = here.groupby("teacher")["teacher_error"].mean()

        def shown(teacher: str, right: pd.Series = accuracies, wrong: pd.Series = errors) -> str:
            return f"{teacher} ({100 * right[teacher]:.0f} %, among the bought {100 * (1 - wrong[teacher]):.0f} %)"

        parts += [
            f"## {name}{', kept aside' if name == KEPT_ASIDE else ''}, bought by {buyer}",
            f"Student's test accuracy, %, ± half the 95 % t-interval over {here['seed'].nunique()} seeds.",
            accuracy_table(by_setting(here, ("teacher",), "method"), ORDER, shown),
        ]
    groups = {
        f"{name}, {buyer}": rows_here for (name, buyer), rows_here in frame.groupby(["dataset", "buyer"], sort=False)
    }
    parts += aggregates(groups, SETTING, ORDER, REFERENCES, given.out / "study2")
    parts += verdicts(frame, SETTING, [*PUBLISHED, *OURS])
    parts += _shapes(given, frame)
    write_markdown(given.out / "study2.md", "Study 2: learning from labels that are sometimes wrong", parts)


def _shapes(given: Arguments, frame: pd.DataFrame) -> list[str]:
    """Compare over the teachers of the synthetic family whose wrong labels name the same kind of class."""
    here, dials = frame[frame["dataset"] == "synthetic"], synthetic().teachers
    if here.empty:
        return []
    shapes = here["teacher"].map(lambda name: dials[name]["shape"])
    found = aggregates(
        dict(list(here.groupby(shapes, sort=False))), SETTING, ORDER, REFERENCES[:1], given.out / "study2-synthetic"
    )
    return ["# The synthetic family by what a wrong label names", *found]


def _calibration(frame: pd.DataFrame) -> str:
    means = frame.groupby(["dataset", "teacher"], sort=False)[
        ["temperature", "teacher_ece", "teacher_ece_calibrated"]
    ].mean()
    lines = [
        f"{name}, {teacher}: T {row['temperature']:.2f}, {row['teacher_ece']:.3f} to {row['teacher_ece_calibrated']:.3f}"
        for (name, teacher), row in means.iterrows()
    ]
    return (
        "Temperature fitted, and the calibration error on the validation labels before and after: "
        + "; ".join(lines)
        + "."
    )
