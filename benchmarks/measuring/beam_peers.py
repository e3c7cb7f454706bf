"""Labelling with what Beam has: RunInference and its Parquet sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import torch
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference

from distilbeam.teacher.softlabels import SoftLabelSpec, encode
from measuring.label_loops import BATCH, Task


class Rows(ModelHandler[np.ndarray, PredictionResult, Any]):
    """Examples are the feature vectors of single rows, as Beam's own handlers want them."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def load_model(self) -> Any:
        """Load the teacher."""
        torch.set_num_threads(1)
        return self.task.model()

    def batch_elements_kwargs(self) -> dict[str, int]:
        """Allow batches as large as ours."""
        return {"min_batch_size": 4096, "max_batch_size": BATCH}

    @torch.inference_mode()
    def run_inference(self, batch: Sequence[Any], model: Any, inference_args: Any = None) -> Any:  # noqa: ARG002  # Beam's interface
        """Answer a batch of rows."""
        logits = model(torch.from_numpy(np.stack([x for _, x in batch]))).numpy()
        return [PredictionResult(example, row) for example, row in zip(batch, logits, strict=True)]


class Batches(Rows):
    """Examples are Arrow batches."""

    def batch_elements_kwargs(self) -> dict[str, int]:
        """Take one Arrow batch at a time."""
        return {"min_batch_size": 1, "max_batch_size": 1}

    @torch.inference_mode()
    def run_inference(self, batch: Sequence[Any], model: Any, inference_args: Any = None) -> Any:  # noqa: ARG002  # Beam's interface
        """Answer an Arrow batch."""
        from measuring.label_loops import _inputs

        return [
            PredictionResult(table, model(torch.from_numpy(_inputs(table, self.task).copy())).numpy())
            for table in batch
        ]


def label_rows(pipeline: Any, task: Task) -> None:
    """Label row by row."""
    fields = [("example_id", pa.string()), ("teacher_logprobs", pa.list_(pa.float32()))]
    _ = (
        pipeline
        | beam.io.ReadFromParquet(str(task.pool / "*.parquet"), columns=["id", *task.columns])
        | beam.Map(lambda row: (row["id"], np.frombuffer(row["x"], np.float32)))
        | RunInference(Rows(task))
        | beam.Map(_row_of_labels)
        | beam.io.WriteToParquet(str(task.output / "labels"), pa.schema(fields), file_name_suffix=".parquet")
    )


def label_batched(pipeline: Any, task: Task) -> None:
    """Label Arrow tables."""
    spec = SoftLabelSpec(num_classes=task.classes)
    schema = _loose_schema(spec)
    _ = (
        pipeline
        | beam.io.ReadFromParquetBatched(str(task.pool / "*.parquet"), columns=["id", *task.columns])
        | RunInference(Batches(task))
        | beam.Map(_table_of_labels, spec)
        | beam.io.parquetio.WriteToParquetBatched(str(task.output / "labels"), schema, file_name_suffix=".parquet")
    )


def _row_of_labels(result: PredictionResult) -> dict[str, Any]:
    logits = result.inference
    shifted = logits - logits.max()
    return {"example_id": result.example[0], "teacher_logprobs": (shifted - np.log(np.exp(shifted).sum())).tolist()}


def _table_of_labels(result: PredictionResult, spec: SoftLabelSpec) -> pa.Table:
    labels = encode(result.inference, spec)
    values = pa.FixedSizeListArray.from_arrays(labels[0].flatten(), spec.num_classes)
    return pa.table([result.example["id"], values, labels[1]], schema=_loose_schema(spec))


def _loose_schema(spec: SoftLabelSpec) -> pa.Schema:
    """The columns as Beam's sink writes them."""
    logprobs = pa.list_(pa.float32(), spec.num_classes)
    return pa.schema([("example_id", pa.string()), ("teacher_logprobs", logprobs), ("teacher_margin", pa.float32())])
