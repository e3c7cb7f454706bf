"""The compiled loops against numpy: equal integers, equal bytes, the same points chosen, the same refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from distilbeam.selection import compiled
from distilbeam.selection.rounding import dep_round, round_shard
from distilbeam.selection.sketch.bins import BINS, histogram
from distilbeam.selection.sketch.gain_sketch import GainSketch

SIZE = 300_001  # above the size from which numba is used, and a multiple of no block
EDGES = np.array(
    [0, -0.0, 1e-45, 1.1754942e-38, 1.17549435e-38, 1, np.nextafter(np.float32(2), 0), 3.4028235e38], np.float32
)
SHAPES = {
    "uniform": lambda rng, n: rng.random(n, np.float32),
    "margins": lambda rng, n: (1 - rng.beta(5, 1, n)).astype(np.float32),
    "mass near zero": lambda rng, n: rng.beta(0.05, 3, n).astype(np.float32),
    "ties": lambda rng, n: rng.choice(np.array([0.1, 0.3, 0.95, 1.0], np.float32), n),
    "nine tenths zeros": lambda rng, n: np.where(rng.random(n) < 0.1, rng.random(n), 0.0).astype(np.float32),
    "lognormal": lambda rng, n: np.exp(rng.normal(0, 12, n)).astype(np.float32),
    "edges": lambda rng, n: rng.choice(EDGES, n),
    "every pattern": lambda rng, n: rng.integers(0, BINS << 16, n).astype(np.uint32).view(np.float32),
    "one bin": lambda rng, n: (rng.integers(1 << 16, size=n) + (0x3F80 << 16)).astype(np.uint32).view(np.float32),
    "float64": lambda rng, n: rng.random(n),
}
SIZES = [0, 1, 7, 4_095, 4_096, 4_097, SIZE]


@pytest.fixture
def on_both_paths(monkeypatch):
    """Return a function that gives a task's result compiled, whatever the size, and in numpy."""
    pytest.importorskip("numba")
    load = compiled._load

    def run(task):
        monkeypatch.setattr(compiled, "MIN_SIZE", 0)
        assert compiled.kernels(0) is not None
        fast = task()
        monkeypatch.setattr(compiled, "_load", lambda: None)
        assert compiled.kernels(0) is None
        slow = task()
        monkeypatch.setattr(compiled, "_load", load)
        return fast, slow

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_histograms_are_equal(shape, size, on_both_paths):
    gains = SHAPES[shape](np.random.default_rng([size, 1]), size)
    fast, slow = on_both_paths(lambda: sketch_of(gains))
    assert fast == slow
    assert fast.to_bytes() == slow.to_bytes()
    assert fast.count == size


def test_a_bin_may_hold_more_than_one_flush(on_both_paths):
    gains = np.full(2 * compiled._FLUSH + 3, np.nextafter(np.float32(2), 0))  # the largest deficit that there is
    fast, slow = on_both_paths(lambda: histogram(gains))
    np.testing.assert_array_equal(fast, slow)
    assert fast[0][0x3FFF] == len(gains)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("wrong", "bought"), [(0.1, 0.05), (0.02, 0.6), (0.0, 0.3), (0.3, 0.65)])
def test_refinements_are_equal(shape, wrong, bought, on_both_paths):
    gains = SHAPES[shape](np.random.default_rng(2), SIZE)
    sketch = sketch_of(gains)

    def refine():
        threshold, passes = sketch.solve(wrong * SIZE, int(bought * SIZE)), []
        while (refinement := threshold.refinement()) is not None:
            for part in np.array_split(gains, 3):
                refinement.add(part)
            passes.append(refinement.to_bytes())
            threshold = refinement.solve()
        return threshold, passes

    (fast, fast_passes), (slow, slow_passes) = on_both_paths(refine)
    assert fast_passes == slow_passes
    assert fast == slow


def marginals_of(kind, rng, n):
    if kind == "tiny":
        return np.full(n, 2.0**-40)
    if kind == "large":
        return 1 - rng.random(n) ** 8
    if kind == "special":
        return rng.choice([0.0, 1.0, 0.5, 1e-17, 1 - 2.0**-53], n)
    return rng.random(n) * kind


@pytest.mark.parametrize("kind", [0.001, 0.1, 1.0, "tiny", "large", "special"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 50, 65_536, 65_537, SIZE])
def test_the_same_points_are_chosen(kind, size, on_both_paths):
    marginals = marginals_of(kind, np.random.default_rng([size, 3]), size)
    for seed in range(40 if size < 100 else 2):

        def task(seed=seed):
            rng = np.random.default_rng(seed)
            chosen, *carry = round_shard(marginals, rng)
            return chosen.tobytes(), carry, rng.random()  # the generators have been used alike

        fast, slow = on_both_paths(task)
        assert fast == slow


def test_dependent_rounding_chooses_the_same(on_both_paths):
    fast, slow = on_both_paths(lambda: dep_round(np.full(400_000, 0.25), np.random.default_rng(0)))
    np.testing.assert_array_equal(fast, slow)
    assert fast.sum() == 100_000


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("place", [0, SIZE - 1])
def test_bad_gains_are_refused_in_the_same_words(bad, place, on_both_paths):
    gains = np.ones(SIZE)
    gains[place] = bad
    sketch, refinement = GainSketch(), sketch_of(np.linspace(0.1, 1, 100)).solve(10, 20).refinement()
    before = refinement.to_bytes()

    def sentences():
        found = []
        for add in (sketch.add, refinement.add):
            with pytest.raises(ValueError, match=r"^gains must ") as caught:
                add(gains)
            found.append(str(caught.value))
        return found

    fast, slow = on_both_paths(sentences)
    assert fast == slow
    assert sketch == GainSketch()
    assert refinement.to_bytes() == before


PROGRAM = """
import sys, hashlib, numpy as np
if {absent}: sys.modules["numba"] = None  # importing it now fails, as where it is not installed
import distilbeam.selection
from distilbeam.selection import GainSketch, round_shard
gains = np.random.default_rng(0).random(300_000, np.float32)
small = GainSketch()
small.add(gains[:1000])
assert sys.modules.get("numba") is None, "numba was loaded for a small pool"
sketch = GainSketch()
sketch.add(gains)
print(sys.modules.get("numba") is not None)
refinement = sketch.solve(30_000, 15_000).refinement()
refinement.add(gains)
chosen = round_shard(refinement.solve().marginals(gains), np.random.default_rng(0))[0]
print(hashlib.sha256(sketch.to_bytes() + refinement.to_bytes() + chosen.tobytes()).hexdigest())
"""


def test_without_numba_numpy_gives_the_same_bytes():
    pytest.importorskip("numba")
    outputs = []
    for absent in (False, True):
        program = PROGRAM.format(absent=absent)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert [loaded for loaded, _ in outputs] == ["True", "False"]
    assert outputs[0][1] == outputs[1][1]


def test_machine_code_that_cannot_be_kept_is_compiled_anew(monkeypatch):
    numba = pytest.importorskip("numba")
    njit = numba.njit

    def refusing(function, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(function, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    counts = np.zeros(1 << 16, np.int64)
    compiled._load.__wrapped__().sum_lows(np.array([0x10003, 0x10004], np.uint32), 0x10000, 0x20000, counts)
    assert counts[1] == 7


def sketch_of(gains):
    sketch = GainSketch()
    sketch.add(gains)
    return sketch
