"""What the studies' commands share: arguments, datasets, and the order in which cells are computed."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.science.cells import Cell, Key, Store, run
from benchmarks.science.cifar import cifar10, cifar10_patches
from benchmarks.science.clinc import clinc150
from benchmarks.science.digits import digits
from benchmarks.science.keeping import Row, basis, beside_former, named
from benchmarks.science.problems import Dataset, Problem
from benchmarks.science.synthetic import synthetic

KEPT_ASIDE = "cifar10-patches"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "science"
ESTIMATES_RECIPE = (
    2  # 2: temperatures with a ridge to 1, debiasing weights that share ties, herding that sums over the pool
)
QUICK_TEACHERS = {
    "digits": ("20 labels", "50 labels"),
    "synthetic": ("error 0.3, correlation 0, random, informative", "error 0.3, correlation 1, runner-up, informative"),
}


@dataclass(frozen=True)
class Arguments:
    """What a study was asked to do.

    Attributes:
      datasets: with the teachers wanted.
      seeds: the numbers of the seeds.
      store: the cells' directory.
      minutes: of this call, or None.
      out: directory of the results.
      quick: whether this is the short form.
      parts: of the study that are wanted.
      methods: that are wanted, or None for all of them.
      keep: whether the former report's rows of other cells are kept.
    """

    datasets: tuple[Dataset, ...]
    seeds: range
    store: Store
    minutes: float | None
    out: Path
    quick: bool
    parts: tuple[str, ...]
    methods: tuple[str, ...] | None = None
    keep: bool = False


def arguments(description: str | None, default: Sequence[str], parts: Sequence[str]) -> Arguments:
    """Read a study's command line.

    Args:
      description: the study's module docstring.
      default: names of the datasets of the full study.
      parts: names of the study's parts, the most wanted first; --quick is the first of them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with clinc150.parquet and cifar10-*.parquet")
    parser.add_argument("--quick", action="store_true", help="digits and synthetic data, two seeds, without --data")
    parser.add_argument("--work", type=Path, help="directory of the cells; a stopped study goes on there")
    parser.add_argument(
        "--minutes", type=float, help="stop computing new cells after so long, and report what is there"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds (5; 2 for --quick)")
    parser.add_argument("--datasets", nargs="+", default=list(default), help="which datasets")
    parser.add_argument("--parts", nargs="+", choices=parts, help="which parts of the study to compute")
    parser.add_argument("--methods", nargs="+", help="which methods to compute")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--keep", action="store_true", help="keep what the report in --out has of other cells")
    parser.add_argument("--device", default="cpu", help="for the dataset cifar10")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.quick and given.data is None and set(given.datasets) - {"digits", "synthetic"}:
        parser.error("--data DIR is needed, or --quick, or --datasets digits synthetic")
    work = given.work or Path(tempfile.mkdtemp(prefix="science-"))
    names = [name for name in given.datasets if name in QUICK_TEACHERS] if given.quick else given.datasets
    datasets = [_dataset(name, given.data, work, given.device, given.quick) for name in names or ["digits"]]
    seeds = range(given.seeds or (2 if given.quick else 5))
    out = given.out or (work / "results" if given.quick else RESULTS)
    methods = None if given.methods is None else tuple(given.methods)
    wanted = tuple(given.parts or (parts[:1] if given.quick else parts))
    store = Store(work / "cells")
    return Arguments(tuple(datasets), seeds, store, given.minutes, out, given.quick, wanted, methods, given.keep)


def _dataset(name: str, data: Path, work: Path, device: str, quick: bool) -> Dataset:
    makers: dict[str, Callable[[], Dataset]] = {
        "digits": digits,
        "synthetic": synthetic,
        "clinc150": lambda: clinc150(data),
        "cifar10-patches": lambda: cifar10_patches(data, work),
        "cifar10": lambda: cifar10(data, device),
    }
    if name not in makers:
        raise SystemExit(f"--datasets must be of {', '.join(makers)}, got {name}")
    dataset = makers[name]()
    if not quick:
        return dataset
    return replace(dataset, teachers={teacher: dataset.teachers[teacher] for teacher in QUICK_TEACHERS[name]})


@lru_cache(maxsize=2)
def _problem(
    make: Callable[[dict[str, Any], int], Problem], settings: tuple[tuple[str, Any], ...], seed: int
) -> Problem:
    return make(dict(settings), seed)


@dataclass(frozen=True)
class Place:
    """Where a cell is: a dataset, one of its teachers, a seed."""

    dataset: Dataset
    teacher: str
    seed: int

    def problem(self) -> Problem:
        """Make the problem, or give the one that was made last."""
        return _problem(self.dataset.make, tuple(self.dataset.teachers[self.teacher].items()), self.seed)

    def cell(self, study: str, recipe: int, options: dict[str, Any], compute: Compute) -> Cell:
        """Make a cell here.

        Args:
          study: its study's name.
          recipe: counted up when `compute` comes to mean something else.
          options: what distinguishes the cells of one problem, plain data.
          compute: from this place and the options to rows of figures.
        """
        key = {
            "study": study,
            "recipe": recipe,
            "dataset": self.dataset.name,
            "dataset_recipe": self.dataset.recipe,
            "estimates_recipe": ESTIMATES_RECIPE,
            "about": self.dataset.about,
            "teacher": self.teacher,
            "settings": self.dataset.teachers[self.teacher],
            "seed": self.seed,
            **options,
        }

        def rows() -> list[dict[str, Any]]:
            return [_about(self.problem()) | row for row in compute(self, options)]

        return Cell(key, rows)


Compute = Callable[[Place, dict[str, Any]], list[dict[str, Any]]]


def places(given: Arguments) -> Iterator[Place]:
    """Go through all problems, seed by seed, so that a study that is stopped has all problems at equal seeds."""
    for seed in given.seeds:
        for dataset in given.datasets:
            for teacher in dataset.teachers:
                yield Place(dataset, teacher, seed)


def collect(
    given: Arguments, cells: Sequence[Cell], shown: Callable[[Row], Row] = lambda row: row
) -> list[dict[str, Any]]:
    """Compute the cells of the methods that are wanted; give all rows of the report, each with its cell's key.

    Args:
      given: the study's arguments.
      cells: the study's.
      shown: changes a row into what the report has.
    """
    if given.methods is not None:
        cells = [cell for cell in cells if cell.key["method"] in given.methods]
    found = run(given.store, cells, given.minutes, _say)
    rows = [shown(named(key) | {"basis": basis(key)} | row) for key, figures in found for row in figures]
    if given.keep and cells:
        some = cells[0].key
        names = [name for name in named(some) if not name.endswith("recipe")]
        rows = beside_former(given.out / f"{some['study']}.parquet", rows, names, lambda row: _today(some, row))
    if not rows:
        raise SystemExit("there is nothing to report: no cell was computed yet, give --minutes more or leave it out")
    return rows


def _today(some: Key, row: Row) -> Key:
    """Give the key of a former row's cell, from that of some cell of its study: what their names leave out."""
    dataset = _dataset(row["dataset"], Path(), Path(), "cpu", quick=False)  # to describe one needs no data
    settings = dataset.teachers.get(row["teacher"])
    return some | {"dataset_recipe": dataset.recipe, "about": dataset.about, "settings": settings}


def _about(problem: Problem) -> dict[str, Any]:
    calibration = problem.calibration
    return {
        "teacher_accuracy": problem.teacher_accuracy,
        "temperature": calibration.temperature,
        "teacher_ece": calibration.ece_before,
        "teacher_ece_calibrated": calibration.ece_after,
    }


def _say(line: str) -> None:
    print(line, flush=True)
