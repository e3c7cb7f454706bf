"""A Beam pipeline of your own: soft labels as one step of it.

    python examples/own_pipeline.py [DIRECTORY] [--runner=... Beam's options]

Elements are Arrow record batches. `LabelExamples` asks the teacher, `WriteSoftLabels` commits a set of shards for
each window, whatever stands before them. Seconds on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines import LabelExamples, WriteSoftLabels
from distilbeam.teacher import load_teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest


def main(directory: Path, flags: list[str]) -> None:
    """Label what a filter leaves of a thousand rows."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(torch.nn.Linear(4, 3), (torch.zeros(2, 4),), dynamic_shapes=shapes)
    torch.export.save(program, directory / "teacher.pt2")

    model = str(directory / "teacher.pt2")
    teacher = {"kind": "torch", "model": model, "device": "cpu", "input": {"columns": ["x"]}}
    spec = SoftLabelSpec(num_classes=3, teacher=load_teacher(teacher).fingerprint(), carried=("x",))
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        _ = (
            pipeline
            | "Numbers" >> beam.Create(range(10))
            | "Batches" >> beam.Map(make_batch)  # yours: read Parquet, decode messages, join, ...
            | "LongOnes" >> beam.Map(long_ones)
            | LabelExamples(teacher, spec, id_column="id", dead_letters=directory / "dead")
            | WriteSoftLabels(directory / "labels", spec)
        )
    manifest = read_manifest(directory / "labels")
    print(f"{sum(entry.rows for entry in manifest.entries)} labels in {len(manifest.entries)} shard(s)")


def make_batch(number: int) -> pa.RecordBatch:
    """Make a hundred rows."""
    x = np.random.default_rng(number).normal(size=(100, 4)).astype(np.float32)
    columns = {
        "id": [f"{number}-{i}" for i in range(100)],
        "x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4),
    }
    return pa.record_batch(columns)


def long_ones(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Keep the rows whose first number is positive."""
    return batch.filter(pc.greater(pc.list_element(batch["x"], 0), 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="pipeline-")), sys.argv[2:])
