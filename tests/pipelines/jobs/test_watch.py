"""`distilbeam label --watch` as its user meets it: a process that labels what arrives."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from problem import CLASSES, SUPPORT, asked, make_table
from rich.console import Console

from distilbeam.pipelines import run
from distilbeam.pipelines.cli.label import label
from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.pipelines.jobs.watch import watch
from distilbeam.pipelines.jobs.watch_files import Arrivals
from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher.softlabels import read_manifest

WATCH = {"poll_s": 0.05, "settle_s": 0.3, "window_s": 0.2}


def settings(directory: Path, **watch: Any) -> dict[str, Any]:
    """Write a labelling job's configuration; return it."""
    (directory / "in").mkdir(parents=True, exist_ok=True)
    config = {
        "run": {"directory": "job"},
        "data": {"pool": "in", "id": "key", "carry": ["x"], "num_classes": CLASSES},
        "teacher": {
            "kind": "torch",
            "model": "logging_teacher:LoggingTeacher",
            "arguments": {"log": "asked.log", "delay_s": 0.02},
            "input": {"columns": ["x"]},
        },
        "engine": {"unit_rows": 40, "shard_rows": 8, "batch_rows": 16, "teacher_batch": 8},
        "watch": {**WATCH, **watch},
    }
    (directory / "job.toml").write_text(tomli_w.dumps(config))
    return config


def start(directory: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "distilbeam", "label", "job.toml", "--watch", "in", *words]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=directory,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status, out
    return out


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


def arrive(directory: Path, name: str, rows: int, seed: int) -> pa.Table:
    """Put a file in place by a rename, as careful writers do."""
    table = make_table(rows, seed, labelled=False)
    path = directory / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return table


def done_windows(directory: Path) -> list[Path]:
    return sorted((directory / "job" / "windows").glob("*.done.json"))


def labelled_ids(directory: Path) -> list[str]:
    paths = read_manifest(directory / "job" / "labels").paths()
    return sorted(key for path in paths for key in pq.read_table(path)["example_id"].to_pylist())


def shards(directory: Path) -> list[tuple[str, int, str, int]]:
    entries = read_manifest(directory / "job" / "labels").entries
    return sorted((entry.key, entry.rows, entry.checksum, entry.extra["window"]) for entry in entries)


@pytest.fixture
def killed() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_files_of_every_kind_arrive_while_it_runs(tmp_path: Path, killed: list[subprocess.Popen[str]]) -> None:
    settings(tmp_path)
    one = arrive(tmp_path, "a.parquet", 30, 11)
    process = start(tmp_path)
    killed.append(process)
    wait_for(lambda: len(done_windows(tmp_path)) == 1, process)
    assert labelled_ids(tmp_path) == sorted(one["key"].to_pylist())

    two = arrive(tmp_path, "day=2/b.parquet", 20, 12)  # in a folder of its own
    shutil.copy(tmp_path / "in" / "a.parquet", tmp_path / "in" / "copy.parquet")  # a duplicate
    data = (tmp_path / "in" / "a.parquet").read_bytes()
    half = tmp_path / "in" / "half.parquet"
    half.write_bytes(data[: len(data) // 2])  # being written, by somebody careless
    other = pa.table({"key": ["a"], "y": [1]})
    pq.write_table(other, tmp_path / "in" / "stranger.parquet")
    (tmp_path / "in" / "notes.txt").write_text("not a Parquet file")
    wait_for(lambda: len(done_windows(tmp_path)) == 2, process)

    three = make_table(25, 13, labelled=False)
    pq.write_table(three, tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    half.write_bytes(whole[:-100])
    time.sleep(0.5)
    with half.open("wb") as file:  # now the rest of it comes
        file.write(whole)
    os.utime(half, (1e9, 1e9))  # long before everything that came so far: late, and taken all the same
    wait_for(lambda: len(done_windows(tmp_path)) == 3, process)
    changed = arrive(tmp_path, "a.parquet", 10, 14)  # the same name with another content is new
    (tmp_path / "in" / "STOP").touch()
    out = finish(process)

    tables = (one, two, three, changed)
    assert labelled_ids(tmp_path) == sorted(key for table in tables for key in table["key"].to_pylist())
    assert len(asked(tmp_path)) == 85
    assert set(Counter(asked(tmp_path)).values()) == {1}, "no row is asked for twice"
    assert "Ended: STOP was there; it is removed" in out
    assert not (tmp_path / "in" / "STOP").exists()
    assert "4 window(s), 4 file(s), 85 rows: 85 labelled, 0 failed; 2 file(s) passed over" in out
    assert "copy.parquet is not labelled: its content came before, as a.parquet" in out
    assert "stranger.parquet is not labelled: it has no column x" in out
    assert Counter(window for _, _, _, window in shards(tmp_path)) == {0: 4, 1: 3, 2: 4, 3: 2}
    rows = [
        row
        for path in read_manifest(tmp_path / "job" / "labels").paths()
        for row in pq.read_table(path)["pool_row"].to_pylist()
    ]
    assert sorted(rows) == list(range(85)), "rows are numbered through all windows"


@pytest.mark.slow
def test_killed_and_started_again_it_loses_and_repeats_nothing(
    tmp_path: Path, killed: list[subprocess.Popen[str]]
) -> None:
    def arrivals(directory: Path) -> int:
        return sum(arrive(directory, f"{i}.parquet", 24, 20 + i).num_rows for i in range(3))

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for directory in (undisturbed, disturbed):
        settings(directory, windows=1)
        rows = arrivals(directory)
    finish(start(undisturbed))
    kills = 0
    for moment in ("windows/000000.json", "labels/_manifest/*.json", "labels/_manifest/*.json"):
        process = start(disturbed)
        killed.append(process)
        before = len(list((disturbed / "job").glob(moment)))
        while process.poll() is None and len(list((disturbed / "job").glob(moment))) <= before:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if kills == 1:
            arrive(disturbed, "later.parquet", 10, 30)  # comes while nobody looks: not part of the frozen window
    assert kills == 3
    assert len(read_json(disturbed / "job/windows/000000.json")["files"]) == 3
    out = finish(start(disturbed, "watch.windows=2"))
    assert "2 window(s), 4 file(s), 82 rows: 82 labelled, 0 failed" in out
    first_window = [shard for shard in shards(disturbed) if shard[3] == 0]
    assert first_window == shards(undisturbed), "the same shards, bit for bit"
    extra = len(asked(disturbed)) - (rows + 10)
    assert 0 <= extra <= kills * 8, "a kill costs at most the shard that was being labelled"
    assert not list((disturbed / "job").rglob(".*.tmp"))


@pytest.mark.slow
def test_a_budget_for_each_window(problem: dict[str, Any], tmp_path: Path) -> None:
    student = run(problem, base=tmp_path, until=("train", 0)) / "students" / "round=000"
    directory = tmp_path / "stream"
    choice = {"budget": 10, "student": str(student), "wrong_share": 0.1, "window_files": 1}
    settings(directory, windows=2, **choice)
    tables = [arrive(directory, f"{i}.parquet", rows, 40 + i) for i, rows in enumerate((50, 6))]
    out = finish(start(directory))
    assert "2 window(s), 2 file(s), 56 rows: 16 labelled, 0 failed" in out
    rows = [
        row for path in read_manifest(directory / "job" / "labels").paths() for row in pq.read_table(path).to_pylist()
    ]
    keys = [set(table["key"].to_pylist()) for table in tables]
    assert [sum(row["example_id"] in of for row in rows) for of in keys] == [10, 6]
    gains = load_student(student).logits(tables[0].combine_chunks().to_batches()[0])
    top = np.sort(np.exp(gains) / np.exp(gains).sum(axis=1, keepdims=True), axis=1)
    margin_gain = dict(zip(tables[0]["key"].to_pylist(), 1 - (top[:, -1] - top[:, -2]), strict=True))
    for row in rows:
        if row["example_id"] in margin_gain:
            assert row["gain"] == pytest.approx(margin_gain[row["example_id"]], rel=1e-4)
            assert 0 < row["inclusion_probability"] <= 1
        else:
            assert row["inclusion_probability"] == 1
    plan = read_json(directory / "job/selected/window=000000/plan.json")
    assert plan["examples"] == 50
    assert plan["wrong"] == pytest.approx(5)


def watch_here(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Watch in this process; return the totals and what was said."""
    config = {**config, "watch": {"idle_s": 20.0, **config["watch"]}}  # a watch that waits for ever fails its test
    console = Console(file=io.StringIO(), width=500)
    with opened_job(parse_label_config(config).relative_to(directory)) as job:
        totals = watch(job, directory / "in", pipeline_options(), Display(console))
    assert isinstance(console.file, io.StringIO)
    return totals, console.file.getvalue()


def test_idle_time_ends_it_and_what_was_never_whole_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the teacher's log is relative
    config = settings(tmp_path, idle_s=1.0)
    arrive(tmp_path, "a.parquet", 5, 11)
    (tmp_path / "in" / "half.parquet").write_bytes(b"PAR1 and no end")
    totals, said = watch_here(tmp_path, config)
    assert "Ended: nothing came for 1 s" in said
    assert totals == {
        "windows": 1,
        "files": 1,
        "rows": 5,
        "wanted": 5,
        "labelled": 5,
        "failed": 0,
        "passed_over": 0,
        "unreadable": ["half.parquet"],
    }


def test_rows_without_an_answer_do_not_stop_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, windows=2, window_files=1)
    config["teacher"]["arguments"]["fail_below"] = 1e6  # every row
    arrive(tmp_path, "a.parquet", 5, 11)
    arrive(tmp_path, "b.parquet", 4, 12)
    totals, _ = watch_here(tmp_path, config)
    assert (totals["windows"], totals["labelled"], totals["failed"]) == (2, 0, 9)
    letters = pq.read_table(tmp_path / "job" / "deadletter" / "window=000001").to_pylist()
    assert [(letter["file"], letter["row"]) for letter in letters] == [
        (str(tmp_path / "in/b.parquet"), i) for i in range(4)
    ]


def test_a_frozen_file_that_is_gone_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, windows=1, idle_s=1.0)
    arrive(tmp_path, "a.parquet", 5, 11)
    watch_here(tmp_path, config)
    (tmp_path / "job" / "windows" / "000000.done.json").unlink()
    content = (tmp_path / "in" / "a.parquet").read_bytes()
    (tmp_path / "in" / "a.parquet").unlink()
    with pytest.raises(ValueError, match=r"a.parquet is gone before window 0 was labelled; put it back as it was"):
        watch_here(tmp_path, config)
    (tmp_path / "in" / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet was changed before window 0 was labelled; put it back as it was"):
        watch_here(tmp_path, config)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, windows=1)
    arrive(tmp_path, "a.parquet", 5, 11)
    watch_here(tmp_path, config)
    with pytest.raises(ValueError, match=r"labels changed: .* was started with .*; put it back or choose another dir"):
        watch_here(tmp_path, {**config, "labels": {"kind": "top_k", "k": 2}})
    (tmp_path / "job" / "watch.json").unlink()
    with pytest.raises(ValueError, match=r"job/labels holds labels that no watch made; choose another directory"):
        watch_here(tmp_path, config)
    with pytest.raises(ValueError, match=r"watch.budget, student and wrong_share must be given together: a choice"):
        parse_label_config({**config, "watch": {"budget": 5}})
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(ValueError, match=r"--watch must name a directory, got .*/in; make it before anything arrives"):
        watch_here(tmp_path, config)


def test_a_run_cannot_watch(problem: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(problem))
    with pytest.raises(
        ValueError, match=r"--watch is for labelling jobs, .*run.toml describes a run: leave out \[selection"
    ):
        label(tmp_path / "run.toml", watch=tmp_path)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_is_taken_when_it_has_been_still_and_is_whole(tmp_path: Path) -> None:
    clock = Clock()
    arrivals = Arrivals(tmp_path, 2.0, lambda _: "", clock)
    path = tmp_path / "a.parquet"
    pq.write_table(make_table(5, 1, labelled=False), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    assert arrivals.look() == ([], [])
    assert arrivals.unsettled
    clock.now = 1.9
    assert arrivals.look() == ([], [])
    clock.now = 2.0
    assert arrivals.look() == ([], []), "still, and half written"
    assert arrivals.unreadable == {"a.parquet"}
    assert not arrivals.unsettled
    path.write_bytes(whole)
    assert arrivals.look() == ([], []), "it has just changed"
    clock.now = 4.0
    taken, _ = arrivals.look()
    assert [(file.name, file.rows, file.bytes) for file in taken] == [("a.parquet", 5, len(whole))]
    clock.now = 9.0
    assert arrivals.look() == ([], []), "once"


def test_the_first_file_decides_the_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, windows=1)
    arrive(tmp_path, "a.parquet", 5, 11)
    watch_here(tmp_path, config)
    pq.write_table(pa.table({"key": ["b"], "x": [[1.0]]}), tmp_path / "in" / "b.parquet")
    pq.write_table(make_table(0, 1, labelled=False), tmp_path / "in" / "empty.parquet")
    arrive(tmp_path, "c.parquet", 5, 12)
    totals, _ = watch_here(tmp_path, config)
    assert (totals["files"], totals["passed_over"]) == (2, 2)
    why = {file["name"]: file["why"] for file in read_json(tmp_path / "job/windows/000001.json")["passed_over"]}
    assert why == {
        "b.parquet": "its column x is list<element: double>, not fixed_size_list<element: float>[4]",
        "empty.parquet": "it has no rows",
    }


def test_one_bad_file_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, idle_s=1.0)
    arrive(tmp_path, "a.parquet", 30, 11)
    damaged = tmp_path / "in" / "b.parquet"
    arrive(tmp_path, "b.parquet", 30, 12)
    data = bytearray(damaged.read_bytes())
    data[30:200] = bytes(170)
    damaged.write_bytes(data)
    arrive(tmp_path, "c.parquet", 20, 13)
    totals, _ = watch_here(tmp_path, config)
    assert (totals["files"], totals["labelled"], totals["passed_over"]) == (2, 50, 1)
    (passed,) = read_json(tmp_path / "job/windows/000000.json")["passed_over"]
    assert passed["name"] == "b.parquet"
    assert passed["why"].startswith("it is damaged (")


def test_a_lost_file_stops_neither_its_window_nor_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, idle_s=1.0)
    for number, name in enumerate("ab"):
        arrive(tmp_path, f"{name}.parquet", 10, 11 + number)
    with monkeypatch.context() as patch:
        patch.setattr("distilbeam.pipelines.jobs.watch_window.WindowWork.do", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):  # noqa: PT011  # killed when the window was frozen
            watch_here(tmp_path, config)
    (tmp_path / "in" / "a.parquet").unlink()
    arrive(tmp_path, "c.parquet", 5, 14)
    totals, _ = watch_here(tmp_path, config)
    assert (totals["files"], totals["labelled"], totals["passed_over"]) == (2, 15, 1)
    assert "it is gone before its window" in read_json(tmp_path / "job/windows/000000.json")["passed_over"][0]["why"]

    (tmp_path / "job" / "windows" / "000000.done.json").unlink()  # a window of which something is labelled waits
    (tmp_path / "in" / "b.parquet").unlink()
    arrive(tmp_path, "d.parquet", 4, 15)
    with pytest.raises(
        ValueError, match=r"b.parquet is gone before window 0 was labelled; .*everything else is labelled"
    ):
        watch_here(tmp_path, config)
    assert len(labelled_ids(tmp_path)) == 19


def test_what_is_watched_does_not_hold_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, idle_s=1.0)
    (tmp_path / "in" / "job").mkdir()
    config["data"]["pool"] = "other"
    config["run"]["directory"] = "in/job"
    with (
        pytest.raises(ValueError, match=r"run.directory \(.*/in/job\) must not be inside --watch"),
        opened_job(parse_label_config(config).relative_to(tmp_path)) as job,
    ):
        watch(job, tmp_path / "in", pipeline_options(), Display(Console(file=io.StringIO())))
