"""What a text student is where nothing is said, and what is left as it was: other kinds, what is said, folders of before."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import torch

from distilbeam.inputs.config import InputConfig
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import TEXT_INPUT, StudentConfig

TEXT = {"kind": "text", "columns": ["t"]}
FORMER = {"analyzer": "word", "ngrams": (1, 2), "buckets": 4096, "ngram_form": "vector"}


def said(config):
    return {name: getattr(config.input, name) for name in FORMER}


def test_a_text_student_of_which_nothing_is_said():
    config = StudentConfig(kind="text", input=TEXT)
    assert config.hidden == ()
    assert said(config) == {**FORMER, "analyzer": "char_wb", "ngrams": (2, 4), "buckets": 8192}
    assert StudentConfig.model_validate(config.model_dump(mode="json")) == config


def test_what_is_said_and_other_kinds_stay():
    assert StudentConfig(kind="text", hidden=(64, 64), input=TEXT).hidden == (64, 64)
    for own in ({"analyzer": "word"}, {"ngrams": (1, 3)}):  # n-grams and analyser belong together
        assert said(StudentConfig(kind="text", input={**TEXT, **own})) == {**FORMER, "buckets": 8192, **own}
    chosen = {**FORMER, "analyzer": "char_wb", "ngrams": (2, 4), "buckets": 512}
    assert said(StudentConfig(kind="text", input={**TEXT, "buckets": 512})) == chosen
    ids = StudentConfig(kind="text", input={**TEXT, "ngram_form": "ids"})
    assert said(ids) == {**FORMER, "ngram_form": "ids"}
    assert StudentConfig(kind="mlp", input={"columns": ["x"]}).hidden == (64, 64)
    assert said(StudentConfig(kind="mlp", input=TEXT)) == FORMER
    assert {name: getattr(InputConfig(**TEXT), name) for name in FORMER} == FORMER  # which teachers read too
    tokens = StudentConfig(kind="text", input={"kind": "tokens", "columns": ["t"], "vocabulary": 9})
    assert tokens.hidden == ()


def test_folders_of_before_are_what_they_were(tmp_path):
    config = StudentConfig(kind="text", hidden=(64, 64), input=InputConfig(**TEXT))
    torch.manual_seed(0)
    network = build_student(config, (4096,), 3).eval()
    folder = save_student(tmp_path / "s", network, config, "abc", (4096,))
    # what version 0.1 wrote: every setting, with the defaults that it had
    written = json.loads((folder / "student.json").read_text())["config"]
    assert written["hidden"] == [64, 64]
    assert {name: written["input"][name] for name in TEXT_INPUT} == {
        "analyzer": "word",
        "ngrams": [1, 2],
        "buckets": 4096,
    }
    student = load_student(folder)
    batch = pa.record_batch({"t": ["where is my card", "hello", ""]})
    expected = network(torch.tensor(student.inputs(batch))).detach().numpy()
    np.testing.assert_allclose(student.logits(batch), expected, atol=1e-6)
    # and its exports, which say of their input only what is not InputConfig's default
    export = export_student(folder, "pt2", tmp_path / "e")
    assert json.loads((export / "export.json").read_text())["input"] == {"kind": "text", "columns": ["t"]}
    np.testing.assert_allclose(load_export(export).logits(batch), expected, atol=1e-5)
