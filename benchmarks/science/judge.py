"""The rule's page: regret, non-inferiority and corrections of studies 1 and 2, from their published figures.

python -m benchmarks.science.judge                   # reads and writes benchmarks/results/science/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.science.buying import OURS, PUBLISHED
from benchmarks.science.command import RESULTS
from benchmarks.science.losses import OURS as OUR_LOSSES
from benchmarks.science.losses import PUBLISHED as PUBLISHED_LOSSES
from benchmarks.science.noninferiority import (
    WITHIN,
    Settings,
    benjamini_hochberg,
    beside,
    least_lead,
    not_worse,
    over_datasets,
    regrets,
)
from benchmarks.science.report import by_setting, signed, table, write_markdown
from benchmarks.science.statistics import LEAST_SEEDS, holm, paired_p


def page(frame: pd.DataFrame, setting: Sequence[str], methods: Sequence[str], reference: str) -> list[str]:
    """Judge methods.

    Args:
      frame: the rows of a study.
      setting: what a setting is beside the data set, without the budget.
      methods: the competitors.
      reference: the one that is the least to ask for.

    Returns:
      Parts of a page: the verdicts, and what each data set shows beside the reference.
    """
    datasets = {str(name): by_setting(rows, setting, "method") for name, rows in frame.groupby("dataset", sort=False)}
    methods = [method for method in methods if any(method in s for found in datasets.values() for s in found.values())]
    rejected, family, deviation = _corrections(datasets, methods)
    rows = []
    for method in methods:
        behind = {name: regrets(settings, method, methods) for name, settings in datasets.items()}
        means = [np.mean(list(found.values())) for found in behind.values() if found]
        worst = max((value for found in behind.values() for value in found.values()), default=np.nan)
        counts = [
            "" if against == [method] else "{} of {}".format(*not_worse(datasets, method, against, within))
            for against in ([reference], methods)
            for within in WITHIN
        ]
        worse = [str(sum(found[method])) for found in rejected]
        rows.append([method, f"{100 * np.mean(means):.1f}", f"{100 * worst:.1f}", *counts, *worse])
    points = " and ".join(f"{100 * within:g}" for within in WITHIN)
    header = ["method", "mean regret", "worst regret"]
    header += [f"not worse than {who} within {100 * w:g}" for who in (reference, "any") for w in WITHIN]
    header += ["worse in settings, Holm", "worse, Benjamini-Hochberg"]
    some = next(iter(datasets.values()))
    seeds = len(next(iter(next(iter(some.values())).values())))
    power = (
        f"Power: {family:,} comparisons of a method with another in a setting; over {seeds} seeds the median deviation of a difference is "
        f"{100 * deviation:.1f} points, so that Holm's first step finds a lead of {100 * least_lead(deviation, seeds, family):.1f} points "
        f"with 80 % probability, and one comparison alone {100 * least_lead(deviation, seeds):.1f}. The columns "
        "of corrected tests say little of methods that are closer. “Not worse” counts data sets whose interval "
        f"shows it within {points} points; what each could show is in the next table."
    )
    return [table(header, rows), power, *_datasets(datasets, methods, reference)]


def _datasets(datasets: dict[str, Settings], methods: Sequence[str], reference: str) -> list[str]:
    rows = []
    for method in (name for name in methods if name != reference):
        cells = []
        for settings in datasets.values():
            found = beside(settings, method, reference)
            cells.append(
                "" if found is None else f"{100 * found.mean:+.1f} (≥ {100 * found.low:+.1f}; {100 * found.least:.1f})"
            )
        rows.append([method, *cells, signed(over_datasets(datasets, method, reference))])
    return [
        f"Minus {reference}, points: the mean, in brackets the lower end of the one-sided 95 % interval over the seeds and the difference "
        "that could be shown with 80 % probability were both equal. Last column: the mean over the data sets, ± half the 95 % "
        "interval whose unit is the data set.",
        table([f"minus {reference}", *datasets, "over data sets"], rows),
    ]


def _corrections(
    datasets: dict[str, Settings], methods: Sequence[str]
) -> tuple[tuple[dict[str, list[bool]], dict[str, list[bool]]], int, float]:
    """Say by method in which settings some other is significantly better, by Holm and by Benjamini and Hochberg.

    Both correct over all comparisons of the method, as `statistics.judge` does.
    """
    found: tuple[dict[str, list[bool]], dict[str, list[bool]]] = ({}, {})
    deviations, family = [], 0
    for method in methods:
        pairs = []
        for settings in datasets.values():
            for setting, results in settings.items():
                for other in methods:
                    if other == method or not {method, other} <= set(results):
                        continue
                    d = results[other] - results[method]
                    d = d[np.isfinite(d)]
                    if len(d) >= LEAST_SEEDS:
                        pairs.append((id(settings), setting, d))
        p = [paired_p(d) for *_, d in pairs]
        deviations += [float(d.std(ddof=1)) for *_, d in pairs]
        family = max(family, len(pairs))
        for by_method, correct in zip(found, (holm, benjamini_hochberg), strict=True):
            bad = {pair[:2]: False for pair in pairs}
            for pair, no in zip(pairs, correct(p), strict=True):
                bad[pair[:2]] |= bool(no and pair[2].mean() > 0)
            by_method[method] = list(bad.values())
    return found, family, float(np.median(deviations))


def main() -> None:
    """Read, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory with study1.parquet and study2.parquet"
    )
    parser.add_argument("--out", type=Path, help="directory of the page; that of the results if it is not given")
    given = parser.parse_args()
    first, second = (pd.read_parquet(given.results / f"study{number}.parquet") for number in (1, 2))
    selectors = [*PUBLISHED, *OURS]
    small = first[first["budget"] <= 0.1]
    joint = small.assign(method=small["method"] + ", " + small["labels"])
    together = [f"{method}, {labels}" for method in selectors for labels in ("calibrated", "pooled")]
    parts = ["# Which labels to buy: calibrated labels, budgets of 2, 5 and 10 % averaged"]
    parts += page(small[small["labels"] == "calibrated"], ("teacher",), selectors, "margin")
    parts.append("# Selectors together with labels, three data sets")
    parts += page(joint[joint["dataset"] != "synthetic"], ("teacher",), together, "margin, calibrated")
    parts.append("# What to learn from the labels")
    parts += page(second, ("teacher", "buyer"), [*PUBLISHED_LOSSES, *OUR_LOSSES], "calibrated")
    title = "The rule: regret, and what is shown to be not worse"
    write_markdown((given.out or given.results) / "rule.md", title, [*parts, _explained()])


def _explained() -> str:
    return (
        "Regret in a setting (data set, teacher and, for the losses, buyer) is the distance to the best method, which is chosen on the other seeds; "
        "the mean is over the settings of a data set, then over the data sets. Definitions: `benchmarks/science/noninferiority.py`."
    )


if __name__ == "__main__":
    main()
