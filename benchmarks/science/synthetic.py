"""A synthetic family in which what the methods assume about the teacher's mistakes are dials.

Inputs are Gaussian; the truth is the largest output of a fixed random network, whose margin says how hard an example is.
The teacher is wrong on exactly the wanted share of the rows:

    error         the share of wrong labels
    correlation   0: anywhere alike; 1: on the hardest examples alone; between: a mixture of the two
    shape         the wrong class: `random` of the others, `runner-up` of the truth, or the `next` number, always
    informative   whether the teacher's confidence follows its local error rate (calibrated at x), or is the same everywhere

Its probability of the class that it names is then that local rate, or the global one, so that it is calibrated in either
case; the rest goes to the classes that a mistake of this shape would have been about. Where a single class remains to be
doubted in favour of, the named class keeps the larger half: else the teacher would name the other one.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.science.problems import Dataset, Floats, Indices, Problem, about, split
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

DIMENSIONS, CLASSES, HIDDEN = 16, 10, 12
SIZES = {"labelled": 100, "validation": 400, "pool": 3_000, "test": 2_500}
STUDENT = StudentConfig(kind="mlp", hidden=(64,), input={"columns": ["x"], "shape": (DIMENSIONS,)})
TRAINING = TrainConfig(batch_size=64, lr=1e-2)
STEPS = 200
ABOUT = about(SIZES, STEPS, student=STUDENT, training=TRAINING)
SHAPES = ("random", "runner-up", "next")


def _teachers() -> dict[str, dict[str, Any]]:
    grid = [
        (0.3, 0.0, shape, True) for shape in SHAPES
    ]  # with errors alike everywhere there is nothing to be informed of
    grid += [(0.3, 1.0, *rest) for rest in product(SHAPES, (True, False))]
    grid += [(error, 0.5, "runner-up", True) for error in (0.1, 0.3, 0.5)]
    return {
        f"error {error:g}, correlation {correlation:g}, {shape}, {'informative' if informative else 'uninformative'}": {
            "error": error,
            "correlation": correlation,
            "shape": shape,
            "informative": informative,
        }
        for error, correlation, shape, informative in grid
    }


def synthetic() -> Dataset:
    """Describe the family."""
    return Dataset("synthetic", _teachers(), make, 1, ABOUT)


def make(dials: dict[str, Any], seed: int) -> Problem:
    """Make a problem of the family."""
    rng = np.random.default_rng([seed, 16])
    x, scores = world(sum(SIZES.values()), rng)
    truth = scores.argmax(axis=1)
    rates = error_rates(scores, dials["error"], dials["correlation"])
    logprobs = _teacher(scores, rates, dials, rng)
    parts = split(np.arange(len(x)), SIZES, rng)
    inputs = torch.from_numpy(x.astype(np.float32))
    return Problem(STUDENT, TRAINING, STEPS, inputs, truth, logprobs, **parts, seed=seed)


def error_rates(scores: npt.NDArray[np.float64], error: float, correlation: float) -> npt.NDArray[np.float64]:
    """Give each example's probability of a wrong label: a mixture of the mean rate and of "the hardest alone"."""
    top = np.sort(scores, axis=1)
    margins = top[:, -1] - top[:, -2]
    hardest = np.argsort(np.argsort(margins)) < error * len(scores)
    return np.asarray((1 - correlation) * error + correlation * hardest)


def world(rows: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draw inputs [rows, 16] and the network's scores of them [rows, 10], whose largest is the truth."""
    x = rng.standard_normal((rows, DIMENSIONS))
    first = rng.standard_normal((DIMENSIONS, HIDDEN)) / np.sqrt(DIMENSIONS)
    second = rng.standard_normal((HIDDEN, CLASSES)) / np.sqrt(HIDDEN)
    scores = np.maximum(x @ first + 0.3 * rng.standard_normal(HIDDEN), 0) @ second
    return x, scores - scores.mean(axis=0)  # no class is the largest nearly everywhere


def _teacher(
    scores: npt.NDArray[np.float64], rates: npt.NDArray[np.float64], dials: dict[str, Any], rng: np.random.Generator
) -> Floats:
    rows, truth = np.arange(len(scores)), scores.argmax(axis=1)
    wrong = rng.random(len(scores)) < rates
    named = np.where(wrong, _mistakes(scores, dials["shape"], rng), truth)
    most = 0.85 if dials["shape"] == "random" else 0.49
    doubt = np.clip(rates if dials["informative"] else np.full(len(rates), rates.mean()), 0.02, most)
    share = _alternatives(scores, named, dials["shape"])
    probabilities = 0.01 / CLASSES + 0.99 * (doubt[:, None] * share)
    probabilities[rows, named] += 0.99 * (1 - doubt)
    return np.log(probabilities).astype(np.float32)


def _mistakes(scores: npt.NDArray[np.float64], shape: str, rng: np.random.Generator) -> Indices:
    truth = scores.argmax(axis=1)
    if shape == "random":
        return (truth + rng.integers(1, CLASSES, len(truth))) % CLASSES
    if shape == "next":
        return (truth + 1) % CLASSES
    return np.asarray(np.argsort(scores, axis=1)[:, -2])


def _alternatives(scores: npt.NDArray[np.float64], named: Indices, shape: str) -> npt.NDArray[np.float64]:
    """Spread the teacher's doubt: over which classes would the truth be, were the named class a mistake of this shape."""
    rows = np.arange(len(scores))
    if shape == "random":
        share = np.full(scores.shape, 1 / (CLASSES - 1))
        share[rows, named] = 0.0
        return share
    share = np.zeros(scores.shape)
    if shape == "next":
        share[rows, (named - 1) % CLASSES] = 1.0
        return share
    top = np.argsort(scores, axis=1)[:, -2:]
    share[rows, np.where(top[:, 0] == named, top[:, 1], top[:, 0])] = 1.0
    return share
