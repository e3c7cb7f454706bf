"""What was answered is not asked again, however the pool is written, and what changed is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelling import Command, dataset, labelled_ids, pool_ids, write_job
from problem import asked, make_table
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import load_any_config
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.teacher.softlabels import decode, read_manifest
from distilbeam.teacher.softlabels.manifest import write_entry
from distilbeam.teacher.softlabels.verify import verify_labels

UNCARRIED = {"data": {"carry": []}}


def files(directory: Path) -> list[Path]:
    return sorted((directory / "pool").glob("*.parquet"))


def whole(directory: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in files(directory)])


def rename(directory: Path) -> None:
    for file in files(directory):
        (directory / "pool" / "day=1").mkdir(exist_ok=True)
        file.rename(directory / "pool" / f"z{file.name}")


def merge(directory: Path) -> None:
    table, old = whole(directory), files(directory)
    pq.write_table(table, directory / "pool" / "all.parquet", row_group_size=77)
    for file in old:
        file.unlink()


def compress(directory: Path) -> None:
    for file in files(directory):
        pq.write_table(pq.read_table(file), file, compression="zstd", row_group_size=7)


def add_column(directory: Path) -> None:
    for file in files(directory):
        table = pq.read_table(file)
        pq.write_table(table.append_column("more", pa.array(np.arange(len(table)))), file)


def shuffle(directory: Path) -> None:
    table, old = whole(directory), files(directory)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), directory / "pool" / "mixed.parquet")
    for file in old:
        file.unlink()


@pytest.mark.parametrize("settings", [{}, UNCARRIED], ids=["carried", "not carried"])
@pytest.mark.parametrize("change", [rename, merge, compress, add_column, shuffle])
def test_a_pool_that_is_written_otherwise_buys_nothing(
    tmp_path: Path, command: Command, settings: dict[str, Any], change: Callable[[Path], None]
) -> None:
    write_job(tmp_path, **settings, labels={"kind": "top_k", "k": 2})
    command("label")
    before = labels_by_id(tmp_path)
    change(tmp_path)
    plan = command("plan")
    assert "240 are labelled, 0 are not" in plan
    assert "240 rows ask what was answered already: the answers are copied." in plan
    command("label")
    assert len(asked(tmp_path)) == 240
    assert labels_by_id(tmp_path) == before, "each row has the label that it had"
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    assert verify_labels(dataset(tmp_path)).ok
    again = command("label")
    assert "240 are labelled, 0 are not" in again
    assert "are copied" not in again


def labels_by_id(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in read_manifest(dataset(directory)).paths():
        table = pq.read_table(path)
        labels = [bytes(str(row), "utf-8") for row in table.select(["teacher_logprobs", "teacher_classes"]).to_pylist()]
        found |= dict(zip(table["example_id"].to_pylist(), labels, strict=True))
    return found


def test_a_file_that_is_gone_for_a_night_keeps_its_labels(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    command("label")
    rows = len(pq.read_table(tmp_path / "pool" / "1.parquet"))
    (tmp_path / "pool" / "1.parquet").rename(tmp_path / "1.parquet")
    output = command("label")
    assert f"{rows} labels are of files that are gone; they are kept until 'label --prune'." in output
    assert len(labelled_ids(tmp_path)) == 240
    (tmp_path / "1.parquet").rename(tmp_path / "pool" / "1.parquet")
    assert "240 are labelled, 0 are not" in command("label")
    assert len(asked(tmp_path)) == 240
    (tmp_path / "pool" / "1.parquet").unlink()
    command("label", "--prune")
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))


def test_identical_rows_are_asked_once(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    table = pq.read_table(tmp_path / "pool" / "0.parquet")
    keys = pa.array([f"again-{key}" for key in table["key"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("key"), "key", keys), tmp_path / "pool" / "again.parquet")
    rows = len(table)
    plan = command("plan")
    assert f"{240 + rows} are not." in plan
    assert f"{rows} rows ask what other rows ask: they are not asked, but get their answers." in plan
    command("label")
    assert len(asked(tmp_path)) == 240
    labels = answers_by_id(tmp_path)
    assert len(labels) == 240 + rows
    assert all(labels[key] == labels[f"again-{key}"] for key in table["key"].to_pylist())
    assert f"{240 + rows} are labelled, 0 are not" in command("plan")


def answers_by_id(directory: Path) -> dict[str, list[float]]:
    manifest = read_manifest(dataset(directory))
    tables = [pq.read_table(path) for path in manifest.paths()]
    return {
        key: row
        for table in tables
        for key, row in zip(
            table["example_id"].to_pylist(), decode(table, manifest.spec).logprobs.tolist(), strict=True
        )
    }


def test_the_same_row_twice_is_kept_once_and_two_rows_with_one_id_are_refused(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    table = pq.read_table(tmp_path / "pool" / "0.parquet")
    pq.write_table(table, tmp_path / "pool" / "copy.parquet")
    said = f"{len(table)} rows are the same as others, id and content, and are kept once."
    assert said in command("plan")
    command("label")
    assert len(asked(tmp_path)) == len(labelled_ids(tmp_path)) == 240
    assert said in command("plan")
    assert "0 are not" in command("plan")
    x = np.stack(table["x"].to_numpy(zero_copy_only=False)) + 1
    changed = table.set_column(table.column_names.index("x"), "x", vectors(x)).slice(3, 2)
    pq.write_table(changed, tmp_path / "pool" / "other.parquet")
    expected = (
        rf"'{table['key'][3].as_py()}' is the id of two rows that differ, row 3 of .*/pool/0.parquet and row 0 of "
        r".*/pool/other.parquet; mend one of them"
    )
    for name in ("plan", "label"):
        with pytest.raises(ValueError, match=expected):
            command(name)
    assert len(asked(tmp_path)) == 240


def vectors(x: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).ravel()), x.shape[1])


def rewrite(file: Path, rows: list[int]) -> None:
    """Correct some vectors as pyarrow's default writer does: the footer stays, value by value, but for its statistics."""
    table = pq.read_table(file)
    x = np.stack(table["x"].to_numpy(zero_copy_only=False))
    x[rows] = x[rows][:, ::-1] + 0.25
    footer = footer_of(file)
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    corrected = table.set_column(
        table.column_names.index("x"), table.schema.field("x"), vectors(x).cast(table["x"].type)
    )
    pq.write_table(corrected, file, row_group_size=20, **options)
    assert footer_of(file) == footer


def footer_of(file: Path) -> bytes:
    data = file.read_bytes()
    return data[-8 - int.from_bytes(data[-8:-4], "little") :]


@pytest.mark.parametrize("settings", [{}, UNCARRIED], ids=["carried", "not carried"])
def test_a_corrected_row_under_the_same_footer_is_asked_again(
    tmp_path: Path, command: Command, settings: dict[str, Any]
) -> None:
    write_job(tmp_path, **settings)
    plain(tmp_path)
    command("label")
    before = answers_by_id(tmp_path)
    file = tmp_path / "pool" / "1.parquet"
    rewrite(file, [4, 9])
    assert "238 are labelled, 2 are not" in command("plan")
    assert "1 file(s) changed: 1.parquet." in command("plan")
    command("label")
    assert len(asked(tmp_path)) == 242
    keys = {pq.read_table(file)["key"][row].as_py() for row in (4, 9)}
    now = answers_by_id(tmp_path)
    assert {key for key in now if now[key] != before[key]} == keys
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    rewrite(file, [4])
    command("label")
    assert len(asked(tmp_path)) == 243
    assert "240 are labelled, 0 are not" in command("plan")


def plain(directory: Path) -> None:
    for file in files(directory):
        table = pq.read_table(file)
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(table, file, row_group_size=20, **options)


def test_a_file_that_was_only_touched_is_left_and_check_content_looks_at_all(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    plain(tmp_path)
    command("label")
    before = read_manifest(dataset(tmp_path))
    file = tmp_path / "pool" / "0.parquet"
    os.utime(file, (1, 1))
    assert "240 are labelled, 0 are not" in command("label")
    assert read_manifest(dataset(tmp_path)) == before
    state = file.stat()
    data = bytearray(file.read_bytes())
    value = pq.read_table(file)["x"][0].as_py()[0]
    at = bytes(data).index(np.float32(value).tobytes())
    data[at : at + 4] = np.float32(value + 1).tobytes()
    with file.open("r+b") as there:
        there.write(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "240 are labelled, 0 are not" in command("plan"), "size, time and inode are the same"
    assert "239 are labelled, 1 are not" in command("plan", "--check-content")
    command("label", "--check-content")
    assert len(asked(tmp_path)) == 241


@pytest.mark.usefixtures("command")
def test_a_file_that_is_replaced_in_the_middle_is_not_committed_under_its_former_key(tmp_path: Path) -> None:
    write_job(tmp_path)
    file = tmp_path / "pool" / "0.parquet"
    with opened_job(load_any_config(tmp_path / "label.toml")) as job:
        work, plan = job.work(job.dataset, job.dead_letters), job.plan()
        begun = work(plan.tasks[0])
        pq.write_table(make_table(40, 3, labelled=False), file)
        with pytest.raises(ValueError, match=r"0.parquet was changed since this was planned"):
            list(begun)
        file.unlink()
        with pytest.raises(ValueError, match=r"0.parquet is gone since this was planned"):
            list(work(plan.tasks[0]))
    assert not dataset(tmp_path).exists() or not list(dataset(tmp_path).glob("*.parquet"))


def test_rows_without_a_label_or_a_dead_letter_are_wanted_again(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    failing = ["--set", "teacher.arguments.fail_below=-1.0"]
    command("label", *failing)
    failed = 240 - len(labelled_ids(tmp_path))
    assert 5 < failed < 120
    plan = command("plan", *failing)
    assert f"{240 - failed} are labelled, {failed} are not" in plan
    assert f"{failed} rows had no answer before" in plan
    calls = len(asked(tmp_path))
    assert "label 0 rows" in command("label", "--no-retry", *failing)
    assert len(asked(tmp_path)) == calls
    for file in (tmp_path / "job" / "deadletter" / "labels").glob("*.parquet"):
        file.unlink()
    assert f"{240 - failed} are labelled, {failed} are not" in command("plan", *failing)
    command("label", *failing)
    letters = (tmp_path / "job" / "deadletter" / "labels").glob("*.parquet")
    assert sum(pq.read_metadata(file).num_rows for file in letters) == failed


def test_rows_that_failed_are_asked_again_when_they_were_repaired(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    failing = ["--set", "teacher.arguments.fail_below=-1.0"]
    command("label", *failing)
    failed, calls = 240 - len(labelled_ids(tmp_path)), len(asked(tmp_path))
    for file in files(tmp_path):
        table = pq.read_table(file)
        x = np.stack(table["x"].to_numpy(zero_copy_only=False))
        x[:, 0] = np.maximum(x[:, 0], -0.5 - np.arange(len(x)) / 1000)
        low = np.stack(table["x"].to_numpy(zero_copy_only=False))[:, 0] < -1
        x = np.where(low[:, None], x, np.stack(table["x"].to_numpy(zero_copy_only=False)))
        pq.write_table(table.set_column(table.column_names.index("x"), "x", vectors(x)), file)
    assert f"{240 - failed} are labelled, {failed} are not" in command("plan", *failing)
    command("label", *failing)
    assert sorted(labelled_ids(tmp_path)) == sorted(pool_ids(tmp_path))
    assert len(asked(tmp_path)) == calls + failed
    assert not list((tmp_path / "job" / "deadletter" / "labels").glob("*.parquet"))


def test_other_carried_columns_buy_nothing_and_another_form_does(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    command("label")
    dense = answers_by_id(tmp_path)
    command("label", "--relabel", "--set", "data.carry=['x','key']")
    assert len(asked(tmp_path)) == 240
    assert answers_by_id(tmp_path) == dense
    command("label", "--relabel", "--set", "labels.kind=top_k", "--set", "labels.k=1")
    assert len(asked(tmp_path)) == 480, "its draws and its rounding are others"


def test_a_dataset_of_version_0_1_goes_on(tmp_path: Path, command: Command) -> None:
    """Its entries do not say which rows they have, and nothing is known of the contents of its files."""
    write_job(tmp_path)
    failing = ["--set", "teacher.arguments.fail_below=-1.0"]
    command("label", *failing)
    labelled = len(labelled_ids(tmp_path))
    for entry in read_manifest(dataset(tmp_path)).entries:
        extra = {name: value for name, value in entry.extra.items() if name != "rows"}
        write_entry(dataset(tmp_path), type(entry)(**{**vars(entry), "extra": extra}))
    (tmp_path / "job" / "contents.json").unlink()
    assert f"{labelled} are labelled, {240 - labelled} are not" in command("plan", *failing)
    for file in (tmp_path / "job" / "deadletter" / "labels").glob("*.parquet"):
        file.unlink()
    assert f"{labelled} are labelled, {240 - labelled} are not" in command("plan", *failing)
    calls = len(asked(tmp_path))
    command("label", *failing)
    assert len(labelled_ids(tmp_path)) == labelled
    assert not len(asked(tmp_path)) - calls, "rows that fail are not written down, and no other was asked"


def test_verify_finds_that_the_pool_changed(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path)
    plain(tmp_path)
    command("label")

    def verify() -> tuple[int, str]:
        result = CliRunner().invoke(app, ["verify", "job/labels", "--teacher", "label.toml"], catch_exceptions=False)
        return result.exit_code, " ".join(result.output.split())

    assert verify()[0] == 0
    rewrite(tmp_path / "pool" / "2.parquet", [7])
    status, said = verify()
    assert status == 1
    assert "1 file(s) hold other values than were labelled: 2.parquet; 'distilbeam label' asks its changed rows" in said
    command("label")
    assert verify()[0] == 0
