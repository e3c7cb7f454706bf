"""distilbeam predict: files into a folder, standard input to standard output, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from problem import make_table
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig


@pytest.fixture
def student(tmp_path: Path) -> Path:
    config = StudentConfig(kind="mlp", hidden=(), input={"columns": ["x"]})
    torch.manual_seed(0)
    return save_student(tmp_path / "student", build_student(config, (4,), 3), config, ["a", "b", "c"], (4,))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pq.write_table(make_table(30, 5, labelled=True), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def invoke(*arguments: str | Path, text: str | None = None) -> Any:
    return CliRunner().invoke(
        app, ["predict", *map(str, arguments)], input=text, env={"COLUMNS": "200"}, catch_exceptions=True
    )


@pytest.mark.parametrize("form", ["student", "pt2", "onnx", "int8-weights", "int8"])
def test_files_into_a_folder(student: Path, data: Path, tmp_path: Path, form: str) -> None:
    model = student
    if form != "student":
        if form != "pt2":
            pytest.importorskip("onnxscript")
        x = pq.read_table(data)["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
        model = export_student(student, form, tmp_path / form, examples=x)
    out = tmp_path / "out"
    words = (model, "--data", data, "--out", out, "--top-k", "2", "--columns", "key,label", "--file-rows", "20")
    first = invoke(*words)
    assert first.exit_code == 0, first.exception
    assert "30 row(s) of 1 file(s), 30 predicted by this call. Predictions: " in first.output
    found = pq.read_table(out)
    expected = load_student(student).predict(pq.read_table(data), top_k=2)
    assert found.column_names == ["source_file", "source_row", "key", "label", *expected.column_names]
    assert len(list(out.glob("*.parquet"))) == 2
    same = [a == b for a, b in zip(found["prediction"].to_pylist(), expected["prediction"].to_pylist(), strict=True)]
    assert sum(same) >= (28 if form.startswith("int8") else 30)
    assert "30 row(s) of 1 file(s), 0 predicted by this call" in invoke(*words).output


def test_rows_without_a_prediction_are_counted_and_a_file_of_nothing_else_fails(student: Path, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"x": [0, 0, 0, 1]}\n{"x": null}\n')
    some = invoke(student, "--data", tmp_path / "some.jsonl", "--out", tmp_path / "some")
    assert some.exit_code == 0
    assert "1 row(s) have no prediction, and a reason instead; the first is row 1 of " in some.output
    (tmp_path / "none.jsonl").write_text('{"x": null}\n')
    none = invoke(student, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "none")
    assert isinstance(none.exception, RuntimeError)
    assert str(none.exception) == "none of the 1 row(s) has an input that the student can use"
    assert pq.read_table(tmp_path / "none")["reason"].null_count == 0  # they are there for all that


def test_standard_input_to_standard_output_and_nothing_else_there(student: Path) -> None:
    lines = '{"x": [0, 0, 0, 1], "id": 7}\n{"x": [1]}\n'
    done = subprocess.run(
        [sys.executable, "-m", "distilbeam", "predict", str(student), "--data", "-", "--columns", "id"],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    expected = load_student(student).predict(pa.table({"x": [[0.0, 0.0, 0.0, 1.0]]})).to_pylist()[0]
    assert (first["id"], first["prediction"], first["reason"]) == (7, expected["prediction"], None)
    assert (second["id"], second["prediction"]) == (None, None)
    assert done.stderr.strip() == "1 of 2 line(s) have no prediction, and a reason instead"


def test_a_reader_that_has_had_enough_ends_the_command_without_a_word(student: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "distilbeam", "predict", str(student), "--data", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(b'{"x": [0, 0, 0, 1]}\n' * 10)
    assert (process.returncode, said) == (1, b"")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "-", "--out", "o"], "must be given together and alone"),
        (["--data", "x.csv"], "must be given together and alone: files are predicted into a folder, --out FOLDER"),
        (["--data", "-", "--data", "x.csv"], "must be given together and alone"),
        (["--data", "-", "--format", "csv"], "--format must be jsonl for standard input, got csv"),
        (["--data", "nowhere.csv", "--out", "o"], "--data must name files, directories or glob patterns"),
        (["--data", "-", "--columns", "reason"], "other names than those of the predictions, got reason"),
    ],
)
def test_a_wrong_call_is_a_sentence(
    student: Path, words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(student, *words, text="")
    assert isinstance(result.exception, ValueError), result.output
    assert sentence in str(result.exception)
    assert result.stdout == ""
