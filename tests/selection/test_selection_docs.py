"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest

MODULES = ["calibration", "debias", "gains", "noise", "rad", "rounding", "selectors", "sketch"]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    result = doctest.testmod(
        importlib.import_module(f"distilbeam.selection.{module}"), extraglobs={"np": np}, optionflags=doctest.ELLIPSIS
    )
    assert result.attempted > 0
    assert result.failed == 0
