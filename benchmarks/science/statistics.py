"""Intervals, and the rule by which a method is better, worse, or not worse. Written before a result was looked at.

The unit of replication is the seed: it draws the split, the teacher, the students and the choices anew, and all methods of
a seed share the first three, so that methods are compared by differences within the seed.

**A setting** is a dataset, a teacher and a budget. There, method A is *worse* than B when the mean difference over the seeds
is negative and its two-sided paired t-test is significant at 5 % after Holm's correction over all comparisons of A in the
study: every setting times every competitor. A is **not worse in a setting** when no competitor is significantly better than
A there. That alone rewards few seeds, so the interval belongs to it: A is *shown* to be within a margin of the best when,
for every competitor, the upper end of the Bonferroni interval (5 % over the competitors of the setting) of B - A is below
`MARGIN`. Settings with fewer than three seeds are not judged.

**In the aggregate** A is better than B when the mean over all settings of the difference, computed seed by seed, has a
95 % t-interval over the seeds that is above 0 after Bonferroni's correction for the two comparisons that matter, with
margin and with uniform.

With five seeds the corrected tests find leads of a dozen points alone; what is claimed rests on `noninferiority`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

MARGIN = 0.01  # one point of accuracy
LEAST_SEEDS = 3
LEVEL = 0.05


class Interval(NamedTuple):
    """A mean with its two-sided t-interval."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float] | npt.NDArray[np.float64], level: float = LEVEL) -> Interval:
    """Give the mean and its (1 - level) t-interval; infinite for a single value."""
    array = np.asarray(values, np.float64)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Interval(mean, -np.inf, np.inf, count)
    half = float(stats.t.ppf(1 - level / 2, count - 1) * array.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def paired_p(differences: npt.NDArray[np.float64]) -> float:
    """Give the two-sided p-value of "the mean difference is 0"; 1 where all are 0."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float], level: float = LEVEL) -> npt.NDArray[np.bool_]:
    """Say which hypotheses Holm's step-down procedure rejects, keeping the family's error at `level`."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    passed = p[order] <= level / (len(p) - np.arange(len(p)))
    rejected = np.zeros(len(p), bool)
    rejected[order[: len(p) if passed.all() else int(passed.argmin())]] = True
    return rejected


class Verdict(NamedTuple):
    """What a setting says about a method.

    Attributes:
      worse_than: competitors that are significantly better.
      best: the competitor with the largest mean.
      behind: interval of best - method (not corrected).
      shown: whether it is shown to be within `MARGIN` of every competitor.
    """

    worse_than: tuple[str, ...]
    best: str
    behind: Interval
    shown: bool


def judge(
    settings: dict[str, dict[str, npt.NDArray[np.float64]]], method: str, competitors: Sequence[str]
) -> dict[str, Verdict]:
    """Judge a method in every setting.

    Args:
      settings: by setting and method, the results of the seeds; NaN where a seed is missing.
      method: to be judged.
      competitors: what it is compared with.

    Returns:
      By setting, the verdict; settings without the method, or without `LEAST_SEEDS` seeds of a competitor, are left out.
    """
    pairs: list[tuple[str, str, npt.NDArray[np.float64]]] = []
    for setting, results in settings.items():
        for other in competitors:
            if other == method or other not in results or method not in results:
                continue
            differences = results[other] - results[method]
            differences = differences[np.isfinite(differences)]
            if len(differences) >= LEAST_SEEDS:
                pairs.append((setting, other, differences))
    if not pairs:
        return {}
    rejected = holm([paired_p(differences) for *_, differences in pairs])
    verdicts = {}
    for setting in dict.fromkeys(setting for setting, *_ in pairs):
        here = [(other, d, bad) for (s, other, d), bad in zip(pairs, rejected, strict=True) if s == setting]
        best, behind = max(((other, interval(d)) for other, d, _ in here), key=lambda pair: pair[1].mean)
        shown = all(interval(d, LEVEL / len(here)).high < MARGIN for _, d, _ in here)
        worse = tuple(other for other, d, bad in here if bad and d.mean() > 0)
        verdicts[setting] = Verdict(worse, best, behind, shown)
    return verdicts


def aggregate(
    settings: dict[str, dict[str, npt.NDArray[np.float64]]], method: str, other: str, level: float = LEVEL
) -> Interval | None:
    """Average method - other over the settings, seed by seed; None where fewer than `LEAST_SEEDS` seeds have all settings."""
    parts = [results[method] - results[other] for results in settings.values() if {method, other} <= set(results)]
    if not parts:
        return None
    length = max(map(len, parts))
    table = np.stack([np.pad(part, (0, length - len(part)), constant_values=np.nan) for part in parts])
    complete = table[:, np.isfinite(table).all(axis=0)]
    if complete.shape[1] < LEAST_SEEDS:
        return None
    return interval(complete.mean(axis=0), level)
