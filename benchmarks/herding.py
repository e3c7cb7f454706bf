"""Uncertainty herding in pools that are too large to compare every row with every other.

    python benchmarks/herding.py --quick                             # a minute, synthetic rows alone
    python benchmarks/herding.py --data DIR --json benchmarks/results/herding.json
    python benchmarks/herding.py --pools synthetic --rows 1000000 --ways bounded --seeds 1 --no-training
    python benchmarks/herding.py --data DIR --rows 40000 --deviations 0 0.25 0.5 1 --no-training

Pools: the rows of the science benchmark's synthetic family; CLINC150's sentence embeddings, repeated with Gaussian noise up to
`--rows`; CIFAR-10's training images at 8 x 8 pixels, of which there are 50,000. A student with 64 hidden units learns `--known`
labelled rows, 500 labels (true ones) are chosen by its margins and its hidden layer, it learns anew with them. Ways:

    whole      the objective summed over all rows for every candidate: what is to be reached
    bounded    `herd`: references bound, sums over all rows decide
    sampled    what `herd` was before: the sum over the references, a reference's own row counting size / references times
    own once   the same, every candidate's own row counting once
    margin, uniform

`--deviations 0 0.25 0.5 1` compares values of z in the bounds of `bounded` instead (`DEVIATIONS`), beside `whole`.

Of each: the share of the choice that is references (a choice that ignores which rows they are has their share of the pool, within four
standard deviations of the hypergeometric distribution), what is covered beyond the labelled rows in % of what `whole` covers,
the share of the choice that `whole` chose too, accuracy, processor seconds and rows summed over the whole pool.
"""

from __future__ import annotations

import argparse
import io
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring.record import machine, write
from benchmarks.science.problems import Problem
from benchmarks.science.synthetic import world
from benchmarks.science.training import accuracy, embeddings_of, fit, logits_of
from distilbeam.selection.gains import margin_gain
from distilbeam.selection.strategies.facility_location import DEVIATIONS, FacilityLocation, greedy, nearest, samples
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

Floats32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
BUDGET, REFERENCES, TEST, HIDDEN = 500, 8192, 4_000, 64
WAYS = ("whole", "bounded", "sampled", "own once", "margin", "uniform")


@dataclass(frozen=True)
class Pool:
    """Rows to choose from, as a student sees them that has learned the labelled ones.

    Attributes:
      problem: rows, truth and parts.
      points: float32 [n, 64], of length one.
      gains: float64 [n].
      known: float32 [m, 64], of the labelled rows.
    """

    problem: Problem
    points: Floats32
    gains: npt.NDArray[np.float64]
    known: Floats32


class SumOverReferences:
    """The objective summed over references alone, and what others count for themselves.

    With `once` every candidate's own row counts once; without, that of a reference counts as often as all its rows stand for.
    """

    def __init__(self, whole: FacilityLocation, drawn: Indices, once: bool) -> None:
        self.whole, self.drawn, self.once = whole, drawn, once
        self.weights = whole.weights[drawn] * np.float32(len(whole.cover) / len(drawn))
        self.columns = whole.factors[drawn].T.copy()
        self.place = np.full(len(whole.cover), -1)
        self.place[drawn] = np.arange(len(drawn))

    def added(self, candidates: Indices) -> npt.NDArray[np.float64]:
        values = np.empty(len(candidates))
        step = max(1, 2**22 // len(self.drawn))
        for start in range(0, len(candidates), step):
            some = candidates[start : start + step]
            near = np.maximum(np.exp(self.whole._exponents(some, self.columns)) - self.whole.cover[self.drawn], 0)
            if self.once:
                rows = np.flatnonzero(self.place[some] >= 0)
                near[rows, self.place[some][rows]] = 0
            own = self.whole.weights[some] * (1 - self.whole.cover[some])
            if not self.once:
                own[self.place[some] >= 0] = 0
            values[start : start + step] = near @ self.weights + own
        return values

    def bound(self, candidate: int, _sample: int = 0) -> float:
        return float(self.added(np.array([candidate]))[0])

    def choose(self, candidate: int) -> None:
        self.whole.choose(candidate)


def choose(
    pool: Pool, way: str, references: int, seed: int, deviations: float = DEVIATIONS
) -> tuple[Indices, Indices, int]:
    """Choose rows; give them, the references, and how many rows were summed over the whole pool."""
    rng, size = np.random.default_rng(seed), len(pool.points)
    drawn, *finer = samples(size, references, rng)
    order = rng.permutation(size)
    if way == "uniform":
        return order[:BUDGET], drawn, 0
    if way == "margin":
        return order[np.argsort(-pool.gains[order], kind="stable")[:BUDGET]], drawn, 0
    distances = nearest(pool.points, pool.known)
    radius = max(float(np.median(distances)), 1e-6)
    objective = FacilityLocation(pool.points, pool.gains, distances, radius, deviations)
    if way in ("sampled", "own once"):
        part: Any = SumOverReferences(objective, drawn, way == "own once")
        return greedy(part, part.added(np.arange(size)), True, BUDGET, order), drawn, 0
    if way == "whole":
        return greedy(objective, objective.bounds(np.arange(size)), True, BUDGET, order), drawn, size
    return greedy(objective, objective.bounds(drawn, *finer), False, BUDGET, order), drawn, objective.looked_at


def covered(pool: Pool, chosen: Indices) -> float:
    """Compute what a choice covers beyond the labelled rows."""
    before = nearest(pool.points, pool.known)
    radius = max(float(np.median(before)), 1e-6)
    after = np.minimum(before, nearest(pool.points, pool.points[chosen]))
    return float(pool.gains @ (np.exp(-after / radius) - np.exp(-before / radius)).astype(np.float64))


def make_pool(name: str, data: Path | None, rows: int, known: int, seed: int) -> Pool:
    """Make a pool, and train a student on its labelled rows."""
    inputs, truth = MAKERS[name](data, rows + known + TEST, np.random.default_rng([seed, 21]))
    order = np.random.default_rng([seed, 22]).permutation(len(inputs))
    test, labelled, rest = np.split(order, [TEST, TEST + known])
    logits = np.zeros((len(inputs), int(truth.max()) + 1), np.float32)  # no teacher: the labels are the true classes
    student = StudentConfig(kind="mlp", hidden=(HIDDEN,), input={"columns": ["x"], "shape": inputs.shape[1:]})
    problem = Problem(
        student=student,
        training=TrainConfig(batch_size=128, lr=3e-3),
        steps=400,
        inputs=torch.from_numpy(inputs),
        truth=truth,
        teacher_logits=logits,
        labelled=labelled,
        validation=labelled,
        pool=rest,
        test=test,
        seed=seed,
    )
    module = fit(problem, None, problem.human(labelled))
    seen = [embeddings_of(module, problem, part) for part in (rest, labelled)]
    points, centres = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-30) for part in seen)
    return Pool(problem, points, margin_gain(logits_of(module, problem, rest)), centres)


def _synthetic(_data: Path | None, rows: int, rng: np.random.Generator) -> tuple[Floats32, Indices]:
    inputs, scores = world(rows, rng)
    return inputs.astype(np.float32), scores.argmax(axis=1)


def _clinc150(data: Path | None, rows: int, rng: np.random.Generator) -> tuple[Floats32, Indices]:
    from benchmarks.science.clinc import read

    assert data is not None
    _, embeddings, truth, _ = read(data)
    meant = np.flatnonzero(truth >= 0)
    drawn = np.concatenate([rng.permutation(meant) for _ in range(math.ceil(rows / len(meant)))])[:rows]
    width = embeddings.shape[1]
    noise = rng.normal(0, 0.5 / math.sqrt(width), (rows, width))  # of half the embeddings' length
    return (embeddings.numpy()[drawn] + noise).astype(np.float32), truth[drawn]


def _cifar10(data: Path | None, rows: int, rng: np.random.Generator) -> tuple[Floats32, Indices]:
    import pyarrow.parquet as pq
    from PIL import Image

    assert data is not None
    table = pq.read_table(data / "cifar10-train.parquet")
    small = [
        np.asarray(Image.open(io.BytesIO(coded)).reduce(4), np.float32).ravel() for coded in table["image"].to_pylist()
    ]
    order = rng.permutation(len(small))[:rows]
    inputs = (np.stack(small)[order] / 255 - 0.473) / np.float32(0.251)
    return inputs, table["label"].to_numpy().astype(np.int64)[order]


MAKERS: dict[str, Callable[..., tuple[Floats32, Indices]]] = {
    "synthetic": _synthetic,
    "clinc150": _clinc150,
    "cifar10": _cifar10,
}


def measure(name: str, given: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Compare the ways on one pool."""
    pool = make_pool(name, given.data, given.rows, given.known, seed)
    size, found, best = len(pool.points), [], None
    print(f"\n{name}, {size:,} rows, {given.known} labelled, seed {seed}", flush=True)
    ways = [(way, DEVIATIONS) for way in given.ways]
    if given.deviations:
        ways = [("whole", DEVIATIONS), *(("bounded", z) for z in given.deviations)]
    for way, deviations in ways:
        start = time.process_time()
        chosen, drawn, summed = choose(pool, way, given.references, seed, deviations)
        seconds = time.process_time() - start
        value, share = covered(pool, chosen), len(drawn) / size
        best = best or (value, chosen)
        spread = 4 * math.sqrt(share * (1 - share) / BUDGET * (size - BUDGET) / (size - 1))
        row = {
            "pool": name,
            "rows": size,
            "known": given.known,
            "references": len(drawn),
            "seed": seed,
            "way": way,
            "deviations": deviations if way == "bounded" else None,
            "references_in_pool": share,
            "references_in_choice": float(np.isin(chosen, drawn).mean()),
            "bound": spread,
            "covered": value / best[0],
            "covered_beside": ways[0][0],
            "chosen_too": float(np.isin(chosen, best[1]).mean()),
            "seconds": seconds,
            "rows_summed": summed,
        }
        if not given.no_training:
            problem = pool.problem
            rows = np.concatenate([problem.labelled, problem.pool[chosen]])
            row["accuracy"] = accuracy(fit(problem, None, problem.human(rows)), problem)
        found.append(row)
        print(
            f"  {way:9} {f'z = {deviations:g}' if given.deviations else ''} references {100 * row['references_in_choice']:5.1f} % of the choice, "
            f"{100 * share:.1f} ± {100 * spread:.1f} expected; covered {100 * row['covered']:6.2f} %; "
            f"same {100 * row['chosen_too']:5.1f} %; accuracy {100 * row.get('accuracy', math.nan):.1f} %; "
            f"{seconds:.1f} s; {summed:,} summed",
            flush=True,
        )
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with clinc150.parquet and cifar10-train.parquet")
    parser.add_argument("--pools", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first is what others are compared with"
    )
    parser.add_argument("--deviations", nargs="+", type=float, default=[], help="values of z to compare")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--known", type=int, default=500, help="labelled rows")
    parser.add_argument("--references", type=int, default=REFERENCES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-training", action="store_true", help="leave the accuracy out")
    parser.add_argument("--quick", action="store_true", help="20,000 synthetic rows, one seed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.pools, given.rows, given.seeds, given.references = ["synthetic"], 20_000, 1, 2048
    if given.data is None and set(given.pools) != {"synthetic"}:
        parser.error("--data DIR is needed, or --quick, or --pools synthetic")
    torch.set_num_threads(given.threads)
    results = [row for name in given.pools for seed in range(given.seeds) for row in measure(name, given, seed)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak of memory {peak:.1f} GiB")
    write(given.json, machine(("numpy", "scipy", "torch"), threads=given.threads, peak_gib=round(peak, 2)), results)


if __name__ == "__main__":
    main()
