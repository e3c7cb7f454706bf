"""Nightly labelling: rows of a table that come day by day, a teacher behind a server, a student of the labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import make_classification
from torch import nn

from distilbeam.pipelines.examples.teachers import write_teacher
from distilbeam.progress import Progress

CLASSES = ("basic", "plus", "premium", "trial")
FEATURES = 12
DAYS = {"pool/day-1": 600, "arrived/day-2": 300}
TEST_ROWS, TEACHERS_ROWS = 400, 2_000

TEACHER = """# What `distilbeam serve-teacher` serves; on a machine of its own: --host 0.0.0.0 --cert-file FILE --key-file FILE
[teacher]
kind = "torch"
model = "teacher.pt2"
input = { columns = ["features"] }
"""

NIGHTLY = """# Every row of the pool gets its label once, however often the pool grows.
[run]
directory = "labelling"

[data]
pool = "pool"
id = "id"
carry = ["features"]      # copied beside the labels, for a student to learn from
classes = ["basic", "plus", "premium", "trial"]   # in the order of the teacher's outputs

[teacher]
kind = "tfserving"
address = "127.0.0.1:8500"   # of serve-teacher or of TensorFlow Serving
model = "teacher"
# tls = true                 # with ca_file = "server.pem", where the teacher is on another machine
input = { columns = ["features"] }
"""

TRAINING = """# `distilbeam launch` trains a student on labels alone.
[data]
soft_labels = ["labelling/labels"]
classes = ["basic", "plus", "premium", "trial"]
directory = "student"

[student]
kind = "mlp"
hidden = [32]
input = { columns = ["features"] }

[training]
epochs = 30
lr = 0.01
"""


def write(directory: Path, seed: int, progress: Progress) -> None:
    """Write the example's days, teacher and configurations.

    Args:
      directory: where to write; made if it is not there.
      seed: of the rows and of the teacher's training.
      progress: told the epochs of the teacher's training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = sum(DAYS.values()) + TEST_ROWS + TEACHERS_ROWS
    x, y = make_classification(rows, FEATURES, n_informative=8, n_classes=4, class_sep=1.5, random_state=seed)
    x = x.astype(np.float32)
    start = 0
    for name, count in DAYS.items():
        path = directory / f"{name}.parquet"
        path.parent.mkdir()
        pq.write_table(table(x[start : start + count], path.stem), path)
        start += count
    test = table(x[start : start + TEST_ROWS], "test").append_column(
        "plan", pa.array([CLASSES[label] for label in y[start : start + TEST_ROWS]])
    )
    pq.write_table(test, directory / "test.parquet")
    start += TEST_ROWS
    seen, classes = torch.from_numpy(x[start:]), torch.from_numpy(y[start:])
    make = partial(network, FEATURES, len(CLASSES))
    write_teacher(make, seen, classes, directory / "teacher.pt2", seed, progress, epochs=15)
    for name, text in {"teacher": TEACHER, "nightly": NIGHTLY, "training": TRAINING}.items():
        (directory / f"{name}.toml").write_text(text)


def table(x: npt.NDArray[np.float32], name: str) -> pa.Table:
    """Put rows [n, features] into a table with ids that begin with a name."""
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    return pa.table({"id": [f"{name}-{i:04d}" for i in range(len(x))], "features": features})


def network(features: int, classes: int) -> nn.Module:
    """Make a network that is larger than a student need be."""
    hidden = [nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, classes))
