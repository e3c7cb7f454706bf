"""The manual's nightly example, its two halves together: a teacher that is served, and a pool that is labelled by it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distilbeam.pipelines.config import load_any_config
from distilbeam.pipelines.pool.first_rows import first_rows
from distilbeam.pipelines.pool.splits import plan_pool
from distilbeam.settings import read_toml
from distilbeam.teacher import load_teacher
from distilbeam.teacher.config import parse_teacher_config
from distilbeam.teacher.tfserving.probing import with_probe_shape
from distilbeam.teacher.tfserving.serve import TeacherServer

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 8


def example() -> str:
    """The configuration as it stands in the manual."""
    section = (ROOT / "docs/guides/labelling.md").read_text()
    return section.split("```toml\n")[1].split("```")[0]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(torch.nn.Linear(WIDTH, 10), (torch.zeros(2, WIDTH),), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "teacher.pt2")
    return tmp_path / "teacher.pt2"


def write(path: Path, rows: int, name: str) -> None:
    path.parent.mkdir(exist_ok=True)
    x = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype(np.float32)
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), WIDTH)
    pq.write_table(pa.table({"id": [f"{name}-{i}" for i in range(rows)], "features": features}), path)


def distilbeam(*words: str) -> str:
    run = subprocess.run([sys.executable, "-m", "distilbeam", *words], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return run.stdout


def served(program: Path) -> TeacherServer:
    teacher = {"kind": "torch", "model": program.name, "device": "cpu", "input": {"columns": ["features"]}}
    return TeacherServer(teacher, base=program.parent)


def test_the_two_halves_work_together(program: Path, tmp_path: Path) -> None:
    write(tmp_path / "pool" / "1.parquet", 30, "a")
    with served(program) as server:
        config = tmp_path / "nightly.toml"
        config.write_text("\ufeff" + example().replace("teacher:8500", server.address).replace("\n", "\r\n"))
        assert "The pool has 30 rows in 1 file(s); 0 are labelled" in distilbeam("plan", str(config))
        assert "label 30" in re.sub(" +", " ", distilbeam("label", str(config)))
        write(tmp_path / "pool" / "0.parquet", 20, "b")  # another first row, of the same shape: the same teacher
        told = distilbeam("label", str(config))
        assert "The pool has 50 rows in 2 file(s); 30 are labelled, 20 are not." in told
        assert "everything is as the manifest says" in distilbeam(
            "verify", str(tmp_path / "labelling" / "labels"), "--teacher", str(config)
        )


def settings(address: str, **more: Any) -> Any:
    columns = {"columns": ["features"]}
    return parse_teacher_config({"kind": "tfserving", "address": address, "model": "teacher", "input": columns, **more})


def test_the_shape_is_that_of_the_first_row_that_has_one() -> None:
    config = settings("a:1")
    pool = pa.record_batch({"features": [None, [1.0, 2.0, 3.0]], "id": [1, 2]})
    assert with_probe_shape(config, lambda: [pool.slice(0, 1), pool.slice(1)]).probe_shape == (3,)  # type: ignore[union-attr]
    assert with_probe_shape(config, list) == config
    said = settings("a:1", probe_shape=[7])
    assert with_probe_shape(said, lambda: pytest.fail("nobody has to look")) == said
    other = parse_teacher_config({"kind": "torch", "model": "a.pt2", "input": {"column": "x"}})
    assert with_probe_shape(other, lambda: pytest.fail("nobody has to look")) is other


def test_the_first_rows_are_those_of_the_pool(tmp_path: Path) -> None:
    write(tmp_path / "pool" / "0.parquet", 100, "a")
    (batch,) = first_rows(lambda: plan_pool(tmp_path / "pool", 1000, "pool"), ["features"])()
    assert (len(batch), batch.schema.names) == (64, ["features"])
    assert list(first_rows(lambda: plan_pool(tmp_path / "nowhere", 1000, "pool"), ["features"])()) == []


def test_a_client_learns_the_shape_from_its_first_batch(program: Path) -> None:
    rows = pa.record_batch({"features": np.eye(WIDTH, dtype=np.float32).tolist()})
    with served(program) as server:
        unsaid: Any = load_teacher(settings(server.address))
        with pytest.raises(ValueError, match=r"teacher.probe_shape must be given: the model does not say the shape"):
            unsaid.fingerprint()
        unsaid.logits(rows)
        told: Any = load_teacher(settings(server.address, probe_shape=[WIDTH]))
        assert unsaid.fingerprint() == told.fingerprint()
        unsaid.close()
        told.close()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_of_any_editor_are_read(tmp_path: Path, mark: str, end: str) -> None:
    path = tmp_path / "nightly.toml"
    path.write_bytes((mark + example().replace("\n", end)).encode())
    config = load_any_config(path)
    assert (config.data.pool, config.dump()["data"]["pool"]) == (str(tmp_path / "pool"), "pool/")
    assert read_toml(path)["teacher"]["model"] == "teacher"


def test_files_that_are_no_utf_8_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes("[data]\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"x.toml is not valid TOML: it must be stored in UTF-8"):
        load_any_config(tmp_path / "x.toml")
