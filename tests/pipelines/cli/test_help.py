"""What help texts and descriptions of settings say to somebody who knows the field and not this project."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import LabelConfig, RunConfig
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.student.training.launch import LaunchConfig

# abbreviations and nicknames of papers; their full names stand in help texts
INSIDERS = re.compile(r"\b(the Survey|RAD|SLaM|RS-KD|LAuReL|BADGE|DoFn|phase record)\b")
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def descriptions(model: type[BaseModel], seen: set[type] | None = None) -> Iterator[tuple[str, str | None]]:
    """The settings of a model and of those in it, with what is said of them; sections speak by their docstrings."""
    seen = seen if seen is not None else set()
    for name, field in model.model_fields.items():
        inner = list(models_in(field.annotation))
        yield f"{model.__name__}.{name}", field.description if not inner else inner[0].__doc__
        for other in inner:
            if other not in seen:
                seen.add(other)
                yield from descriptions(other, seen)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_without_nicknames(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert INSIDERS.findall(shown.output) == []
    undescribed = [p.name for p in COMMANDS[command].params if not p.help and p.name not in ("help",)]
    assert undescribed == []


@pytest.mark.parametrize("model", [RunConfig, LabelConfig, LaunchConfig, IngestOptions])
def test_every_setting_is_described_without_nicknames(model: type[BaseModel]) -> None:
    found = dict(descriptions(model))
    assert len(found) > 10
    assert [name for name, text in found.items() if not text and not name.endswith(".kind")] == []
    assert {name: text for name, text in found.items() if text and INSIDERS.search(text)} == {}
