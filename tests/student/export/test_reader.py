"""The reader that lies in every export: the student's own answers, where distilbeam cannot be imported."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.testing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_distilbeam import lines_of
from PIL import Image

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export import reader
from distilbeam.student.export.export import export_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig

TEXTS = ["Where is my card?", "x", "", "  ", "a  b\tc\n\nd", "naïve Straße ΣΊΣΥΦΟΣ \U0001f600 ok", "the the the cat"]


def given_input(**settings_):
    return InputConfig(kind="text", columns=("text",), **settings_)


@pytest.mark.parametrize("analyzer", ["word", "char", "char_wb"])
@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2), (2, 3), (3, 5)])
@pytest.mark.parametrize("form", ["vector", "ids"])
def test_texts_are_hashed_as_the_student_hashes_them(analyzer, ngrams, form):
    config = given_input(analyzer=analyzer, ngrams=ngrams, ngram_form=form, buckets=97, max_length=40, pad_id=5)
    same_as_ours(config, TEXTS)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4))
def test_any_text_is_hashed_as_the_student_hashes_it(texts):
    for analyzer in ("word", "char_wb"):
        same_as_ours(given_input(analyzer=analyzer, ngrams=(1, 3), buckets=2**20, ngram_form="ids"), texts)
        same_as_ours(given_input(analyzer=analyzer, ngrams=(1, 3), buckets=64), texts)


def same_as_ours(config, texts):
    expected = make_input(config)(pa.record_batch({"text": pa.array(texts, pa.string())}))
    made = reader._maker(config.model_dump(mode="json", exclude_defaults=True), Path())([[text] for text in texts])
    assert made.dtype == expected.dtype
    npt.assert_allclose(made, expected, atol=1e-6 if expected.dtype == np.float32 else 0)


def test_murmurhash_of_known_values():
    # MurmurHash3_x86_32 with seed 0 as its author's SMHasher and others list them
    known = {"": 0, "a": 0x3C2569B2, "abc": 0xB3DD93FA, "test": 0xBA6BD213, "Hello, world!": 0xC0363E43}
    assert {text: reader.murmur3(text) % 2**32 for text in known} == known


def save(where, config, shape, classes=("no", "yes", "maybe")):
    torch.manual_seed(0)
    return save_student(where, build_student(config, shape, len(classes)), config, classes, shape)


@pytest.mark.parametrize("format_", ["onnx", "pt2"])
def test_a_text_student_answers_without_distilbeam(tmp_path, format_):
    inputs = given_input(buckets=512, ngram_form="ids", ngrams=(1, 2))
    student = save(tmp_path / "s", StudentConfig(kind="text", hidden=(), dim=16, input=inputs), (128,))
    export = export_student(student, format_, tmp_path / "e")
    found = lines_of(export / "reader.py", [], [{"text": text, "id": 3} for text in TEXTS], tmp_path)
    expected = load_student(student).predict(TEXTS)
    assert [row["prediction"] for row in found] == expected["prediction"].to_pylist()
    npt.assert_allclose([row["confidence"] for row in found], expected["confidence"].to_numpy(), atol=1e-5)


def test_a_student_of_images_answers_without_distilbeam(tmp_path):
    rng = np.random.default_rng(0)
    inputs = {"kind": "image", "columns": ["image"], "size": (8, 8), "mean": [0.5], "std": [0.2]}
    student = save(tmp_path / "s", StudentConfig(kind="cnn", width=0.25, input=inputs), (3, 8, 8))
    files = []
    for number, (mode, orientation) in enumerate([("RGB", 1), ("L", 6), ("P", 3), ("RGB", 8), ("I;16", 1)]):
        grey = rng.integers(0, 2**16 if mode == "I;16" else 2**8, (20, 13, 3))
        picture = Image.fromarray(grey.astype(np.uint8)).convert(mode) if mode != "I;16" else None
        picture = picture or Image.fromarray(grey[..., 0].astype(np.uint16))
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{number}.png"
        picture.save(path, exif=exif)
        files.append(path)
    export = export_student(student, "onnx", tmp_path / "e")
    found = lines_of(export / "reader.py", [], [{"image": str(path)} for path in files], tmp_path)
    expected = load_student(student).predict([path.read_bytes() for path in files])
    npt.assert_allclose([row["confidence"] for row in found], expected["confidence"].to_numpy(), atol=2e-3)
    npt.assert_allclose([row["confidence"] for row in found][:4], expected["confidence"].to_numpy()[:4], atol=1e-5)
    own = reader.Export(export)
    buffer = io.BytesIO(files[0].read_bytes())
    assert own.predict([{"image": buffer.getvalue()}], top_k=2) == own.predict([{"image": str(files[0])}], top_k=2)


def test_numbers_and_tokens_answer_as_the_student(tmp_path):
    tokens = {"kind": "tokens", "columns": ["ids"], "max_length": 5, "vocabulary": 30, "pad_id": 2}
    student = save(tmp_path / "t", StudentConfig(kind="transformer", dim=8, heads=2, layers=1, input=tokens), (5,))
    rows = [[1, 2, 3], [], [4, 5, 6, 7, 8, 9]]
    export = reader.Export(export_student(student, "onnx", tmp_path / "te"))
    expected = load_student(student).logits(pa.record_batch({"ids": pa.array(rows, pa.list_(pa.int64()))}))
    npt.assert_allclose(export.logits([{"ids": row} for row in rows]), expected, atol=1e-5)
    numbers = {"columns": ["t", "v"], "mean": [1.7e9, 0.0, 1.0], "std": [1e4, 1.0, 2.0]}  # too far for the graph
    student = save(tmp_path / "n", StudentConfig(kind="mlp", hidden=(4,), input=numbers), (3,))
    export = reader.Export(export_student(student, "onnx", tmp_path / "ne"))
    rows = [{"t": 1.7e9 + 3.0, "v": [1.0, 2.0]}, {"t": 1.7e9 - 2e4, "v": [0.0, -2.0]}]
    lists = pa.array([row["v"] for row in rows], pa.list_(pa.float64(), 2))
    batch = pa.record_batch({"t": pa.array([row["t"] for row in rows]), "v": lists})
    npt.assert_allclose(export.logits(rows), load_student(student).logits(batch), atol=1e-5)
    assert export.predict([]) == []
    stored = np.array(rows[1]["v"], np.float32).tobytes()  # as a column of bytes has them
    npt.assert_allclose(
        export.logits([{"t": np.array(rows[1]["t"]), "v": stored}])[0], export.logits(rows)[1], atol=1e-5
    )
    student = save(tmp_path / "p", StudentConfig(kind="mlp", hidden=(4,), input={"columns": ["v"]}), (3,))
    export = reader.Export(export_student(student, "onnx", tmp_path / "pe"))
    with pytest.raises(ValueError, match=r"an example must have the shape \[3\], got \[6\]"):
        export.logits([{"v": [0.0] * 6}])  # which are no two examples


def test_a_tokenizer_answers_as_the_student(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "where": 2, "is": 3, "card": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    inputs = given_input(tokenizer=str(tmp_path / "tokenizer.json"), max_length=4)
    student = save(tmp_path / "s", StudentConfig(kind="transformer", dim=8, heads=2, layers=1, input=inputs), (4,))
    export = reader.Export(export_student(student, "onnx", tmp_path / "e"))
    texts = ["where is", "card card card card card card", "nobody"]
    expected = load_student(student).logits(pa.record_batch({"text": texts}))
    npt.assert_allclose(export.logits([{"text": text} for text in texts]), expected, atol=1e-5)


def test_a_line_without_an_answer_ends_nothing_and_says_why(tmp_path):
    student = save(tmp_path / "s", StudentConfig(kind="mlp", hidden=(4,), input={"columns": ["v"]}), (3,))
    export = export_student(student, "onnx", tmp_path / "e")
    lines = [{"v": [0, 1, 2]}, {"w": 1}, 7, {"v": [0, 1]}, {"v": ["a", "b", "c"]}, {"v": None}, {"v": [0, 1, 2]}]
    found = lines_of(export / "reader.py", [], lines, tmp_path)
    assert found[0] == found[-1]
    assert found[0]["prediction"] is not None
    assert [answer["prediction"] for answer in found[1:-1]] == [None] * 5
    assert found[1]["reason"] == "a row must have the column(s) v, got w"
    assert found[2]["reason"] == "a line must be a JSON object, got int"
    assert "shape [3], got [2]" in found[3]["reason"]
    assert all(answer["reason"] for answer in found[1:-1])
