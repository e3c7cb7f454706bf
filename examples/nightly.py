"""Nightly labelling: a teacher behind a server, a pool that grows, labels for what is new, a student in the morning.

    python examples/nightly.py [DIRECTORY]

Two nights: the second asks the teacher for the rows that came since, and for nothing else. About a minute on one core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.teacher import TeacherServer

NIGHTLY = """
[run]
directory = "labelling"

[data]
pool = "pool"
id = "id"
carry = ["features"]
classes = ["low", "middle", "high"]

[teacher]
kind = "tfserving"
address = "{address}"
model = "teacher"
input = {{ columns = ["features"] }}
"""

TRAINING = """
[data]
soft_labels = ["labelling/labels"]
classes = ["low", "middle", "high"]
directory = "student"

[student]
kind = "linear"
input = { columns = ["features"] }

[training]
epochs = 20
lr = 0.03
"""


def main(directory: Path) -> None:
    """Serve a teacher, label two nights, train, predict."""
    (directory / "pool").mkdir(parents=True, exist_ok=True)
    save_teacher(directory / "teacher.pt2")
    teacher = {"kind": "torch", "model": "teacher.pt2", "device": "cpu", "input": {"columns": ["features"]}}
    # on a machine of its own: distilbeam serve-teacher teacher.toml --host 0.0.0.0 --cert-file ... --key-file ...
    with TeacherServer(teacher, base=directory) as server:
        config = directory / "nightly.toml"
        config.write_text(NIGHTLY.format(address=server.address))
        write_day(directory / "pool", 1, 500)
        distilbeam("plan", str(config))
        distilbeam("label", str(config))
        write_day(directory / "pool", 2, 300)
        distilbeam("label", str(config))  # 300 rows
        distilbeam("label", str(config))  # nothing
        distilbeam("verify", str(directory / "labelling/labels"), "--teacher", str(config))
    training = directory / "training.toml"
    training.write_text(TRAINING)
    distilbeam("launch", str(training))
    words = (
        "--data",
        str(directory / "pool/day-2.parquet"),
        "--out",
        str(directory / "predictions"),
        "--columns",
        "id",
    )
    distilbeam("predict", str(directory / "student"), *words)


def distilbeam(*words: str) -> None:
    """Give a command, as cron would."""
    print("$ distilbeam", *words, flush=True)
    subprocess.run([sys.executable, "-m", "distilbeam", *words], check=True)


def write_day(pool: Path, day: int, rows: int) -> None:
    """Write the examples of a day as a new file."""
    x = np.random.default_rng(day).normal(size=(rows, 4)).astype(np.float32)
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)
    pq.write_table(
        pa.table({"id": [f"{day}-{i}" for i in range(rows)], "features": features}), pool / f"day-{day}.parquet"
    )


def save_teacher(path: Path) -> None:
    """Export a network that was made up."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 4),), dynamic_shapes=shapes), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="nightly-")))
