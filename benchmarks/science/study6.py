"""Study 6: what is a wrong label worth?

    python -m benchmarks.science.study6 --quick
    python -m benchmarks.science.study6 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

The game of Robust Active Distillation lets a wrong label pay nothing. Here a student gets 5 % of the pool, drawn by chance
from the rows whose label is right, or from those whose label is wrong, as calibrated, hard or pooled labels: how much does its
accuracy change from that of the human labels alone, and what share of a right label's gain does a wrong one have?
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.science.buying import Situation, first_student, soft_rows
from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.training import accuracy, fit

DATASETS = ("clinc150", "digits", "synthetic", "cifar10-patches")
KINDS = ("calibrated", "hard", "pooled")
SHARE = 0.05
METHODS = ("human", *(f"{kind}, {side}" for kind in KINDS for side in ("right", "wrong")))
RECIPE = 1


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, ("labels",))
    rows = collect(given, study_cells(given))
    from benchmarks.science.report_short import write_report

    write_report(given, rows, "study6", "Study 6: what a wrong label is worth", METHODS, ("human",))


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells."""
    return [
        place.cell("study6", RECIPE, {"method": method, "share": SHARE}, _compute)
        for place in places(given)
        for method in METHODS
    ]


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem, method = place.problem(), chosen["method"]
    student = first_student(problem)
    situation = Situation(problem, student, problem.pool, problem.pool[:0], 0)
    if method == "human":
        return [{"accuracy": accuracy(student, problem), "estimated_worth": situation.worth()}]
    kind, side = method.split(", ")
    rows = problem.pool[problem.right[problem.pool] == (side == "right")]
    count = min(round(SHARE * len(problem.pool)), len(rows))
    rows = np.sort(problem.rng(6).permutation(rows)[:count])
    taught = fit(problem, soft_rows(problem, rows, situation.answers(rows, kind)), problem.human(problem.labelled))
    return [{"accuracy": accuracy(taught, problem), "labels": count}]


if __name__ == "__main__":
    main()
