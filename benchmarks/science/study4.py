"""Study 4: blind distillation (arXiv 1911.05275), from a pool of another distribution.

    python -m benchmarks.science.study4 --quick
    python -m benchmarks.science.study4 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

The pool: `same` has all classes, `half` only the first half of them, `outside` the queries of CLINC150 that belong to no
intent. Equally large each. The student: `human` learns the human labels alone; `blind` the teacher's answers about the pool
alone; `blind+finetune` then the human-labelled rows, true classes and teacher's answers, at a low rate that decays (the
product's second phase); `together` everything from the start. Accuracy over all classes and, beside it, over the classes
that `half` leaves out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.science.buying import first_student, soft_rows
from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.problems import Indices, Problem
from benchmarks.science.training import fit, logits_of
from distilbeam.student.training.blind import second_phase
from distilbeam.student.training.config import FinetuneConfig

DATASETS = ("clinc150", "digits", "cifar10-patches")
POOLS = ("same", "half", "outside")
METHODS = ("human", "blind", "blind+finetune", "together")
LOWER = 0.3  # the second phase's learning rate over the first's
RECIPE = 1


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, POOLS)
    rows = collect(given, study_cells(given))
    from benchmarks.science.report_short import write_report

    title = "Study 4: blind distillation"
    write_report(given, rows, "study4", title, METHODS, ("human", "together"), ("pool",), ("accuracy", "left_out"))


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells; only CLINC150 has an outside."""
    return [
        place.cell("study4", RECIPE, {"method": method, "pool": pool, "lower": LOWER}, _compute)
        for place in places(given)
        for pool in given.parts
        for method in METHODS
        if pool != "outside" or place.dataset.name == "clinc150"
    ]


def pool_rows(problem: Problem, pool: str) -> Indices:
    """Draw the pool's rows, as many for each kind."""
    sizes, half = problem.rng(4), problem.classes // 2
    kinds = {
        "same": problem.pool,
        "half": problem.pool[problem.truth[problem.pool] < half],
        "outside": np.flatnonzero(problem.truth < 0),
    }
    count = min(len(rows) for rows in kinds.values() if len(rows))
    return np.sort(sizes.permutation(kinds[pool])[:count])


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem = place.problem()
    rows, human = pool_rows(problem, chosen["pool"]), problem.human(problem.labelled)
    answers = problem.teacher_logprobs()
    soft = soft_rows(problem, rows, answers[rows])
    if chosen["method"] == "human":
        student = first_student(problem)
    elif chosen["method"] == "together":
        student = fit(problem, soft, human)
    else:
        student = fit(problem, soft, None)
    if chosen["method"] == "blind+finetune":
        finetune = FinetuneConfig(lr=LOWER * problem.training.lr)
        training = second_phase(problem.training.model_copy(update={"finetune": finetune}))
        known = soft_rows(problem, problem.labelled, answers[problem.labelled])
        student = fit(problem, known, human, training, init=student)
    truth = problem.truth[problem.test]
    right = logits_of(student, problem, problem.test).argmax(axis=1) == truth
    left_out = truth >= problem.classes // 2
    return [{"accuracy": float(right.mean()), "left_out": float(right[left_out].mean()), "pool_rows": len(rows)}]


if __name__ == "__main__":
    main()
