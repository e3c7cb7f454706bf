"""The example of language models, small: text, teacher and pools are written, labelled, learned and measured by the commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import LabelConfig, TokenRunConfig, load_any_config
from distilbeam.pipelines.examples.lm import LENGTH, PARTS, python_texts, write
from distilbeam.pipelines.examples.registry import EXAMPLES
from distilbeam.progress import Progress
from distilbeam.settings import read_settings, validated
from distilbeam.student.language.config import TokenLaunchConfig

transformers = pytest.importorskip("transformers", reason="needs distilbeam[hf]")
FEW = 120


def test_every_text_is_there_once_and_in_one_part(tmp_path: Path) -> None:
    write(tmp_path, 0, Progress(), steps=2, documents=FEW)
    parts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "corpus" / f"{name}.jsonl").read_text().splitlines()]
        for name in PARTS
    }
    together = [text for texts in parts.values() for text in texts]
    assert sorted(together) == sorted(list(python_texts())[:FEW])
    assert len(set(together)) == FEW
    told = json.loads((tmp_path / "text.json").read_text())
    assert told["documents"] == {name: len(texts) for name, texts in parts.items()}
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")) <= 1024


@pytest.mark.slow
def test_the_commands_that_init_prints_choose_label_learn_and_compare(tmp_path: Path) -> None:
    write(tmp_path, 0, Progress(), steps=100, documents=FEW)
    lines = [shlex.split(line) for line in EXAMPLES["lm"].next_lines(tmp_path) if not line.startswith("#")]
    assert [words[1] for words in lines] == ["ingest", "ingest", "run", "inspect"]
    assert all(words[words.index("--sequence-length") + 1] == str(LENGTH) for words in lines[:2])
    fewer = ["--set", "selection.budget_tokens=1280", "--set", "training.epochs=2"]
    for words in lines:
        done = CliRunner().invoke(app, [*words[1:], *(fewer if words[1] == "run" else [])])
        assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    before, *_, student = found["students"]
    # the text of as many blocks, and who teaches: the student that has learned its draws is nearer to the teacher
    assert student["labels"] == found["plain"]["labels"] > 0
    assert student["kl"] < found["plain"]["kl"]
    assert student["bits_per_byte"] < before["bits_per_byte"]
    for row in (found["teacher"], student, found["plain"]):
        assert isinstance(row["continued"], str)
    assert [entry["method"] for entry in found["rounds"]] == ["uniform", "herding"]


def test_the_files_of_the_example_are_valid(tmp_path: Path) -> None:
    write(tmp_path, 3, Progress(), steps=1, documents=FEW)
    run = load_any_config(tmp_path / "run.toml")
    assert isinstance(run, TokenRunConfig)
    assert run.run.seed == 3
    for name in ("label", "held-out"):
        assert isinstance(load_any_config(tmp_path / f"{name}.toml"), LabelConfig)
    trainings = {
        name: validated(TokenLaunchConfig, read_settings(tmp_path / f"{name}.toml")) for name in ("student", "plain")
    }
    assert trainings["student"].student == trainings["plain"].student
    assert trainings["student"].student.config == run.student.config
    assert (trainings["student"].training.hard_share, trainings["plain"].training.hard_share) == (0.25, 1.0)
