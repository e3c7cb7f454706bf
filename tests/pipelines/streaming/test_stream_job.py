"""The streaming job without a broker: messages to rows, the graph from end to end, object stores, the former command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from apache_beam.io.localfilesystem import LocalFileSystem
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.testing import test_stream as beam_test_stream
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from problem import CLASSES, make_table, write_problem

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines import run
from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.ingest.columns import ColumnType
from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.pipeline import build
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.pipelines.streaming.stream_job import LabelStream, main, stream_options
from distilbeam.pipelines.transforms.messages import MessagesToBatches, parse_schema
from distilbeam.teacher.softlabels import read_manifest

Events = beam_test_stream.TestStream  # under its own name pytest would take it for a test
SCHEMA = "key:string,x:float32[4]"


class BucketFileSystem(LocalFileSystem):
    """An object store with the scheme `bucket`, whose objects are files below a directory."""

    root = Path()

    @classmethod
    def scheme(cls) -> str:
        return "bucket"

    def join(self, base: str, *parts: str) -> str:
        return "/".join([base.rstrip("/"), *parts])

    def create(self, path: str, *arguments: Any, **options: Any) -> Any:
        target = self.root / path.removeprefix("bucket://")
        target.parent.mkdir(parents=True, exist_ok=True)
        with (self.root / "order").open("a") as order:
            order.write(f"{target.name}\n")
        return super().create(str(target), *arguments, **options)


def config_of(directory: Path, **watch: Any) -> dict[str, Any]:
    return {
        "data": {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": CLASSES},
        "teacher": {
            "kind": "torch",
            "model": "logging_teacher:LoggingTeacher",
            "arguments": {"log": str(directory / "asked.log")},
            "input": {"columns": ["x"]},
        },
        **({"watch": watch} if watch else {}),
    }


def messages(rows: int, seed: int) -> list[bytes]:
    return [json.dumps(row).encode() for row in make_table(rows, seed, labelled=False).to_pylist()]


def batches_of(items: list[Any], schema: str, directory: Path) -> pa.Table:
    """Turn messages into batches; return the rows."""
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        batches = pipeline | beam.Create(items) | MessagesToBatches(parse_schema(schema), batch_rows=7)
        _ = batches | beam.Map(lambda b: pq.write_table(pa.Table.from_batches([b]), directory / f"{b['n'][0]}.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in directory.glob("*.parquet")).sort_by("n")


def test_messages_become_rows_and_bad_ones_cost_nobody_else(tmp_path: Path) -> None:
    rows: list[Any] = [{"n": i, "x": [i, i + 0.5], "p": [[i, 1], [2, 3]], "t": f"t{i}"} for i in range(30)]
    rows[3]["x"] = [1.0]
    rows[4]["p"] = list(range(4))  # as many numbers in another shape
    rows[5]["p"] = [[1, 2], [3, 256]]
    rows[7]["n"] = "seven"
    del rows[9]["t"]
    rows[11] = [1]
    items = [*(json.dumps(row).encode() for row in rows), b"{", b"\xff"]
    table = batches_of(items, "n:int64, x:float32[2], p:uint8[2,2], t:string", tmp_path)
    kept = [i for i in range(30) if i not in (3, 4, 5, 7, 9, 11)]
    assert table["n"].to_pylist() == kept
    assert table["t"].to_pylist() == [f"t{i}" for i in kept]
    batch = table.combine_chunks().to_batches()[0]
    np.testing.assert_array_equal(make_input(InputConfig(columns=("x",)))(batch), [[i, i + 0.5] for i in kept])
    np.testing.assert_array_equal(make_input(InputConfig(columns=("p",)))(batch), [[[i, 1], [2, 3]] for i in kept])


def test_schemas() -> None:
    assert parse_schema("a:string,b:uint8[8, 8],c:float64") == {
        "a": ColumnType("string"),
        "b": ColumnType("vector", "uint8", (8, 8)),
        "c": ColumnType("float64"),
    }
    for text, sentence in (
        ("a", r"--schema takes name:type or name:type\[shape\], separated by commas, got 'a'"),
        ("a:float32", "--schema: the type of a must be one of string, binary, int64, float64, bool, got float32"),
        ("a:string[3]", r"--schema: the type of a must be one of float32, uint8, int32, int64, got string"),
    ):
        with pytest.raises(ValueError, match=sentence):
            parse_schema(text)


def test_messages_of_two_windows_to_labels_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BucketFileSystem, "root", tmp_path)
    problem = write_problem(tmp_path)
    student = run(problem, base=tmp_path, until=("train", 0)) / "students" / "round=000"
    config = parse_label_config(config_of(tmp_path, budget=9, student=str(student), wrong_share=0.1))
    one, two = messages(40, 7), messages(20, 8)
    together = [TimestampedValue(m, 5) for m in one[:20]] + [TimestampedValue(m, 65) for m in two]
    events = Events().add_elements(together).add_elements([TimestampedValue(m, 50) for m in one[20:]])
    with beam.Pipeline(options=PipelineOptions(["--streaming", "--runner=BundleBasedDirectRunner"])) as pipeline:
        windowed = pipeline | events.advance_watermark_to_infinity() | beam.WindowInto(FixedWindows(60))
        batches = windowed | MessagesToBatches(parse_schema(SCHEMA), batch_rows=8)
        _ = batches | LabelStream(config, tmp_path, "bucket://labels", shards=1)
    entries = read_manifest(tmp_path / "labels").entries
    assert [(entry.rows, entry.extra["window"]) for entry in entries] == [
        (9, "19700101T000000Z-19700101T000100Z"),
        (9, "19700101T000100Z-19700101T000200Z"),
    ]
    for entry, source in zip(entries, (one, two), strict=True):
        keys = {json.loads(message)["key"] for message in source}
        assert set(pq.read_table(tmp_path / "labels" / entry.path)["example_id"].to_pylist()) <= keys
    order = (tmp_path / "order").read_text().split()
    assert [Path(name).suffix for name in order] == [".parquet", ".json"] * 2, "the entry comes last: it is the commit"


def test_rows_without_an_answer_go_to_the_object_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BucketFileSystem, "root", tmp_path)
    settings = config_of(tmp_path)
    settings["teacher"]["arguments"]["fail_below"] = 0.0
    config = parse_label_config(settings)
    batches = make_table(20, 7, labelled=False).to_batches()
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        stream = LabelStream(config, tmp_path, "bucket://labels", dead_letters="bucket://dead")
        _ = pipeline | beam.Create(batches) | stream
    labelled = read_manifest(tmp_path / "labels").rows
    dead = sum(pq.read_metadata(file).num_rows for file in (tmp_path / "dead").glob("*.parquet"))
    assert 0 < labelled < 20
    assert labelled + dead == 20


@pytest.mark.parametrize("files", ["pool/*.parquet", "pool", "pool/"])
def test_the_command_labels_parquet_files_as_a_bounded_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: str
) -> None:
    write_problem(tmp_path)
    (tmp_path / "job.toml").write_text(tomli_w.dumps(config_of(tmp_path)))
    out = tmp_path / "labels"
    source = f"--source=parquet:{tmp_path}/{files}"
    main([f"--config={tmp_path / 'job.toml'}", source, f"--out={out}", "--shards=2", "--runner=FnApiRunner"])
    manifest = read_manifest(out)
    assert manifest.rows == 240
    assert [entry.path.rsplit("-", 1)[0] for entry in manifest.entries] == [
        "window=global-00000",
        "window=global-00001",
    ]
    said = capsys.readouterr()
    assert json.loads(said.err.splitlines()[-1])["labels"] == 240


def test_options_for_a_pipeline_of_ones_own() -> None:
    def streaming(source: str) -> bool:
        options = stream_options(["--runner=FnApiRunner"], source)
        return bool(options.view_as(StandardOptions).streaming)

    assert streaming("kafka:broker:9092:topic")
    assert not streaming("parquet:pool/*.parquet")
    with pytest.raises(ValueError, match="--nonsense"):
        stream_options(["--nonsense=1"], "kafka:")


def test_pubsub_is_read_in_windows_by_beams_own_connector(tmp_path: Path) -> None:
    pytest.importorskip("apitools", reason="needs the extra gcp")
    config = parse_label_config(config_of(tmp_path))
    source = "pubsub:projects/project/subscriptions/name"
    settings = StreamSettings(source=source, out=str(tmp_path / "out"), schema=SCHEMA, window_s=30)
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", "--streaming"]))
    committed = build(pipeline, config.relative_to(tmp_path), settings, Decoder(SCHEMA), None)
    assert not committed.is_bounded
    assert committed.windowing.windowfn == FixedWindows(30)
