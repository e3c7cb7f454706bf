from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from labelling import Command, command_in
from problem import write_problem


@pytest.fixture(autouse=True)
def _clean_models() -> Iterator[None]:
    yield
    models = sys.modules.get("distilbeam.pipelines.engine.model_cache")
    if models is not None:
        models.forget_models()


@pytest.fixture
def problem(tmp_path: Path) -> dict[str, Any]:
    """Write a pool of 240 rows in 4 files and the labelled sets into `tmp_path`; return the settings of a run over them."""
    return write_problem(tmp_path)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the command line about the labelling job that `write_job` writes into `tmp_path`."""
    return command_in(tmp_path, monkeypatch)
