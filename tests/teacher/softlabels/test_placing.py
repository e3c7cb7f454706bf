"""Placed shards: unseen until they are flushed, found again after a kill, forgotten when they are not whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.storage import atomic
from distilbeam.teacher.softlabels import SoftLabelSpec, committed, read_manifest, write_shard
from distilbeam.teacher.softlabels.placing import commit_all_left, commit_placed, place_shard, placed_entry

SPEC = SoftLabelSpec(4, teacher="torch:t:1")
Labelled = Callable[..., pa.Table]


@pytest.fixture
def rows(labelled: Labelled) -> pa.Table:
    table: pa.Table = labelled(np.random.default_rng(0).normal(size=(50, 4)), SPEC)
    return table


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_a_placed_shard_is_seen_when_it_is_committed(tmp_path: Path, rows: pa.Table) -> None:
    entry = place_shard(tmp_path, rows, SPEC, "k.1", {"calls": 50})
    assert committed(tmp_path) == set()
    assert placed_entry(tmp_path, "k.1") == entry
    commit_placed(tmp_path, [entry])
    assert read_manifest(tmp_path).entries == (entry,)
    assert names(tmp_path) == {"k.1.parquet", "_manifest/k.1.json"}
    assert placed_entry(tmp_path, "k.1") is None


def test_it_is_the_shard_that_is_written_at_once(tmp_path: Path, rows: pa.Table) -> None:
    entry = place_shard(tmp_path / "a", rows, SPEC, "k", {"calls": 50})
    commit_placed(tmp_path / "a", [entry])
    assert write_shard(tmp_path / "b", "k", rows, SPEC, "k", {"calls": 50}) == entry
    one, two = ((tmp_path / name / "_manifest" / "k.json").read_bytes() for name in "ab")
    assert one == two


def test_every_file_is_flushed_before_its_final_name(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [place_shard(tmp_path, rows, SPEC, key) for key in ("a", "b")]
    flushed: list[tuple[str, int]] = []

    def flush(path: Path) -> None:
        flushed.append((path.name, len(committed(tmp_path))))

    monkeypatch.setattr(atomic, "flush", flush)
    monkeypatch.setattr("distilbeam.teacher.softlabels.placing.flush", flush)
    commit_placed(tmp_path, entries)
    before = ["a.parquet", "b.parquet", tmp_path.name, "a.placed", "b.placed"]
    assert flushed == [*((name, 0) for name in before), ("_manifest", 2)]


def test_what_a_killed_process_placed_is_committed(tmp_path: Path, rows: pa.Table) -> None:
    for name in ("one", "two/deep"):
        place_shard(tmp_path / name, rows, SPEC, "k")
    assert commit_all_left(tmp_path) == 2
    assert [committed(tmp_path / name) for name in ("one", "two/deep")] == [{"k"}, {"k"}]
    assert commit_all_left(tmp_path) == 0


@pytest.mark.parametrize("damage", ["cut", "zeros", "gone", "no entry"])
def test_what_a_crash_left_half_is_forgotten(tmp_path: Path, rows: pa.Table, damage: str) -> None:
    for key in ("whole", "half"):
        place_shard(tmp_path, rows, SPEC, key)
    file, entry = tmp_path / "half.parquet", tmp_path / "_manifest" / "half.placed"
    size = file.stat().st_size
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[: size // 2])
        case "zeros":
            file.write_bytes(bytes(size))
        case "gone":
            file.unlink()
        case "no entry":
            entry.write_bytes(b"")
    assert placed_entry(tmp_path, "half") is None
    assert commit_all_left(tmp_path) == 1
    assert committed(tmp_path) == {"whole"}
    assert not entry.exists()


def test_what_the_disk_does_not_take_is_not_taken_for_whole(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = place_shard(tmp_path, rows, SPEC, "k")

    def broken(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("distilbeam.teacher.softlabels.placing.flush", broken)
    with pytest.raises(OSError, match="Input/output"):
        commit_placed(tmp_path, [entry])
    monkeypatch.undo()
    assert commit_all_left(tmp_path) == 0
    assert committed(tmp_path) == set()


def test_two_that_commit_the_same_both_end_well(tmp_path: Path, rows: pa.Table) -> None:
    for turn in range(20):
        entries = [place_shard(tmp_path, rows, SPEC, f"{turn}-{i}") for i in range(6)]
        errors: list[Exception] = []

        def commit(entries: list[object], errors: list[Exception] = errors) -> None:
            try:
                commit_placed(tmp_path, entries)  # type: ignore[arg-type]
            except Exception as e:  # noqa: BLE001
                errors.append(e)

        threads = [threading.Thread(target=commit, args=(part,)) for part in (entries, entries[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert {entry.key for entry in entries} <= committed(tmp_path)
    assert not list(tmp_path.rglob("*.placed"))
