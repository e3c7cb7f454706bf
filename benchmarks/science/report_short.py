"""The report of a study that compares a handful of methods: tables of accuracies, differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.science.command import KEPT_ASIDE, Arguments
from benchmarks.science.comparing import aggregates, verdicts
from benchmarks.science.report import accuracy_table, by_setting, save, table, write_markdown, write_parquet


def write_report(
    given: Arguments,
    rows: Sequence[dict[str, Any]],
    name: str,
    title: str,
    methods: Sequence[str],
    references: Sequence[str],
    more: Sequence[str] = (),
    values: Sequence[str] = ("accuracy",),
) -> None:
    """Write NAME.parquet, NAME.md and the plots.

    Args:
      given: the study's arguments.
      rows: its figures.
      name: of the files.
      title: of the page.
      methods: in the order to show.
      references: methods that the others are compared with.
      more: columns that make a setting, beside dataset and teacher.
      values: columns to show; the first is compared.
    """
    frame = pd.DataFrame(rows)
    write_parquet(given.out / f"{name}.parquet", frame)
    parts = []
    for dataset, here in frame.groupby("dataset", sort=False):
        aside = ", kept aside" if dataset == KEPT_ASIDE else ""
        for value in values:
            results = by_setting(here, ("teacher", *more), "method", value)
            parts += [
                f"## {dataset}{aside}",
                f"{value.replace('_', ' ')}, %, ± half the 95 % t-interval over {here['seed'].nunique()} seeds.",
                accuracy_table(results, methods),
            ]
    if "parameters" in frame:
        sizes = frame.groupby(["dataset", "method", *more], sort=False)["parameters"].mean()
        lines = [[*map(str, names), f"{count:,.0f}"] for names, count in sizes.items()]
        parts += ["## Sizes", table(["dataset", "method", *more, "parameters"], lines)]
    groups = dict(list(frame.groupby("dataset", sort=False)))
    setting = ("dataset", "teacher", *more)
    parts += aggregates(groups, setting, methods, references, given.out / name)
    parts += verdicts(frame, setting, methods)
    write_markdown(given.out / f"{name}.md", title, parts)


def pareto(out: Path, rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
    """Draw accuracy against bytes, a panel per dataset."""
    frame = pd.DataFrame(rows)
    groups = list(frame.groupby("dataset", sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 3.1), squeeze=False)
    for axis, (dataset, here) in zip(axes[0], groups, strict=True):
        for index, method in enumerate(methods):
            means = here[here["method"] == method].groupby("width")[["bytes", "accuracy"]].mean()
            style = "--o" if "int8" in method else "-o"
            axis.plot(means["bytes"] / 1024, 100 * means["accuracy"], style, ms=3, color=f"C{index // 2}", label=method)
        axis.set(xscale="log", xlabel="KB", title=dataset)
    axes[0, 0].set_ylabel("student's test accuracy, %")
    axes[0, -1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, out / "study5-pareto.png")
