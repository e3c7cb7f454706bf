"""A student inside somebody else's pipeline: batches through PredictExamples, rows through Beam's RunInference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from problem import CLASSES, FEATURES, make_table

from distilbeam.pipelines import PredictExamples, StudentModelHandler
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig


@pytest.fixture
def student(tmp_path: Path) -> Path:
    config = StudentConfig(kind="mlp", hidden=(8,), input={"columns": ["x"]})
    torch.manual_seed(0)
    network = build_student(config, (FEATURES,), CLASSES)
    return save_student(tmp_path / "student", network, config, ["a", "b", "c"], (FEATURES,))


@pytest.mark.parametrize("form", ["student", "pt2"])
def test_batches_become_predictions_row_for_row(student: Path, tmp_path: Path, form: str) -> None:
    model = student if form == "student" else export_student(student, "pt2", tmp_path / "pt2")
    table = make_table(70, 7, labelled=False)
    x = [None if i == 20 else row for i, row in enumerate(table["x"].to_pylist())]
    table = table.set_column(1, "x", pa.array(x, pa.list_(pa.float32(), FEATURES)))
    out = tmp_path / "out"
    out.mkdir()

    def keep(batch: pa.RecordBatch) -> None:
        pq.write_table(pa.Table.from_batches([batch]), out / f"{batch['key'][0]}.parquet")

    with beam.Pipeline(options=pipeline_options()) as pipeline:
        batches = pipeline | beam.Create(table.to_batches(max_chunksize=13))
        _ = batches | PredictExamples(model, columns=["key"], top_k=2) | beam.Map(keep)
    found = pq.read_table(out).sort_by("key")
    expected = load_student(student).predict(table, top_k=2).add_column(0, "key", table["key"]).sort_by("key")
    assert found.column_names == expected.column_names
    assert found.drop_columns(["confidence", "top_probabilities"]).equals(
        expected.drop_columns(["confidence", "top_probabilities"])
    )
    assert found["reason"].null_count == 69
    confidences = [found["confidence"].to_numpy(), expected["confidence"].to_numpy()]
    np.testing.assert_allclose(*confidences, atol=1e-5)


def test_rows_go_through_run_inference_with_their_keys(student: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"x": row} for row in make_table(25, 8, labelled=False)["x"].to_pylist()]
    rows[3], rows[4] = {"x": "nonsense"}, {"y": [1.0]}
    out = tmp_path / "lines"
    out.mkdir()

    def keep(pair: Any) -> None:
        key, result = pair
        (out / str(key)).write_text(json.dumps(result.inference))

    with beam.Pipeline(options=pipeline_options()) as pipeline:
        keyed = pipeline | beam.Create(list(enumerate(rows)))
        _ = keyed | RunInference(KeyedModelHandler(StudentModelHandler(student, top_k=2))) | beam.Map(keep)
    found = [json.loads((out / str(i)).read_text()) for i in range(25)]
    good = [i for i in range(25) if i not in (3, 4)]
    expected = load_student(student).predict([rows[i] for i in good], top_k=2).to_pylist()
    for i, row in zip(good, expected, strict=True):
        assert found[i]["prediction"] == row["prediction"]
        assert found[i]["top_classes"] == row["top_classes"]
        assert found[i]["confidence"] == pytest.approx(row["confidence"], abs=1e-5)
        assert found[i]["reason"] is None
    assert found[3]["prediction"] is None
    assert "column x must hold values of type" in found[3]["reason"]
    assert "missing" in found[4]["reason"]


def test_what_is_refused(student: Path) -> None:
    with pytest.raises(
        ValueError, match="must have other names than those of the predictions, got confidence; rename them"
    ):
        PredictExamples(student, columns=["confidence"])
    handler = StudentModelHandler(student)
    with pytest.raises(ValueError, match="a student takes no inference_args, got temperature; leave them out"):
        handler.run_inference([], handler.load_model(), {"temperature": 1})
    batch = make_table(3, 1, labelled=False).to_batches()[0]
    with (
        pytest.raises(Exception, match=r"columns: a batch must have id to carry along, it has key, x"),
        beam.Pipeline(options=pipeline_options()) as pipeline,
    ):
        _ = pipeline | beam.Create([batch]) | PredictExamples(student, columns=["id"])
