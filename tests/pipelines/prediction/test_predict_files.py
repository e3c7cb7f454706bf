"""Files of every format become one folder of predictions: all rows once, whatever stops a call, and only what is left is done."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import make_table

from distilbeam.pipelines.experiments.evaluate import evaluate_directory
from distilbeam.pipelines.prediction import predict_files as job
from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.pipelines.prediction.predict_files import PredictOptions, predict_files


def predict(student: Path, data: Any, out: Path, **options: Any) -> Any:
    places = [str(place) for place in (data if isinstance(data, list) else [data])]
    return predict_files(open_model(student)[1], places, out, PredictOptions(**options))


def read(out: Path) -> pa.Table:
    """All predictions in the order of the rows."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet")))
    return table.sort_by([("source_file", "ascending"), ("source_row", "ascending")])


def write_forms(directory: Path, table: pa.Table) -> None:
    """Write the rows in every format that holds them, with the features as one column and as four."""
    directory.mkdir()
    pq.write_table(table, directory / "a.parquet", row_group_size=7)
    rows = table.to_pylist()
    with gzip.open(directory / "b.jsonl.gz", "wt") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows))
    with (directory / "c.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "x", "label"])
        writer.writerows([row["key"], json.dumps(row["x"]), row["label"]] for row in rows)


@pytest.mark.parametrize("batch_rows", [1, 9, 1024])
def test_every_format_gives_the_predictions_of_the_table(student: Path, tmp_path: Path, batch_rows: int) -> None:
    table = make_table(30, 5, labelled=True)
    write_forms(tmp_path / "data", table)
    out = tmp_path / "out"
    found = predict(student, tmp_path / "data", out, top_k=2, columns=("key",), batch_rows=batch_rows, file_rows=13)
    expected = open_model(student)[1].predict(table, top_k=2)
    assert (found.files, found.rows, found.predicted, found.without) == (3, 90, 90, 0)
    for name in ("a.parquet", "b.jsonl.gz", "c.csv"):
        rows = read(out).filter(pa.compute.equal(read(out)["source_file"], str(tmp_path / "data" / name)))
        assert rows["source_row"].to_pylist() == list(range(30))
        assert rows["key"].to_pylist() == table["key"].to_pylist()
        assert rows.select(expected.column_names).equals(expected)
    assert sorted(pq.read_metadata(path).num_rows for path in out.glob("*.parquet")) == [4, 4, 4, *[13] * 6]
    assert pq.read_table(out).num_rows == 90  # the folder reads as one table


def test_the_share_of_right_predictions_is_the_accuracy_of_evaluate(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(500, 8, labelled=True)
    table = table.set_column(2, "label", table["label"].cast(pa.string()))
    pq.write_table(table, tmp_path / "test.parquet")
    predict(student, tmp_path / "test.parquet", tmp_path / "out", columns=("label",), file_rows=64)
    found = read(tmp_path / "out")
    right = np.mean(np.array(found["label"].to_pylist()) == np.array(found["prediction"].to_pylist()))
    monkeypatch.setattr("distilbeam.pipelines.experiments.model_metrics.measure", lambda *_, **__: {})
    expected = evaluate_directory(student, tmp_path / "test.parquet", "label")["data"]["accuracy"]
    assert right == expected
    assert 0.6 < right < 0.95


def test_texts_lines_and_fields_are_read_as_they_are_written(text_student: Path, tmp_path: Path) -> None:
    texts = ["good film", "", 'a, quoted "one"', "zwei Wörter"]
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("\r\n".join(texts) + "\r\n")
    with (data / "b.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["n", "text"], *enumerate([*texts, "two\nlines"])])
    (data / "c.ndjson").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    predict(text_student, data, tmp_path / "out", logits=True, columns=("text",))
    model = open_model(text_student)[1]
    expected = model.predict({"text": texts}, logits=True)["logits"].to_pylist()
    found = read(tmp_path / "out")
    assert found["text"].to_pylist() == [*texts, *texts, "two\nlines", *texts]
    logits = found["logits"].to_pylist()
    assert logits[:4] == logits[4:8] == logits[9:] == expected
    assert logits[8] == model.predict(["two\nlines"], logits=True)["logits"].to_pylist()[0]


def test_a_row_that_cannot_be_read_keeps_its_place_with_a_reason(student: Path, tmp_path: Path) -> None:
    good = {"id": 1, "x": [0.0, 3.0, 0.0, 0.0]}
    lines = [json.dumps(good), "{", "[1]", '{"id": 2}', '{"x": ["a", 0, 0, 0]}', '{"x": [1, 2]}', json.dumps(good)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = predict(student, tmp_path / "rows.jsonl", tmp_path / "out", columns=("id",))
    table = read(tmp_path / "out").to_pylist()
    assert [row["prediction"] for row in table] == ["1", None, None, None, None, None, "1"]
    assert [row["id"] for row in table] == [1, None, None, 2, None, None, 1]
    reasons = [row["reason"] for row in table]
    assert reasons[0] is None
    assert reasons[1].startswith("the line is no JSON object: ")
    assert reasons[2] == "the line is no JSON object: a line must be an object, got [1]"
    assert "missing" in reasons[3]
    assert reasons[4] == "column x must hold values of type list<item: double>, it has ['a', 0, 0, 0]"
    assert "[2]" in reasons[5]
    assert (found.rows, found.without, found.first["source_row"]) == (7, 5, 1)


def test_fields_that_are_no_numbers_and_records_of_another_width(student: Path, tmp_path: Path) -> None:
    config = json.loads((student / "student.json").read_text())
    config["config"]["input"]["columns"] = ["a", "b", "c", "d"]
    (student / "student.json").write_text(json.dumps(config))
    rows = [b"a,b,c,d,id", b"0,3.5,1e-1,-1,007", b"0,x,0,0,2", b"1,2", b",0,0,0,4", b"0,0,9,0,\xff", b"9,0,0,0,last"]
    (tmp_path / "rows.csv").write_bytes(b"\n".join(rows))
    predict(student, tmp_path / "rows.csv", tmp_path / "out", columns=("id",))
    table = read(tmp_path / "out").to_pylist()
    assert [row["prediction"] for row in table] == ["1", None, None, None, None, "0"]
    assert [row["id"] for row in table] == ["007", "2", None, "4", None, "last"]
    reasons = [row["reason"] for row in table]
    assert reasons[1] == "column b must hold values of type double, it has 'x'"
    assert reasons[2] == "the record has 2 fields, the header 5"
    assert "missing" in reasons[3]
    assert reasons[4] == "column id: the text must be UTF-8"


class StopError(Exception):
    pass


def test_a_stopped_call_goes_on_where_it_stopped(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_forms(tmp_path / "data", make_table(30, 5, labelled=True))
    expected = tmp_path / "expected"
    predict(student, tmp_path / "data", expected, file_rows=8)
    write, written = job.OutputFolder.write, []

    def stopping(*arguments: Any) -> None:
        if len(written) == 6:
            raise StopError
        written.append(arguments[2])
        write(*arguments)

    monkeypatch.setattr(job.OutputFolder, "write", stopping)
    out = tmp_path / "out"
    with pytest.raises(StopError):
        predict(student, tmp_path / "data", out, file_rows=8)
    monkeypatch.undo()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert len(there) == 6
    found = predict(student, tmp_path / "data", out, file_rows=5, batch_rows=3)  # other sizes, the same rows
    assert found.predicted == 90 - 30 - 16
    assert read(out).equals(read(expected))
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert predict(student, tmp_path / "data", out).predicted == 0


def test_a_refused_call_leaves_a_folder_that_any_other_call_takes(student: Path, tmp_path: Path) -> None:
    write_forms(tmp_path / "data", make_table(30, 5, labelled=True))
    assert "has no column none" in refusal(student, tmp_path / "data", tmp_path / "out", columns=("none",))
    found = predict(student, tmp_path / "data" / "a.parquet", tmp_path / "out", columns=("key",), top_k=2)
    assert (found.rows, found.predicted, found.gone) == (30, 30, ())
    assert "differ in top_k" in refusal(student, tmp_path / "data", tmp_path / "out", columns=("key",))


def test_a_gap_is_predicted_again(student: Path, tmp_path: Path) -> None:
    pq.write_table(make_table(30, 5, labelled=True), tmp_path / "a.parquet")
    predict(student, tmp_path / "a.parquet", tmp_path / "out", file_rows=10)
    before = read(tmp_path / "out")
    next((tmp_path / "out").glob("*-000000000010.parquet")).unlink()
    assert predict(student, tmp_path / "a.parquet", tmp_path / "out", file_rows=7).predicted == 20
    assert read(tmp_path / "out").equals(before)


@pytest.mark.slow
def test_a_killed_command_leaves_whole_files_and_the_next_does_the_rest(student: Path, tmp_path: Path) -> None:
    pq.write_table(make_table(60_000, 5, labelled=True), tmp_path / "a.parquet")
    out = tmp_path / "out"
    words = [
        "predict",
        student,
        "--data",
        tmp_path / "a.parquet",
        "--out",
        out,
        "--file-rows",
        "100",
        "--batch-rows",
        "50",
    ]
    process = subprocess.Popen([sys.executable, "-m", "distilbeam", *map(str, words)], stdout=subprocess.DEVNULL)
    try:
        while len(list(out.glob("*.parquet"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    there = sorted(out.glob("*.parquet"))
    assert 3 <= len(there) < 600
    assert all(pq.read_metadata(path).num_rows == 100 for path in there)
    found = predict(student, tmp_path / "a.parquet", out)
    assert found.predicted == 60_000 - 100 * len(there)
    assert read(out)["source_row"].to_pylist() == list(range(60_000))
    expected = open_model(student)[1].predict(pq.read_table(tmp_path / "a.parquet"))
    assert read(out)["prediction"].equals(expected["prediction"])
    assert list(out.glob(".*.tmp")) == []


def test_a_changed_file_is_predicted_again_and_a_new_one_too(student: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_forms(data, make_table(30, 5, labelled=True))
    predict(student, data, out, file_rows=8)
    (data / "a.parquet").unlink()
    pq.write_table(make_table(12, 6, labelled=True), data / "a.parquet")
    (data / "b.jsonl.gz").rename(data / "d.jsonl.gz")
    found = predict(student, data, out, file_rows=8)
    assert (found.files, found.rows, found.predicted) == (3, 72, 12 + 30)
    assert found.changed == (str(data / "a.parquet"),)
    assert found.gone == (str(data / "b.jsonl.gz"),)
    assert read(out).num_rows == 72 + 30  # those of the file that is gone stay


def test_a_file_that_changes_while_it_is_read_is_noticed(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(make_table(30, 5, labelled=True), path)
    write = job.OutputFolder.write

    def touching(*arguments: Any) -> None:
        write(*arguments)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(job.OutputFolder, "write", touching)
    with pytest.raises(ValueError, match=r"a\.parquet was changed while it was read; give the same command again"):
        predict(student, path, tmp_path / "out")
    monkeypatch.undo()
    assert predict(student, path, tmp_path / "out").predicted == 30


def refusal(student: Path, data: Any, out: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every sentence is looked at
        predict(student, data, out, **options)
    return str(caught.value)


def test_what_cannot_be_done_is_refused_in_a_sentence(student: Path, text_student: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_forms(data, make_table(30, 5, labelled=True))
    predict(student, data, out)
    assert "differ in top_k; name another folder" in refusal(student, data, out, top_k=2)
    assert "differ in model, classes; name another" in refusal(text_student, data, out)
    assert "--out" in refusal(student, data, data / "out")
    assert "must not hold predictions" in refusal(student, [*out.glob("*.parquet")], out)
    assert "holds other files (README.md, model.safetensors, student.json); name a new" in refusal(
        student, data, text_student
    )
    assert "nothing is there" in refusal(student, tmp_path / "none", tmp_path / "o1")
    assert "--data must be files of this machine, got s3://b/x" in refusal(student, "s3://b/x", tmp_path / "o2")
    assert "--out must be a folder of this machine" in refusal(student, data, "s3://b/x")  # type: ignore[arg-type]
    (tmp_path / "odd.bin").write_text("x")
    assert "--format must say how" in refusal(student, tmp_path / "odd.bin", tmp_path / "o3")
    assert "--format must be one of parquet, csv, jsonl, text, images, got xml" in refusal(
        student, data, out, format="xml"
    )
    assert "other names than those of the predictions, got reason" in refusal(student, data, out, columns=("reason",))
    assert "other names than those of the predictions, got source_row" in refusal(
        student, data, out, columns=("source_row",)
    )
    assert "c.csv has no column none" in refusal(student, data / "c.csv", tmp_path / "o4", columns=("none",))
    assert "has none; they have key, x, label" in refusal(
        student, data / "b.jsonl.gz", tmp_path / "o5", columns=("none",)
    )
    assert "a.parquet has no column text" in refusal(text_student, data / "a.parquet", tmp_path / "o6")
    (tmp_path / "a.txt").write_text("x")
    assert "lines of text cannot hold what the student reads, tensor input of column x; give Parquet" in refusal(
        student, tmp_path / "a.txt", tmp_path / "o7"
    )
    cut = (data / "b.jsonl.gz").read_bytes()[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    assert "cannot be read to its end" in refusal(student, tmp_path / "cut.jsonl.gz", tmp_path / "o8")
    pq.write_table(pa.table({"x": [[0.0] * 4], "key": [3]}), tmp_path / "z.parquet")
    pq.write_table(pa.table({"x": [[0.0] * 4], "key": ["a"]}), tmp_path / "y.parquet")
    predict(student, tmp_path / "z.parquet", tmp_path / "o9", columns=("key",))
    assert "--columns: key is string in" in refusal(student, tmp_path / "y.parquet", tmp_path / "o9", columns=("key",))
