"""Seconds that selectors take which compare examples with each other: herding beside k-center, BADGE and the largest margins.

    python benchmarks/comparing_selectors.py --quick
    OMP_NUM_THREADS=1 python benchmarks/comparing_selectors.py --json benchmarks/results/comparing_selectors.json

Pools of normal noise around 100 centres in 64 dimensions, logits of 10 classes, 500 labelled examples. In each repetition every
selector has one turn. The limit of herding is one product of the pool's embeddings with those of its references (float32),
which it cannot do without. Memory is the growth of a fresh process's peak resident set, the pool included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from measuring.record import machine, write

from distilbeam.selection.strategies.herding import Herding
from distilbeam.selection.strategies.registry import selector
from distilbeam.selection.strategies.selectors import CandidatePool

NAMES = ("herding", "k-center", "badge", "margin")
CENTRES, DIMENSIONS, CLASSES, LABELLED = 100, 64, 10, 500


def pool_of(size: int) -> CandidatePool:
    """Make a pool."""
    rng = np.random.default_rng(size)
    centres = rng.normal(size=(CENTRES, DIMENSIONS)).astype(np.float32)
    rows = centres[rng.integers(CENTRES, size=size + LABELLED)]
    rows += 0.7 * rng.standard_normal(rows.shape, np.float32)
    logits = rows[:size] @ rng.normal(size=(DIMENSIONS, CLASSES)).astype(np.float32)
    return CandidatePool(size, logits, rows[:size], rows[size:])


def select(name: str, pool: CandidatePool, budget: int) -> None:
    """Choose once."""
    selector(name).select(pool, budget, np.random.default_rng(0))


def multiply(pool: CandidatePool) -> None:
    """Multiply the pool's embeddings with those of as many references as herding takes, a block at a time."""
    assert pool.embeddings is not None
    references = pool.embeddings[: Herding().references].T.copy()
    for start in range(0, pool.size, 512):
        pool.embeddings[start : start + 512] @ references


def timed(task: Any, *arguments: Any) -> float:
    """Return the seconds that a task takes."""
    start = time.perf_counter()
    task(*arguments)
    return time.perf_counter() - start


def grown(name: str, size: int, budget: int) -> float:
    """Return by how many MB choosing grows this process's peak resident set."""
    before = _peak_mb()
    select(name, pool_of(size), budget)
    return _peak_mb() - before


def measure(size: int, budget: int, repeats: int) -> dict[str, Any]:
    """Time the selectors in turn."""
    pool = pool_of(size)
    seconds: dict[str, list[float]] = {name: [] for name in (*NAMES, "limit")}
    for _ in range(repeats):
        for name in NAMES:
            seconds[name].append(timed(select, name, pool, budget))
        seconds["limit"].append(timed(multiply, pool))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    with get_context("spawn").Pool(1) as fresh:
        memory = fresh.apply(grown, ("herding", size, budget))
    return {"examples": size, "budget": budget, "repeats": repeats, "seconds": medians, "herding_mb": memory}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures."""
    print(
        f"{'examples':>10}{'budget':>8}" + "".join(f"{name + ', s':>14}" for name in (*NAMES, "limit")) + f"{'MB':>8}"
    )
    for row in rows:
        print(
            f"{row['examples']:>10,}{row['budget']:>8,}"
            + "".join(f"{row['seconds'][name]:>14.2f}" for name in (*NAMES, "limit"))
            + f"{row['herding_mb']:>8.0f}"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten thousand examples, once")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    cases = [(10_000, 500, 1)] if options.quick else [(10_000, 500, 5), (50_000, 2_500, 3), (250_000, 1_000, 3)]
    about = machine(("numpy", "scikit-learn"))
    rows = [measure(*case) for case in cases]
    show(rows)
    write(options.json, about, rows)


def _peak_mb() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
