"""What is written down before rows are asked, and who is seen to have died of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.pipelines.labelling import saved_answers
from distilbeam.pipelines.labelling.in_flight import InFlight, read_flights
from distilbeam.pipelines.labelling.saved_answers import Answered

CODE = """
import os, sys
from pathlib import Path
from distilbeam.pipelines.labelling.in_flight import InFlight
flight = InFlight(Path(sys.argv[1]), "other")
flight.write(16, 32, 3)
os.kill(os.getpid(), 9)
"""


def test_the_rows_that_a_killed_process_was_asking_about_are_suspects(tmp_path: Path) -> None:
    own = InFlight(tmp_path, "own")
    own.write(0, 8, 2)
    killed = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    found = {
        flight.shard: (flight.start, flight.stop, flight.failed, flight.suspect) for flight in read_flights(tmp_path)
    }
    assert found == {"own": (0, 8, 2, False), "other": (16, 32, 3, True)}
    own.close()
    assert [flight.shard for flight in read_flights(tmp_path)] == ["other"]


def test_a_process_that_died_between_requests_is_nobodys_fault(tmp_path: Path) -> None:
    flight = InFlight(tmp_path, "shard")
    flight.write(0, 8, 0)
    flight.write(0, 0, 0)
    os.close(flight._file)
    (found,) = read_flights(tmp_path)
    assert not found.alive
    assert not found.suspect


def test_saved_answers_come_back_as_they_were(tmp_path: Path) -> None:
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 3)
    schema = pa.schema([pa.field("example_id", pa.string()), pa.field("teacher_logprobs", values.type, nullable=False)])
    table = pa.table([pa.array(["a", "b"]), values], schema=schema)
    failures = [
        {"example_id": b"\x00\xff", "pool_row": 4, "stage": "teacher", "error": "no", "attempts": 2, "place": 1}
    ]
    answered = Answered(table, np.array([0, 2]), failures, {"calls": 3, "requests": 1, "reused": 0})
    dataset = str(tmp_path / "labels")
    parts = [("unit", 0, 4)]
    saved_answers.save(dataset, "key", "spec", parts, [answered])
    (found,) = saved_answers.saved(dataset, "spec")
    assert found.table.equals(table, check_metadata=True)
    assert found.places.tolist() == [0, 2]
    assert (found.failures, found.costs) == (failures, answered.costs)
    assert found.of_shard(parts) is found
    assert not saved_answers.saved(dataset, "another")
    (file,) = (tmp_path / "labels" / "_partial").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert not saved_answers.saved(dataset, "spec"), "a damaged file is asked again"
    saved_answers.forget(dataset, ["key"])
    saved_answers.tidy(dataset)
    assert not (tmp_path / "labels").exists()


def test_answers_are_kept_elsewhere_where_the_dataset_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "labels").write_text("a file, in which there is no room for files")
    answered = Answered(pa.table({"example_id": ["a"]}), np.array([0]), [], {"calls": 1})
    dataset = str(tmp_path / "labels")
    saved_answers.save(dataset, "key", "spec", [("unit", 0, 1)], [answered])
    spill = tmp_path / f"distilbeam-spill-{os.getuid()}"
    assert spill.stat().st_mode & 0o777 == 0o700
    assert len(list(spill.rglob("*.answers"))) == 1
    (tmp_path / "labels").unlink()
    (found,) = saved_answers.saved(dataset, "spec")
    assert found.table["example_id"].to_pylist() == ["a"]
    spill.chmod(0o755)
    assert not saved_answers.saved(dataset, "spec"), "others might have put it there"


def test_saved_answers_are_found_in_another_shard_of_the_same_rows() -> None:
    table = pa.table({"example_id": ["u1", "u2", "v0", "v2"]})
    failures = [{"example_id": "v1", "place": 4}, {"example_id": "u0", "place": 0}]
    parts = (("u", 0, 3), ("v", 0, 3))
    answered = Answered(table, np.array([1, 2, 3, 5]), failures, {"calls": 6}, parts)
    found = answered.of_shard([("w", 0, 10), ("v", 1, 3), ("u", 1, 2)])
    assert found is not None
    assert found.table["example_id"].to_pylist() == ["v2", "u1"]
    assert found.places.tolist() == [11, 12]
    assert [(f["example_id"], f["place"]) for f in found.failures] == [("v1", 10)]
    assert answered.of_shard([("u", 3, 9), ("w", 0, 3)]) is None
