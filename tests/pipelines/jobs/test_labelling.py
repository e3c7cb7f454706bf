"""A labelling job over a pool that grows: what is labelled again is exactly what must be, and the plan says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelling import Command, calls_by_row, dataset, labelled_ids, pool_ids, shards, write_job
from problem import asked, make_table

from distilbeam.pipelines.config import load_any_config
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.teacher.softlabels import compact_manifest, decode, read_manifest


def write_file(directory: Path, name: str, rows: int, seed: int) -> None:
    pq.write_table(make_table(rows, seed, labelled=False), directory / "pool" / name, row_group_size=20)


def place(directory: Path, tasks: slice) -> int:
    """Label some tasks of the job and leave their shards unflushed, as a process that is killed then does."""
    with opened_job(load_any_config(directory / "label.toml")) as job:
        work, plan = job.work(job.dataset, job.dead_letters), job.plan()
        return len([entry for task in plan.tasks[tasks] for entry in work(task)])


def wanted(output: str) -> int:
    """Read from a plan how many rows are not labelled."""
    match = re.search(r"([\d,]+) are labelled, ([\d,]+) are not", output)
    assert match, output
    return int(match[2].replace(",", ""))


@pytest.mark.parametrize(
    ("answer_bytes", "batch_rows", "teacher_batch", "expected"),
    [
        (2**20, 16, 8, 16),
        (10 * 3 * 4, 16, 8, 10),  # ten answers of three float32
        (1, 16, 8, 8),  # but a request is never cut
        (1, 5, 8, 5),
    ],
)
def test_answers_bound_what_is_asked_at_a_time(
    answer_bytes: int,
    batch_rows: int,
    teacher_batch: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distilbeam.pipelines.pool.read_splits.ANSWER_BYTES", answer_bytes)
    write_job(
        tmp_path, engine={"unit_rows": 40, "shard_rows": 30, "batch_rows": batch_rows, "teacher_batch": teacher_batch}
    )
    with opened_job(load_any_config(tmp_path / "label.toml")) as job:
        work, plan = job.work(job.dataset, job.dead_letters), job.plan()
        assert work.rows_at_once == expected
        seen = [found.num_rows for _, found in work._to_label(plan.tasks[0]) if isinstance(found, pa.Table)]
    assert max(seen) == expected
    assert sum(seen) == plan.tasks[0].rows


def test_every_row_is_labelled_once(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    assert wanted(command("plan", "--sample", "0")) == 240
    assert not asked(tmp_path), "a plan without a sample asks nothing"
    command("label")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    assert set(calls_by_row(tmp_path).values()) == {1}
    table = pq.read_table(read_manifest(dataset(tmp_path)).paths()[0])
    assert table.column_names == ["example_id", "x", "teacher_logprobs", "teacher_margin"]
    features = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    labels = decode(table, read_manifest(dataset(tmp_path)).spec).logprobs
    assert (labels.argmax(axis=1) == features[:, :3].argmax(axis=1)).all()
    metrics = json.loads((tmp_path / "job" / "metrics.json").read_text())
    assert (metrics["labelled"], metrics["kept"], metrics["rows"], metrics["failed"]) == (240, 0, 240, 0)
    assert metrics["work"]["label"]["teacher_calls"] == 240
    assert metrics["work"]["label"]["rows_labelled"] == 240
    assert metrics["work"]["label"]["read_s"] > 0

    before = shards(tmp_path)
    assert wanted(command("label")) == 0
    assert shards(tmp_path) == before
    assert len(asked(tmp_path)) == 240


def test_only_new_and_changed_files_are_asked_about(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path, engine={"shard_rows": 25})  # shards span files: a change leaves parts that hold
    command("label")
    former = calls_by_row(tmp_path)
    former_ids = pool_ids(tmp_path)
    (tmp_path / "pool" / "1.parquet").unlink()
    write_file(tmp_path, "2.parquet", 45, seed=9)
    write_file(tmp_path, "00.parquet", 7, seed=10)  # sorts before the others and shifts every row of the pool

    expected = 45 + 7
    plan = command("plan", "--sample", "0")
    assert wanted(plan) == expected
    for sentence in ("1 file(s) new: 00.parquet.", "1 file(s) changed: 2.parquet.", "1 file(s) gone: 1.parquet."):
        assert sentence in plan

    assert "60 labels are of files that are gone; they are kept until 'label --prune'." in plan
    assert "60 labels are of rows that are no longer in the pool and are dropped." in plan, "of the file that changed"
    command("label", "--prune")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    now = calls_by_row(tmp_path)
    assert all(now[key] == 1 for key in pool_ids(tmp_path)), "rows of files that stayed are not asked again"
    assert len(asked(tmp_path)) == len(former) + expected
    assert set(labelled_ids(tmp_path)) & set(former_ids) == {k for k in former_ids if k in pool_ids(tmp_path)}
    assert "4 file(s)" in command("plan", "--sample", "0")
    assert wanted(command("plan", "--sample", "0")) == 0


def test_a_compacted_manifest_grows_and_shrinks_too(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    command("label")
    compact_manifest(dataset(tmp_path))
    (tmp_path / "pool" / "0.parquet").unlink()
    write_file(tmp_path, "9.parquet", 12, seed=9)
    command("label", "--prune")
    assert labelled_ids(tmp_path)
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    on_disk = {path.name for path in dataset(tmp_path).glob("*.parquet")}
    assert on_disk == {entry.path for entry in read_manifest(dataset(tmp_path)).entries}, "dropped files are removed"


def test_the_order_of_arrival_does_not_matter_to_a_file_of_its_own(tmp_path: Path, command: Command) -> None:
    """A file's labels are the same whether it came with the others or later."""
    write_job(tmp_path, engine={"shard_rows": 60})
    hidden = tmp_path / "3.parquet"
    (tmp_path / "pool" / "3.parquet").rename(hidden)
    command("label")
    hidden.rename(tmp_path / "pool" / "3.parquet")
    command("label")
    later = set(shards(tmp_path))
    (tmp_path / "job").rename(tmp_path / "former")
    command("label")
    assert set(shards(tmp_path)) == later


def test_another_teacher_needs_a_word_and_the_former_labels_come_back(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    command("label")
    before = shards(tmp_path)
    other = ["--set", "teacher.arguments.delay_s=0.0"]  # an argument is part of the fingerprint
    plan = command("plan", "--sample", "0", *other)
    assert "240 labels differ in teacher" in plan
    assert wanted(plan) == 240
    with pytest.raises(
        ValueError, match=r"the 240 labels in .* differ in teacher .*--relabel sets them aside and asks for 240"
    ):
        command("label", *other)
    assert shards(tmp_path) == before
    command("label", "--relabel", *other)
    assert len(asked(tmp_path)) == 480
    assert {key for key, _, _ in shards(tmp_path)}.isdisjoint(key for key, _, _ in before)
    command("label", "--relabel")
    assert shards(tmp_path) == before
    assert len(asked(tmp_path)) == 480, "labels that were set aside are taken up again"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("labels.kind=top_k", "kind"),
        ("labels.temperature=2", "temperature"),
        ("data.carry=[]", "carried"),
        ("data.num_classes=2", "num_classes"),
    ],
)
def test_another_form_of_labels_is_not_mixed_in(tmp_path: Path, command: Command, override: str, named: str) -> None:
    write_job(tmp_path)
    command("label")
    more = ["--set", "labels.k=2"] if "top_k" in override else []
    with pytest.raises(ValueError, match=f"differ in .*{named}"):
        command("label", "--set", override, *more)


def test_settings_that_cut_the_pool_must_stay(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    command("label")
    with pytest.raises(ValueError, match=r"differs in engine.shard_rows \(8 there, 9 now\)"):
        command("label", "--set", "engine.shard_rows=9")
    command("label", "--set", "engine.teacher_batch=3")


def test_dead_letters_say_file_and_row_and_follow_their_rows(tmp_path: Path, command: Command) -> None:
    settings = write_job(tmp_path, engine={"shard_rows": 25})
    bad = [key for key, x in _first_features(tmp_path).items() if x < -2.0]
    assert 2 <= len(bad) <= 20
    command("label", "--set", "teacher.arguments.fail_below=-2.0")

    def dead() -> dict[str, tuple[str, int]]:
        files = (tmp_path / "job" / "deadletter" / "labels").glob("*.parquet")
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        assert all(row["stage"] == "teacher" and "makes the teacher raise" in row["error"] for row in rows)
        assert all(row["attempts"] >= 1 for row in rows)
        return {row["example_id"]: (Path(row["file"]).name, row["row"]) for row in rows}

    assert sorted(dead()) == sorted(bad)
    for key, (file, row) in dead().items():
        assert pq.read_table(tmp_path / "pool" / file)["key"][row].as_py() == key
    assert sorted([*labelled_ids(tmp_path), *dead()]) == sorted(pool_ids(tmp_path))
    (tmp_path / "pool" / "1.parquet").unlink()
    command("label", "--prune", "--set", "teacher.arguments.fail_below=-2.0")
    assert sorted([*labelled_ids(tmp_path), *dead()]) == sorted(pool_ids(tmp_path)), (
        "no row is lost when shards are mended"
    )
    assert settings["engine"]["shard_rows"] == 25


def _first_features(directory: Path) -> dict[str, float]:
    found = {}
    for file in sorted((directory / "pool").glob("*.parquet")):
        table = pq.read_table(file)
        x = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)[:, 0]
        found |= dict(zip(table["key"].to_pylist(), x.tolist(), strict=True))
    return found


def test_a_job_that_goes_wrong_stops_early(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    failing = ["--set", "teacher.arguments.fail_below=100.0"]
    with pytest.raises(
        RuntimeError,
        match=r"\d+ rows have no label, engine.max_failures allows 8.*makes the teacher raise; mend the teacher or the rows",
    ):
        command("label", "--max-failures", "8", *failing)
    assert len(list((tmp_path / "job" / "deadletter" / "labels").glob("*.parquet"))) <= 2, "nothing more is asked"
    command("label", "--max-failures", "8", "--relabel")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


def test_the_plan_is_what_is_done_and_priced(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path, prices={"per_1000_calls": 10.0, "currency": "EUR"})
    output = command("plan", "--json", "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    (line, total) = plan["lines"]
    assert (line["rows"], line["calls"], line["shards"]) == (240, 240, 36)
    assert plan["money"]["calls"] == pytest.approx(2.4)
    assert "2.40 EUR: 2.40 for calls." in output
    assert "Nothing was asked" in output
    assert not asked(tmp_path), "a plan spends nothing"
    assert not (tmp_path / "job").exists()
    command("label")
    manifest = read_manifest(dataset(tmp_path))
    assert len(manifest.entries) == line["shards"]
    assert manifest.rows == total["rows"]
    assert len(asked(tmp_path)) == line["calls"]


def test_the_answers_to_a_sample_are_labels_and_in_the_price(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path, prices={"per_1000_calls": 10.0, "currency": "EUR"}, engine={"shard_rows": 30})
    output = command("plan", "--sample", "24", "--json", "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    sample, line, total = plan["lines"]
    assert (sample["calls"], line["calls"], total["calls"], plan["sampled"]) == (20, 220, 240, 20)
    assert len(asked(tmp_path)) == 20, "a row group has 20 rows"
    assert sorted(labelled_ids(tmp_path)) == sorted(asked_ids(tmp_path))
    assert "2.40 EUR: 2.40 for calls." in output
    assert total["seconds"] == line["seconds"] > 0
    assert "20 are labelled, 220 are not" in command("plan")
    command("label")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    assert len(asked(tmp_path)) == 240, "rows of the sample are not asked again"
    bytes_of = {entry.rows: entry.bytes for entry in read_manifest(dataset(tmp_path)).entries}
    assert 0.5 < sum(e.bytes for e in read_manifest(dataset(tmp_path)).entries) / (line["bytes"] + bytes_of[20]) < 2
    assert "0 are not" in command("plan", "--sample", "10")
    assert len(asked(tmp_path)) == 240


def asked_ids(directory: Path) -> list[str]:
    return [key for key, calls in calls_by_row(directory).items() if calls]


def test_a_sample_is_not_mixed_with_labels_of_another_teacher(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    command("label")
    with pytest.raises(ValueError, match=r"--sample keeps its answers, but the labels in .* differ in teacher"):
        command("plan", "--sample", "8", "--set", "teacher.arguments.delay_s=0.0")
    assert len(asked(tmp_path)) == 240


def test_a_teacher_without_an_answer_to_the_sample_is_a_sentence(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    with pytest.raises(ValueError, match="the teacher answers none of the 7 rows of the sample"):
        command("plan", "--sample", "64", "--set", "teacher.arguments.fail_below=100.0")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s["data"].pop("num_classes"),
            r"classes must be given by their names, or num_classes by their number",
        ),
        (lambda s: s["data"].update(pool="nowhere"), r"data.pool must name Parquet files.*nothing is at"),
        (lambda s: s["data"].update(carry=["y"]), r"data.pool has no column y; its columns are key, x"),
        (
            lambda s: s["engine"].update(shard_row=1),
            r"engine.shard_row is not a setting; did you mean engine.shard_rows\?",
        ),
    ],
)
def test_wrong_settings_are_sentences(
    tmp_path: Path, command: Command, change: Callable[[Any], Any], sentence: str
) -> None:
    import tomli_w

    settings = write_job(tmp_path)
    change(settings)
    (tmp_path / "label.toml").write_text(tomli_w.dumps(settings))
    with pytest.raises(ValueError, match=sentence):
        command("label")


def test_a_run_is_not_a_labelling_job(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    with pytest.raises(ValueError, match=r"label.toml describes a labelling job, it has no \[selection\]"):
        command("run")
    with pytest.raises(ValueError, match="it has no rounds"):
        command("label", "--round", "1")


def test_a_refused_setting_does_not_claim_the_directory(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    for name in ("label", "plan"):
        arguments = ["--set", "data.id=kye", *(["--sample", "8"] if name == "plan" else [])]
        with pytest.raises(ValueError, match=r"data.pool has no column kye"):
            command(name, *arguments)
    command("label")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


def test_a_mend_that_was_cut_short_is_repeated(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(tmp_path, engine={"shard_rows": 25})
    command("label")
    (tmp_path / "pool" / "1.parquet").unlink()
    calls = len(asked(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(
            "distilbeam.pipelines.labelling.reconcile.remove_shards", lambda *_: (_ for _ in ()).throw(OSError("cut"))
        )
        with pytest.raises(OSError, match="cut"):
            command("label", "--prune")
    command("label", "--prune")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    assert len(asked(tmp_path)) == calls
    assert np.unique(labelled_ids(tmp_path)).size == len(labelled_ids(tmp_path))


def test_what_a_killed_process_had_placed_is_committed_and_not_asked_again(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    placed = place(tmp_path, slice(0, 5))
    calls = len(asked(tmp_path))
    assert calls > 0
    assert len(shards_there(tmp_path)) == 0
    assert wanted(command("plan", "--sample", "0")) == 240 - calls, "it will be committed when the job is opened"
    with opened_job(load_any_config(tmp_path / "label.toml")):
        assert len(shards_there(tmp_path)) == placed
    command("label")
    assert len(asked(tmp_path)) == 240
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


def test_a_worker_takes_a_placed_shard_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker process is killed alone and its tasks are given to another."""
    monkeypatch.chdir(tmp_path)
    forget_models()
    write_job(tmp_path)
    with opened_job(load_any_config(tmp_path / "label.toml")) as job:
        work, plan = job.work(job.dataset, job.dead_letters), job.plan()
        first = [entry for task in plan.tasks for entry in work(task)]
        calls = len(asked(tmp_path))
        again = [entry for task in plan.tasks for entry in work(task)]
        assert [entry.checksum for entry in again] == [entry.checksum for entry in first]
        assert len(asked(tmp_path)) == calls == 240
        file = dataset(tmp_path) / first[0].path
        file.write_bytes(file.read_bytes()[:-100])  # half of it reached the disk
        third = [entry for task in plan.tasks for entry in work(task)]
        assert [entry.checksum for entry in third] == [entry.checksum for entry in first]
        assert len(asked(tmp_path)) == calls + first[0].rows
        work.settle(again)
        assert not work.remaining(plan.tasks)
        assert not [entry for task in plan.tasks for entry in work(task)]


def shards_there(directory: Path) -> list[Any]:
    return shards(directory) if any((dataset(directory) / "_manifest").glob("*.json")) else []
