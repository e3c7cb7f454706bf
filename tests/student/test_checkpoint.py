"""Students on disk: complete or absent, the same when read again, refused in a sentence when they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from distilbeam.student.checkpoint import FORWARD_NUMBERS, FORWARD_ROWS, load_student, save_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig

CLASSES = ("red", "green", "blue")


@pytest.fixture
def network(student_config):
    torch.manual_seed(0)
    return build_student(student_config, (2,), 3)


@pytest.fixture
def saved(tmp_path, network, student_config):
    return save_student(tmp_path / "student", network, student_config, CLASSES, (2,), {"note": 1})


def batch_of(problem, rows, seed=1):
    return problem(rows, seed).table().combine_chunks().to_batches()[0]


def test_a_student_read_again_answers_the_same(saved, network, student_config, problem):
    student = load_student(saved)
    data = problem(300, 1)
    found = student.logits(data.table().combine_chunks().to_batches()[0])
    assert found.dtype == np.float32
    with torch.no_grad():
        np.testing.assert_allclose(found, network.eval()(torch.from_numpy(data.x)).numpy(), rtol=1e-5, atol=1e-6)
    assert student.classes == CLASSES
    assert student.config == student_config
    assert student.input_shape == (2,)
    assert student.num_parameters == 2 * 16 + 16 + 16 * 3 + 3
    assert student.size_bytes == (saved / "model.safetensors").stat().st_size
    assert student.extra == {"note": 1}


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_rows_logits_do_not_depend_on_the_rows_around_it(tmp_path, kind):
    """But for the last bit: a matrix product may round a row by where in the block it stands."""
    shape = (1, 8, 8) if kind == "cnn" else (64,)
    config = StudentConfig(kind=kind, width=0.1, hidden=(32, 32), input={"columns": ["x"], "shape": shape})
    torch.manual_seed(1)
    student = load_student(save_student(tmp_path / "s", build_student(config, shape, 5), config, "abcde", shape))
    many = FORWARD_NUMBERS // 64
    x = np.random.default_rng(0).normal(size=(many + FORWARD_ROWS + 87, 64)).astype(np.float32)
    batch = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 64)})
    whole = student.logits(batch)
    order = np.random.default_rng(1).permutation(len(x))
    for size in (300, many + 7, len(x)):
        parts = [student.logits(batch.take(pa.array(order[i : i + size]))) for i in range(0, len(x), size)]
        np.testing.assert_allclose(np.concatenate(parts), whole[order], rtol=0, atol=1e-6)
        again = [student.logits(batch.take(pa.array(order[i : i + size]))) for i in range(0, len(x), size)]
        np.testing.assert_array_equal(np.concatenate(again), np.concatenate(parts))


def test_no_rows_have_no_logits(saved):
    batch = pa.record_batch({"x": pa.array([], pa.list_(pa.float32(), 2))})
    assert load_student(saved).logits(batch).shape == (0, 3)


def test_the_fingerprint_follows_weights_and_meaning(saved, tmp_path, network, student_config):
    same = save_student(tmp_path / "same", network, student_config, CLASSES, (2,), {"note": 2})
    renamed = save_student(tmp_path / "renamed", network, student_config, ("a", "b", "c"), (2,))
    with torch.no_grad():
        network.head.bias[0] += 1e-3
    moved = save_student(tmp_path / "moved", network, student_config, CLASSES, (2,))
    first, second, third, fourth = (load_student(path).fingerprint() for path in (saved, same, renamed, moved))
    assert first == second
    assert len({first, third, fourth}) == 3


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, network, student_config):
    def fail(_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_student(tmp_path / "student", network, student_config, CLASSES, (2,), files=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_directory_appears_by_one_rename(tmp_path, network, student_config, monkeypatch):
    def look(temporary):
        assert not target.exists()
        assert sorted(path.name for path in temporary.iterdir()) == ["model.safetensors", "student.json"]

    def fail(*_):
        raise OSError("power cut")

    target = tmp_path / "student"
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        save_student(target, network, student_config, CLASSES, (2,), files=look)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_left_alone(saved, network, student_config):
    before = (saved / "student.json").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a student; choose another directory or remove it"):
        save_student(saved, network, student_config, CLASSES, (2,))
    assert (saved / "student.json").read_bytes() == before


def test_what_cannot_be_read_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"holds no student: student.json is missing"):
        load_student(tmp_path)
    description = json.loads((saved / "student.json").read_text())
    (saved / "student.json").write_text(json.dumps({**description, "format_version": 9}))
    with pytest.raises(ValueError, match="has format version 9, this release reads 1"):
        load_student(saved)
    (saved / "student.json").write_text(json.dumps({**description, "classes": ["a"]}))
    with pytest.raises(ValueError, match="does not hold the weights of this student"):
        load_student(saved)
    (saved / "student.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_student(saved)
    (saved / "student.json").write_text(json.dumps(description))
    weights = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(weights[:40])
    with pytest.raises(ValueError, match="does not hold the weights of this student"):
        load_student(saved)


def test_inputs_of_another_shape_are_refused(saved):
    batch = pa.record_batch({"x": pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))})
    with pytest.raises(
        ValueError, match=r"inputs must have the shape \[2\] that the student was trained on, got \[3\]"
    ):
        load_student(saved).logits(batch)


def test_loading_leaves_the_global_generator_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_student(saved)
    assert torch.equal(torch.rand(1), expected)
