"""Classifiers that name their classes, in Hugging Face folders and ONNX files; and heads that are no choice of one class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distilbeam.teacher import TeacherMisfit, ask, load_teacher

TEXTS = ["play some jazz", "stop", "stop it now play", "some", "jazz now"]
NAMES = ["positive", "neutral", "negative"]
TEXT = {"kind": "text", "column": "text"}
X = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
BATCH = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)})
W = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def bert(folder: Path, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["play", "some", "jazz", "now", "stop", "it"]]
    folder.mkdir()
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=12)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
        **settings,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def named() -> dict[str, Any]:
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def hugging_face(folder: Path, job: list[str] | None = None, **settings: Any) -> Any:
    config = {"kind": "huggingface", "model": str(folder), "input": TEXT, "device": "cpu", **settings}
    return load_teacher(config, classes=job)


def test_a_hugging_face_model_answers_in_the_job_s_order(tmp_path: Path) -> None:
    bert(tmp_path / "bert", **named())
    batch = pa.record_batch({"text": TEXTS})
    own = hugging_face(tmp_path / "bert").logits(batch)
    for classes in (sorted(NAMES), NAMES, ["Neutral", "POSITIVE", "negative"]):
        teacher = hugging_face(tmp_path / "bert", classes)
        wanted = own[:, [NAMES.index(name.lower()) for name in classes]]
        np.testing.assert_array_equal(teacher.logits(batch), wanted)
        np.testing.assert_array_equal(ask(teacher, batch, 3, batch_size=2).logits[:2], wanted[:2])
    np.testing.assert_array_equal(hugging_face(tmp_path / "bert", ["0", "1", "2"]).logits(batch), own)


def test_other_names_are_refused_and_may_be_said(tmp_path: Path) -> None:
    bert(tmp_path / "bert", **named())
    classes, batch = ["neg", "neu", "pos"], pa.record_batch({"text": TEXTS})
    with pytest.raises(
        ValueError,
        match=r"outputs are positive, neutral, negative \(id2label in its config.json\), the job's classes neg",
    ):
        hugging_face(tmp_path / "bert", classes)
    said = hugging_face(tmp_path / "bert", classes, classes=["pos", "neu", "neg"])
    np.testing.assert_array_equal(said.logits(batch), hugging_face(tmp_path / "bert").logits(batch)[:, [2, 1, 0]])
    with pytest.raises(ValueError, match=r"the teacher has 3 outputs .* the job 2 classes"):
        hugging_face(tmp_path / "bert", ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            r"gives each row several labels \(problem_type",
        ),
        ({"num_labels": 1}, r"answers with 1 number\(s\) .* regression and no choice among classes"),
        ({"num_labels": 3, "problem_type": "regression"}, r"answers with 3 number\(s\) \(problem_type 'regression'\)"),
    ],
)
def test_heads_that_choose_no_class_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    bert(tmp_path / "bert", **settings)
    with pytest.raises(ValueError, match=message):
        hugging_face(tmp_path / "bert")


def test_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    model = bert(tmp_path / "bert", num_labels=3)
    model.bert.save_pretrained(tmp_path / "bert")  # an encoder that was trained to fill in words
    with pytest.raises(
        ValueError, match=r"holds no weights for classifier.bias, classifier.weight: they would be drawn"
    ):
        hugging_face(tmp_path / "bert")


@pytest.mark.parametrize("padding", [None, "tokenizer", "both"])
def test_rows_stand_together_only_where_they_can_be_padded(tmp_path: Path, padding: str | None) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = [*(["[PAD]"] if padding else []), "[UNK]", "play", "some", "jazz", "now", "stop", "it"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pads = {"pad_token": "[PAD]"} if padding else {}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **pads)
    tokenizer.save_pretrained(tmp_path / "gpt")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=8, n_layer=1, n_head=2, n_positions=16, num_labels=3, initializer_range=1.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0 if padding == "both" else None,
    )  # fmt: skip
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "gpt")
    answers = ask(hugging_face(tmp_path / "gpt"), pa.record_batch({"text": TEXTS}), 3)
    assert (answers.calls, answers.requests, list(answers.errors)) == (5, 1, [])
    with torch.no_grad():
        one_by_one = [model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in TEXTS]
    np.testing.assert_allclose(answers.logits, np.concatenate(one_by_one), rtol=1e-4, atol=1e-5)


def test_a_damaged_folder_is_a_sentence(tmp_path: Path) -> None:
    bert(tmp_path / "bert", num_labels=3)
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"teacher.model: .*bert holds no text classifier with safetensors"):
        hugging_face(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"teacher.model: .* must be a folder with config.json"):
        hugging_face(weights)


def classifier(path: Path, labels: list[Any], form: str) -> Path:
    """A classifier as converters of scikit-learn write it: the class itself, and a map or a row of probabilities."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    helper, types = onnx.helper, onnx.TensorProto
    text = isinstance(labels[0], str)
    probabilities = "raw" if form == "maps" else "probabilities"
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", probabilities], domain="ai.onnx.ml", multi_class=1,
            coefficients=W.ravel().tolist(), intercepts=[0.0] * 3, post_transform="SOFTMAX",
            **{"classlabels_strings" if text else "classlabels_ints": labels},
        )
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info("label", types.STRING if text else types.INT64, ["n"])]
    if form == "maps":
        key = {"classlabels_strings" if text else "classlabels_int64s": labels}
        nodes.append(helper.make_node("ZipMap", ["raw"], ["probabilities"], domain="ai.onnx.ml", **key))
        maps = onnx.ValueInfoProto(name="probabilities")
        of = maps.type.sequence_type.elem_type.map_type
        of.key_type = types.STRING if text else types.INT64
        of.value_type.tensor_type.elem_type = types.FLOAT
        outputs.append(maps)
    else:
        outputs.append(helper.make_tensor_value_info("probabilities", types.FLOAT, ["n", 3]))
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", types.FLOAT, ["n", 4])], outputs)
    opsets = [helper.make_opsetid("ai.onnx.ml", 1), helper.make_opsetid("", 13)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def onnx(path: Path, classes: list[str] | None = None, **settings: Any) -> Any:
    return load_teacher({"kind": "onnx", "model": str(path), "input": {"column": "x"}, **settings}, classes=classes)


def expected() -> np.ndarray:
    z = X.astype(np.float64) @ W.T
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.log(e / e.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("form", ["maps", "rows"])
def test_the_probabilities_of_a_classifier_are_found(tmp_path: Path, form: str) -> None:
    path = classifier(tmp_path / "net.onnx", [0, 1, 2], form)
    answers = ask(onnx(path, answers="probabilities"), BATCH, 3)
    np.testing.assert_allclose(answers.logits, expected(), rtol=1e-3, atol=1e-4)
    with pytest.raises(TeacherMisfit, match=r"say teacher.answers = 'probabilities'"):
        ask(onnx(path), BATCH, 3)
    with pytest.raises(TeacherMisfit, match=r"must answer with shape \[20, 3\], got \[20\]: .*\(teacher.output\)"):
        ask(onnx(path, output="label"), BATCH, 3)


@pytest.mark.parametrize("form", ["maps", "rows"])
def test_the_classes_of_a_classifier_are_put_in_order(tmp_path: Path, form: str) -> None:
    path = classifier(tmp_path / "net.onnx", ["c", "a", "b"], form)
    teacher = onnx(path, ["a", "b", "c"], answers="probabilities")
    np.testing.assert_allclose(teacher.logits(BATCH), expected()[:, [1, 2, 0]], rtol=1e-3, atol=1e-4)
    assert teacher.fingerprint() != onnx(path, answers="probabilities").fingerprint()
    with pytest.raises(ValueError, match=r"the teacher's outputs are c, a, b \(the classifier's classlabels"):
        onnx(path, ["x", "y", "z"])


def test_unknown_outputs_are_named(tmp_path: Path) -> None:
    path = classifier(tmp_path / "net.onnx", [0, 1, 2], "rows")
    with pytest.raises(
        ValueError, match=r"teacher.output must be one of the model's outputs label, probabilities, got 'p'"
    ):
        onnx(path, output="p")


def test_id2label_must_count(tmp_path: Path) -> None:
    bert(tmp_path / "bert", num_labels=3)
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config["id2label"] = {"1": "a", "2": "b", "3": "c"}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"id2label in .*config.json must name the outputs 0 to 2"):
        hugging_face(tmp_path / "bert")
