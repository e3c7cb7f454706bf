"""A run stops before its budget is spent where the validation answers show a teacher at chance or in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import asked, make_table

from distilbeam.pipelines.jobs.teacher_check import require_order
from distilbeam.pipelines.steps import run


def test_another_order_is_named_and_nothing_is_bought(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["data"] |= {"classes": ["2", "0", "1"], "integers": "names"}  # the teacher's outputs are 0, 1, 2
    for _ in range(2):  # a second call stops there again
        with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
            run(problem, base=tmp_path)
        message = str(error.value)
        assert message.startswith(
            "the teacher's outputs are in another order than the classes: of its 60 answers for the "
        )
        assert "where it answers '2' the truth is '0', where it answers '0' the truth is '1'" in message
        assert "give data.classes in the order of its outputs = ['0', '1', '2'] and data.integers" in message
        assert message.endswith("data.check_classes = false goes on all the same")
    assert len(asked(tmp_path)) == 60, "the validation set alone"
    problem["data"]["classes"] = ["0", "1", "2"]
    problem["run"]["directory"] = "other"
    run(problem, base=tmp_path, until=("label", 0))


def test_chance_is_named_and_whoever_knows_better_goes_on(problem: dict[str, Any], tmp_path: Path) -> None:
    table = make_table(200, 3, labelled=True)
    shuffled = np.random.default_rng(0).permutation(table["label"].to_numpy())
    pq.write_table(table.set_column(2, "label", pa.array(shuffled)), tmp_path / "validation.parquet")
    with pytest.raises(
        ValueError, match=r"^the teacher is at chance: of its 200 answers for the validation set \d+\.\d% are "
    ):
        run(problem, base=tmp_path)
    assert len(asked(tmp_path)) == 200
    problem["data"]["check_classes"] = False
    problem["run"]["accept_weak_teacher"] = True
    run(problem, base=tmp_path, until=("label", 0))
    assert len(asked(tmp_path)) == 200 + 80 + 30


def test_rows_without_an_answer_do_not_count_and_long_lists_are_shortened() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 40
    answers = np.full((400, 40), -9.0, np.float32)
    answers[np.arange(400), (truth + 1) % 40] = 0
    answers[7] = np.nan
    with pytest.raises(
        ValueError, match=r"of its 399 answers .* where it answers 'c0' the truth is 'c39', .* and so on, 40 of 40"
    ):
        require_order(answers, truth, [f"c{i}" for i in range(40)], rng)
    answers[np.arange(400), truth] = 1
    require_order(answers, truth, [f"c{i}" for i in range(40)], rng)
