"""What happens to labelling when the world fails: servers, files, disks and other processes, each the real thing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from labelling import calls_by_row, dataset, finish, labelled_ids, pool_ids, shards, start, write_job
from problem import SUPPORT, make_table

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`distilbeam serve-teacher` as a process of its own, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        arguments = {"log": str(directory / "asked.log"), "delay_s": 0.05}
        teacher = {"kind": "torch", "model": "logging_teacher:LoggingTeacher", "arguments": arguments}
        settings = {"teacher": {**teacher, "input": {"columns": ["x"], "shape": [4]}}}
        (directory / "server.toml").write_text(tomli_w.dumps(settings))
        self.process: subprocess.Popen[str] | None = None

    def start(self, version: int = 1) -> None:
        words = ["serve-teacher", "server.toml", "--port", str(self.port), "--version", str(version)]
        environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distilbeam", *words],
            cwd=self.directory,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        assert "Serving" in self.process.stdout.readline()

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "d").mkdir()
    write_job(tmp_path / "d")
    found = Server(tmp_path / "d")
    yield found
    if found.process is not None and found.process.poll() is None:
        found.kill()


def ask_over_the_wire(directory: Path, address: str, **more: object) -> None:
    """Let the job's teacher be the one behind an address."""
    teacher = {
        "kind": "tfserving",
        "address": address,
        "model": "teacher",
        "batch_rows": 4,
        "timeout_s": 5.0,
        "first_wait_s": 0.2,
        "longest_wait_s": 1.0,
        "input": {"columns": ["x"], "shape": [4]},
        **more,
    }
    settings = {
        "run": {"directory": "job"},
        "data": {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": 3},
        "teacher": teacher,
        "engine": {"unit_rows": 40, "shard_rows": 8, "batch_rows": 16, "teacher_batch": 8},
    }
    (directory / "label.toml").write_text(tomli_w.dumps(settings))


def when_shards(directory: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until the job has committed that many shards."""
    while len(list((dataset(directory) / "_manifest").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_server_that_is_killed_and_comes_back_costs_nothing_but_time(server: Server) -> None:
    directory = server.directory
    ask_over_the_wire(directory, f"127.0.0.1:{server.port}", attempts=60)
    server.start()
    job = start(directory)
    when_shards(directory, 5, job)
    server.kill()
    time.sleep(1)
    server.start()
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, out + err
    assert sorted(labelled_ids(directory)) == sorted(pool_ids(directory))


def test_a_server_that_stays_away_ends_the_job_in_a_sentence_and_the_rest_is_labelled_later(server: Server) -> None:
    directory = server.directory
    ask_over_the_wire(directory, f"127.0.0.1:{server.port}", attempts=3)
    server.start()
    job = start(directory)
    when_shards(directory, 5, job)
    server.kill()
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1, out + err
    assert f"127.0.0.1:{server.port}" in err
    assert "Traceback" not in err
    paid = set(labelled_ids(directory))
    before = calls_by_row(directory)
    server.start()
    finish(directory)
    assert sorted(labelled_ids(directory)) == sorted(pool_ids(directory))
    after = calls_by_row(directory)
    assert all(after[key] == before[key] for key in paid)


def test_a_server_that_comes_back_with_another_version_stops_the_job(server: Server) -> None:
    directory = server.directory
    ask_over_the_wire(directory, f"127.0.0.1:{server.port}", attempts=60)
    server.start(version=1)
    job = start(directory)
    when_shards(directory, 5, job)
    server.kill()
    server.start(version=2)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1, out + err
    assert "changed" in err
    assert "Traceback" not in err
    spoken_for = [entry for entry, _, _ in shards(directory)]
    assert 5 <= len(spoken_for) < 36, "nothing of the other version was mixed in"


@contextmanager
def speaking(answer: bytes | None) -> Iterator[int]:
    """A server that answers every connection with some bytes, or resets it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    if answer is None:  # close with a reset instead of a farewell
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    else:
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 200 OK\r\n\r\nthis is not gRPC"], ids=["resets", "garbage"])
def test_a_server_that_is_none_is_a_sentence(tmp_path: Path, answer: bytes | None) -> None:
    write_job(tmp_path / "d")
    with speaking(answer) as port:
        ask_over_the_wire(tmp_path / "d", f"127.0.0.1:{port}", attempts=3)
        out = finish(tmp_path / "d", status=1)
    assert f"127.0.0.1:{port}" in out
    assert "Traceback" not in out
    assert not dataset(tmp_path / "d").exists()


def test_one_row_in_a_thousand_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    table = pa.concat_tables([make_table(4000, 5, labelled=False)])
    lowest = np.sort(table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)[:, 0])[:5]
    limit = float((lowest[3] + lowest[4]) / 2)
    teacher = {"arguments": {"log": "asked.log", "fail_below": limit}}
    engine = {"unit_rows": 1000, "shard_rows": 500, "batch_rows": 500, "teacher_batch": 100}
    write_job(directory, teacher=teacher, engine=engine)
    shutil.rmtree(directory / "pool")
    (directory / "pool").mkdir()
    pq.write_table(table, directory / "pool" / "all.parquet", row_group_size=500)
    out = finish(directory)
    assert "4 rows have no label" in out
    letters = [pq.read_table(f) for f in (directory / "job" / "deadletter" / "labels").glob("*.parquet")]
    rows = [row for letter in letters for row in letter.to_pylist()]
    assert len(rows) == 4
    features = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    assert all(features[row["row"], 0] < limit for row in rows)
    assert sorted([*labelled_ids(directory), *(row["example_id"] for row in rows)]) == sorted(pool_ids(directory))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_job(tmp_path / "d")
    file = tmp_path / "d" / "pool" / "2.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    out = finish(tmp_path / "d", status=2)
    assert "2.parquet cannot be read as Parquet" in out
    assert "Traceback" not in out


def test_a_file_whose_data_is_damaged_is_named_and_the_others_are_labelled(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    write_job(directory)
    file = directory / "pool" / "2.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=20, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    where = pq.read_metadata(file).row_group(1).column(1).data_page_offset + 60
    data[where : where + 20] = bytes(20)
    file.write_bytes(data)
    out = finish(directory, status=1)
    assert "2.parquet is damaged" in out
    assert "Traceback" not in out
    damaged = set(pq.read_table(file, columns=["key"])["key"].to_pylist()[20:40])
    assert set(pool_ids_but(directory, file)) <= set(labelled_ids(directory))
    assert not damaged & set(labelled_ids(directory))


def test_rows_in_one_shard_with_a_damaged_file_are_asked_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    write_job(directory, engine={"unit_rows": 10_000, "shard_rows": 10_000, "batch_rows": 16})
    file = sorted((directory / "pool").glob("*.parquet"))[0]
    pq.write_table(pq.read_table(file), file, row_group_size=20, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    where = pq.read_metadata(file).row_group(0).column(1).data_page_offset + 60
    data[where : where + 20] = bytes(20)
    others = pool_ids_but(directory, file)
    file.write_bytes(data)
    assert f"{file.name} is damaged" in finish(directory, status=1)
    file.unlink()
    assert calls_by_row(directory).keys() == set(others), "the rows of other files did not wait"
    finish(directory)
    assert sorted(labelled_ids(directory)) == sorted(others)
    assert all(calls_by_row(directory)[row] == 1 for row in others)


def pool_ids_but(directory: Path, file: Path) -> list[str]:
    own = set(pq.read_table(file, columns=["key"])["key"].to_pylist())
    return [
        key
        for other in (directory / "pool").glob("*.parquet")
        if other != file
        for key in _keys(other)
        if key not in own
    ]


def _keys(file: Path) -> list[str]:
    keys: list[str] = pq.read_table(file, columns=["key"])["key"].to_pylist()
    return keys


def test_files_of_another_schema_are_named(tmp_path: Path) -> None:
    write_job(tmp_path / "d")
    file = tmp_path / "d" / "pool" / "2.parquet"
    table = pq.read_table(file)
    texts = pa.array([str(row) for row in range(table.num_rows)])
    pq.write_table(table.set_column(table.column_names.index("x"), "x", texts), file)
    out = finish(tmp_path / "d", status=2)
    assert "2.parquet" in out
    assert "column(s) x" in out
    assert "Traceback" not in out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 600 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True, check=False
        )
        if shutil.which("mount")
        else None
    )
    if made is None or made.returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


def test_a_full_disk_is_a_sentence_and_the_job_goes_on_when_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    directory = tmp_path / "d"
    write_job(directory, run={"directory": str(small_disk / "job")})
    (directory / "job").symlink_to(small_disk / "job")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    out = finish(directory, status=1)
    assert "No space left on device" in out
    assert "Traceback" not in out
    former = set(labelled_ids(directory)) if (dataset(directory) / "_manifest").exists() else set()
    assert len(former) < 240
    ballast.unlink()
    remount(small_disk, "size=4m")
    finish(directory)
    assert sorted(labelled_ids(directory)) == sorted(pool_ids(directory))
    assert not list((directory / "job").rglob(".*.tmp"))


def test_a_read_only_output_is_a_sentence(tmp_path: Path, small_disk: Path) -> None:
    directory = tmp_path / "d"
    write_job(directory, run={"directory": str(small_disk / "job")})
    remount(small_disk, "ro")
    out = finish(directory, status=2)
    assert "cannot be written (Read-only file system)" in out
    assert "Traceback" not in out


def test_two_jobs_on_one_directory(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    write_job(directory, 120, teacher={"arguments": {"log": "asked.log", "delay_s": 1.0}})
    first = start(directory)
    when_shards(directory, 1, first)
    second = finish(directory, status=2)
    assert f"is being worked on by process {first.pid} on" in second
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, out + err
    assert sorted(labelled_ids(directory)) == sorted(pool_ids(directory))
    assert set(calls_by_row(directory).values()) == {1}
