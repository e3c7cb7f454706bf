"""Study 7: what a last training is worth that learns from everything: un-bought rows, validation rows, a sentence encoder.

    python -m benchmarks.science.study7 --quick
    python -m benchmarks.science.study7 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

Of the synthetic family four settings are taken, one of each kind. The labels are those that a run buys (10 % of the pool in three
rounds by herding), the same for every method; the parts `half` and `fifth` have 5 and 2 %.

| name | what is learned in the last training |
|---|---|
| default | the human labels and what was bought |
| validation | the same and the true classes of the validation rows |
| longer | validation, in as many steps as the methods with pseudo-labels take |
| self | default and soft pseudo-labels, by an ensemble of five defaults, for the rows that were not bought; noise that suits the input |
| both | validation, and pseudo-labels of five cross-fitted students, each of which has learned four fifths of the validation rows |
| both-mixup | the same with mixup, where inputs are numbers |
| last | what a run does: `both`, or `validation` where pseudo-labels are worse by cross-validation |
| ensemble | no training: the mean of the cross-fitted students' probabilities |
| encoder, encoder+validation, encoder+both | the same with embeddings that start from a sentence encoder, where there is one |
| teacher | the teacher itself |

Texts have a fifth of their words dropped wherever pseudo-labels are learned. The rows of `last` have what the comparison by folds
found: validation rows won and lost by pseudo-labels, and the losses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.last_training import LONGER, MEMBERS, MIXUP, RIDGE, WORDS, Lesson, lesson, mean_logprobs
from benchmarks.science.problems import Problem
from benchmarks.science.training import accuracy, logits_of
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.student.training.batches import TEXTS

DATASETS = ("clinc150", "digits", "synthetic", "cifar10-patches")
ENCODED = ("encoder", "encoder+validation", "encoder+both")
METHODS = (
    *("default", "validation", "longer", "self", "both", "both-mixup", "last", "ensemble"),
    *ENCODED,
    "teacher",
)
COMPARED = ("default", "validation", "last")
PARTS = {"whole": (0.10, METHODS), "half": (0.05, COMPARED), "fifth": (0.02, COMPARED)}
SYNTHETIC = (
    "error 0.3, correlation 0, random, informative",
    "error 0.3, correlation 1, runner-up, informative",
    "error 0.1, correlation 0.5, runner-up, informative",
    "error 0.5, correlation 0.5, runner-up, informative",
)
RECIPE = 2
OPTIONS = {"members": MEMBERS, "longer": LONGER, "words": WORDS, "mixup": MIXUP, "ridge": RIDGE}


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, tuple(PARTS))
    rows = collect(given, study_cells(given))
    from benchmarks.science.report_short import write_report

    write_report(given, rows, "study7", "Study 7: the last training", METHODS, ("default", "validation"), ("share",))


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells; mixup is for numbers, an encoder for texts."""
    return [
        place.cell("study7", RECIPE, {"method": method, "share": share, **OPTIONS}, _compute)
        for place in places(given)
        if place.dataset.name != "synthetic" or place.teacher in SYNTHETIC
        for share, methods in (PARTS[name] for name in given.parts)
        for method in methods
        if method not in (("both-mixup",) if place.dataset.name == "clinc150" else ENCODED)
    ]


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem, method = place.problem(), chosen["method"]
    if method == "teacher":
        return [{"accuracy": problem.teacher_accuracy}]
    noise = "mixup" if method == "both-mixup" else "words" if problem.student.input.kind in TEXTS else ""
    taught = lesson(problem, chosen["share"], noise, encoder=method in ENCODED)
    if method == "ensemble":
        named = taught.ensemble[problem.test].argmax(axis=1)
        return [{"accuracy": float((named == problem.truth[problem.test]).mean())}]
    if method == "last":
        return [_last(taught)]
    return [{"accuracy": _accuracy(taught, method.removeprefix("encoder+"))}]


def _accuracy(taught: Lesson, method: str) -> float:
    """Train as a method does, once for everybody who asks, and measure on the test rows."""
    known = taught.__dict__.setdefault("_accuracies", {})
    if method not in known:
        known[method] = accuracy(_student(taught, method), taught.problem)
    return float(known[method])


def _student(taught: Lesson, method: str) -> nn.Module:
    if method in ("default", "encoder"):
        return taught.plain(taught.problem.labelled)
    if method == "validation":
        return taught.plain(taught.all_human)
    if method == "longer":
        return taught.with_pseudo(None, taught.all_human)
    if method == "self":
        return taught.with_pseudo(_uninformed(taught), taught.problem.labelled)
    return taught.with_pseudo(taught.ensemble, taught.all_human)


def _uninformed(taught: Lesson) -> npt.NDArray[np.float64]:
    """Log-probabilities of an ensemble that has not learned the validation rows, at the temperature that suits them."""
    problem: Problem = taught.problem
    every, held_out = np.arange(len(problem.inputs)), problem.validation
    members = [taught.plain(problem.labelled, seed) for seed in range(MEMBERS)]
    mean = mean_logprobs([logits_of(member, problem, every).astype(float) for member in members])
    temperature = fit_temperature(mean[held_out], problem.truth[held_out]).temperature
    return mean_logprobs([mean / temperature])


def _last(taught: Lesson) -> dict[str, Any]:
    found = taught.by_folds()
    kept = keeps(found)
    return {"accuracy": _accuracy(taught, "both" if kept else "validation"), "kept": kept, **found}


def keeps(found: dict[str, Any]) -> bool:
    """Tell by the comparison of folds whether pseudo-labels are learned."""
    return bool((found["won"] - found["lost"], -found["nll_with"]) > (0, -found["nll_without"]))


if __name__ == "__main__":
    main()
