"""Ingest as a job: duplicates, units, resumption, runners, sentences."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import example, write_tfrecords
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.ingest import ingesting
from distilbeam.pipelines.ingest.ingesting import Summary, ingest
from distilbeam.pipelines.ingest.settings import ingest_options
from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.pipelines.pool.splits import plan_units


def run(tmp_path: Path, source: str = "in", out: str = "pool", flags: tuple[str, ...] = (), **settings: Any) -> Summary:
    options = ingest_options(**{"format": "jsonl", **settings})
    return ingest([str(tmp_path / source)], tmp_path / out, options, beam=pipeline_options(flags))


def pool_of(tmp_path: Path, out: str = "pool") -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / out).glob("*.parquet")))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "_ingest.json"}


def write_many(tmp_path: Path) -> list[int]:
    """Write 4,000 records with repetitions into 4 files; return the values in the order in which they are first met."""
    values = np.random.default_rng(3).integers(0, 3000, 4000).tolist()
    for number in range(4):
        part = values[1000 * number : 1000 * (number + 1)]
        write_lines(tmp_path / "in" / f"{number}.jsonl", [{"n": n, "x": [n * 0.5, 1.0]} for n in part])
    return list(dict.fromkeys(values))


def test_the_first_of_equal_rows_stays_wherever_the_others_are(tmp_path: Path) -> None:
    expected = write_many(tmp_path)
    summary = run(tmp_path, file_rows=500)
    assert pool_of(tmp_path)["n"].to_pylist() == expected
    assert (summary.records, summary.rows, summary.duplicates) == (4000, len(expected), 4000 - len(expected))
    assert len(set(pool_of(tmp_path)["id"].to_pylist())) == len(expected)
    sizes = [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "pool").glob("*.parquet"))]
    assert len(sizes) == summary.pool_files
    assert all(size == 500 for size in sizes[:-1])
    units = plan_units(find_files(tmp_path / "pool"), 10**6)
    assert units.rows == len(expected), "the pool is what select and label read"


def test_the_id_of_a_row_depends_on_that_row_alone(tmp_path: Path) -> None:
    row = {"n": 1, "text": "a", "x": [1, 2]}
    write_lines(tmp_path / "in" / "a.jsonl", [row])
    run(tmp_path, out="alone")
    write_lines(tmp_path / "in" / "a.jsonl", [{"n": 2.5, "text": None, "x": [1], "more": 1}, row])
    run(tmp_path, out="among")
    assert pool_of(tmp_path, "among")["id"][1] == pool_of(tmp_path, "alone")["id"][0]
    assert len(pool_of(tmp_path, "alone")["id"][0].as_py()) == 32


def test_one_id_with_two_contents_is_a_bad_record(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"key": "a", "n": 1}, {"key": "b", "n": 2}, {"key": "a", "n": 1}])
    write_lines(tmp_path / "in" / "b.jsonl", [{"key": "b", "n": 3}, {"key": "c", "n": 1}])
    summary = run(tmp_path, id_column="key", unit_bytes=30)
    assert pool_of(tmp_path).to_pylist() == [{"key": "a", "n": 1}, {"key": "b", "n": 2}, {"key": "c", "n": 1}]
    assert (summary.duplicates, summary.bad) == (1, 1)
    assert summary.first_bad == {
        "file": "b.jsonl",
        "line": 1,
        "error": "the id of this record is that of an earlier one with other content",
        "record": "",
    }


@pytest.mark.parametrize("format_", ["csv", "tfrecord"])
def test_large_files_are_cut_into_units_and_bad_records_keep_their_lines(tmp_path: Path, format_: str) -> None:
    if format_ == "csv":
        lines = [f'{i},"t {i}"' for i in range(500)]
        lines[333] = "333"
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.csv").write_text("n,text\n" + "\n".join(lines) + "\n")
        line = 335
    else:
        (tmp_path / "in").mkdir()
        records = [example({"n": [i], "text": [f"t {i}".encode()]}) for i in range(500)]
        starts = write_tfrecords(tmp_path / "in" / "a.tfrecord", records)
        data = bytearray((tmp_path / "in" / "a.tfrecord").read_bytes())
        data[starts[333] + 14] ^= 1
        (tmp_path / "in" / "a.tfrecord").write_bytes(data)
        line = 334
    summary = run(tmp_path, format=format_, unit_bytes=1000, id_column="n")
    assert pool_of(tmp_path)["n"].to_pylist() == [i for i in range(500) if i != 333]
    assert summary.first_bad is not None
    assert summary.first_bad["line"] == line


def test_records_over_several_lines_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("n,text\n" + "".join(f'{i},"one\n{i},two"\n' for i in range(300)))
    run(tmp_path, format="csv", unit_bytes=500)
    assert pool_of(tmp_path)["text"].to_pylist() == [f"one\n{i},two" for i in range(300)]


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path)
    monkeypatch.setattr("distilbeam.pipelines.ingest.write._GROUP_ROWS", 400)
    monkeypatch.setattr("distilbeam.pipelines.ingest.write._GROUP_BYTES", 20_000)
    run(tmp_path, unit_bytes=10_000)
    metadata = pq.read_metadata(next((tmp_path / "pool").glob("*.parquet")))
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert max(sizes) <= 400
    assert len(sizes) < 40


def ingest_command(tmp_path: Path, *arguments: str) -> list[str]:
    paths = [str(tmp_path / "in"), "--out", str(tmp_path / "pool"), "--format", "jsonl"]
    return [sys.executable, "-m", "distilbeam", "ingest", *paths, *arguments]


def kill_when_there(command: list[str], work: Path, pattern: str) -> bool:
    """Kill a command when a file of its work is there; False where it ended before that was seen."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None:
            if any(work.glob(pattern)):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return process.returncode == -signal.SIGKILL
            time.sleep(0.001)
    return False


@pytest.mark.slow
def test_killed_and_started_again_it_makes_the_same_pool(tmp_path: Path) -> None:
    write_many(tmp_path)
    run(tmp_path, out="undisturbed")
    work = tmp_path / ".pool.ingest"
    for moment in ("plan.json", "ingest.duckdb", "letters", "pool/.*.tmp"):
        for _ in range(20):  # some of these are there for a few milliseconds, which may pass unseen
            killed = kill_when_there(ingest_command(tmp_path), work, moment)
            if killed:
                break
            shutil.rmtree(tmp_path / "pool")
        assert killed, f"it always ended before {moment} was there"
        assert not (tmp_path / "pool").exists(), "a pool appears whole or not at all"
    out = subprocess.run(ingest_command(tmp_path), capture_output=True, text=True, check=True)
    assert (
        f"Read 4,000 records from 4 file(s); left out {4000 - pool_of(tmp_path).num_rows:,} duplicate(s)" in out.stdout
    )
    assert files_of(tmp_path / "pool") == files_of(tmp_path / "undisturbed")
    assert not work.exists()
    again = subprocess.run(ingest_command(tmp_path), capture_output=True, text=True, check=True)
    assert again.stdout.endswith(out.stdout[out.stdout.index("Read") :])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_every_runner_makes_the_same_bytes(tmp_path: Path, mode: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        records = [example({"n": [i % 700], "x": [i * 0.5, 1.0]}) for i in range(500 * number, 500 * (number + 1))]
        write_tfrecords(tmp_path / "in" / f"{number}.tfrecord", records)
    run(tmp_path, out="one", format="tfrecord", unit_bytes=10_000, file_rows=500)
    flags = (f"--direct_running_mode={mode}", "--direct_num_workers=2")
    run(tmp_path, out="other", flags=flags, format="tfrecord", unit_bytes=10_000, file_rows=500)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("key;p0;p1\n" + "".join(f"k{i};{i}.5;1\n" for i in range(30)) + "k;x;1\n")
    command = [sys.executable, "-m", "distilbeam", "ingest", str(tmp_path / "a.csv"), "--out", str(tmp_path / "pool")]
    options = ["--format", "csv", "--delimiter", ";", "--vector", "p=p*", "--shape", "p=2,1", "--id", "key"]
    out = subprocess.run(
        [*command, *options, "--", "--direct_num_workers=1"], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "30 examples in" in out.stdout
    assert "columns key (string), p (float32 [2, 1])" in out.stdout
    assert "the first: a.csv line 32: columns of vector p must all be float32 numbers" in out.stdout
    wrong = subprocess.run([*command, *options, "--", "--runer=x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: --runer is not a Beam option; did you mean --runner?"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"format": "xml"}, "format: must be 'csv', 'jsonl', 'tfrecord', 'text' or 'images', got 'xml'"),
        ({"class_column": "label"}, "class_column must be given for images only, got format jsonl"),
        ({"id_column": "nr"}, "--id must name a column of the sources, got nr; the columns are n, x"),
        ({"types": {"m": "string"}}, "--type must name a column of the sources, got m; the columns are n, x"),
        (
            {"types": {"n": "bool"}},
            "no record can be used, the first bad one is 0.jsonl line 1: column n must be bool, got",
        ),
        ({"format": "csv"}, "no file in it ends in .csv, .tsv"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    write_many(tmp_path)
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        run(tmp_path, **settings)


def test_csv_settings_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("id,a,b\n1,2,3\n")
    for settings, sentence in (
        ({}, "the sources have a column id of their own; give --id id"),
        (
            {"id_column": "id", "vectors": {"v": {"columns": ["c*"]}}},
            r"--vector v must name columns .*, got c\*; the col",
        ),
        (
            {"id_column": "id", "vectors": {"v": {"columns": ["a", "b"], "shape": [3]}}},
            r"--shape v must have as many elements as its 2 columns, got \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(tmp_path, format="csv", out=f"pool-{len(sentence)}", **settings)


def test_what_is_there_already_is_not_mixed_with_anything(tmp_path: Path) -> None:
    write_many(tmp_path)
    first = run(tmp_path)
    assert run(tmp_path) == first
    with pytest.raises(ValueError, match="was made from other sources or with other options; name a new directory"):
        run(tmp_path, id_column="n")
    write_lines(tmp_path / "in" / "5.jsonl", [{"n": 1}])
    with pytest.raises(ValueError, match="was made from other sources or with other options; name a new directory"):
        run(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="taken holds something else already; name a new directory"):
        run(tmp_path, out="taken")


def test_the_same_command_again_says_the_same_and_that_it_did_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"z": 1, "b": "t", "a": 0.5}])
    arguments = ["ingest", str(tmp_path / "in"), "--out", str(tmp_path / "pool"), "--format", "jsonl"]
    first, again = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert (first.exit_code, again.exit_code) == (0, 0), again.output
    assert "columns id (string), z (int64), b (string), a (float64)." in first.output
    assert "before; nothing is left to do." not in first.output
    sentence = "was made from these sources with these options before; nothing is left to do."
    said, _, repeated = again.output.replace("\n", " ").partition(sentence)
    assert said.strip() == str(tmp_path / "pool")
    assert first.output.replace("\n", " ").endswith(repeated.strip() + " ")


def test_an_ingest_that_failed_begins_again_with_what_is_there_then(tmp_path: Path) -> None:
    write_many(tmp_path)
    with pytest.raises(ValueError, match="--id must name a column"):
        run(tmp_path, id_column="nr")  # leaves a working directory behind
    for number in range(4):
        write_lines(tmp_path / "in" / f"{number}.jsonl", [{"nr": number}])
    assert run(tmp_path, id_column="nr").rows == 4
    assert not (tmp_path / ".pool.ingest").exists()


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path)
    count = ingesting.count_kinds

    def and_change(*arguments: Any) -> Any:
        (tmp_path / "in" / "2.jsonl").write_text('{"n": 1}\n')
        return count(*arguments)

    monkeypatch.setattr(ingesting, "count_kinds", and_change)
    with pytest.raises(ValueError, match=r"2.jsonl changed while it was read; give the command again"):
        run(tmp_path)
    assert not (tmp_path / "pool").exists()


def test_no_usable_record(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [])
    with pytest.raises(
        ValueError, match=r"SOURCE must hold at least one record; its 1 file\(s\), the first .*a.jsonl, have n"
    ):
        run(tmp_path)
    (tmp_path / "in" / "a.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"no record can be used, the first bad one is a.jsonl line 1: not JSON"):
        run(tmp_path, out="other")
