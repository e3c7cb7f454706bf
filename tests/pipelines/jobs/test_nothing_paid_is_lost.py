"""Labelling whatever dies or fails: what was paid is kept, what failed is asked again, and nothing else is asked twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from labelling import calls_by_row, dataset, finish, labelled_ids, pool_ids, shards, start, write_job
from problem import asked, labels_of, make_table, write_problem

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.pipelines.steps import run
from distilbeam.teacher.softlabels import read_manifest

pytestmark = pytest.mark.slow

ENGINE = {"unit_rows": 120, "shard_rows": 60, "batch_rows": 60, "teacher_batch": 16}
PROCESSES = ("--", "--direct_running_mode=multi_processing", "--direct_num_workers=2")


def write_hostile(directory: Path, pool_rows: int = 240, **more: dict[str, Any]) -> None:
    engine = {**ENGINE, **more.pop("engine", {})}
    teacher = {"model": "hostile_teacher:HostileTeacher", "arguments": {}}
    write_job(directory, pool_rows, teacher=teacher, engine=engine, **more)


def behave(directory: Path, **behaviour: object) -> None:
    (directory / "behaviour.json").write_text(json.dumps(behaviour))


def first_features(directory: Path) -> dict[str, float]:
    found = {}
    for file in sorted((directory / "pool").glob("*.parquet")):
        table = pq.read_table(file)
        x = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)[:, 0]
        found |= dict(zip(table["key"].to_pylist(), x.tolist(), strict=True))
    return found


def lowest(directory: Path, count: int) -> tuple[list[str], float]:
    """The ids of the rows with the lowest first features, and a bound between them and the others."""
    features = first_features(directory)
    ordered = sorted(features, key=lambda key: features[key])
    return sorted(ordered[:count]), (features[ordered[count - 1]] + features[ordered[count]]) / 2


def dead(directory: Path) -> dict[str, dict[str, Any]]:
    files = (directory / "job" / "deadletter" / "labels").glob("*.parquet")
    return {str(row["example_id"]): row for file in files for row in pq.read_table(file).to_pylist()}


def label(directory: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """`distilbeam label label.toml` in this process."""
    monkeypatch.chdir(directory)
    forget_models()
    try:
        app(["label", "label.toml", *arguments], standalone_mode=False)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_dead_letters_are_asked_again_and_disappear_when_they_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hostile(tmp_path)
    bad, bound = lowest(tmp_path, 6)
    behave(tmp_path, fail_below=bound)
    label(tmp_path, monkeypatch)
    assert sorted(dead(tmp_path)) == bad
    attempts = {key: row["attempts"] for key, row in dead(tmp_path).items()}
    good = {key: count for key, count in calls_by_row(tmp_path).items() if key not in bad}

    label(tmp_path, monkeypatch, "--no-retry")
    assert {key: row["attempts"] for key, row in dead(tmp_path).items()} == attempts

    label(tmp_path, monkeypatch)
    assert sorted(dead(tmp_path)) == bad
    assert all(row["attempts"] > attempts[key] for key, row in dead(tmp_path).items()), "attempts add up"

    still, bound = lowest(tmp_path, 2)
    behave(tmp_path, fail_below=bound)
    label(tmp_path, monkeypatch)
    assert sorted(dead(tmp_path)) == still
    assert sorted([*labelled_ids(tmp_path), *still]) == sorted(pool_ids(tmp_path))

    behave(tmp_path)
    label(tmp_path, monkeypatch)
    assert not dead(tmp_path)
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    now = calls_by_row(tmp_path)
    assert {key: now[key] for key in good} == good, "nobody else is asked again"
    calls = len(asked(tmp_path))
    label(tmp_path, monkeypatch)
    assert len(asked(tmp_path)) == calls


def test_a_pool_of_which_every_row_failed_is_no_dead_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hostile(tmp_path)
    behave(tmp_path, fail_below=100.0, message="half a surrogate pair: \ud800")
    sentence = (
        r"answered none of the 240 rows asked, 240 of them with: RuntimeError: half a surrogate pair: \\ud800; mend"
    )
    with pytest.raises(ValueError, match=sentence):
        label(tmp_path, monkeypatch)
    assert len(dead(tmp_path)) == 240
    calls = len(asked(tmp_path))
    with pytest.raises(ValueError, match="answered none of the 240 rows"):
        label(tmp_path, monkeypatch, "--no-retry")
    assert len(asked(tmp_path)) == calls
    behave(tmp_path)
    label(tmp_path, monkeypatch)
    assert not dead(tmp_path)
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


def test_a_retry_that_is_killed_in_the_middle_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hostile(tmp_path)
    bad, bound = lowest(tmp_path, 6)
    behave(tmp_path, fail_below=bound)
    label(tmp_path, monkeypatch)
    behave(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "distilbeam.pipelines.jobs.labelling.drop_answered", lambda *_: (_ for _ in ()).throw(OSError("cut"))
        )
        with pytest.raises(OSError, match="cut"):
            label(tmp_path, monkeypatch)
    calls = len(asked(tmp_path))
    label(tmp_path, monkeypatch)
    assert len(asked(tmp_path)) == calls, "they were committed"
    assert not dead(tmp_path)
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    assert bad


def test_answers_are_kept_every_few_seconds_and_the_result_is_the_same(tmp_path: Path) -> None:
    """A kill in the middle of the only shard; what was kept is not asked again, and the bytes are those of a calm run."""
    engine = {"unit_rows": 240, "shard_rows": 240, "batch_rows": 240, "flush_s": 0.5}
    for name in ("calm", "killed"):
        write_hostile(tmp_path / name, engine=engine)
    finish(tmp_path / "calm")
    directory = tmp_path / "killed"
    behave(directory, delay_s=0.3)
    process = start(directory)
    while len(list(dataset(directory).glob("_partial/*.answers"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    behave(directory)
    finish(directory)
    assert shards(directory) == shards(tmp_path / "calm")
    assert sorted(labelled_ids(directory)) == sorted(pool_ids(directory))
    calls = Counter(calls_by_row(directory).values())
    assert calls[2] <= 3 * 16, "at most what was asked since the answers were kept"
    assert calls[1] >= 240 - 3 * 16
    assert not (dataset(directory) / "_partial").exists()


def test_answers_that_were_kept_hold_when_the_pool_has_grown_meanwhile(tmp_path: Path) -> None:
    """A file that comes first moves every row, and the shards are others."""
    write_hostile(tmp_path, engine={"unit_rows": 240, "shard_rows": 240, "batch_rows": 240, "flush_s": 0.3})
    bad, bound = lowest(tmp_path, 3)
    behave(tmp_path, delay_s=0.3)
    process = start(tmp_path)
    while len(list(dataset(tmp_path).glob("_partial/*.answers"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    pq.write_table(make_table(20, 9, labelled=False), tmp_path / "pool" / "00.parquet")
    behave(tmp_path, fail_below=bound)
    finish(tmp_path)
    assert sorted([*labelled_ids(tmp_path), *dead(tmp_path)]) == sorted(pool_ids(tmp_path))
    assert set(dead(tmp_path)) <= set(bad)
    manifest = read_manifest(dataset(tmp_path))
    assert sum(part[3] for entry in manifest.entries for part in entry.extra["parts"]) == manifest.rows
    calls = calls_by_row(tmp_path)
    assert sum(count > 1 for key, count in calls.items() if key not in bad) <= 3 * 16 + 3 * 16
    assert not (dataset(tmp_path) / "_partial").exists()


@pytest.mark.parametrize(
    "processes", [(), pytest.param(PROCESSES, marks=pytest.mark.exhaustive)], ids=["one process", "two processes"]
)
def test_an_interrupt_keeps_what_was_asked_and_says_one_sentence(tmp_path: Path, processes: tuple[str, ...]) -> None:
    write_hostile(tmp_path, engine={"unit_rows": 120, "shard_rows": 120, "batch_rows": 120})
    behave(tmp_path, delay_s=0.3)
    process = start(tmp_path, *processes)
    while len(asked(tmp_path)) < 48:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "stopped; the same command goes on from here"
    paid = len(asked(tmp_path))
    assert paid < 240
    behave(tmp_path)
    plan = finish(tmp_path, command="plan")
    assert f"{paid} rows were answered before a call was stopped: they are not asked again." in plan
    assert re.search(rf"label +240 +{240 - paid} ", plan), "what is kept is not in the price"
    finish(tmp_path)
    assert "Nothing is left to choose or to ask the teacher." in finish(tmp_path, command="plan")
    assert len(asked(tmp_path)) == 240, "nothing is asked twice"
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


@pytest.mark.local_runner(reason="on Prism the worker is a thread of the command, which dies with it")
def test_rows_that_kill_the_process_are_found_and_become_dead_letters(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    bad, bound = lowest(tmp_path, 2)
    behave(tmp_path, kill_below=bound)
    out = finish(tmp_path, status=-signal.SIGSEGV)  # the first one takes the driver with it
    out = finish(tmp_path)
    assert "2 rows have no label" in out
    assert "Traceback" not in out
    assert sorted(dead(tmp_path)) == bad
    features = first_features(tmp_path)
    for row in dead(tmp_path).values():
        assert "was killed by SIGSEGV whenever this row is asked" in row["error"]
        key = pq.read_table(row["file"])["key"][row["row"]].as_py()
        assert features[key] < bound
    assert sorted([*labelled_ids(tmp_path), *bad]) == sorted(pool_ids(tmp_path))
    assert len(asked(tmp_path)) <= 240 + 60 + 2 * (2 * 60), "each is found within twice the rows that were in flight"


@pytest.mark.local_runner(reason="on Prism the worker is a thread of the command, which dies with it")
def test_a_worker_that_dies_of_its_first_row_hangs_nobody(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    first = pool_ids(tmp_path)[0]
    features = first_features(tmp_path)
    table = pq.read_table(tmp_path / "pool" / "0.parquet")
    x = table["x"].combine_chunks().flatten().to_numpy().copy()
    x[0] = min(features.values()) - 1
    table = table.set_column(1, table.schema.field("x"), pa.FixedSizeListArray.from_arrays(pa.array(x), 4))
    pq.write_table(table, tmp_path / "pool" / "0.parquet", row_group_size=20)
    behave(tmp_path, kill_below=float(x[0]) + 0.5)
    finish(tmp_path, *PROCESSES)
    assert list(dead(tmp_path)) == [first]
    assert sorted([*labelled_ids(tmp_path), first]) == sorted(pool_ids(tmp_path))


def test_a_server_that_is_away_for_one_row_only_costs_that_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hostile(tmp_path)
    bad, bound = lowest(tmp_path, 1)
    behave(tmp_path, away_below=bound)
    label(tmp_path, monkeypatch)
    assert sorted(dead(tmp_path)) == bad
    assert "TeacherUnavailable: the server went away; other rows are answered" in dead(tmp_path)[bad[0]]["error"]
    assert sorted([*labelled_ids(tmp_path), *bad]) == sorted(pool_ids(tmp_path))


def test_a_server_that_is_away_stops_everybody_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hostile(tmp_path)
    behave(tmp_path, away_below=100.0)
    with pytest.raises(RuntimeError, match="the server went away"):
        label(tmp_path, monkeypatch)
    assert len(asked(tmp_path)) <= 2 * 3 * 60, "two attempts at one shard, each with its halves"


def test_too_many_failures_stop_the_job_and_the_good_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hostile(tmp_path, engine={"shard_rows": 240, "unit_rows": 240, "batch_rows": 240})
    bad, bound = lowest(tmp_path, 20)
    behave(tmp_path, fail_below=bound, delay_s=0.05)
    with pytest.raises(RuntimeError, match=r"rows have no label, engine.max_failures allows 4"):
        label(tmp_path, monkeypatch, "--max-failures", "4")
    paid = set(asked(tmp_path))
    behave(tmp_path)
    calls = len(asked(tmp_path))
    label(tmp_path, monkeypatch)
    again = set(asked(tmp_path)[calls:])
    names = {row: key for key, row in _rows(tmp_path).items()}
    assert {names[row] for row in paid & again} <= set(bad), "the rows that were answered are kept"
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


def _rows(directory: Path) -> dict[str, str]:
    found = {}
    for file in (directory / "pool").glob("*.parquet"):
        table = pq.read_table(file)
        features = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
        found |= {key: row.tobytes().hex() for key, row in zip(table["key"].to_pylist(), features, strict=True)}
    return found


def test_a_row_without_an_id_is_a_dead_letter_and_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hostile(tmp_path)
    file = tmp_path / "pool" / "0.parquet"
    table = pq.read_table(file)
    keys: list[str | None] = table["key"].to_pylist()
    keys[7] = None
    pq.write_table(table.set_column(0, "key", pa.array(keys)), file, row_group_size=20)
    label(tmp_path, monkeypatch)
    assert len(asked(tmp_path)) == 239
    (row,) = dead(tmp_path).values()
    assert (row["example_id"], row["stage"], Path(row["file"]).name, row["row"]) == (None, "input", "0.parquet", 7)
    assert "data.id: column key must have a value in every row" in row["error"]
    assert len(labelled_ids(tmp_path)) == 239


def test_a_disk_that_takes_nothing_stops_the_job_and_what_was_paid_waits(tmp_path: Path, small_disk: Path) -> None:
    directory = tmp_path / "d"
    engine = {"unit_rows": 2000, "shard_rows": 1000, "batch_rows": 1000, "teacher_batch": 100}
    write_hostile(directory, 8000, run={"directory": str(small_disk / "job")}, engine=engine)
    (directory / "job").symlink_to(small_disk / "job")
    out = finish(directory, status=1)
    assert "No space left on device" in out
    assert "what was answered is kept: make room" in out
    assert "Traceback" not in out
    paid = len(asked(directory))
    assert paid < 8000
    kept = len(labelled_ids(directory))
    finish(directory, status=1)
    assert len(asked(directory)) <= paid + 1000, "the next start pays for one shard at most"
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    finish(directory)
    assert len(asked(directory)) == 8000, "nothing is asked twice"
    assert sorted(labelled_ids(directory)) == sorted(pool_ids(directory))
    assert kept < paid


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A filesystem of 200 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_run_asks_again_about_a_rounds_rows_until_a_student_has_learned_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = write_problem(tmp_path / "d")
    problem["teacher"] |= {"model": "hostile_teacher:HostileTeacher", "arguments": {}}
    problem["run"]["rounds"] = 1
    directory = tmp_path / "d"
    (directory / "distilbeam.toml").write_text(tomli_w.dumps(problem))
    monkeypatch.chdir(directory)
    forget_models()
    run("distilbeam.toml", until=("select", 0))
    behave(directory, fail_below=100.0)
    with pytest.raises(ValueError, match="answered none of the 30 rows asked, 30 of them with: RuntimeError: this row"):
        run("distilbeam.toml", until=("label", 0))
    picked = _chosen_features(directory)
    behave(directory, fail_below=float(np.sort(picked)[4:6].mean()))
    run("distilbeam.toml", until=("label", 0))
    labels = directory / "run" / "labels" / "round=000"
    assert read_manifest(labels).rows == 25
    behave(directory)
    run("distilbeam.toml", until=("label", 0))
    assert read_manifest(labels).rows == 30
    rows = labels_of(labels)
    assert len(set(rows["pool_row"].to_pylist())) == 30
    assert rows["gain"].null_count == 0
    calls = len(asked(directory))
    run("distilbeam.toml", until=("train", 1))
    run("distilbeam.toml", until=("label", 0))
    assert len(asked(directory)) == calls


def test_the_plan_of_a_run_counts_the_answers_that_an_interrupted_round_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = write_problem(tmp_path / "d")
    problem["teacher"] |= {"model": "hostile_teacher:HostileTeacher", "arguments": {}}
    problem["run"]["rounds"] = 1
    problem["engine"] |= {"shard_rows": 30, "unit_rows": 10_000, "batch_rows": 30, "teacher_batch": 4}
    directory = tmp_path / "d"
    (directory / "distilbeam.toml").write_text(tomli_w.dumps(problem))
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "160")
    forget_models()
    run("distilbeam.toml", until=("select", 0))
    behave(directory, fail_below=0.0, delay_s=0.1)
    with pytest.raises(RuntimeError, match=r"rows have no label, engine.max_failures allows 1"):
        app(["label", "distilbeam.toml", "--round", "0", "--max-failures", "1"], standalone_mode=False)
    kept = len(asked(directory))
    behave(directory)
    capsys.readouterr()
    app(["plan", "distilbeam.toml"], standalone_mode=False)
    out = capsys.readouterr().out
    found = re.search(r"round 1: ask the teacher +\d+ +(\d+) ", out)
    run("distilbeam.toml", until=("label", 0))
    assert found is not None, out
    assert int(found[1]) == len(asked(directory)) - kept < 30


def _chosen_features(directory: Path) -> Any:
    features = list(first_features(directory).values())
    picks = sorted((directory / "run" / "deadletter" / "round=000").glob("*.parquet"))
    return np.array([features[row] for file in picks for row in pq.read_table(file)["pool_row"].to_pylist()])
