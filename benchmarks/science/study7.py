"""Study 7: what a last training is worth that learns from everything: un-bought rows, validation rows, an ensemble.

    python -m benchmarks.science.study7 --quick
    python -m benchmarks.science.study7 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

The labels are those that a run buys (10 % of the pool in three rounds by herding), the same for every method:

| name | what is learned in the last training |
|---|---|
| default | the human labels and what was bought |
| longer | the same in as many steps as the methods with pseudo-labels take |
| validation | the same as default and the true classes of the validation rows |
| self | default and soft pseudo-labels, by an ensemble of five defaults, for the rows that were not bought |
| self-noise | the same, with words of texts dropped, images shifted |
| self-alone | the pseudo-labels of a single student instead of five |
| all, all-noise | self, self-noise and the validation rows |
| again, again-noise | the same with pseudo-labels of an ensemble that has learned the validation rows as well |
| ensemble | no training: the mean of the five students' probabilities, from which `self` is distilled |
| teacher | the teacher itself |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp

from benchmarks.science.buying import rounds, soft_rows
from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.problems import Floats, Indices, Problem
from benchmarks.science.training import accuracy, fit, logits_of
from distilbeam.selection.trust.calibration import fit_temperature

DATASETS = ("clinc150", "digits", "synthetic", "cifar10-patches")
METHODS = (
    *("default", "longer", "validation", "self", "self-noise", "self-alone", "all", "all-noise"),
    *("again", "again-noise", "ensemble", "teacher"),
)
MEMBERS, LONGER, WORDS = 5, 3, 0.2
RECIPE = 1


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, ("last",))
    rows = collect(given, study_cells(given))
    from benchmarks.science.report_short import write_report

    write_report(given, rows, "study7", "Study 7: the last training", METHODS, ("default", "longer"))


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells; words can be dropped of texts alone."""
    return [
        place.cell("study7", RECIPE, {"method": method, "members": MEMBERS, "longer": LONGER, "words": WORDS}, _compute)
        for place in places(given)
        for method in METHODS
        if "noise" not in method or place.dataset.name == "clinc150"
    ]


def _bought(problem: Problem) -> Indices:
    """Buy 10 % of the pool; the same for all methods, and computed once."""
    if (found := problem.__dict__.get("_bought")) is None:
        figures = rounds(problem, "herding", "small", "calibrated")
        found = problem.__dict__["_bought"] = np.concatenate([row["rows"] for row in figures])
    return np.asarray(found)


def _mean(problem: Problem, members: int, known: Indices, name: str) -> npt.NDArray[np.float64]:
    """Train students of different seeds alike; give the logarithms of their mean probabilities for all rows."""
    bought = _bought(problem)
    soft = soft_rows(problem, bought, problem.teacher_logprobs()[bought])
    said = problem.__dict__.setdefault(name, [])
    every = np.arange(len(problem.inputs))
    for number in range(len(said), members):
        student = fit(replace(problem, seed=problem.seed + 1000 * number), soft, problem.human(known))
        said.append(log_softmax(logits_of(student, problem, every).astype(float), axis=1))
    return np.asarray(logsumexp(said[:members], axis=0) - np.log(members))


def _ensemble(problem: Problem, members: int, again: bool = False) -> Floats:
    """Give an ensemble's log-probabilities for all rows, at the temperature that suits the validation rows.

    It is fitted on students that have not learned them, also for those (`again`) that have.
    """
    held_out = problem.validation
    mean = _mean(problem, members, problem.labelled, "_members")
    temperature = fit_temperature(mean[held_out], problem.truth[held_out]).temperature
    if again:
        mean = _mean(problem, members, np.concatenate([problem.labelled, held_out]), "_informed")
    return np.asarray(log_softmax(mean / temperature, axis=1), np.float32)


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem, method = place.problem(), chosen["method"]
    if method == "teacher":
        return [{"accuracy": problem.teacher_accuracy}]
    if method == "ensemble":
        named = _ensemble(problem, MEMBERS)[problem.test].argmax(axis=1)
        return [{"accuracy": float((named == problem.truth[problem.test]).mean())}]
    bought = _bought(problem)
    rows, labels = bought, problem.teacher_logprobs()[bought]
    known, training = problem.labelled, problem.training
    learner: Problem = (
        problem if method in ("default", "validation") else replace(problem, steps=LONGER * problem.steps)
    )
    if method.startswith(("self", "all", "again")):
        left = np.setdiff1d(problem.pool, bought)
        members = 1 if method == "self-alone" else MEMBERS
        pseudo = _ensemble(problem, members, again=method.startswith("again"))[left]
        rows, labels = np.concatenate([rows, left]), np.concatenate([labels, pseudo])
    if method.startswith(("validation", "all", "again")):
        known = np.concatenate([known, problem.validation])
    if "noise" in method:
        training = training.model_copy(update={"augment": training.augment.model_copy(update={"word_dropout": WORDS})})
    student = fit(learner, soft_rows(problem, rows, labels), problem.human(known), training)
    return [{"accuracy": accuracy(student, problem)}]


if __name__ == "__main__":
    main()
