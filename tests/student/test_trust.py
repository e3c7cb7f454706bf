"""A folder chooses no code: its factory and functions are called only where the caller names them too."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distilbeam.student import trust as trusting
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train

CODE = """
import pathlib
import numpy
import torch
pathlib.Path(__file__).with_name("imported").touch()

def network(input_shape, num_classes):
    pathlib.Path(__file__).with_name("called").touch()
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(input_shape[0], num_classes))

def doubled(batch):
    return 2 * numpy.stack(batch["x"].to_pylist()).astype("float32")
"""
CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusting, "_trusted", set())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"foreign_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def folder(directory: Path, config: dict[str, Any]) -> Path:
    """A student's folder as somebody else sends it."""
    own = StudentConfig(kind="linear", input={"columns": ["x"]})
    torch.manual_seed(0)
    path = save_student(directory, build_student(own, (2,), 3), own, CLASSES, (2,))
    description = json.loads((path / "student.json").read_text())
    description["config"] |= config
    (path / "student.json").write_text(json.dumps(description))
    return path


def table(rows: int = 6) -> pa.Table:
    x = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    labels = [CLASSES[i % 3] for i in range(rows)]
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 2), "label": labels})


def test_a_factory_is_not_imported_for_a_folder(tmp_path: Path, module: str) -> None:
    path = folder(tmp_path / "sent", {"kind": f"{module}:network"})
    with pytest.raises(ValueError, match=rf"student.json wants to call {module}:network, .*--trust {module}"):
        load_student(path)
    assert not (tmp_path / "imported").exists()


def test_a_function_of_an_input_is_not_imported_for_a_folder(tmp_path: Path, module: str) -> None:
    given = {"kind": "function", "columns": ["x"], "function": f"{module}:doubled"}
    path = folder(tmp_path / "sent", {"input": given})
    with pytest.raises(ValueError, match=rf"wants to call {module}:doubled"):
        load_student(path)
    assert not (tmp_path / "imported").exists()
    student = load_student(path, trust=[f"{module}:doubled"])
    assert student.logits(table().select(["x"]).to_batches()[0]).shape == (6, 3)


def test_a_pruned_student_smuggles_no_factory(tmp_path: Path, module: str) -> None:
    network = StudentConfig(kind="linear", input={"columns": ["x"]}).model_dump(mode="json") | {
        "kind": f"{module}:network"
    }
    kind = "distilbeam.student.export.prune:pruned_network"
    path = folder(tmp_path / "sent", {"kind": kind, "options": {"network": network, "shapes": {}}})
    with pytest.raises(ValueError, match=rf"wants to call {module}:network"):
        load_student(path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("kind", ["torch.hub:load", "os:system", "distilbeam.student.export.export:export_student"])
def test_installed_code_is_no_exception(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"wants to call {kind}, and a file may not choose what is run"):
        load_student(folder(tmp_path / "sent", {"kind": kind, "options": {}}))


def test_an_export_calls_no_function(tmp_path: Path, module: str) -> None:
    student = folder(tmp_path / "student", {})
    export = export_student(student, "pt2", tmp_path / "export")
    assert load_export(export).logits(table().select(["x"]).to_batches()[0]).shape == (6, 3)
    description = json.loads((export / "export.json").read_text())
    description["input"] = {"kind": "function", "columns": ["x"], "function": f"{module}:doubled"}
    (export / "export.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"export.json wants to call {module}:doubled"):
        load_export(export)
    assert not (tmp_path / "imported").exists()
    assert load_export(export, trust=[module]).logits(table().select(["x"]).to_batches()[0]).shape == (6, 3)


def test_an_export_names_a_file_beside_it(tmp_path: Path) -> None:
    export = export_student(folder(tmp_path / "student", {}), "pt2", tmp_path / "export")
    description = json.loads((export / "export.json").read_text()) | {"file": "../student/model.safetensors"}
    (export / "export.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"names the file '../student/model.safetensors', which must lie beside it"):
        load_export(export)


def test_a_damaged_description_is_a_sentence(tmp_path: Path) -> None:
    export = export_student(folder(tmp_path / "student", {}), "pt2", tmp_path / "export")
    good = json.loads((export / "export.json").read_text())
    for key, value in itertools.product(("classes", "input", "input_shape", "file", "student", "digest"), (3, [], {})):
        (export / "export.json").write_text(json.dumps(good | {key: value}))
        with suppress(ValueError, OSError):
            load_export(export)
    for key in ("classes", "input", "input_shape", "file", "student", "digest", "size_bytes"):
        (export / "export.json").write_text(json.dumps({name: part for name, part in good.items() if name != key}))
        with pytest.raises(ValueError, match=rf"export.json does not describe an export: it has no '{key}'"):
            load_export(export)
    (export / "export.json").write_text("[]")
    with pytest.raises(ValueError, match="has format version None, this release reads 1"):
        load_export(export)


def test_who_trains_with_a_factory_trusts_it(tmp_path: Path, module: str) -> None:
    config = StudentConfig(kind=f"{module}:network", input={"columns": ["x"]})
    indexed = table(30).set_column(1, "label", pa.array([i % 3 for i in range(30)], pa.int64()))
    done = train(
        config,
        TrainConfig(epochs=1),
        classes=CLASSES,
        labelled=indexed,
        soft_labels=[],
        validation=indexed,
        label_column="label",
        directory=tmp_path / "trained",
        seed=0,
    )
    assert (tmp_path / "called").exists()
    load_student(done.directory)
    trusting._trusted.clear()
    with pytest.raises(ValueError, match="wants to call"):
        load_student(done.directory)


@pytest.mark.parametrize("name", ["", "a b", "a:", "../x", "a:b-c"])
def test_what_is_trusted_has_a_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"--trust must name a module or module:name, got "):
        trusting.trust(name)


def test_trust_covers_a_module_and_what_is_below_it(tmp_path: Path) -> None:
    trusting.trust("mine", "its.part:make")
    where = tmp_path / "student.json"
    trusting.require_trusted(["mine:a", "mine.nets:b", "its.part:make"], where)
    for name in ("mines:a", "its.part:other", "its:make"):
        with pytest.raises(ValueError, match="wants to call"):
            trusting.require_trusted([name], where)


def test_the_command_says_how_to_trust(tmp_path: Path, module: str) -> None:
    path = folder(tmp_path / "sent", {"kind": f"{module}:network"})
    pq.write_table(table(), tmp_path / "data.parquet")
    command = [sys.executable, "-m", "distilbeam", "evaluate", str(path), "--data", str(tmp_path / "data.parquet")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert f"wants to call {module}:network" in done.stderr
    assert not (tmp_path / "imported").exists()
    done = subprocess.run([*command, "--trust", module], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").exists()
