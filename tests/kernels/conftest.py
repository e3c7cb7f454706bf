"""What the tests of all operations share: which backends run here, teacher labels, and an oracle in probabilities."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton_device

from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels, SampledLabels, TopKLabels

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic

SETTINGS = [
    ("kl", "dense", "normalised"),
    ("truncated_kl", "top_k", "normalised"),
    ("ce", "dense", "normalised"),
    ("ce", "top_k", "normalised"),
    ("ce", "hard", "normalised"),
    ("tail", "top_k", "normalised"),
    ("renormalised", "top_k", "normalised"),
    ("renormalised", "sampled", "normalised"),
    ("sampled", "sampled", "normalised"),
    *(
        ("slam", kind, mixing)
        for kind, mixing in itertools.product(("dense", "top_k", "sampled"), ("plain", "forward"))
    ),
    ("slam", "dense", "normalised"),
    *(
        (objective, kind, "normalised")
        for objective, kind in itertools.product(
            ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"), ("dense", "top_k")
        )
    ),
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _corrected_interpreter() -> None:
    triton_device.correct_the_interpreter()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill what is allocated and not written with NaN, which torch does where operations must be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # some of torch's own there are not
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20230806)


@pytest.fixture(params=SETTINGS, ids="-".join)
def setting(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """An objective, a kind of labels that it takes, and a form of mixing."""
    return request.param


@pytest.fixture(params=["reference", "chunked"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_labels(rng: torch.Generator) -> Callable[..., Labels]:
    """Labels of a random teacher; sparse ones have padding in every third row, but not in the first."""

    def make(kind: str, rows: int, classes: int, k: int = 4, sharpness: float = 2.0) -> Labels:
        logits = sharpness * torch.randn(rows, classes, generator=rng, dtype=torch.float64)
        logprobs = logits.log_softmax(1)
        if kind == "dense":
            return DenseLabels(logprobs)
        if kind == "hard":
            return HardLabels(torch.randint(0, classes, (rows,), generator=rng))
        top = logprobs.topk(k, dim=1)
        values, chosen = top.values.clone(), top.indices.clone()
        chosen[2::3, 2:], values[2::3, 2:] = -1, -torch.inf
        if kind == "top_k":
            return TopKLabels(values, chosen, torch.log1p(-values.exp().sum(1)))
        return SampledLabels(values.log_softmax(1), chosen)

    return make


@pytest.fixture
def oracle() -> Callable[..., np.ndarray]:
    """Every row's loss from its definition, in probabilities and loops over rows; it shares no code with the library."""
    return _oracle


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def _oracle(
    logits: np.ndarray,
    labels: Labels,
    objective: str,
    temperature: float = 1.0,
    accuracy: Any = None,
    candidates: Any = None,
    mixing: str = "normalised",
) -> np.ndarray:
    losses = []
    for i, z in enumerate(logits):
        a = None if accuracy is None else float(np.broadcast_to(accuracy, len(logits))[i])
        m = None if candidates is None else int(np.broadcast_to(candidates, len(logits))[i])
        losses.append(_row(z, _row_labels(labels, i), objective, temperature, a, m, mixing))
    return np.array(losses)


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(a > 0, a * np.log(a / b), 0).sum())


OTHERS = {  # of the teacher's y and the student's f, with the settings that nobody has changed
    "reverse_kl": lambda y, f: _kl(f, y),
    "jsd": lambda y, f: 0.5 * _kl(y, (y + f) / 2) + 0.5 * _kl(f, (y + f) / 2),
    "skew_kl": lambda y, f: _kl(y, 0.1 * y + 0.9 * f),
    "skew_reverse_kl": lambda y, f: _kl(f, 0.9 * y + 0.1 * f),
    "tv": lambda y, f: np.abs(y - f).sum() / 2,
}


def _row_labels(labels: Labels, i: int) -> dict[str, Any]:
    if isinstance(labels, HardLabels):
        return {"hard": int(labels.classes[i])}
    logprobs = labels.logprobs[i].double().numpy()
    if isinstance(labels, DenseLabels):
        return {"kept": np.arange(len(logprobs)), "p": np.exp(logprobs), "tail": None, "dense": True}
    there = labels.classes[i].numpy() >= 0
    tail = None if isinstance(labels, SampledLabels) else float(labels.tail_logmass[i].exp())
    return {"kept": labels.classes[i].numpy()[there], "p": np.exp(logprobs[there]), "tail": tail, "dense": False}


def _row(
    z: np.ndarray, label: dict[str, Any], objective: str, T: float, a: float | None, m: int | None, mixing: str
) -> float:
    if "hard" in label:
        return -float(np.log(_softmax(z)[label["hard"]]))
    kept, p, tail = label["kept"], label["p"], label["tail"]
    rest = np.setdiff1d(np.arange(len(z)), kept)
    with np.errstate(divide="ignore"):
        tempered = _softmax(np.log(np.append(p, tail or 0.0)) / T)  # the tail, where there is one, is one more bucket
    if objective in ("kl", "ce", "sampled", "truncated_kl"):
        f, y = _softmax(z / T)[kept], tempered[:-1]
    elif objective == "renormalised":
        f, y = _softmax(z[kept] / T), p ** (1 / T) / (p ** (1 / T)).sum()
    elif label["dense"]:
        f, y = _softmax(z / T), tempered[:-1]
    else:  # student and teacher are bucketed at temperature 1, then both are tempered
        student = _softmax(z)
        buckets = np.append(student[kept], student[rest].sum()) ** (1 / T)
        f, y = buckets / buckets.sum(), tempered
    if objective == "slam":
        top = np.zeros(len(f))
        top[np.argsort(-p, kind="stable")[:m]] = 1
        if mixing == "plain":
            f = a * f + (1 - a) * (1 - f) * top
        else:
            reach = 1.0 if mixing == "normalised" else (f * top).sum()
            f = a * f + (1 - a) / max(m - 1, 1) * (reach - f) * top
    if objective in OTHERS:
        return float(T**2 * OTHERS[objective](y, f))
    y, f = y[y > 0], f[y > 0]
    entropy = (y * np.log(y)).sum() if objective not in ("ce", "slam") else 0.0
    return float(T**2 * (entropy - (y * np.log(f)).sum()))
