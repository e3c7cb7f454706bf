"""The rule's page, from figures made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.science.judge import page


def frame():
    """Make two data sets of one teacher and two budgets; on the second, b is three points behind a and c level with it."""
    rng, rows = np.random.default_rng(0), []
    for dataset, behind in (("one", {"a": 0.0, "b": 0.0, "c": 0.0}), ("two", {"a": 0.0, "b": 0.03, "c": 0.0})):
        for seed in range(5):
            level = 0.5 + 0.1 * rng.random()
            for method, lost in behind.items():
                for budget in (0.05, 0.1):
                    accuracy = level - lost + 0.0001 * rng.standard_normal()
                    row = {"dataset": dataset, "teacher": "t", "seed": seed, "budget": budget, "method": method}
                    rows.append(row | {"accuracy": accuracy})
    return pd.DataFrame(rows)


def test_a_method_that_is_behind_on_one_data_set_is_shown_so():
    verdicts, power, _, beside = page(frame(), ("teacher",), ("a", "b", "c"), "a")
    rows = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in verdicts.splitlines())
    }
    assert rows["a"][2:4] == ["", ""]  # not beside itself
    assert rows["b"] == ["1.5", "3.0", "1 of 2", "1 of 2", "1 of 2", "1 of 2", "1", "1"]
    assert rows["c"][2:] == ["2 of 2", "2 of 2", "2 of 2", "2 of 2", "0", "0"]
    assert power.startswith("Power: 4 comparisons")
    line = next(line for line in beside.splitlines() if line.startswith("| b |"))
    assert "-3.0 (≥ -3.0; 0.0)" in line
