"""A run that is killed with SIGKILL, at moments chosen by what it has just committed, and started again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from killed_runs import StartedRun
from problem import FEATURES, asked, write_problem

from distilbeam.teacher.softlabels import read_manifest

pytestmark = pytest.mark.slow

# the file whose appearance is the moment to kill, relative to the run directory
MOMENTS = [
    "students/round=000/student.json",
    "teacher/validation/_manifest/*.json",
    "selected/round=000/gains/*.parquet",
    "selected/round=000/plan.json",
    "selected/round=000/picks",
    "labels/round=000/_manifest/*.json",
    "labels/round=000.summary.json",
    "selected/round=001/plan.json",
    "labels/round=001/_manifest/*.json",
    "uniform/labels/round=000/_manifest/*.json",
    "report/metrics.json",
]


def started(directory: Path) -> StartedRun:
    return StartedRun(directory, ("-m", "distilbeam", "run", str(directory / "distilbeam.toml")))


def result(directory: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was killed."""
    root = directory / "run"
    datasets = [root / "labels" / "round=000", root / "labels" / "round=001", root / "uniform" / "labels" / "round=000"]
    return {
        "shards": [[(e.key, e.rows, e.checksum) for e in read_manifest(d).entries] for d in datasets],
        "students": [p.read_bytes() for p in sorted(root.rglob("model.safetensors"))],
        "plans": [p.read_bytes() for p in sorted(root.rglob("plan.json"))],
    }


def paid_calls(directory: Path) -> int:
    """Count the calls for rows of the pool and of the test set; validation rows also serve to measure latency."""
    files = [*(directory / "pool").glob("*.parquet"), directory / "test.parquet"]
    features = [pq.read_table(f)["x"].combine_chunks().flatten().to_numpy().reshape(-1, FEATURES) for f in files]
    wanted = {row.tobytes().hex() for row in np.concatenate(features)}
    return sum(row in wanted for row in asked(directory))


def settings(directory: Path) -> dict[str, Any]:
    problem = write_problem(directory)
    problem["teacher"]["arguments"] = {"log": "asked.log", "delay_s": 0.03}  # relative: it is part of the fingerprint
    (directory / "distilbeam.toml").write_text(tomli_w.dumps(problem))
    return problem


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("undisturbed") / "d"
    settings(directory)
    started(directory).finish()
    return {**result(directory), "calls": paid_calls(directory)}


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(MOMENTS[0::3], id="a"),
        pytest.param(MOMENTS[1::3], id="b", marks=pytest.mark.exhaustive),
        pytest.param(MOMENTS[2::3], id="c", marks=pytest.mark.exhaustive),
    ],
)
def test_killed_and_started_again_it_ends_in_the_same_result(
    tmp_path: Path, undisturbed: dict[str, Any], moments: list[str]
) -> None:
    directory = tmp_path / "d"
    problem = settings(directory)
    killed = sum(started(directory).kill_when(moment) for moment in moments)
    assert killed >= len(moments) - 1, "the moments are met in their order"
    started(directory).finish()
    after = result(directory)
    for name in after:
        assert after[name] == undisturbed[name], name
    # a kill costs at most the shard that was being labelled (8 rows, in one batch), and no committed row is asked again
    extra = paid_calls(directory) - undisturbed["calls"]
    assert 0 <= extra <= killed * problem["engine"]["shard_rows"]
    assert not list((directory / "run").rglob(".*.tmp"))


def test_no_committed_shard_is_asked_again(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    settings(directory)
    moment = "labels/round=000/_manifest/*.json"
    assert started(directory).kill_when(moment, 2)
    log = asked(directory)
    assert 2 <= len(read_manifest(directory / "run" / "labels" / "round=000").entries) < 4

    def committed_rows() -> list[str]:
        tables = [pq.read_table(p) for p in read_manifest(directory / "run" / "labels" / "round=000").paths()[:]]
        return [
            row.tobytes().hex() for t in tables for row in t["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
        ]

    paid = committed_rows()
    assert set(paid) <= set(log)
    started(directory).finish()
    again = Counter(asked(directory)[len(log) :])
    assert not set(paid) & set(again), "rows of committed shards were asked again"


def test_the_finished_run_says_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    settings(directory)
    first = started(directory).finish()
    assert "Report:" in first
    calls = len(asked(directory))
    assert "Nothing to do: all 12 steps are done" in started(directory).finish()
    assert len(asked(directory)) == calls
