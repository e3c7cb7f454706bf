"""Study 2: what to learn from labels that are sometimes wrong.

    python -m benchmarks.science.study2 --quick
    python -m benchmarks.science.study2 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

Plain soft, calibrated and hard labels, Weighted Distillation, Student-Label Mixing in its forms, both, top-2 partial labels,
filtering, and pseudo-labels with their bias taken out, each on the same 10 % of the pool as bought by uniform, by margin and
by RAD in study 1, whose cells this study shares.

Part `everything` is the papers' regime: teacher and student share their human labels, the whole pool is labelled, and students take
three times the steps; some of the losses, and no synthetic teachers, which were not trained on anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.science import study1
from benchmarks.science.cells import Cell, Store
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.losses import LOSSES, learn
from benchmarks.science.problems import Problem
from benchmarks.science.training import accuracy

DATASETS = ("clinc150", "digits", "synthetic", "cifar10-patches")
BUYERS, EVERYTHING = ("uniform", "margin", "rad"), "everything"
PARTS = (*BUYERS, EVERYTHING)
SHARED = ("soft", "calibrated", "hard", "weighted", "slam-plain", "slam-forward-m", "pooled", "nothing", "truth")
LONGER = 3
RECIPE = 1


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, PARTS)
    rows = collect(given, study_cells(given))
    from benchmarks.science.report2 import write_report

    write_report(given, rows)


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells: for each problem all losses on what each buyer bought."""
    return [
        _cell(given.store, place, buyer, loss)
        for place in places(given)
        for buyer in given.parts
        for loss in (SHARED if buyer == EVERYTHING else LOSSES)
        if buyer != EVERYTHING or place.dataset.name != "synthetic"
    ]


def _cell(store: Store, place: Place, buyer: str, loss: str) -> Cell:
    if buyer == EVERYTHING:
        options = {"method": loss, "buyer": buyer, "bought_by_recipe": study1.RECIPE, "longer": LONGER}
        return place.cell("study2", RECIPE, options, _everything)

    def compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
        found = store.rows(study1.cell(place, chosen["buyer"]))
        bought = np.concatenate([np.array(row["rows"], np.int64) for row in found])
        problem = place.problem()
        error = float((~problem.right[bought]).mean())
        student = learn(problem, bought, chosen["method"])
        return [{"accuracy": accuracy(student, problem), "teacher_error": error, "bought": len(bought)}]

    return place.cell("study2", RECIPE, {"method": loss, "buyer": buyer, "bought_by_recipe": study1.RECIPE}, compute)


def _everything(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem = shared(place.problem())
    error = float((~problem.right[problem.pool]).mean())
    student = learn(problem, problem.pool, chosen["method"])
    return [{"accuracy": accuracy(student, problem), "teacher_error": error, "bought": len(problem.pool)}]


def shared(problem: Problem) -> Problem:
    """Give student and teacher the same human labels, and time for the whole pool."""
    assert problem.lesson is not None
    return replace(problem, labelled=problem.lesson, steps=LONGER * problem.steps)


if __name__ == "__main__":
    main()
