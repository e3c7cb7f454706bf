"""A run of a language model that is killed with SIGKILL, at moments chosen by what it has just committed, and started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from killed_runs import SUPPORT, StartedRun
from language_runs import asked, write_run

from distilbeam.teacher.softlabels import read_manifest

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
pytestmark = pytest.mark.slow

# files whose appearance is the moment to kill, relative to the run directory: of a training, a score phase, a label phase
MOMENTS = [
    "students/round=001.training/step-*.safetensors",
    "selected/round=001/gains/*.parquet",
    "labels/round=001/_manifest/*.json",
]
MORE = [
    "students/round=000/student.json",
    "teacher/validation/_manifest/*.json",
    "selected/round=001/plan.json",
    "students/round=002.training/step-*.safetensors",
    "plain/students/round=002.training/step-*.safetensors",
    "uniform/labels/round=000/_manifest/*.json",
    "report/metrics.json",
]
TRAINING = {"checkpoint_steps": 1}


def started(place: Path) -> StartedRun:
    return StartedRun(place, (str(SUPPORT / "language_runs.py"), "asked.log", "run", "run.toml"))


def result(place: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was killed."""
    root = place / "run"
    datasets = ["teacher/validation", "labels/round=000", "labels/round=001", "uniform/labels/round=000"]
    return {
        "shards": [[(e.key, e.rows, e.checksum) for e in read_manifest(root / d).entries] for d in datasets],
        "students": {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("model.safetensors"))},
        "plans": [p.read_bytes() for p in sorted(root.rglob("plan.json"))],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("undisturbed")
    write_run(place, training=TRAINING)
    started(place).finish()
    return {**result(place), "asked": asked(place / "asked.log")}


@pytest.mark.parametrize(
    "moments", [pytest.param(MOMENTS, id="a"), pytest.param(MORE, id="b", marks=pytest.mark.exhaustive)]
)
def test_killed_and_started_again_it_ends_in_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, Any], moments: list[str]
) -> None:
    write_run(tmp_path, training=TRAINING)
    killed, paid = 0, {}
    for moment in moments:
        killed += started(tmp_path).kill_when(moment)
        log = asked(tmp_path / "asked.log")
        for ids in paid.values():
            assert all(log[id_] == 1 for id_ in ids), "a block of a committed shard was asked again"
        paid = {path: ids for path, ids in committed(tmp_path).items() if all(log[id_] == 1 for id_ in ids)}
    assert killed >= len(moments) - 1, "the moments are met in their order"
    started(tmp_path).finish()
    after = result(tmp_path)
    for name in after:
        assert after[name] == undisturbed[name], name
    log = asked(tmp_path / "asked.log")
    assert log.keys() == undisturbed["asked"].keys()
    # a kill costs at most the shard that was being labelled, of 4 blocks
    assert sum(log.values()) - len(log) <= 4 * killed
    assert not list((tmp_path / "run").rglob("*.training"))


def committed(place: Path) -> dict[str, list[str]]:
    """The ids of the blocks of each committed shard of the rounds."""
    import pyarrow.parquet as pq

    found = {}
    for dataset in (place / "run" / "labels").glob("round=???"):
        if (dataset / "_manifest").exists() and list((dataset / "_manifest").glob("*.json")):
            for path in read_manifest(dataset).paths():
                found[str(path)] = pq.read_table(path, columns=["example_id"])["example_id"].to_pylist()
    return found
