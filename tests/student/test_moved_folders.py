"""A student's folder and its exports are whole: they move, and what they say is checked."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.fingerprint import _without_places
from distilbeam.teacher.load import load_teacher

TEXTS = pa.record_batch({"text": ["good film", "bad film not", "not", "words nobody knows"]})
VECTOR = StudentConfig(kind="mlp", hidden=(16,), input={"columns": ["x"]})


def write_tokenizer(path, words="not good bad film"):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words.split()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def save(directory, tokenizer, kind="transformer"):
    reading = {"kind": "text", "columns": ["text"], "tokenizer": str(tokenizer), "max_length": 6}
    config = StudentConfig(kind=kind, dim=8, layers=1, heads=2, hidden=(8,), input=reading)
    torch.manual_seed(0)
    return save_student(directory, build_student(config, (6,), 2), config, ("a", "b"), (6,))


@pytest.mark.parametrize("kind", ["transformer", "text"])
def test_a_student_with_a_tokenizer_moves(tmp_path, kind):
    tokenizer = write_tokenizer(tmp_path / "words.json")
    student = save(tmp_path / "here" / "student", tokenizer, kind)
    before = load_student(student)
    logits = before.logits(TEXTS)
    shutil.move(tmp_path / "here", tmp_path / "there")
    tokenizer.unlink()
    moved = tmp_path / "there" / "student"
    assert json.loads((moved / "student.json").read_text())["config"]["input"]["tokenizer"] == "tokenizer.json"
    after = load_student(moved)
    np.testing.assert_array_equal(after.logits(TEXTS), logits)
    assert after.fingerprint() == before.fingerprint()
    again = save_student(tmp_path / "again", after.module, after.config, after.classes, after.input_shape)
    assert load_student(again).fingerprint() == before.fingerprint()


def test_the_fingerprint_follows_what_the_tokenizer_holds(tmp_path):
    first = save(tmp_path / "first", write_tokenizer(tmp_path / "a.json"))
    second = save(tmp_path / "second", write_tokenizer(tmp_path / "b.json", "good not bad film"))
    assert load_student(first).fingerprint() != load_student(second).fingerprint()


def test_a_stopped_training_goes_on_where_it_was_moved(tmp_path):
    (tmp_path / "moved").mkdir()
    configs = [load_student(save(tmp_path / "s", write_tokenizer(tmp_path / "a.json"))).config]
    shutil.copy(tmp_path / "a.json", tmp_path / "moved" / "a.json")
    changed = configs[0].input.model_copy(update={"tokenizer": str(tmp_path / "moved" / "a.json")})
    configs.append(configs[0].model_copy(update={"input": changed}))
    assert _without_places(configs[0]) == _without_places(configs[1])


def test_a_folder_of_before_is_read_where_its_tokenizer_is_or_was_put(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "words.json")
    student = save(tmp_path / "student", tokenizer)
    logits = load_student(student).logits(TEXTS)
    description = json.loads((student / "student.json").read_text())
    description["config"]["input"]["tokenizer"] = str(tokenizer)
    (student / "student.json").write_text(json.dumps(description))
    (student / "tokenizer.json").unlink()
    np.testing.assert_array_equal(load_student(student).logits(TEXTS), logits)
    copied = tokenizer.read_bytes()
    tokenizer.unlink()
    with pytest.raises(
        ValueError, match=r"student needs the tokenizer .*words.json, which is not there; copy it to .*/tokenizer"
    ):
        load_student(student)
    (student / "tokenizer.json").write_bytes(copied)
    np.testing.assert_array_equal(load_student(student).logits(TEXTS), logits)


def test_an_export_with_a_tokenizer_moves_and_its_teacher_section_asks_it(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "words.json")
    student = save(tmp_path / "student", tokenizer, "text")
    export_student(student, "pt2", tmp_path / "here")
    logits = load_student(student).logits(TEXTS)
    shutil.move(tmp_path / "here", tmp_path / "there")
    tokenizer.unlink()
    np.testing.assert_allclose(load_export(tmp_path / "there").logits(TEXTS), logits, rtol=1e-5, atol=1e-6)
    section = json.loads((tmp_path / "there" / "export.json").read_text())["teacher"]
    assert (section["model"], section["input"]["tokenizer"]) == ("model.pt2", "tokenizer.json")
    teacher = load_teacher(section, base=tmp_path / "there")
    np.testing.assert_allclose(teacher.logits(TEXTS), logits, rtol=1e-5, atol=1e-6)
    teacher.close()


@pytest.fixture
def saved(tmp_path):
    return save_student(tmp_path / "student", build_student(VECTOR, (2,), 3), VECTOR, "abc", (2,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: [said], "has format version None"),
        (lambda said: said.pop("config") and said, "does not describe a student: config: Field required"),
        (lambda said: said | {"classes": 7}, "does not describe a student: classes"),
        (lambda said: said | {"classes": []}, "does not describe a student: classes"),
        (lambda said: said | {"input_shape": [-2]}, "does not describe a student: input_shape.0"),
        (lambda said: said | {"input_shape": "2"}, "does not describe a student: input_shape"),
        (lambda said: said | {"config": {"kind": "mlp"}}, "does not describe a student: config.input: Field required"),
        (lambda said: said | {"config": said["config"] | {"hidden": [0]}}, "hidden must hold positive widths"),
        (
            lambda said: said | {"input_shape": [10**9, 10**5]},
            r"of the shape \[16, 2\] there and of the shape \[16, 10{14}\]",
        ),
        (
            lambda said: said | {"input_shape": [3]},
            r"weight is of the shape \[16, 2\] there and of the shape \[16, 3\] by",
        ),
        (lambda said: said | {"config": said["config"] | {"hidden": [16, 16]}}, "is missing there and of the shape"),
    ],
)
def test_a_description_that_does_not_fit_is_a_sentence(saved, change, message):
    said = json.loads((saved / "student.json").read_text())
    (saved / "student.json").write_text(json.dumps(change(said)))
    with pytest.raises(ValueError, match=message) as e:
        load_student(saved)
    assert str(saved) in str(e.value)
    assert "\n" not in str(e.value)


def test_weights_of_another_shape_or_of_no_kind_are_a_sentence(saved):
    weights = load_file(saved / "model.safetensors")
    name = next(name for name in weights if name.endswith("bias"))
    save_file(weights | {name: torch.zeros(5)}, saved / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"{name} is of the shape \[5\] there and of the shape \[\d+\] by .*; copy the"
    ):
        load_student(saved)
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="does not hold the weights of this student"):
        load_student(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold the weights of this student"):
        load_student(saved)


def test_what_a_later_release_adds_is_passed_over(saved):
    before = load_student(saved).fingerprint()
    said = json.loads((saved / "student.json").read_text())
    (saved / "student.json").write_text(json.dumps(said | {"licence": "Apache-2.0"}))
    assert load_student(saved).fingerprint() == before
