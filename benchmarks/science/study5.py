"""Study 5: width and 8 bits, with and without distillation.

    python -m benchmarks.science.study5 --quick
    python -m benchmarks.science.study5 --data DIR --work DIR [--minutes M] [--seeds N] [--datasets NAME ...]

Students of several widths learn the human labels alone (`human`), with the teacher's first class of every row of the pool
(`hard`), or with its calibrated distribution (`distilled`); each is exported by the product as it is and in 8 bits (static,
calibrated on the pool; weights alone for text). Accuracy beside parameters and the bytes of the exported file.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.science.buying import soft_rows
from benchmarks.science.cells import Cell
from benchmarks.science.command import Arguments, Place, arguments, collect, places
from benchmarks.science.problems import Problem
from benchmarks.science.training import accuracy, fit
from distilbeam.student.checkpoint import save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import count_parameters

DATASETS = ("digits", "cifar10-patches", "clinc150")
WIDTHS = (0.25, 0.5, 1.0, 2.0)
LESSONS = ("human", "hard", "distilled")
CALIBRATION_ROWS = 256
RECIPE = 1


def main() -> None:
    """Compute and report."""
    given = arguments(__doc__, DATASETS, ("widths",))
    rows = collect(given, study_cells(given), lambda row: row | {"method": f"{row['method']}, {row['bits']}"})
    from benchmarks.science.report_short import pareto, write_report

    methods = tuple(f"{lesson}, {bits}" for lesson in LESSONS for bits in ("float32", "int8"))
    references = ("hard, float32", "distilled, float32")
    write_report(given, rows, "study5", "Study 5: width and 8 bits", methods, references, ("width",))
    pareto(given.out, rows, methods)


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells; one teacher per dataset, the best."""
    best = {dataset.name: list(dataset.teachers)[-1] for dataset in given.datasets}
    return [
        place.cell("study5", RECIPE, {"method": lesson, "width": width}, _compute)
        for place in places(given)
        if place.teacher == best[place.dataset.name]
        for width in WIDTHS
        for lesson in LESSONS
    ]


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    whole = place.problem()
    problem = replace(whole, student=whole.student.model_copy(update={"width": chosen["width"]}))
    soft = None
    if chosen["method"] != "human":
        kind = "hard" if chosen["method"] == "hard" else "calibrated"
        soft = soft_rows(whole, whole.pool, whole.teacher_logprobs(kind)[whole.pool])
    student = fit(problem, soft, problem.human(problem.labelled))
    common = {"parameters": count_parameters(student)}
    return [
        {"bits": "float32", "accuracy": accuracy(student, problem), "bytes": 4 * common["parameters"], **common},
        {"bits": "int8", **_int8(student, problem), **common},
    ]


def _int8(student: nn.Module, problem: Problem) -> dict[str, Any]:
    inputs = problem.inputs.numpy()
    classes = [str(number) for number in range(problem.classes)]
    shape = tuple(inputs.shape[1:])
    with tempfile.TemporaryDirectory() as directory:
        saved = save_student(Path(directory) / "student", student, problem.student, classes, shape)
        text = problem.student.kind == "text"
        examples = None if text else inputs[problem.pool[:CALIBRATION_ROWS]]
        exported = export_student(saved, "int8-weights" if text else "int8", Path(directory) / "int8", examples)
        model = load_export(exported)
        found = model.logits_of_inputs(inputs[problem.test]).argmax(axis=1)
        return {"accuracy": float((found == problem.truth[problem.test]).mean()), "bytes": model.size_bytes}


if __name__ == "__main__":
    main()
