"""Shards and manifests: what is committed is whole, what is not is not there."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.storage import atomic
from distilbeam.teacher.softlabels import (
    ManifestEntry,
    SoftLabelSpec,
    committed,
    compact_manifest,
    decode,
    entry_path,
    file_checksum,
    manifest,
    merge_manifests,
    read_manifest,
    shards,
    write_shard,
)
from distilbeam.teacher.softlabels.verify import verify_labels

SPEC = SoftLabelSpec(4, "top_k", 2, classes=("a", "b", "c", "d"), teacher="torch:t:1")
WRITE_SHARDS = Path(__file__).parents[2] / "support" / "write_shards.py"
Labelled = Callable[..., pa.Table]
Dataset = Callable[..., Path]


def test_entry_and_manifest_say_what_was_written(tmp_path: Path, labelled: Labelled) -> None:
    table = labelled(np.arange(12.0).reshape(3, 4), SPEC)
    entry = write_shard(tmp_path / "new", "shard", table, SPEC, "k1", {"calls": 3})
    file = tmp_path / "new" / "shard.parquet"
    assert entry == ManifestEntry(
        "k1", "shard.parquet", 3, file.stat().st_size, file_checksum(file), SPEC, {"calls": 3}
    )
    found = read_manifest(tmp_path / "new")
    assert found.entries == (entry,)
    assert (found.spec, found.rows, found.bytes) == (SPEC, 3, entry.bytes)
    assert found.paths() == [file]
    assert committed(tmp_path / "new") == {"k1"}
    assert entry_path(tmp_path / "new", "k1").exists()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["_manifest", "shard.parquet"]


def test_shard_reads_back_with_its_specification(tmp_path: Path, labelled: Labelled) -> None:
    table = labelled(np.random.default_rng(0).normal(size=(100, 4)), SPEC, gain=pa.array(np.ones(100, np.float32)))
    write_shard(tmp_path, "s", table, SPEC, "k")
    read = pq.read_table(tmp_path / "s.parquet")
    assert read.column_names == table.column_names
    assert SoftLabelSpec.from_json(read.schema.metadata[b"distilbeam.softlabels"]) == SPEC
    footer = pq.read_metadata(tmp_path / "s.parquet").metadata
    assert SoftLabelSpec.from_json(footer[b"distilbeam.softlabels"]) == SPEC
    a, b = decode(read, SPEC), decode(table, SPEC)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
    np.testing.assert_array_equal(a.classes, b.classes)
    np.testing.assert_array_equal(a.tail_logmass, b.tail_logmass)


def test_carried_tensors_keep_their_shape_and_type(tmp_path: Path, labelled: Labelled) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 3), dtype=np.uint8)
    field = pa.field("image", pa.binary(6), metadata={"dtype": "uint8", "shape": "[2, 3]"})
    column = pa.array([p.tobytes() for p in pixels], field.type)
    table = labelled(np.zeros((5, 4)), SPEC).append_column(field, column)
    write_shard(tmp_path, "s", table, replace(SPEC, carried=("image",)), "k")
    batch = pq.read_table(tmp_path / "s.parquet").combine_chunks().to_batches()[0]
    np.testing.assert_array_equal(make_input(InputConfig(columns=("image",)))(batch), pixels)


def test_frequencies_of_sampled_labels_are_in_a_dictionary(tmp_path: Path, labelled: Labelled) -> None:
    spec = SoftLabelSpec(4, "sampled", 30)
    write_shard(tmp_path, "s", labelled(np.random.default_rng(0).normal(size=(9, 4)), spec), spec, "k")
    group = pq.read_metadata(tmp_path / "s.parquet").row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert any("DICTIONARY" in e for e in columns["teacher_logprobs.list.element"].encodings)
    assert "BYTE_STREAM_SPLIT" in columns["teacher_classes.list.element"].encodings


def test_encodings_are_those_of_the_format(tmp_path: Path, labelled: Labelled) -> None:
    write_shard(tmp_path, "s", labelled(np.zeros((9, 4)), SPEC, text=["same"] * 9), SPEC, "k")
    group = pq.read_metadata(tmp_path / "s.parquet").row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in columns["teacher_logprobs.list.element"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["teacher_margin"].encodings
    assert not any("DICTIONARY" in e for e in columns["teacher_logprobs.list.element"].encodings)
    assert any("DICTIONARY" in e for e in columns["text"].encodings)


def test_row_groups_are_bounded(tmp_path: Path, labelled: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 1000)
    table = labelled(np.zeros((200, 4)), SPEC)
    write_shard(tmp_path, "s", table, SPEC, "k")
    metadata = pq.read_metadata(tmp_path / "s.parquet")
    most = max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    assert most == 1000 // (table.nbytes // 200)
    assert metadata.num_rows == 200


def test_batches_are_streamed(tmp_path: Path, labelled: Labelled) -> None:
    table = labelled(np.random.default_rng(0).normal(size=(10, 4)), SPEC)
    empty = table.slice(0, 0).to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    batches = [*empty, *table.to_batches(max_chunksize=4), *empty]
    assert write_shard(tmp_path, "s", iter(batches), SPEC, "k").rows == 10
    assert pq.read_table(tmp_path / "s.parquet")["example_id"].to_pylist() == table["example_id"].to_pylist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 0), "a shard must have at least one row, 's' has none"),
        (lambda _: iter([]), "a shard must have at least one row, got no batch"),
        (lambda t: t.drop_columns(["example_id"]), "a shard must have a column example_id; the columns are teacher_"),
        (lambda t: t.drop_columns(["teacher_margin"]), "soft labels must have a column teacher_margin"),
        (
            lambda t: t.set_column(
                t.column_names.index("teacher_margin"), "teacher_margin", pa.array([1.0, None, 1.0], pa.float32())
            ),
            "column teacher_margin must not have missing values, got 1",
        ),
        (
            lambda t: t.set_column(t.column_names.index("teacher_margin"), "teacher_margin", pa.array([1.0, 2.0, 3.0])),
            "column teacher_margin must be float for top_k labels, got double",
        ),
    ],
)
def test_what_is_no_shard_is_refused_and_leaves_nothing(
    tmp_path: Path, labelled: Labelled, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, "s", change(labelled(np.zeros((3, 4)), SPEC)), SPEC, "k")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_carried_columns_must_be_there(tmp_path: Path, labelled: Labelled) -> None:
    with pytest.raises(ValueError, match="a shard must have a column image; the columns are example_id, "):
        write_shard(tmp_path, "s", labelled(np.zeros((3, 4)), SPEC), replace(SPEC, carried=("image",)), "k")


@pytest.mark.parametrize(("name", "key"), [("../s", "k"), ("s", "a/b"), ("", "k"), (".hidden", "k")])
def test_names_stay_inside_the_dataset(tmp_path: Path, labelled: Labelled, name: str, key: str) -> None:
    with pytest.raises(ValueError, match=r"must be letters, digits, '\.', '_', '=' and '-', got '"):
        write_shard(tmp_path, name, labelled(np.zeros((3, 4)), SPEC), SPEC, key)


def test_order_of_entries_does_not_depend_on_the_order_of_writing(tmp_path: Path, labelled: Labelled) -> None:
    table = labelled(np.zeros((1, 4)), SPEC)
    for name in ("b", "a", "c"):
        write_shard(tmp_path, name, table, SPEC, f"key-{name}")
    assert [p.name for p in read_manifest(tmp_path).paths()] == ["a.parquet", "b.parquet", "c.parquet"]


def test_a_second_write_replaces_the_first(tmp_path: Path, labelled: Labelled) -> None:
    write_shard(tmp_path, "s", labelled(np.zeros((5, 4)), SPEC), SPEC, "k")
    write_shard(tmp_path, "s", labelled(np.zeros((2, 4)), SPEC), SPEC, "k")
    assert read_manifest(tmp_path).rows == 2
    assert pq.read_metadata(tmp_path / "s.parquet").num_rows == 2


def test_files_without_an_entry_are_not_part_of_the_dataset(dataset: Dataset, labelled: Labelled) -> None:
    folder = dataset(SPEC)
    pq.write_table(labelled(np.zeros((99, 4)), SPEC), folder / "orphan.parquet")
    (folder / "_manifest" / ".half.json.123.tmp").write_text("{")
    assert read_manifest(folder).rows == 8


@pytest.mark.parametrize("step", ["write", "flush", "rename"])
def test_a_failure_at_any_step_commits_nothing(
    tmp_path: Path, labelled: Labelled, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target = {"write": (pq.ParquetWriter, "write_table"), "flush": (atomic, "flush"), "rename": (Path, "replace")}[step]
    monkeypatch.setattr(*target, broken)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, "s", labelled(np.zeros((3, 4)), SPEC), SPEC, "k")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
    assert committed(tmp_path) == set()


def test_kill_leaves_only_whole_shards(dataset: Dataset) -> None:
    folder = dataset(SPEC, rows=(20_000,))
    program = [sys.executable, str(WRITE_SHARDS), str(folder)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for i in range(3):
            assert process.stdout.readline() == b"%d\n" % i
        process.kill()
    assert process.returncode == -signal.SIGKILL
    found = read_manifest(folder)
    assert len(found.entries) >= 4
    for entry, path in zip(found.entries, found.paths(), strict=True):
        assert file_checksum(path) == entry.checksum
        assert pq.read_table(path).num_rows == 20_000


def test_writers_and_readers_at_once_see_only_whole_manifests(tmp_path: Path, labelled: Labelled) -> None:
    table = labelled(np.random.default_rng(0).normal(size=(50, 4)), SPEC)
    write_shard(tmp_path, "first", table, SPEC, "first")
    failures: list[BaseException] = []

    def guard(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as e:  # noqa: BLE001  (a thread's failure must reach the test)
                failures.append(e)

        return threading.Thread(target=run)

    def write(worker: int) -> None:
        for i in range(15):
            write_shard(tmp_path, f"w{worker}-{i}", table, SPEC, f"w{worker}-{i}")
            write_shard(tmp_path, "shared", table, SPEC, "shared")

    def compact() -> None:
        for _ in range(10):
            compact_manifest(tmp_path)

    def read() -> None:
        seen = 0
        for _ in range(30):
            now = len(read_manifest(tmp_path).entries)
            assert now >= seen
            seen = now

    threads = [guard(lambda w=w: write(w)) for w in range(3)] + [guard(compact), guard(read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert committed(tmp_path) == {"first", "shared", *(f"w{w}-{i}" for w in range(3) for i in range(15))}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_manifest_that_is_compacted_while_it_is_read_is_read_again(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset(SPEC)
    listings = iter([[folder / "_manifest" / "gone.json"]] * 3)
    real = manifest.manifest_files
    monkeypatch.setattr(manifest, "manifest_files", lambda directory: next(listings, None) or real(directory))
    assert read_manifest(folder).rows == 8
    monkeypatch.setattr(manifest, "manifest_files", lambda directory: [directory / "gone.json"])
    with pytest.raises(ValueError, match=r"the manifest of .* changes faster than it can be read; try again"):
        read_manifest(folder)


def test_missing_manifest_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nothing has no soft labels: there is no entry in .*/_manifest; label something"
    ):
        read_manifest(tmp_path / "nothing")
    assert committed(tmp_path / "nothing") == set()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: "", "Expecting value"),
        (lambda text: text[:-20], "delimiter|Expecting|Unterminated"),
        (lambda _: "[]", "an entry must be a JSON object, got list"),
        (lambda text: json.dumps({**json.loads(text), "rows": "5"}), "rows must be given as int, got '5'"),
        (
            lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "checksum"}),
            "checksum must be given",
        ),
        (
            lambda text: text.replace('"version": "1.1"', '"version": "3.2"'),
            "soft labels of format version 3.2 cannot be read by this release, which reads 1.x and 2.x; install a newer",
        ),
    ],
)
def test_damaged_entries_are_named(dataset: Dataset, damage: Callable[[str], str], message: str) -> None:
    folder = dataset(SPEC)
    file = entry_path(folder, "labels-key-1")
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=rf"manifest entry .*labels-key-1.json cannot be read: .*({message})"):
        read_manifest(folder)


def test_entries_of_a_newer_minor_version_are_read(dataset: Dataset) -> None:
    folder = dataset(SPEC)
    file = entry_path(folder, "labels-key-1")
    data = json.loads(file.read_text().replace('"version": "1.1"', '"version": "1.3"'))
    file.write_text(json.dumps({**data, "region": "eu"}))
    assert read_manifest(folder).spec == replace(SPEC, version="1.3")


def test_shards_that_mean_something_else_are_refused(dataset: Dataset, labelled: Labelled) -> None:
    folder = dataset(SPEC)
    other = replace(SPEC, teacher="torch:t:2")
    write_shard(folder, "other", labelled(np.zeros((2, 4)), other), other, "other")
    message = r"other.parquet and shard-0.parquet differ in teacher \('torch:t:2' and 'torch:t:1'\); keep labels of"
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_one_file_under_two_keys_is_refused(dataset: Dataset) -> None:
    folder = dataset(SPEC)
    entry = json.loads(entry_path(folder, "labels-key-0").read_text())
    entry_path(folder, "twin").write_text(json.dumps({**entry, "key": "twin"}))
    with pytest.raises(
        ValueError, match=r"shard-0.parquet is committed under two keys, labels-key-0 and twin; write it"
    ):
        read_manifest(folder)


def test_storage_may_differ_within_a_dataset(dataset: Dataset, labelled: Labelled) -> None:
    folder = dataset(SPEC)
    compact = replace(SPEC, storage="float16")
    write_shard(folder, "x", labelled(np.zeros((2, 4)), compact), compact, "x")
    assert [e.spec.storage for e in read_manifest(folder).entries] == ["float32", "float32", "float16"]


def test_compacting_changes_nothing_but_the_number_of_files(dataset: Dataset, labelled: Labelled) -> None:
    folder = dataset(SPEC, rows=(5, 3, 4))
    before = read_manifest(folder)
    file = compact_manifest(folder)
    assert list((folder / "_manifest").iterdir()) == [file]
    assert read_manifest(folder) == before
    assert compact_manifest(folder) == file
    write_shard(folder, "shard-0", labelled(np.zeros((1, 4)), SPEC), SPEC, "labels-key-0")
    assert read_manifest(folder).rows == 8
    assert compact_manifest(folder) != file
    assert (read_manifest(folder).rows, len(list((folder / "_manifest").iterdir()))) == (8, 1)


def test_merging_leads_to_the_files_of_the_sources(dataset: Dataset, tmp_path: Path) -> None:
    sources = [dataset(SPEC, name="round0"), dataset(SPEC, name="round1", seed=1)]
    merged = merge_manifests(tmp_path / "all" / "labels", sources)
    assert merged.rows == 16
    assert [path.resolve() for path in merged.paths()] == [p for s in sources for p in read_manifest(s).paths()]
    assert all(file_checksum(p) == e.checksum for p, e in zip(merged.paths(), merged.entries, strict=True))
    assert merge_manifests(tmp_path / "all" / "labels", sources) == merged


def test_merging_refuses_sources_that_mean_something_else(dataset: Dataset, tmp_path: Path) -> None:
    sources = [dataset(SPEC, name="a"), dataset(replace(SPEC, k=3), name="b")]
    with pytest.raises(ValueError, match=r"differ in k \(2 and 3\)"):
        merge_manifests(tmp_path / "all", sources)
    assert not (tmp_path / "all").exists()


def test_checksums_of_older_manifests_still_hold(tmp_path: Path, labelled: Labelled) -> None:
    entry = write_shard(tmp_path, "s", labelled(np.zeros((5, 4)), SPEC), SPEC, "k")
    file = tmp_path / "s.parquet"
    assert entry.checksum == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    old = "blake2b:" + hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    assert file_checksum(file, "blake2b") == old
    manifest.write_entry(tmp_path, replace(entry, checksum=old))
    assert verify_labels(tmp_path).ok
    file.write_bytes(file.read_bytes()[:-1] + b"2")
    assert "must have the checksum blake2b:" in verify_labels(tmp_path).problems[0]
