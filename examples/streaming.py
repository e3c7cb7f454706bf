"""Streaming: messages become soft labels, each once, a set of shards for each window.

    python examples/streaming.py [DIRECTORY] [HOST:PORT:TOPIC]

Without a topic the messages are rows of Parquet files, which need neither a broker nor Prism: the same job with an
end. With one they are read from Kafka (`pip install 'distilbeam[kafka]'`) until its newest. Under a minute on one
core.
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

from distilbeam.teacher.softlabels import decode, read_manifest

CONFIG = """
[data]
pool = "messages"
id = "key"
carry = ["x"]
classes = ["ham", "spam"]

[teacher]
kind = "torch"
model = "teacher.pt2"
device = "cpu"
input = { columns = ["x"] }
"""


def main(directory: Path, topic: str | None) -> None:
    """Write messages, label them as they come, and look at what there is."""
    (directory / "messages").mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 8)
    table = pa.table({"key": [f"message-{i}" for i in range(400)], "x": vectors})
    pq.write_table(table, directory / "messages/part.parquet")
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(torch.nn.Linear(8, 2), (torch.zeros(2, 8),), dynamic_shapes=shapes)
    torch.export.save(program, directory / "teacher.pt2")
    (directory / "job.toml").write_text(CONFIG)

    words = ["stream", str(directory / "job.toml"), "--out", str(directory / "labels")]
    if topic is None:
        words += ["--source", f"parquet:{directory}/messages/*.parquet"]
    else:
        words += ["--source", f"kafka:{topic}", "--schema", "key:string=key,x:float32[8]", "--until", "latest"]
    subprocess.run([sys.executable, "-m", "distilbeam", *words], check=True)

    manifest = read_manifest(directory / "labels")
    labels = [decode(pq.read_table(path), manifest.spec) for path in manifest.paths()]
    print(f"{sum(len(part.logprobs) for part in labels)} messages have a label, of {manifest.spec.num_classes} classes")


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="streaming-"))
    main(where, sys.argv[2] if len(sys.argv) > 2 else None)
