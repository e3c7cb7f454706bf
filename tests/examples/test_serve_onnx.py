"""The example that uses an export without distilbeam: its accuracy is that of `distilbeam evaluate`, over a file and HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from no_distilbeam import lines_of, without_distilbeam

from distilbeam.pipelines.experiments.evaluate import evaluate_directory
from distilbeam.student.checkpoint import load_student
from distilbeam.student.export.export import export_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "serve_onnx.py"
WORDS = {"card": "lost stolen card broken", "transfer": "money sent abroad transfer", "limit": "raise limit more spend"}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    import random

    draw = random.Random(seed)
    made = []
    for _ in range(count):
        intent = draw.choice(sorted(WORDS))
        noise = draw.choice(sorted(WORDS))  # a word of another intent, so that some are mistaken
        text = [
            draw.choice(WORDS[intent].split()),
            draw.choice(WORDS[noise].split()),
            draw.choice(["please", "now", "my"]),
        ]
        draw.shuffle(text)
        made.append({"text": " ".join(text), "intent": intent})
    return made


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("texts")
    config = StudentConfig(kind="text", dim=8, hidden=(), input={"kind": "text", "columns": ["text"], "buckets": 256})
    labelled, common = pa.Table.from_pylist(rows(200, 0)), {"classes": sorted(WORDS), "label_column": "intent"}
    nothing: dict[str, Any] = {"soft_labels": [], "validation": None, "directory": where / "student", "seed": 0}
    train(config, TrainConfig(epochs=20, lr=0.03), labelled=labelled, **common, **nothing)
    return export_student(where / "student", "onnx", where / "export")


def test_its_accuracy_is_that_of_evaluate(export: Path, tmp_path: Path) -> None:
    examples = rows(300, 1)
    pq.write_table(pa.Table.from_pylist(examples), tmp_path / "test.parquet")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    found = lines_of(PROGRAM, [export, "--data", tmp_path / "test.jsonl", "--label", "intent"], [], tmp_path)
    measured = evaluate_directory(export, tmp_path / "test.parquet", "intent")["data"]["accuracy"]
    assert found[-1] == {"rows": 300, "accuracy": measured}
    assert 0.4 < measured < 0.97  # there are mistakes, and they are the same
    student = load_student(export.parent / "student").predict([row["text"] for row in examples])
    assert [row["prediction"] for row in found[:-1]] == student["prediction"].to_pylist()


def test_a_reader_that_has_had_enough_ends_it_without_a_traceback(export: Path, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text('{"text": "lost card"}\n' * 5_000)  # more than a pipe holds
    words = [sys.executable, "-S", str(PROGRAM), str(export), "--data", str(tmp_path / "many.jsonl")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=without_distilbeam(tmp_path), **pipes) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["prediction"] == "card"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_it_answers_over_http_and_refuses_in_a_sentence(export: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-S", str(PROGRAM), str(export), "--port", "0"]
    process = subprocess.Popen(words, env=without_distilbeam(tmp_path), stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(120, process.kill)
    guard.start()
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()

        def post(body: bytes) -> Any:
            with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
                return json.loads(answer.read())

        assert (
            post(json.dumps([{"text": "lost stolen card"}, {"text": "raise limit"}]).encode())[0]["prediction"]
            == "card"
        )
        for body, status in [(b"{", 400), (b'{"text": "x"}', 400), (b'[{"other": 1}]', 400), (b"[" * 5, 400)]:
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(body)
            assert caught.value.code == status
            caught.value.close()
        assert post(b'[{"text": "money transfer"}]')[0]["prediction"] == "transfer"  # it goes on
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
