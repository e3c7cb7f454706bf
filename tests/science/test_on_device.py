"""Training with images on the device: what becomes of an image, that a student learns, and the command without data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.science import cifar_whole
from benchmarks.science.on_device import SHIFT, changed
from benchmarks.science.problems import Problem
from benchmarks.science.training import accuracy, fit
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

SIDE = 12


def test_an_image_is_mirrored_or_not_and_shifted_with_its_border_mirrored() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, SIDE, SIDE, generator=generator)
    found = changed(images, generator).numpy()
    mirrored, shifts = 0, set()
    for image, now in zip(images.numpy(), found, strict=True):
        candidates = {
            (flip, y, x): padded[:, y : y + SIDE, x : x + SIDE]
            for flip in (False, True)
            for padded in [
                np.pad(image[:, :, ::-1] if flip else image, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), "reflect")
            ]
            for y in range(2 * SHIFT + 1)
            for x in range(2 * SHIFT + 1)
        }
        (same,) = [key for key, candidate in candidates.items() if np.array_equal(candidate, now)]
        mirrored += same[0]
        shifts.add(same[1:])
    assert abs(mirrored - 32) <= 20  # five standard deviations of a fair coin
    assert len(shifts) > 30


def test_a_student_learns_in_bfloat16_from_soft_and_human_labels() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    images = rng.normal(size=(400, 3, SIDE, SIDE)) + truth[:, None, None, None]  # bright or dark: no shift hides it
    every = np.arange(400)
    logits = np.where(truth[:, None] == np.arange(2), 2.0, -2.0).astype(np.float32)
    problem = Problem(
        student=StudentConfig(kind="cnn", width=0.1, input={"columns": ["x"], "shape": (3, SIDE, SIDE)}),
        training=TrainConfig(batch_size=32, lr=5e-3, precision="bf16"),
        steps=40,
        inputs=torch.from_numpy(images.astype(np.float32)),
        truth=truth,
        teacher_logits=logits,
        labelled=every[:20],
        validation=every[20:60],
        pool=every[60:260],
        test=every[260:],
        seed=0,
    )
    from benchmarks.science.buying import soft_rows

    student = fit(problem, soft_rows(problem, problem.pool, logits[problem.pool]), problem.human(problem.labelled))
    assert accuracy(student, problem) > 0.95
    again = fit(problem, soft_rows(problem, problem.pool, logits[problem.pool]), problem.human(problem.labelled))
    for a, b in zip(student.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_without_cifar_the_command_says_so(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    cifar_whole.main(["--data", str(tmp_path)])
    assert capsys.readouterr().out == f"skipped: {tmp_path} has no cifar10-train.parquet\n"
