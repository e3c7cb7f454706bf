"""CIFAR-10 (Krizhevsky 2009), read from Parquet files of JPEG images.

`cifar10-patches` is the dataset that is kept aside: nothing is tuned on it. Its teacher is a linear head on fixed features,
the responses to random whitened patches pooled over quadrants (Coates, Ng, Lee 2011), trained on 1,000 to 10,000 labels;
its student sees the image at 8 x 8 pixels through a small fully connected network. A cell takes seconds on one core.

`cifar10` is the set of the papers: the product's convolutional network as the teacher, a narrower one as the student. It
wants a GPU.
"""

from __future__ import annotations

import io
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from benchmarks.science.problems import Dataset, Indices, Problem, about, split
from benchmarks.science.teachers import teacher_answers
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

TRAIN_ROWS, TEST_ROWS = 20_000, 5_000
LABELS = (1_000, 3_000, 10_000)
SIZES = {"lesson": 10_000, "labelled": 500, "validation": 500, "pool": 8_000}
PIXELS = {"columns": ["pixels"], "shape": (192,)}
SMALL_STUDENT = StudentConfig(kind="mlp", hidden=(128,), input=PIXELS)
SMALL_TRAINING = TrainConfig(batch_size=128, lr=3e-3)
HEAD = StudentConfig(kind="linear", input={"columns": ["features"]})
HEAD_TRAINING = TrainConfig(batch_size=256, lr=2e-3, weight_decay=0.1)
PATCH, FILTERS = 6, 160
HEAD_STEPS, SMALL_STEPS = 400, 200
IMAGES = {"columns": ["pixels"], "shape": (3, 32, 32)}
LARGE_TEACHER, LARGE_STUDENT = (
    StudentConfig(kind="cnn", width=width, dropout=0.1, input=IMAGES) for width in (1.0, 0.25)
)
LARGE_TRAINING = TrainConfig(batch_size=64, lr=3e-3)
LARGE_TEACHER_STEPS, LARGE_STEPS = 4_000, 3_000
ABOUT_SMALL = about(
    SIZES, SMALL_STEPS, student=SMALL_STUDENT, training=SMALL_TRAINING, teacher=HEAD, teaching=HEAD_TRAINING
)
ABOUT_LARGE = about(SIZES, LARGE_STEPS, student=LARGE_STUDENT, training=LARGE_TRAINING, teacher=LARGE_TEACHER)


def cifar10_patches(data: Path, work: Path) -> Dataset:
    """Describe the small form; the features are computed once and kept in `work`."""
    teachers = {f"{count:,} labels": {"labels": count} for count in LABELS}
    return Dataset("cifar10-patches", teachers, partial(_make_small, data, work), 1, ABOUT_SMALL)


def cifar10(data: Path, device: str) -> Dataset:
    """Describe the convolutional form: a teacher of width 1, a student of width 0.25."""
    teachers = {f"{count:,} labels": {"labels": count} for count in LABELS}
    return Dataset("cifar10", teachers, partial(_make_large, data, device), 1, ABOUT_LARGE)


@cache
def read(data: Path, train: int = TRAIN_ROWS, test: int = TEST_ROWS) -> tuple[npt.NDArray[np.uint8], Indices]:
    """Read the first images of the training file and of the test file, [n, 3, 32, 32], and their classes."""
    parts = []
    for name, rows in (("train", train), ("test", test)):
        table = pq.read_table(data / f"cifar10-{name}.parquet").slice(0, rows)
        images = [np.asarray(Image.open(io.BytesIO(coded)).convert("RGB")) for coded in table["image"].to_pylist()]
        parts.append((np.stack(images).transpose(0, 3, 1, 2), table["label"].to_numpy().astype(np.int64)))
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


@cache
def features(data: Path, work: Path) -> Tensor:
    """Compute the responses to random whitened patches, pooled over quadrants, standardised: float32 [n, 8 FILTERS]."""
    path = work / f"cifar10-features-{TRAIN_ROWS}-{TEST_ROWS}-{FILTERS}.npy"
    if not path.exists():
        images = read(data)[0]
        filters, bias = _filters(images[:TRAIN_ROWS])
        parts = [_responses(images[start : start + 250], filters, bias) for start in range(0, len(images), 250)]
        found = torch.cat(parts)
        found = (found - found[:TRAIN_ROWS].mean(0)) / (found[:TRAIN_ROWS].std(0) + 1e-2)
        work.mkdir(parents=True, exist_ok=True)
        np.save(path, found.numpy().astype(np.float16))
    return torch.from_numpy(np.load(path).astype(np.float32))


def _filters(images: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Draw patches and whiten them; a convolution with the result is a whitened patch times a whitened input."""
    rng = np.random.default_rng(10)
    rows, ys, xs = (rng.integers(0, most, 20_000) for most in (len(images), 33 - PATCH, 33 - PATCH))
    cut = [images[r, :, y : y + PATCH, x : x + PATCH].ravel() for r, y, x in zip(rows, ys, xs, strict=True)]
    patches = np.stack(cut).astype(np.float64) / 255
    patches -= patches.mean(axis=1, keepdims=True)
    mean = patches.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    whiten = vectors / np.sqrt(values + 0.01) @ vectors.T
    chosen = (patches[:FILTERS] - mean) @ whiten
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    kernels = chosen @ whiten
    kernels_here = kernels - kernels.mean(axis=1, keepdims=True)  # subtracts the patch's own mean
    shape = (FILTERS, 3, PATCH, PATCH)
    return torch.from_numpy(kernels_here.reshape(shape)).float(), torch.from_numpy(-kernels @ mean).float()


def _responses(images: npt.NDArray[np.uint8], filters: Tensor, bias: Tensor) -> Tensor:
    response = torch.nn.functional.conv2d(torch.from_numpy(images).float() / 255, filters, bias)
    both = torch.cat([torch.relu(response - 0.5), torch.relu(-response - 0.5)], dim=1)
    return torch.nn.functional.adaptive_avg_pool2d(both, 2).flatten(1)


def _parts(teacher: dict[str, Any], seed: int) -> tuple[Indices, dict[str, Indices], Indices]:
    rng = np.random.default_rng([seed, 10])
    parts = split(np.arange(TRAIN_ROWS), SIZES, rng)
    lesson = np.sort(rng.permutation(parts.pop("lesson"))[: teacher["labels"]])
    return lesson, parts, np.arange(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS)


def _make_small(data: Path, work: Path, teacher: dict[str, Any], seed: int) -> Problem:
    images, truth = read(data)
    lesson, parts, test = _parts(teacher, seed)
    logits = teacher_answers(HEAD, HEAD_TRAINING, HEAD_STEPS, features(data, work), truth, lesson, 10, seed)
    eighth = torch.from_numpy(images).float().reshape(-1, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1)
    inputs = (eighth / 255 - 0.473) / 0.251
    return Problem(
        SMALL_STUDENT, SMALL_TRAINING, SMALL_STEPS, inputs, truth, logits, **parts, test=test, seed=seed, lesson=lesson
    )


def _make_large(data: Path, device: str, teacher: dict[str, Any], seed: int) -> Problem:
    images, truth = read(data)
    lesson, parts, test = _parts(teacher, seed)
    inputs = (torch.from_numpy(images).float() / 255 - 0.473) / 0.251
    training = LARGE_TRAINING.model_copy(update={"device": device})
    logits = teacher_answers(LARGE_TEACHER, training, LARGE_TEACHER_STEPS, inputs, truth, lesson, 10, seed)
    return Problem(
        LARGE_STUDENT, training, LARGE_STEPS, inputs, truth, logits, **parts, test=test, seed=seed, lesson=lesson
    )
