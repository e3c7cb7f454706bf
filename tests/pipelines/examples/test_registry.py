"""`init --example`: each folder does what its "Next:" says, given to a shell line by line."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines.examples.registry import EXAMPLES, Example, find_example
from distilbeam.progress import Progress
from distilbeam.teacher.softlabels import read_manifest

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    "PYTHONUNBUFFERED": "1",
}


def shell(line: str) -> str:
    out = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert out.returncode == 0, f"{line}\n{out.stdout}{out.stderr}"
    return out.stdout


def init(example: str, directory: Path) -> list[str]:
    """Write an example, and return the commands of its "Next:" as they are printed."""
    printed = shell(f"distilbeam init {shlex.quote(str(directory))} --example {example}")
    following = printed.partition("Next:")[2]
    lines = [line.strip() for line in following.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def accuracies(directory: Path) -> tuple[float, list[float]]:
    figures = json.loads((directory / "run/report/metrics.json").read_text())
    return figures["teacher"]["accuracy"], [student["accuracy"] for student in figures["students"]]


@pytest.mark.slow
def test_text(tmp_path: Path) -> None:
    here = tmp_path / "a folder"
    commands = init("text", here)
    assert [line.split()[1] for line in commands] == ["plan", "run", "predict", "export"]
    for line in commands:
        shell(line)
    teacher, students = accuracies(here)
    assert teacher > 0.9
    assert students[-1] > students[0] + 0.05
    assert pq.read_table(here / "predictions")["prediction"].to_pylist() == ["delivery", "payment"]
    assert list((here / "run/exports").rglob("export.json"))


@pytest.mark.slow
@pytest.mark.exhaustive  # the steps of the text example, with pictures
def test_images(tmp_path: Path) -> None:
    commands = init("images", tmp_path / "mine")
    for line in commands:
        shell(line)
    teacher, students = accuracies(tmp_path / "mine")
    assert teacher > 0.93
    assert students[-1] > students[0] + 0.03


@contextmanager
def in_the_background(line: str) -> Iterator[str]:
    """Give a command that goes on, and return the first line that it prints."""
    with subprocess.Popen(shlex.split(line), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.terminate()
            assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_nightly(tmp_path: Path) -> None:
    serve, *commands = init("nightly", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:  # what the example says to edit where 8500 is taken
        port = str(free.getsockname()[1])
    config = tmp_path / "nightly.toml"
    config.write_text(config.read_text().replace("8500", port))
    with in_the_background(serve.replace("8500", port)) as first:
        assert port in first
        printed = [shell(line) for line in commands]
    assert "600 are not" in printed[0]
    assert read_manifest(tmp_path / "labelling/labels").rows == 900
    accuracy = float(re.findall(r"([\d.]+)%", printed[-1])[0])
    assert accuracy > 80  # the classes are balanced: 25 by chance


def test_streaming(tmp_path: Path) -> None:
    for line in init("streaming", tmp_path):
        printed = shell(line)
    assert "500" in printed
    manifest = read_manifest(tmp_path / "labels")
    assert (manifest.rows, list(manifest.spec.classes or ())) == (500, ["ham", "spam"])


def test_an_example_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "teacher.pt2").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"teacher\.pt2 is there already; name another directory or remove it"):
        EXAMPLES["streaming"].write(tmp_path, 0, Progress())
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pt2"]
    assert (tmp_path / "teacher.pt2").read_bytes() == b"mine"


def test_an_example_that_is_not_there_is_a_sentence_with_all_names() -> None:
    with pytest.raises(ValueError, match=r"--example must be digits, .*text.*, got letters"):
        find_example("letters")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_says_how_it_goes_on(name: str) -> None:
    example: Example = EXAMPLES[name]
    lines = list(example.next_lines(Path("a b")))
    assert any(line.startswith("distilbeam ") for line in lines)
    assert all("{" not in line for line in lines)
    assert f"'a b/{example.config}'" in "\n".join(lines)
