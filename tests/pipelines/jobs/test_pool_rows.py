"""`verify --teacher` asks about rows whose labels do not carry what the teacher reads: their columns come out of the pool."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from labelling import Command, command_in, write_job
from problem import make_table, write_problem
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.jobs.pool_rows import with_read_columns
from distilbeam.teacher.softlabels import read_manifest


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return command_in(tmp_path, monkeypatch)


def verify(labels: str, config: str = "label.toml") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", labels, "--teacher", config], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def test_rows_of_a_labelling_job_are_found_by_their_ids(tmp_path: Path, command: Command) -> None:
    write_job(tmp_path, data={"carry": []})
    command("label")
    status, said = verify("job/labels")
    assert status == 0, said
    assert "│ rows │ 240 │ │ not answered now │ 0 │" in said
    # the right rows, and in the labels' order
    rows = pa.concat_tables([pq.read_table(path) for path in read_manifest("job/labels").paths()]).take([200, 3, 77])
    read = with_read_columns(rows, "job/labels", Path("label.toml"), ["x"])
    pool = {row["key"]: row["x"] for row in make_table(240, 1, labelled=False).to_pylist()}
    assert read["x"].to_pylist() == [pool[key] for key in rows["example_id"].to_pylist()]


def test_rows_that_cannot_be_found_are_said(tmp_path: Path, command: Command) -> None:
    settings = write_job(tmp_path, data={"carry": ["day"]})
    for file in (tmp_path / "pool").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("day", table["key"]), file)
    del settings["data"]["id"]
    (tmp_path / "label.toml").write_text(tomli_w.dumps(settings))
    command("label")
    with pytest.raises(
        ValueError, match=r"without data\.id its rows cannot be found in the pool; carry it \(data\.carry\)"
    ):
        verify("job/labels")
    (tmp_path / "teacher.toml").write_text(tomli_w.dumps({"teacher": settings["teacher"]}))
    with pytest.raises(
        ValueError, match="the teacher reads x, which job/labels does not carry: give the configuration"
    ):
        verify("job/labels", "teacher.toml")


def test_rows_of_a_run_are_found_by_their_numbers(tmp_path: Path, command: Command) -> None:
    """Also those of the validation set, which are counted in it and not in the pool."""
    problem = write_problem(tmp_path)
    for file in [*(tmp_path / "pool").glob("*.parquet"), *tmp_path.glob("*.parquet")]:
        table = pq.read_table(file)
        halved = pa.array([row[:2] for row in table["x"].to_pylist()], pa.list_(pa.float32(), 2))
        pq.write_table(table.append_column("y", halved), file)
    problem["student"]["input"] = {"columns": ["y"]}
    (tmp_path / "label.toml").write_text(tomli_w.dumps(problem))
    command("label", "--round", "0")
    for labels, rows in (("run/labels/round=000", 30), ("run/teacher/validation", 60)):
        assert "x" not in read_manifest(labels).spec.carried
        status, said = verify(labels)
        assert status == 0, said
        assert f"│ rows │ {rows} │ │ not answered now │ 0 │" in said
    rows = pa.concat_tables([pq.read_table(path) for path in read_manifest("run/labels/round=000").paths()]).take(
        [20, 3, 7]
    )
    read = with_read_columns(rows, "run/labels/round=000", Path("label.toml"), ["x"])
    assert [row[:2] for row in read["x"].to_pylist()] == read["y"].to_pylist()
