from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import find_prism, require_prism
from labelling import Command, command_in
from problem import write_problem

ON_PRISM = os.environ.get("DISTILBEAM_RUNNER") == "PrismRunner"  # `make test-prism`
if ON_PRISM and (prism := find_prism()) is not None:  # here, before modules of tests and fixtures of many tests look
    os.environ["PRISM"] = str(prism)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where all of these tests run on Prism, leave out those that are about the local runner.

    Beam's own threads may end there as they do when an engine goes before them: with an exception of gRPC's.
    """
    if ON_PRISM:
        for item in items:
            if (marker := item.get_closest_marker("local_runner")) is not None:
                item.add_marker(pytest.mark.skip(reason=f"about the local runner: {marker.kwargs['reason']}"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"))


@pytest.fixture(autouse=True, scope="session")
def _on_prism() -> None:
    """Where all of these tests are to run on Prism, skip them where there is none."""
    if ON_PRISM:
        require_prism()


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
