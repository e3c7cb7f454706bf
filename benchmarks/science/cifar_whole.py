"""CIFAR-10 in the papers' regime: all 50,000 images, convolutional networks, a teacher that has learned the student's own labels.

    python -m benchmarks.science.cifar_whole --data DIR --work WORK --device cuda      # for one GPU; nine minutes for two seeds, by estimate
    python -m benchmarks.science.cifar_whole --data DIR --dry                           # anywhere: 2,000 images, a few steps

|A| = 1,000, 2,500 and 5,000 human labels that teacher and student share; 1,000 labels to validate; the pool is the rest. First study
2's losses on the whole pool, then study 1's selectors for 10 % of it in three rounds (|A| = 2,500), seed by seed. Images lie on the
device, products are in bfloat16, batches of 512 are mirrored and shifted there. A cell that is done is kept in WORK, and what `--minutes`
leaves out is computed by the next call. Without CIFAR-10 in DIR it says so and does nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.science.buying import rounds
from benchmarks.science.cells import Cell, Store, run
from benchmarks.science.cifar import IMAGES, read
from benchmarks.science.command import RESULTS, Place
from benchmarks.science.keeping import named
from benchmarks.science.losses import learn
from benchmarks.science.problems import Dataset, Indices, Problem, about, split
from benchmarks.science.report import write_parquet
from benchmarks.science.teachers import teacher_answers
from benchmarks.science.training import accuracy
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

LABELS, VALIDATION = (1_000, 2_500, 5_000), 1_000
ROWS, TEST_ROWS = 50_000, 10_000
TEACHER, STUDENT = (StudentConfig(kind="cnn", width=width, dropout=0.1, input=IMAGES) for width in (1.0, 0.25))
TRAINING = TrainConfig(batch_size=512, lr=5e-3, weight_decay=5e-2)
TEACHER_STEPS, STEPS, ROUND_STEPS = 1_500, 2_000, 800
LOSSES = ("hard", "calibrated", "weighted", "slam-plain", "slam-forward-m", "pooled", "nothing")
SELECTORS = ("uniform", "margin", "rad", "herding")
SELECTORS_AT = 2_500
RECIPE = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute what there is time for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with cifar10-train.parquet and -test.parquet"
    )
    parser.add_argument("--work", type=Path, default=Path("cifar-work"), help="directory of the cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5, help="no new cell is begun after so long")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU: 2,000 images, a few steps, nothing written to --out"
    )
    given = parser.parse_args(arguments)
    if not (given.data / "cifar10-train.parquet").exists():
        print(f"skipped: {given.data} has no cifar10-train.parquet")
        return
    device, shrink = ("cpu", 25) if given.dry else (given.device, 1)
    dataset = cifar10_whole(given.data, device, shrink)
    torch.set_num_threads(1 if given.dry else torch.get_num_threads())
    start, rows = time.monotonic(), []
    for key, figures in run(Store(given.work / "cells"), study_cells(dataset, range(given.seeds)), given.minutes):
        rows += [named(key) | row for row in figures]
        print(
            f"{time.monotonic() - start:5.0f} s  {key['teacher']}, {key['method']}: {100 * figures[-1]['accuracy']:.1f} %",
            flush=True,
        )
    frame = pd.DataFrame(rows)
    shown = frame.groupby(["part", "teacher", "method", "share"], sort=False)["accuracy"].agg(["mean", "count"])
    print(shown.to_string(float_format=lambda value: f"{value:.3f}"))
    if not given.dry:
        write_parquet(given.out / "cifar10-whole.parquet", frame)


def cifar10_whole(data: Path, device: str, shrink: int = 1) -> Dataset:
    """Describe the problems; with `shrink` everything is so many times smaller."""
    teachers = {f"{count:,} labels": {"labels": count // shrink} for count in LABELS}
    sizes = {"validation": VALIDATION // shrink, "rows": ROWS // shrink, "test": TEST_ROWS // shrink}
    described = about(sizes, STEPS // shrink**2, student=STUDENT, teacher=TEACHER, training=TRAINING)
    return Dataset("cifar10-whole", teachers, partial(_make, data, device, shrink), 1, described)


def study_cells(dataset: Dataset, seeds: range) -> list[Cell]:
    """List the cells, the losses first, seed by seed."""
    cells = []
    for seed in seeds:
        places = [Place(dataset, teacher, seed) for teacher in dataset.teachers]
        options = [(place, {"part": "losses", "method": loss}) for place in places for loss in LOSSES]
        options += [
            (place, {"part": "selectors", "method": name})
            for place in places
            if place.teacher.startswith(f"{SELECTORS_AT:,}")
            for name in SELECTORS
        ]
        cells += [place.cell("cifar10-whole", RECIPE, chosen, _compute) for place, chosen in options]
    return cells


def _compute(place: Place, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    problem = place.problem()
    if chosen["part"] == "losses":
        return [{"share": 1.0, "accuracy": accuracy(learn(problem, problem.pool, chosen["method"]), problem)}]
    shorter = _shorter(problem)
    figures = rounds(shorter, chosen["method"], "small", "calibrated")
    return [
        {"share": row["budget"], "accuracy": row["accuracy"], "teacher_error": row["teacher_error"]} for row in figures
    ]


def _shorter(problem: Problem) -> Problem:
    return replace(problem, steps=max(1, problem.steps * ROUND_STEPS // STEPS))


@cache
def _images(data: Path, device: str, shrink: int) -> tuple[torch.Tensor, Indices]:
    images, truth = read(data, ROWS // shrink, TEST_ROWS // shrink)
    return ((torch.from_numpy(images).to(device).float() / 255 - 0.473) / 0.251), truth


def _make(data: Path, device: str, shrink: int, teacher: dict[str, Any], seed: int) -> Problem:
    inputs, truth = _images(data, device, shrink)
    rows, labels = ROWS // shrink, teacher["labels"]
    sizes = {"labelled": labels, "validation": VALIDATION // shrink}
    sizes["pool"] = rows - sum(sizes.values())
    parts = split(np.arange(rows), sizes, np.random.default_rng([seed, 50]))
    training = TRAINING.model_copy(update={"device": device, "precision": "bf16"})
    known = parts["labelled"]
    steps = [max(1, count // shrink**2) for count in (TEACHER_STEPS, STEPS)]
    logits = teacher_answers(TEACHER, training, steps[0], inputs, truth, known, 10, seed)
    test = np.arange(rows, len(truth))
    return Problem(STUDENT, training, steps[1], inputs, truth, logits, **parts, test=test, seed=seed, lesson=known)


if __name__ == "__main__":
    main()
