"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

MODULES = [
    "trust.calibration",
    "games.capped",
    "trust.debias",
    "gains",
    "trust.local_errors",
    "trust.noise",
    "games.rad",
    "rounding",
    "strategies.registry",
    "sketch.gain_sketch",
]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    result = doctest.testmod(
        importlib.import_module(f"distilbeam.selection.{module}"), extraglobs={"np": np}, optionflags=doctest.ELLIPSIS
    )
    assert result.attempted > 0
    assert result.failed == 0


def test_readme():
    readme = Path(__file__).parents[2] / "selection" / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "README.md", str(readme), 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.tries > 10
    assert runner.failures == 0
