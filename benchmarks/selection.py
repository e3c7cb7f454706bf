"""Time and memory of solving the game exactly and by sketch, of rounding, and of debiasing weights.

    python benchmarks/selection.py --quick                               # a minute
    python benchmarks/selection.py --json benchmarks/results/selection.json --picture selection/guarantee.png

Everything that is compared is measured side by side: each repetition runs every method once, in turn, and ratios are ratios
of medians. Gains are float32, u^2 (1 + u) / 2 of a uniform u (most examples hold little for the student); the sketch sees them in chunks
that are made anew for each pass and never held together, np.sort and the exact solution need all of them in memory. Making
the gains is not timed. Where numba is installed the sketch and the rounding run compiled, and once more in numpy ("numpy" in
the rows); loading numba is timed on its own. Memory is the growth of a fresh process's peak resident set while the method runs. One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring.record import machine

from distilbeam.selection import compiled
from distilbeam.selection.games.rad import guaranteed_gain, rad_marginals
from distilbeam.selection.rounding import dep_round
from distilbeam.selection.sketch.gain_sketch import GainSketch, Threshold
from distilbeam.selection.trust.debias import DebiasEstimator

CHUNK = 1 << 22
WRONG, BUDGET = 0.1, 0.05  # shares of the pool: labels that are wrong, labels that are bought
Gains = npt.NDArray[np.float32]


def chunks_of(size: int) -> Iterator[Gains]:
    """Make the pool's gains, the same ones at every call, a chunk at a time."""
    for start in range(0, size, CHUNK):
        rng = np.random.default_rng([size, start])
        uniform = rng.random(min(CHUNK, size - start), np.float32)
        yield np.square(uniform) * (np.float32(0.5) + np.float32(0.5) * uniform)


def pool_of(size: int) -> Gains:
    """Make the whole pool in memory."""
    pool = np.empty(size, np.float32)
    for number, chunk in enumerate(chunks_of(size)):
        pool[number * CHUNK : number * CHUNK + len(chunk)] = chunk
    return pool


def timed(task: Callable[[], Any]) -> float:
    """Return the seconds that a task takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def over_chunks(size: int, task: Callable[[Gains], Any]) -> float:
    """Return the seconds that a task takes over all chunks, without making them."""
    return sum(timed(lambda chunk=chunk: task(chunk)) for chunk in chunks_of(size))


@contextmanager
def numpy_alone() -> Iterator[None]:
    """Keep the compiled functions out."""
    usual, compiled.MIN_SIZE = compiled.MIN_SIZE, sys.maxsize
    try:
        yield
    finally:
        compiled.MIN_SIZE = usual


def load_time() -> float:
    """Load numba and the compiled functions, so that no other figure holds it; return the seconds it took."""

    def first_use() -> None:
        gains = np.linspace(0.1, 1, compiled.MIN_SIZE, dtype=np.float32)
        sketch_over(gains)
        dep_round(np.full(2 * compiled.MIN_SIZE, 0.5), np.random.default_rng(0))

    def sketch_over(gains: Gains) -> None:
        sketch = GainSketch()
        sketch.add(gains)
        refinement = sketch.solve(WRONG * len(gains), int(0.7 * len(gains))).refinement()
        assert refinement is not None, "this pool needs a refinement"
        refinement.add(gains)

    return timed(first_use)


def sketch_times(size: int) -> tuple[dict[str, float], Threshold]:
    """Time the sketch, its refinement and the marginals."""
    sketch, times = GainSketch(), {}
    times["sketch"] = over_chunks(size, sketch.add)
    start = time.perf_counter()
    threshold = sketch.solve(WRONG * size, int(BUDGET * size))
    refinement = threshold.refinement()
    times["solve"] = time.perf_counter() - start
    times["refinement"] = 0.0
    if refinement is not None:
        times["refinement"] = over_chunks(size, refinement.add)
        start = time.perf_counter()
        threshold = refinement.solve()
        times["refinement"] += time.perf_counter() - start
    assert threshold.exact, "a second refinement would be needed"
    times["marginals"] = over_chunks(size, threshold.marginals)
    times["sketch + refinement"] = times["sketch"] + times["solve"] + times["refinement"]
    times["all of it"] = times["sketch + refinement"] + times["marginals"]
    return times, threshold


def pool_times(size: int, repeats: int) -> dict[str, Any]:
    """Time np.sort, the exact solution and the sketch, in turn; check that the values agree."""
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        gains = pool_of(size)
        times, threshold = sketch_times(size)
        with numpy_alone():
            numpy_times, same = sketch_times(size)
        assert same == threshold, "the compiled functions and numpy differ"
        times |= {f"{name}, numpy": seconds for name, seconds in numpy_times.items()}
        times["np.sort"] = timed(lambda gains=gains: np.sort(gains))
        start = time.perf_counter()
        exact = rad_marginals(gains, WRONG * size, int(BUDGET * size))
        times["exact"] = time.perf_counter() - start
        error = abs(threshold.value / exact.value - 1)
        assert error < 1e-9, f"the refined value is off by {error:.1e}"
        del gains, exact
        for name, seconds in times.items():
            rows.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
    fast = medians["sketch + refinement"]
    return {
        "gains": size,
        "repeats": repeats,
        "ns_per_gain": {name: 1e9 * seconds / size for name, seconds in medians.items()},
        "np.sort / (sketch + refinement)": medians["np.sort"] / fast,
        "exact / (sketch + refinement)": medians["exact"] / fast,
        "np.sort / the same in numpy": medians["np.sort"] / medians["sketch + refinement, numpy"],
        "exact / the same in numpy": medians["exact"] / medians["sketch + refinement, numpy"],
        "exact / all of it": medians["exact"] / medians["all of it"],
        "relative_error_of_value": error,
        "memory_MB": {name: in_fresh_process(name, size) for name in ("np.sort", "exact", "sketch", "sketch, numpy")},
    }


def peak_growth(name: str, size: int) -> float:
    """Run one method and return by how many MB this process's peak resident set has grown, the pool included."""
    tasks: dict[str, Callable[[], Any]] = {
        "np.sort": lambda: np.sort(pool_of(size)),
        "exact": lambda: rad_marginals(pool_of(size), WRONG * size, int(BUDGET * size)),
        "sketch": lambda: sketch_times(size),
        "sketch, numpy": lambda: sketch_times(size),
    }
    before = peak_memory()
    with numpy_alone() if name == "sketch, numpy" else nullcontext():
        tasks[name]()
    return peak_memory() - before


def peak_memory() -> float:
    """Return this process's peak resident set in MB; getrusage would count its parent's at the time of the fork."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_fresh_process(name: str, size: int) -> float:
    """Measure a method's memory in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_growth, (name, size))


def rounding_times(size: int, repeats: int) -> dict[str, Any]:
    """Time the rounding of marginals against sorting them."""
    rng = np.random.default_rng(0)
    cases = {"of the game": rad_marginals(pool_of(size), WRONG * size, int(BUDGET * size)).probabilities}
    for share in (0.05, 0.5):
        spread = 1.9 * share * rng.random(size)
        cases[f"all fractional, {share:.0%} chosen"] = spread * (np.floor(spread.sum()) / spread.sum())
    result: dict[str, Any] = {"marginals": size, "repeats": repeats, "cases": {}}
    for name, marginals in cases.items():
        columns: list[list[float]] = [[], [], []]
        for _ in range(repeats):
            columns[0].append(timed(lambda marginals=marginals: dep_round(marginals, rng)))
            with numpy_alone():
                columns[1].append(timed(lambda marginals=marginals: dep_round(marginals, rng)))
            columns[2].append(timed(lambda marginals=marginals: np.sort(marginals)))
        rounding, in_numpy, sort = map(statistics.median, columns)
        result["cases"][name] = {
            "ns_per_marginal": 1e9 * rounding / size,
            "np.sort ns": 1e9 * sort / size,
            "rounding / two sorts": rounding / (2 * sort),
            "ns_per_marginal, numpy": 1e9 * in_numpy / size,
            "rounding / two sorts, numpy": in_numpy / (2 * sort),
        }
    return result


def debias_times(size: int, validation: int, classes: int) -> dict[str, Any]:
    """Time the debiasing weights of examples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=validation)
    student, teacher = rng.normal(size=(2, size, classes))
    teacher -= np.log(np.exp(teacher).sum(axis=1, keepdims=True))
    fit = timed(lambda: DebiasEstimator.fit(student[:validation], teacher[:validation], labels))
    estimator = DebiasEstimator.fit(student[:validation], teacher[:validation], labels)
    seconds = timed(lambda: estimator.weights(student, teacher))
    sizes = {"examples": size, "validation": validation, "classes": classes, "neighbours": estimator.neighbours}
    return {**sizes, "fit_s": fit, "weights_s": seconds, "ns_per_example": 1e9 * seconds / size}


def draw(path: Path) -> None:
    """Draw what RAD, margin and uniform guarantee against the teacher's error rate, and the probabilities behind it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gains = np.sort(np.random.default_rng(0).beta(0.8, 1.6, 2_000))[::-1]
    size, budget = len(gains), 200
    rates = np.linspace(0, 0.6, 61)
    greedy, chance = (np.arange(size) < budget).astype(float), np.full(size, budget / size)
    frozen = rad_marginals(gains, 0.2 * size, budget).probabilities
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, style, guarantee in (
        ("RAD", "-C0", lambda k: rad_marginals(gains, k, budget).value),
        ("RAD made for 20 %", "--C0", lambda k: guaranteed_gain(gains, frozen, k)),
        ("margin (largest gains)", "-C1", lambda k: guaranteed_gain(gains, greedy, k)),
        ("uniform", "-C2", lambda k: guaranteed_gain(gains, chance, k)),
    ):
        left.plot(100 * rates, [guarantee(rate * size) for rate in rates], style, label=label)
    left.set(xlabel="wrong teacher labels in the pool, %", ylabel=f"guaranteed gain of {budget} labels", ylim=(0, None))
    left.legend()
    for rate, shade in ((0.0, "0.75"), (0.05, "C3"), (0.2, "C0"), (0.5, "C4")):
        q = rad_marginals(gains, rate * size, budget).probabilities
        right.plot(gains, q, color=shade, label=f"{100 * rate:.0f} % wrong")
    right.set(xlabel="gain", ylabel="probability of being bought", ylim=(0, 1.05))
    right.legend()
    figure.suptitle(f"{budget} labels out of {size:,} examples; the worst labels are wrong")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def about() -> dict[str, Any]:
    """Describe where and with what the figures were measured."""
    features = np.show_config(mode="dicts")["SIMD Extensions"]
    simd = [*features["baseline"], *features["found"]]
    return machine(("numpy", "numba", "scipy", "scikit-learn"), simd_of_numpy=simd)


def table(results: dict[str, Any]) -> str:
    """Lay the results out for reading."""
    names = list(results["pools"][0]["ns_per_gain"])
    lines = [
        json.dumps(results["machine"]),
        "",
        f"loading numba and the compiled functions: {results['load_compiled_s']:.2f} s",
        "",
        "ns per gain",
    ]
    lines.append(f"{'':32}" + "".join(f"{pool['gains']:>14,}" for pool in results["pools"]))
    lines += [
        f"{name:32}" + "".join(f"{pool['ns_per_gain'][name]:>14.2f}" for pool in results["pools"]) for name in names
    ]
    for ratio in [name for name in results["pools"][0] if " / " in name]:
        lines.append(f"{ratio:32}" + "".join(f"{pool[ratio]:>13.2f}x" for pool in results["pools"]))
    for name in results["pools"][0]["memory_MB"]:
        lines.append(f"{'MB, ' + name:32}" + "".join(f"{pool['memory_MB'][name]:>14.0f}" for pool in results["pools"]))
    lines += ["", f"rounding {results['rounding']['marginals']:,} marginals"]
    for name, row in results["rounding"]["cases"].items():
        lines.extend(
            f"{name:32}{row['ns_per_marginal' + path]:>10.1f} ns each, "
            f"{row['rounding / two sorts' + path]:.2f} of two sorts{path}"
            for path in ("", ", numpy")
        )
    debias = results["debias"]
    lines += [
        "",
        f"debias weights of {debias['examples']:,}: {debias['weights_s']:.2f} s ({debias['neighbours']} neighbours)",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10^6 gains, one tenth of the examples")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--picture", type=Path, help="draw the picture of selection/README.md to this file")
    options = parser.parse_args()
    if options.picture:
        draw(options.picture)
    sizes = {10**5: 9, 10**6: 7} if options.quick else {10**5: 15, 10**6: 9, 10**7: 5, 10**8: 3}
    results = {
        "machine": about(),
        "load_compiled_s": load_time(),
        "pools": [pool_times(size, repeats) for size, repeats in sizes.items()],
        "rounding": rounding_times(10**6, 5 if options.quick else 15),
        "debias": debias_times(10**5 if options.quick else 10**6, 2_500, 10),
    }
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
