"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["softlabels.spec", "softlabels.codec"])
def test_examples_run(module: str) -> None:
    import numpy as np

    found = doctest.testmod(importlib.import_module(f"distilbeam.teacher.{module}"), extraglobs={"np": np})
    assert found.failed == 0
    assert found.attempted >= 1
