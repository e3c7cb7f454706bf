"""The embedded example: scikit-learn's 1,797 handwritten digits, a teacher, and a student with 23 % of its parameters.

The digits are split at random: 400 to test, 200 to validate, 300 that only the teacher is trained on, 60 with their labels
for student 0, and the remaining 837 without labels as the pool. The teacher is a small convolutional network, exported
with `torch.export` like any user's.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import load_digits
from torch import nn

from distilbeam.pipelines.examples.teachers import write_teacher
from distilbeam.progress import Progress

SPLITS = {"test": 400, "validation": 200, "teacher": 300, "labelled": 60}

CONFIG = """# The embedded example: handwritten digits. `distilbeam run` on this file takes under a minute.
# Relative paths are relative to this file; every setting can be overridden: --set section.key=value

[run]
directory = "run"
rounds = 3
seed = {seed}

[data]
pool = "pool"
labelled = "labelled.parquet"
validation = "validation.parquet"
test = "test.parquet"
label = "digit"
id = "id"

[teacher]
kind = "torch"
model = "teacher.pt2"
input = {{ columns = ["pixels"], shape = [1, 8, 8], scale = 0.0625 }}

[selection]
method = "rad"
budget = 80

[student]
kind = "cnn"
width = 0.25
input = {{ columns = ["pixels"], shape = [1, 8, 8], scale = 0.0625 }}

[training]
epochs = 40
batch_size = 64
ensemble = 3
lr = 0.01
weight_decay = 0.1
"""


def write(directory: Path, seed: int, progress: Progress) -> None:
    """Write the example's data, teacher and configuration.

    Args:
      directory: where to write; made if it is not there.
      seed: decides which images are in which set, and the teacher's training.
      progress: told the epochs of the teacher's training.
    """
    images, digits = load_digits(return_X_y=True)
    images = images.astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(images))
    bounds = [*np.cumsum([0, *SPLITS.values()]), len(images)]
    rows = dict(zip([*SPLITS, "pool"], (order[a:b] for a, b in pairwise(bounds)), strict=True))
    (directory / "pool").mkdir(parents=True, exist_ok=True)
    for name in ("labelled", "validation", "test"):
        table = _table(rows[name], images).append_column("digit", pa.array(digits[rows[name]]))
        pq.write_table(table, directory / f"{name}.parquet")
    for number, part in enumerate(np.array_split(rows["pool"], 4)):
        pq.write_table(_table(part, images), directory / "pool" / f"part-{number}.parquet")
    x = torch.from_numpy(images[rows["teacher"]]).reshape(-1, 1, 8, 8).float() / 16
    write_teacher(_teacher, x, torch.from_numpy(digits[rows["teacher"]]), directory / "teacher.pt2", seed, progress)
    (directory / "distilbeam.toml").write_text(CONFIG.format(seed=seed))


def _table(rows: npt.NDArray[np.int64], images: npt.NDArray[np.uint8]) -> pa.Table:
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(64), len(rows), [None, pa.py_buffer(images[rows].tobytes())]
    )
    field = pa.field("pixels", pa.binary(64), metadata={"dtype": "uint8", "shape": "[8, 8]"})
    return pa.table(
        [pa.array([f"digit-{row:04d}" for row in rows]), pixels], schema=pa.schema([pa.field("id", pa.string()), field])
    )


def _teacher(width: int = 32) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    features = [
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.MaxPool2d(2),
    ]
    head = [nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * width, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*features, *head)
