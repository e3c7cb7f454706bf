"""Messages: rows that come one by one, each of which gets one label; here files stand for the topic that has no end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.datasets import make_classification

from distilbeam.pipelines.examples.nightly import network, table
from distilbeam.pipelines.examples.teachers import write_teacher
from distilbeam.progress import Progress

FEATURES = 8
MESSAGES, TEACHERS_ROWS = 500, 1_000

CONFIG = """# A labelling job whose rows are messages. Its columns are those of the messages; `data.pool` is not read by a stream,
# and `distilbeam label` labels the same rows as a pool.
[run]
directory = "labelling"

[data]
pool = "messages"
id = "id"
carry = ["features"]
classes = ["ham", "spam"]

[teacher]
kind = "torch"
model = "teacher.pt2"
input = { columns = ["features"] }
"""


def write(directory: Path, seed: int, progress: Progress) -> None:
    """Write the example's messages, teacher and configuration.

    Args:
      directory: where to write; made if it is not there.
      seed: of the messages and of the teacher's training.
      progress: told the epochs of the teacher's training.
    """
    (directory / "messages").mkdir(parents=True, exist_ok=True)
    x, y = make_classification(MESSAGES + TEACHERS_ROWS, FEATURES, n_informative=6, random_state=seed)
    x = x.astype(np.float32)
    for number, part in enumerate(np.array_split(x[:MESSAGES], 2)):
        pq.write_table(table(part, f"message-{number}"), directory / "messages" / f"part-{number}.parquet")
    seen, classes = torch.from_numpy(x[MESSAGES:]), torch.from_numpy(y[MESSAGES:])
    write_teacher(partial(network, FEATURES, 2), seen, classes, directory / "teacher.pt2", seed, progress, epochs=10)
    (directory / "job.toml").write_text(CONFIG)
