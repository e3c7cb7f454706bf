"""Classifiers of transformers as students: trained, stopped and gone on with, opened by the library itself, exported, refused."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import tiny_huggingface as tiny
import torch
from on_step import OnStep
from PIL import Image
from safetensors.torch import load_file, save_file

from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train

transformers = pytest.importorskip("transformers", reason="needs distilbeam[hf]")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of transformers' imports
KINDS = ("text", "image")


def settings(tmp_path, reads="text", **changes):
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    return StudentConfig.model_validate({**tiny.student_settings(reads, tokenizer), **changes})


def training(**changes):
    return TrainConfig.model_validate({"epochs": 8, "batch_size": 16, "lr": 1e-2, **changes})


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """Train a student of each kind; give the kind, its folder, its data and its metrics."""
    place = tmp_path_factory.mktemp(request.param)
    data = tiny.write_data(place / "labels", request.param)
    result = train(settings(place, request.param), training(), **data, directory=place / "student", seed=1)
    return request.param, place / "student", data, result.metrics


def test_a_student_learns_and_transformers_gives_its_answers(trained):
    kind, folder, data, metrics = trained
    assert metrics["validation_accuracy"] > 0.6  # a third by chance: 24 rows are above .6 once in 300 times
    student, rows = load_student(folder), data["validation"].drop_columns("label")
    predicted = student.predict(rows)
    pipe = transformers.pipeline(f"{'text' if kind == 'text' else kind}-classification", str(folder))
    values = rows.column(0).to_pylist()
    found = pipe(values if kind == "text" else [Image.open(io.BytesIO(value)) for value in values], top_k=1)
    assert [answer[0]["label"] for answer in found] == predicted["prediction"].to_pylist()
    np.testing.assert_allclose([answer[0]["score"] for answer in found], predicted["confidence"], atol=1e-5)
    auto = "AutoModelForSequenceClassification" if kind == "text" else "AutoModelForImageClassification"
    model = getattr(transformers, auto).from_pretrained(folder)
    assert list(model.config.id2label.values()) == list(tiny.NAMES)


def test_its_embeddings_are_what_its_head_sees(trained):
    _, folder, data, _ = trained
    student, batch = load_student(folder), data["validation"].combine_chunks().to_batches()[0]
    logits, embeddings = student.logits_and_embeddings(batch)
    head = student.module.model.classifier
    np.testing.assert_allclose(logits, embeddings @ head.weight.numpy().T + head.bias.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_ends_with_the_same_weights(kind, tmp_path):
    data = tiny.write_data(tmp_path / "labels", kind)
    config, how = settings(tmp_path, kind), training(epochs=3, checkpoint_steps=2, ema=0.9, checkpoint_seconds=1e9)
    train(config, how, **data, directory=tmp_path / "whole", seed=2)

    def stop(done, _total, _note):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, how, **data, directory=tmp_path / "stopped", seed=2, progress=OnStep(stop))
    train(config, how, **data, directory=tmp_path / "stopped", seed=2)
    assert load_student(tmp_path / "stopped").fingerprint() == load_student(tmp_path / "whole").fingerprint()
    train(config, how, **data, directory=tmp_path / "other", seed=3)
    assert load_student(tmp_path / "other").fingerprint() != load_student(tmp_path / "whole").fingerprint()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_it_trains_in_other_precisions(precision, tmp_path):
    data, config = tiny.write_data(tmp_path / "labels", "text"), settings(tmp_path)
    losses = {}
    for name in ("fp32", precision):
        how = training(epochs=1, precision=name, precision_gate="sizes")
        losses[name] = train(config, how, **data, directory=tmp_path / name, seed=1).metrics["train_loss"]
        assert all(value.dtype == torch.float32 for value in load_file(tmp_path / name / "model.safetensors").values())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses[precision] != losses["fp32"]


def test_a_folder_gives_its_weights_and_tokenizer(trained, tmp_path):
    kind, folder, _, _ = trained
    inputs = {
        "kind": kind,
        "columns": [kind],
        **({"max_length": 8} if kind == "text" else {"size": [16, 16], "mean": [0.5], "std": [0.5]}),
    }
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "student.json").unlink()
    config = StudentConfig(kind="huggingface", model=str(copy), input=inputs)
    assert kind == "image" or config.input.tokenizer == str(copy / "tokenizer.json")
    former = load_student(folder).module.state_dict()
    shape = (8,) if kind == "text" else (3, 16, 16)
    same = build_student(config, shape, 3).state_dict()
    assert all(torch.equal(same[name], value) for name, value in former.items())
    more = build_student(config, shape, 5).state_dict()  # another number of classes: the head alone is drawn anew
    assert {name for name in former if more[name].shape != former[name].shape} == {
        "model.classifier.weight",
        "model.classifier.bias",
    }
    assert all(
        torch.equal(more[name], value) for name, value in former.items() if "classifier" not in name or "pre_" in name
    )


@pytest.mark.parametrize("format_", ["pt2", "onnx", "int8", "int8-weights"])
def test_exports_answer_like_the_student(trained, tmp_path, format_):
    from distilbeam.student.export.export import export_student
    from distilbeam.student.export.load import load_model

    _, folder, data, _ = trained
    student, batch = load_student(folder), data["validation"].combine_chunks().to_batches()[0]
    export_student(folder, format_, tmp_path / "export", student.inputs(batch))
    found = load_model(tmp_path / "export").predict(data["validation"].drop_columns("label"))
    same = np.mean(
        np.array(found["prediction"])
        == np.array(student.predict(data["validation"].drop_columns("label"))["prediction"])
    )
    assert same == 1.0 if format_ in ("pt2", "onnx") else same > 0.8


def test_an_onnx_file_of_texts_is_one_for_tools_of_such_folders(trained, tmp_path):
    import onnxruntime

    from distilbeam.student.export.export import export_student

    kind, folder, data, _ = trained
    where = export_student(folder, "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(where / "model.onnx"))
    (given,) = session.get_inputs()
    if kind != "text":
        assert given.name == "input"
        assert not (where / "config.json").exists()
        return
    assert (given.name, given.shape) == ("input_ids", ["batch", "sequence"])
    assert "takes `input_ids`, int64 [batch, sequence]" in (where / "README.md").read_text()
    config = transformers.AutoConfig.from_pretrained(where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    student, rows = load_student(folder), data["validation"].slice(0, 5)
    expected = student.logits(rows.combine_chunks().to_batches()[0])
    for text, wanted in zip(rows["text"].to_pylist(), expected, strict=True):  # each of its own length, without padding
        ids = np.array([tokenizer(text)["input_ids"]], np.int64)
        (logits,) = session.run(["logits"], {"input_ids": ids})
        np.testing.assert_allclose(logits[0], wanted, atol=1e-5)
        assert config.id2label[int(logits.argmax())] == student.classes[int(wanted.argmax())]


def test_an_export_of_one_length_where_a_network_has_no_other(trained, tmp_path, monkeypatch):
    from distilbeam.student.export import export

    folder = trained[1]
    traced = export._traced

    def fixed(graph):
        if graph.lengths:
            raise RuntimeError("a size is built in")
        return traced(graph)

    monkeypatch.setattr(export, "_traced", fixed)
    where = export.export_student(folder, "onnx", tmp_path / "onnx")
    assert "sequence" not in json.loads((where / "export.json").read_text())["dimensions"]
    assert not (where / "config.json").exists()


def test_a_text_without_a_token_has_an_answer(tmp_path):
    network = build_student(settings(tmp_path), (8,), 3).eval()
    ids = torch.zeros(2, 8, dtype=torch.int64)
    ids[1, 0] = 5
    with torch.inference_mode():
        logits = network(ids)
        alone = network(ids[1:])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], alone)


def test_padding_changes_nothing(tmp_path):
    network = build_student(settings(tmp_path), (8,), 3).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(network(torch.nn.functional.pad(ids, (0, 4))), network(ids))


def test_damaged_weights_are_refused(trained, tmp_path):
    _, folder, _, _ = trained
    for name, change in (
        ("missing", lambda tensors: tensors.pop(next(iter(tensors)))),
        ("unexpected", lambda tensors: tensors.update(more=torch.zeros(1))),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"does not hold the weights of this student: its {name} keys are"):
            load_student(copy)
    copy = shutil.copytree(folder, tmp_path / "config")
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**told, "layer_norm_eps": 0.5}))
    assert load_student(copy).fingerprint() != load_student(folder).fingerprint()
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no model of the transformers library can be read"):
        load_student(copy)


TEXT = {"kind": "text", "columns": ["text"], "max_length": 8}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": None}, "must have model, a folder, or config, one of them"),
        ({"model": "folder"}, "must have model, a folder, or config, one of them"),
        ({"kind": "text"}, "model and config are for students of kind 'huggingface', got kind 'text'"),
        ({"input": {"columns": ["x"]}}, "reads text with a tokenizer, tokens or image, got an input of kind 'tensor'"),
        ({"input": TEXT}, "input.tokenizer must be given"),
        ({"input": {"kind": "image", "columns": ["image"]}}, "input.size must be given for images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "student.config must name its model_type"),
        ({"model_type": "distilbret"}, "transformers knows, got 'distilbret'; did you mean distilbert?"),
        (
            {**tiny.DISTILBERT, "n_layer": 3},
            "student.config.n_layer is not a setting of distilbert; did you mean n_layers?",
        ),
        ({**tiny.DISTILBERT, "num_labels": 3}, "student.config.num_labels is set by the classes"),
        ({**tiny.DISTILBERT, "vocab_size": 5}, "student.input gives ids below 15 and the model has embeddings for 5"),
        (
            {**tiny.DISTILBERT, "max_position_embeddings": 4},
            "max_length must be at most the 4 places of the model, got 8",
        ),
        ({**tiny.DISTILBERT, "n_heads": 3}, "student.config"),
        (tiny.VIT, "transformers makes no classifier of texts of a vit"),
    ],
)
def test_fresh_networks_that_cannot_be_are_refused(config, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        build_student(settings(tmp_path, config=config), (8,), 3)


def test_folders_that_hold_something_else_are_refused(trained, tmp_path):
    kind, folder, _, _ = trained
    wrong = {"kind": kind, "columns": [kind], **({"max_length": 8} if kind == "text" else {"size": [16, 16]})}
    if kind == "text":
        with pytest.raises(ValueError, match=r"student.model: .* must be a folder with config.json"):
            build_student(
                StudentConfig(
                    kind="huggingface",
                    model=str(tmp_path),
                    input={**wrong, "tokenizer": str(folder / "tokenizer.json")},
                ),
                (8,),
                3,
            )
    else:
        with pytest.raises(
            ValueError, match=r"input.mean must be given, and std and size: .* mean = \[0.5, 0.5, 0.5\]"
        ):
            build_student(StudentConfig(kind="huggingface", model=str(folder), input=wrong), (3, 16, 16), 3)
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "layer" in name)
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    full = {**wrong, "mean": [0.5], "std": [0.5]} if kind == "image" else wrong
    # transformers names a vit's layers otherwise in files than in memory
    with pytest.raises(ValueError, match=r"holds no weights for \S+layers?\.0\S+: they would be drawn at random"):
        build_student(
            StudentConfig(kind="huggingface", model=str(broken), input=full), (8,) if kind == "text" else (3, 16, 16), 3
        )
