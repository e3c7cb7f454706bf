"""Study 1: which labels to buy from a teacher that is sometimes wrong.

    python -m benchmarks.science.study1 --quick
    python -m benchmarks.science.study1 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

Uniform, margin, entropy, k-center, cluster-margin, BADGE, RAD and RAD-Loss beside our own and an oracle that knows the
teacher's mistakes. Labels are bought in three rounds, up to 2, 5 and 10 % of the pool (schedule `small`) or 12.5, 25 and 50 % (`large`).
"""

from __future__ import annotations

from typing import Any

from benchmarks.science.buying import BOUNDS, METHODS, OURS, rounds
from benchmarks.science.command import Arguments, arguments, collect, make_cells
from benchmarks.science.problems import Dataset, Problem

DATASETS = ("clinc150", "digits", "synthetic", "cifar10-patches")
RECIPE = 1
PARTS = ("small", "large", "hard")
HARD_METHODS = ("uniform", "margin", "rad", "rad-loss", *OURS, *BOUNDS)
COMPARING = ("k-center", "cluster-margin", "badge")  # compare all pairs: minutes for half of a large pool
LARGE_POOLS = ("clinc150", "cifar10-patches", "cifar10")


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, PARTS)
    rows = collect(given, study_cells(given))
    from benchmarks.science.report1 import write_report

    write_report(given, rows)


def study_cells(given: Arguments) -> list[Any]:
    """List the cells, the most wanted first."""
    parts = {
        "small": ("small", "calibrated", METHODS),
        "large": ("large", "calibrated", METHODS),
        "hard": ("small", "hard", HARD_METHODS),
    }
    cells = []
    for schedule, kind, methods in (parts[name] for name in given.parts):
        options = [{"method": method, "schedule": schedule, "labels": kind} for method in methods]
        cells += make_cells(given, "study1", RECIPE, options, _compute, _wanted)
    return cells


def _wanted(dataset: Dataset, chosen: dict[str, Any]) -> bool:
    return not (chosen["schedule"] == "large" and chosen["method"] in COMPARING and dataset.name in LARGE_POOLS)


def _compute(problem: Problem, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    return rounds(problem, chosen["method"], chosen["schedule"], chosen["labels"])


if __name__ == "__main__":
    main()
