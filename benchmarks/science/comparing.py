"""Tables that compare methods: differences in the aggregate, and the verdicts of the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from benchmarks.science.report import by_setting, differences, signed, table
from benchmarks.science.statistics import LEVEL, MARGIN, Interval, aggregate, judge


def aggregates(
    groups: Mapping[str, pd.DataFrame],
    setting: Sequence[str],
    methods: Sequence[str],
    references: Sequence[str],
    picture: Path,
) -> list[str]:
    """Compare methods with references over all settings of each group.

    Args:
      groups: rows by the name of their column.
      setting: what a setting is, names of columns of the rows.
      methods: in the order to show.
      references: what to compare with.
      picture: the plots are beside it, with the reference after the name.

    Returns:
      Parts of a page.
    """
    level = LEVEL / len(references)
    parts = [
        "## In the aggregate",
        "Mean over the settings of the difference in accuracy, points, ± half the interval over the seeds "
        f"({100 * (1 - level):g} %: {len(references)} comparison{'s'[: len(references) - 1]}); bold where 0 is outside.",
    ]
    for reference in references:
        found: dict[str, dict[str, Interval]] = {}
        for method in (name for name in methods if name != reference):
            for group, rows in groups.items():
                difference = aggregate(by_setting(rows, setting, "method"), method, reference, level)
                if difference is not None:
                    found.setdefault(method, {})[group] = difference
        if not found:
            continue
        shown = [[method, *(signed(found[method].get(group)) for group in groups)] for method in found]
        path = picture.with_name(f"{picture.name}-minus-{reference.replace(',', '').replace(' ', '-')}.png")
        differences(path, found, f"Accuracy minus that of {reference}", "points, with interval")
        parts += [table([f"minus {reference}", *groups], shown), f"![minus {reference}]({path.name})"]
    return parts


def verdicts(frame: pd.DataFrame, setting: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Judge every method by the rule of `statistics`, against all the others.

    Args:
      frame: the rows.
      setting: what a setting is, names of columns.
      methods: the competitors.

    Returns:
      Parts of a page.
    """
    results, rows = by_setting(frame, setting, "method"), []
    for method in methods:
        found = judge(results, method, methods)
        if not found:
            continue
        worse = sum(bool(verdict.worse_than) for verdict in found.values())
        shown = sum(verdict.shown for verdict in found.values())
        behind = [100 * verdict.behind.mean for verdict in found.values()]
        numbers = f"{sum(behind) / len(behind):.1f}", f"{max(behind):.1f}"
        rows.append([method, str(len(found)), str(worse), str(shown), *numbers])
    header = [
        "method",
        "settings",
        "significantly worse than a competitor",
        f"shown within {100 * MARGIN:g} point of every competitor",
        "behind the best on average, points",
        "behind the best at most, points",
    ]
    return ["## By the rule", table(header, rows)]
