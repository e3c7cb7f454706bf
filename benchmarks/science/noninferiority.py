"""Regret and non-inferiority of methods, with the data set as the unit and the power of every claim.

"Significantly worse in no setting" is true of any method if the seeds are few and the comparisons many: with five seeds and
Holm's correction over several hundred comparisons a lead is found only where it is many points (`least_lead`). So a claim
that a method is not worse rests on an interval here:

**Non-inferior to B within D on a data set**: the lower end of the one-sided 95 % t-interval over the seeds of A - B, averaged
over the data set's teachers, budgets and labels seed by seed, is above -D. The budgets of one run are three looks at one
chain of choices, and are one value. "To any" wants it of every competitor at that level: as an intersection of tests it
needs no correction.

**Power**: the differences' own deviation says how small a D could be shown with 80 % probability if A and B were equal.

**Regret** in a setting (a data set, a teacher, labels; budgets averaged): how far A is behind the best of all methods. The
best is chosen on the other seeds, because the largest of several means is too large by chance. Means are over the settings
of a data set first, then over the data sets; the worst is the largest of a setting.

**Over data sets**: the mean over the data sets of A - B with a t-interval over them, for whoever asks of the next data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.science.statistics import LEAST_SEEDS, LEVEL, Interval, aggregate, interval

Settings = dict[str, dict[str, npt.NDArray[np.float64]]]
WITHIN = (0.01, 0.02)  # points of accuracy that a practitioner would give away
POWER = 0.8


def benjamini_hochberg(p_values: Sequence[float], level: float = LEVEL) -> npt.NDArray[np.bool_]:
    """Say which hypotheses the step-up procedure of Benjamini and Hochberg (1995) rejects: of those, `level` are false in the mean."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= level * np.arange(1, len(p) + 1) / max(1, len(p)))
    rejected = np.zeros(len(p), bool)
    if len(passed):
        rejected[order[: passed[-1] + 1]] = True
    return rejected


def least_lead(deviation: float, seeds: int, comparisons: int = 1) -> float:
    """Give the lead that a two-sided paired t-test finds with 80 % probability, corrected as Holm's first step does.

    Args:
      deviation: of the differences between two methods over the seeds.
      seeds: their number.
      comparisons: in the family.
    """
    needed = stats.t.ppf(1 - LEVEL / 2 / comparisons, seeds - 1) + stats.t.ppf(POWER, seeds - 1)
    return float(needed * deviation / np.sqrt(seeds))


class Shown(NamedTuple):
    """What a data set shows of a method beside another.

    Attributes:
      mean: of method - other.
      low: lower end of the one-sided 95 % interval; non-inferior within D where it is above -D.
      least: the D that would be shown with 80 % probability were both equal.
    """

    mean: float
    low: float
    least: float


def beside(settings: Settings, method: str, other: str) -> Shown | None:
    """Compare two methods on one data set; None where fewer than `LEAST_SEEDS` seeds have all its settings."""
    found = aggregate(settings, method, other, level=2 * LEVEL)
    if found is None:
        return None
    error = found.half / stats.t.ppf(1 - LEVEL, found.count - 1)
    least = error * (stats.t.ppf(1 - LEVEL, found.count - 1) + stats.t.ppf(POWER, found.count - 1))
    return Shown(found.mean, found.low, float(least))


def not_worse(datasets: dict[str, Settings], method: str, others: Sequence[str], within: float) -> tuple[int, int]:
    """Count the data sets on which a method is non-inferior to each of the others that is there.

    Args:
      datasets: results by data set, setting and method.
      method: to be judged.
      others: what it is compared with.
      within: D.

    Returns:
      How many data sets show it, and how many there are.
    """
    shown = there = 0
    for settings in datasets.values():
        found = [beside(settings, method, other) for other in others if other != method]
        known = [one for one in found if one is not None]
        there += bool(known)
        shown += bool(known) and all(one.low > -within for one in known)
    return shown, there


def regrets(settings: Settings, method: str, methods: Sequence[str]) -> dict[str, float]:
    """Give by setting how far a method is behind the best, which is chosen on the other seeds than those it is compared on."""
    found = {}
    for name, results in settings.items():
        here = [other for other in methods if other in results]
        if method not in here:
            continue
        table = np.stack([results[other] for other in here])
        table = table[:, np.isfinite(table).all(axis=0)]
        if table.shape[1] < LEAST_SEEDS:
            continue
        best = [int((table.sum(axis=1) - table[:, seed]).argmax()) for seed in range(table.shape[1])]
        own = table[here.index(method)]
        found[name] = float(np.mean([table[number, seed] - own[seed] for seed, number in enumerate(best)]))
    return found


def over_datasets(datasets: dict[str, Settings], method: str, other: str) -> Interval | None:
    """Average method - other over the data sets, with a 95 % t-interval whose unit is the data set; None below three of them."""
    found = [beside(settings, method, other) for settings in datasets.values()]
    means = [one.mean for one in found if one is not None]
    return interval(means) if len(means) >= LEAST_SEEDS else None
