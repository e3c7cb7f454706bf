"""Images: scikit-learn's handwritten digits as PNG files of 16 x 16 pixels, in folders that are named as their classes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from distilbeam.pipelines.examples.teachers import write_teacher
from distilbeam.progress import Progress

PARTS = {"labelled": 80, "validation": 200, "test": 400, "pool": 617}

CONFIG = """# Folders of images: `distilbeam ingest` makes Parquet of them, the files themselves, not their pixels.
# Relative paths are relative to this file; every setting can be overridden: --set section.key=value

[run]
directory = "run"
rounds = 2
seed = {seed}

[data]
pool = "pool"
labelled = "labelled"
validation = "validation"
test = "test"
label = "digit"

[teacher]
kind = "torch"
model = "teacher.pt2"
input = {{ kind = "image", columns = ["image"], mode = "L", size = [16, 16] }}

[selection]
budget = 80

[student]
kind = "cnn"
width = 0.25
input = {{ kind = "image", columns = ["image"], mode = "L", size = [16, 16] }}

[training]
epochs = 20
lr = 0.01
augment = {{ crop = 1 }}   # flip = true is for photographs
# Without the last training on what the pool and the validation set still hold, which takes most of the time:
self_training = false
final_training = "apart"
"""


def write(directory: Path, seed: int, progress: Progress) -> None:
    """Write the example's images, teacher and configuration.

    Args:
      directory: where to write; made if it is not there.
      seed: decides which images are in which set, and the teacher's training.
      progress: told the epochs of the teacher's training.
    """
    digits = load_digits()
    images = np.rint(np.kron(digits.images, np.ones((2, 2))) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(images))
    bounds = np.cumsum([0, *PARTS.values()])
    for name, (start, end) in zip(PARTS, pairwise(bounds), strict=True):
        for row in order[start:end]:
            folder = directory / "files" / name
            if name != "pool":  # nobody knows what its images show
                folder /= str(digits.target[row])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).save(folder / f"{row:04d}.png")
    rest = order[bounds[-1] :]
    x = torch.from_numpy(_as_read(images[rest]))
    write_teacher(_network, x, torch.from_numpy(digits.target[rest]), directory / "teacher.pt2", seed, progress, 20)
    (directory / "distilbeam.toml").write_text(CONFIG.format(seed=seed))


def _as_read(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Make the input [n, 1, 16, 16] from 0 to 1 that the configuration describes, of pixels [n, 16, 16]."""
    return (images[:, None] / np.float32(255)).astype(np.float32)


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
    )
