"""Study 1: which labels to buy from a teacher that is sometimes wrong.

    python -m benchmarks.science.study1 --quick
    python -m benchmarks.science.study1 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

Uniform, margin, entropy, k-center, cluster-margin, BADGE, uncertainty herding, RAD and RAD-Loss beside our own and an oracle that knows the
teacher's mistakes. The student learns from calibrated soft labels, from pooled ones
(our default) or from hard ones. Another strategy that distilbeam has is compared where `--methods` names it.
Labels are bought in three rounds, up to 2, 5 and 10 % of the pool (schedule `small`) or 12.5, 25 and 50 % (`large`).
"""

from __future__ import annotations

from typing import Any

from benchmarks.science.buying import BOUNDS, METHODS, OTHERS, rounds
from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places

DATASETS = ("clinc150", "digits", "synthetic", "cifar10-patches")
RECIPE = 1
PARTS = ("small", "pooled", "large", "hard")
POOLED_METHODS = ("uniform", "margin", "badge", "herding", "rad", "correct-gain", "rad-worth", *BOUNDS)
HARD_METHODS = ("uniform", "margin", "herding", "rad", "rad-loss", "correct-gain", "rad-worth", *BOUNDS)
COMPARING = ("k-center", "cluster-margin", "badge")  # compare all pairs: minutes for half of a large pool
LARGE_POOLS = ("clinc150", "cifar10-patches", "cifar10")


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, PARTS)
    rows = collect(given, study_cells(given))
    from benchmarks.science.report1 import write_report

    write_report(given, rows)


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells, the most wanted first."""
    others = [name for name in OTHERS if name in (given.methods or ())]
    parts = {
        "small": ("small", "calibrated", METHODS),
        "pooled": ("small", "pooled", POOLED_METHODS),
        "large": ("large", "calibrated", METHODS),
        "hard": ("small", "hard", HARD_METHODS),
    }
    wanted = [
        (place, {"method": method, "schedule": schedule, "labels": kind})
        for schedule, kind, methods in (parts[name] for name in given.parts)
        for place in places(given)
        for method in (*methods, *others)
        if not (schedule == "large" and method in COMPARING and place.dataset.name in LARGE_POOLS)
    ]
    return [cell(place, **options) for place, options in wanted]


def cell(place: Place, method: str, schedule: str = "small", labels: str = "calibrated") -> Cell:
    """Make the cell of a method."""
    return place.cell("study1", RECIPE, {"method": method, "schedule": schedule, "labels": labels}, _compute)


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    return rounds(place.problem(), chosen["method"], chosen["schedule"], chosen["labels"])


if __name__ == "__main__":
    main()
