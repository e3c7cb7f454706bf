"""Study 3: learned augmented residuals (LAuReL, arXiv 2411.07501) against plain ones and against one more layer.

    python -m benchmarks.science.study3 --quick
    python -m benchmarks.science.study3 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]
    python -m benchmarks.science.study3 --data DIR --work DIR --datasets cifar10 --device cuda       # residual networks

Students of three hidden layers of one width (a residual network of depth 20 for `cifar10`), trained equally long on the human
labels and the calibrated labels of the whole pool: without residuals, with plain ones, with each learned variant, and plain
with one more layer (one more block of each stage).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scipy.special import log_softmax

from benchmarks.science.buying import soft_rows
from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.problems import Problem
from benchmarks.science.training import fit, logits_of
from distilbeam.student.networks.build import count_parameters
from distilbeam.student.networks.config import StudentConfig

DATASETS = ("digits", "cifar10-patches", "clinc150")
VARIANTS = {
    "none": "none",
    "plain": "plain",
    "one more layer": "plain",
    **{f"laurel-{parts}": f"laurel-{parts}" for parts in ("rw", "lr", "pa", "rw+lr", "rw+lr+pa")},
}
LAYERS, WIDTH, RANK = 3, 64, 8
RECIPE = 1


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, ("residuals",))
    rows = collect(given, study_cells(given))
    from benchmarks.science.report_short import write_report

    write_report(given, rows, "study3", "Study 3: learned residuals", tuple(VARIANTS), ("plain", "one more layer"))


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells."""
    about = {"layers": LAYERS, "width": WIDTH, "rank": RANK}
    return [
        place.cell("study3", RECIPE, {"method": variant, **about}, _compute)
        for place in places(given)
        for variant in VARIANTS
    ]


def student_of(problem: Problem, variant: str) -> StudentConfig:
    """Give a variant's network."""
    more = variant == "one more layer"
    changes: dict[str, Any] = {"residual": VARIANTS[variant], "rank": RANK}
    if problem.student.kind in ("cnn", "resnet"):
        changes |= {"kind": "resnet", "depth": 26 if more else 20, "width": 1.0}
    else:
        changes |= {"hidden": (WIDTH,) * (LAYERS + more)}
    return problem.student.model_copy(update=changes)


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem = place.problem()
    changed = replace(problem, student=student_of(problem, chosen["method"]))
    soft = soft_rows(problem, problem.pool, problem.teacher_logprobs()[problem.pool])
    student = fit(changed, soft, problem.human(problem.labelled))
    logits, truth = logits_of(student, changed, problem.test), problem.truth[problem.test]
    nll = float(-log_softmax(logits.astype(float), axis=1)[range(len(truth)), truth].mean())
    right = float((logits.argmax(axis=1) == truth).mean())
    return [{"accuracy": right, "nll": nll, "parameters": count_parameters(student)}]


if __name__ == "__main__":
    main()
