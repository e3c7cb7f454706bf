"""The model of a run that has really been carried out is the one that its report evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.pipelines.steps import run
from distilbeam.storage.files import read_json


@pytest.mark.slow
@pytest.mark.parametrize("final", ["apart", "auto"])
def test_a_finished_run_predicts_with_the_student_of_its_figures(
    problem: dict[str, Any], tmp_path: Path, final: str
) -> None:
    problem["run"]["rounds"] = 1
    problem["selection"]["compare_uniform"] = False
    problem["training"]["final_training"] = final
    where = run(problem, base=tmp_path)
    directory, model = open_model(where)
    figures = read_json(where / "report" / "metrics.json")
    test = pq.read_table(tmp_path / "test.parquet")
    right = np.array(model.predict(test)["prediction"].to_pylist()) == test["label"].to_numpy().astype(str)
    assert directory.name == ("student" if final == "auto" else f"round={figures['kept']['round']:03d}")
    assert right.sum() == round(sum(row["examples"] * (row["recall"] or 0) for row in figures["classes"]))
