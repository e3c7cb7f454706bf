"""SavedModel, ONNX, Hugging Face and Beam teachers against the models themselves."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from distilbeam.teacher import TeacherChanged, ask, load_teacher

X = np.random.default_rng(1).normal(size=(21, 4)).astype(np.float32)
W = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
BATCH = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)})
INPUT = {"column": "x", "shape": [4]}

SAVED_MODEL = """
import json, sys
import numpy as np, pyarrow as pa, tensorflow as tf
from distilbeam.teacher import TeacherServer, load_teacher

folder, x, w = sys.argv[1], np.load(sys.argv[2]), np.load(sys.argv[3])

class Net(tf.Module):
    def __init__(self):
        self.w = tf.Variable(w)

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="features")])
    def __call__(self, features):
        return {"logits": features @ self.w, "hidden": features}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def length(self, text):
        n = tf.cast(tf.strings.length(text), tf.float32)
        return {"scores": tf.stack([n, -n], axis=1)}

net = Net()
tf.saved_model.save(net, folder, {"serving_default": net.__call__, "length": net.length})
batch = pa.record_batch({"x": x.tolist(), "text": ["a" * i for i in range(len(x))]})
config = {"kind": "savedmodel", "model": folder, "input": {"column": "x", "shape": [4]}}
teacher = load_teacher({**config, "batch_rows": 8})
out = {"logits": teacher.logits(batch).tolist(), "empty": list(teacher.logits(batch.slice(0, 0)).shape)}
text = load_teacher({**config, "signature": "length", "input": {"kind": "raw", "column": "text"}})
out["text"] = text.logits(batch).tolist()
out["fingerprints"] = [teacher.fingerprint(), text.fingerprint()]
for name, change in {
    "signature": {"signature": "predict"},
    "output": {"output": "scores"},
    "folder": {"model": sys.argv[2]},
}.items():
    try:
        load_teacher({**config, **change})
    except ValueError as e:
        out[name] = str(e)
served = {name: TeacherServer(c) for name, c in {
    "numbers": config, "text": {**config, "signature": "length", "input": {"kind": "raw", "column": "text"}}}.items()}
out["addresses"] = {name: server.address for name, server in served.items()}
print(json.dumps(out), flush=True)
sys.stdin.read()
for server in served.values():
    server.stop()
"""


@pytest.mark.slow
def test_savedmodel_in_process_and_served(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "w.npy", W)
    arguments = [str(tmp_path / name) for name in ("model", "x.npy", "w.npy")]
    process = subprocess.Popen(
        [sys.executable, "-c", SAVED_MODEL, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        out = json.loads(line)
        np.testing.assert_allclose(out["logits"], X @ W, rtol=1e-5, atol=1e-6)
        assert out["empty"] == [0, 3]
        np.testing.assert_array_equal(out["text"], [[i, -i] for i in range(21)])
        assert out["fingerprints"][0].startswith("savedmodel:model:")
        assert out["fingerprints"][0] != out["fingerprints"][1]
        assert "teacher.signature 'predict' is unknown" in out["signature"]
        assert "serving_default" in out["signature"]
        assert "teacher.output must be one of the model's outputs" in out["output"]
        assert "x.npy is not a SavedModel" in out["folder"]
        remote = {"kind": "tfserving", "model": "teacher"}
        numbers: Any = load_teacher({**remote, "address": out["addresses"]["numbers"], "input": INPUT, "batch_rows": 8})
        np.testing.assert_array_equal(numbers.logits(BATCH), np.array(out["logits"], np.float32))
        raw = {"kind": "raw", "column": "text"}
        text: Any = load_teacher({**remote, "address": out["addresses"]["text"], "input": raw})
        np.testing.assert_array_equal(
            text.logits(pa.record_batch({"text": ["aaa", "", "ö"]})), [[3, -3], [0, 0], [2, -2]]
        )
        numbers.close()
        text.close()
    finally:
        process.stdin.close()
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(60) == 0


def onnx_model(path: Path, weights: np.ndarray, element: str = "FLOAT") -> Path:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    kind = getattr(onnx.TensorProto, element)
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["features", "w"], ["logits"]),
            helper.make_node("Neg", ["features"], ["negative"]),
        ],
        "linear",
        [helper.make_tensor_value_info("features", kind, ["rows", 4])],
        [helper.make_tensor_value_info(name, kind, ["rows", size]) for name, size in (("negative", 4), ("logits", 3))],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_onnx_answers_like_the_matrix(tmp_path: Path) -> None:
    onnx_model(tmp_path / "net.onnx", W)
    config = {"kind": "onnx", "model": "net.onnx", "input": INPUT, "threads": 1}
    teacher: Any = load_teacher({**config, "batch_rows": 8}, base=tmp_path)
    np.testing.assert_allclose(teacher.logits(BATCH), X @ W, rtol=1e-5, atol=1e-6)
    assert teacher.logits(BATCH.slice(0, 0)).shape == (0, 3)
    assert load_teacher({**config, "output": "negative"}, base=tmp_path).logits(BATCH).shape == (21, 4)
    assert teacher.fingerprint().startswith("onnx:net.onnx:")
    (tmp_path / "net.onnx.data").write_bytes(b"weights that lie beside the model")
    with pytest.raises(
        ValueError, match="the model has the inputs features, got a, b; several inputs need an input of kind function"
    ):
        teacher._run({"a": X, "b": X})
    assert load_teacher(config, base=tmp_path).fingerprint() != teacher.fingerprint()
    onnx_model(tmp_path / "net.onnx", W + 1)
    with pytest.raises(TeacherChanged, match="the teacher changed while it was being asked"):
        teacher.fingerprint()
    teacher.close()
    with pytest.raises(RuntimeError, match="the teacher was closed; load it again"):
        teacher.logits(BATCH)


def test_onnx_converts_to_the_model_s_type(tmp_path: Path) -> None:
    path = onnx_model(tmp_path / "net.onnx", W.astype(np.float64), "DOUBLE")
    answer = load_teacher({"kind": "onnx", "model": str(path), "input": INPUT}).logits(BATCH)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, X.astype(np.float64) @ W, rtol=1e-6)


def test_wrong_onnx_settings_are_sentences(tmp_path: Path) -> None:
    onnx_model(tmp_path / "net.onnx", W)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for change, message in (
        ({"model": "bad.onnx"}, r"teacher.model: .*bad.onnx cannot be run by ONNX Runtime: "),
        ({"output": "scores"}, "teacher.output must be one of the model's outputs negative, logits, got 'scores'"),
        ({"providers": ["Abacus"]}, "teacher.providers must be among .*CPUExecutionProvider, got Abacus"),
    ):
        with pytest.raises(ValueError, match=message):
            load_teacher({"kind": "onnx", "model": "net.onnx", "input": INPUT, **change}, base=tmp_path)


def text_classifier(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["play", "some", "jazz", "now", "stop", "it"]]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=12)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        initializer_range=1.0,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


TEXTS = ["play some jazz", "stop", "stop it now " * 10, ""]


def test_hugging_face_text_classifier(tmp_path: Path) -> None:
    model, tokenizer = text_classifier(tmp_path / "bert")
    config = {"kind": "huggingface", "model": "bert", "input": {"kind": "text", "column": "text"}, "device": "cpu"}
    teacher = load_teacher(config, base=tmp_path)
    batch = pa.record_batch({"text": TEXTS})
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 12
    with torch.no_grad():
        expected = model(**tokens).logits.numpy()
    np.testing.assert_allclose(teacher.logits(batch), expected, atol=1e-5)
    # padding to the longest text of a batch must not change the others
    np.testing.assert_allclose(teacher.logits(batch.slice(1, 1)), expected[1:2], atol=1e-5)
    assert teacher.logits(batch.slice(0, 0)).shape == (0, 3)
    short = load_teacher({**config, "max_length": 4}, base=tmp_path)
    assert np.abs(short.logits(batch) - expected)[2].max() > 1e-4
    assert short.fingerprint() != teacher.fingerprint()
    answers = ask(teacher, pa.record_batch({"text": ["play", None, "stop"]}), 3)
    assert [(e.row, e.stage, e.error) for e in answers.errors] == [
        (1, "input", "column text must not have missing values, got 1")
    ]


def test_hugging_face_image_classifier(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 10, 12, 3), dtype=np.uint8)
    images = []
    for image in pixels:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        images.append(out.getvalue())
    teacher = load_teacher(
        {"kind": "huggingface", "model": "vit", "input": {"kind": "image", "column": "image"}, "device": "cpu"},
        base=tmp_path,
    )
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(image) for image in pixels], return_tensors="pt")
        expected = model(**inputs).logits.numpy()
    np.testing.assert_allclose(teacher.logits(pa.record_batch({"image": images})), expected, atol=1e-5)
    answers = ask(teacher, pa.record_batch({"image": [images[0], b"not an image", images[2]]}), 5)
    assert [(e.row, e.stage) for e in answers.errors] == [(1, "input")]
    np.testing.assert_allclose(answers.logits[[0, 2]], expected[[0, 2]], atol=1e-5)


def test_wrong_hugging_face_settings_are_sentences(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = {"kind": "text", "column": "text"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"teacher.model: .*empty holds no text classifier with safetensors: "):
        load_teacher({"kind": "huggingface", "model": "empty", "input": text}, base=tmp_path)
    with pytest.raises(ValueError, match=r"input.kind must be text or image for a Hugging Face teacher, got tensor"):
        load_teacher({"kind": "huggingface", "model": "empty", "input": INPUT}, base=tmp_path)


def test_pickled_hugging_face_weights_are_refused(tmp_path: Path) -> None:
    model, _ = text_classifier(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no text classifier with safetensors"):
        load_teacher(
            {"kind": "huggingface", "model": "bert", "input": {"kind": "text", "column": "text"}}, base=tmp_path
        )


HANDLERS = """
import numpy as np, torch
from apache_beam.ml.inference.base import ModelHandler, PredictionResult
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from apache_beam.ml.inference.sklearn_inference import SklearnModelHandlerNumpy

class Whole(ModelHandler):
    def __init__(self, path):
        self.path, self.sizes = path, []
    def load_model(self):
        return np.load(self.path)
    def batch_elements_kwargs(self):
        return {"max_batch_size": 8}
    def run_inference(self, batch, model, inference_args=None):
        self.sizes.append(len(batch))
        for rows in batch:
            x = np.array(rows["x"].to_pylist()) if hasattr(rows, "schema") else rows
            yield PredictionResult(rows, x @ model)

def pytorch(path):
    return PytorchModelHandlerTensor(
        state_dict_path=path, model_class=torch.nn.Linear, model_params={"in_features": 4, "out_features": 3, "bias": False}, device="CPU"
    )

def sklearn(path):
    return SklearnModelHandlerNumpy(model_uri=path, inference_fn=lambda model, batch, args: model.decision_function(np.stack(batch)))

def nothing():
    return 3
"""


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "handlers", raising=False)
    np.save(tmp_path / "w.npy", W)
    return tmp_path


def beam(folder: Path, name: str, file: str, **settings: Any) -> Any:
    config = {"kind": "beam", "handler": f"handlers:{name}", "arguments": {"path": str(folder / file)}, "input": INPUT}
    return load_teacher({**config, "files": [file], **settings}, base=folder)


def test_beam_handlers_of_rows_and_of_batches(handlers: Path) -> None:
    rows, whole = beam(handlers, "Whole", "w.npy"), beam(handlers, "Whole", "w.npy", examples="batch")
    np.testing.assert_allclose(rows.logits(BATCH), X @ W, rtol=1e-5, atol=1e-6)
    assert rows._handler.sizes == [8, 8, 5]  # the handler's own limit
    np.testing.assert_allclose(whole.logits(BATCH), X @ W, rtol=1e-5, atol=1e-6)
    assert whole.logits(BATCH).dtype == np.float32
    assert rows.fingerprint() != whole.fingerprint()
    np.save(handlers / "w.npy", W + 1)
    with pytest.raises(TeacherChanged, match=r"w.npy"):
        rows.fingerprint()


@pytest.mark.slow
def test_beam_s_own_handlers(handlers: Path) -> None:
    """In a process of its own: Beam's adapters import every framework that is installed."""
    code = f"""
import pickle, sys
import numpy as np, torch
from sklearn.linear_model import LogisticRegression
sys.path.insert(0, {str(handlers)!r})
from distilbeam.teacher import load_teacher
import pyarrow as pa
x, w = np.random.default_rng(1).normal(size=(21, 4)).astype("f4"), np.load("w.npy")
torch.save({{"weight": torch.tensor(w.T)}}, "w.pt")
model = LogisticRegression().fit(x, np.arange(21) % 3)
with open("model.pkl", "wb") as file:
    pickle.dump(model, file)
batch = pa.record_batch({{"x": x.tolist()}})
def beam(name, path, **settings):
    return load_teacher({{"kind": "beam", "handler": f"handlers:{{name}}", "arguments": {{"path": path}}, "files": [path],
                         "input": {{"column": "x"}}, **settings}})
np.testing.assert_allclose(beam("pytorch", "w.pt", examples="torch").logits(batch), x @ w, rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(beam("sklearn", "model.pkl").logits(batch), model.decision_function(x), rtol=1e-5, atol=1e-5)
print("equal")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=handlers, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("equal\n")


def test_wrong_beam_settings_are_sentences(handlers: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher.handler: handlers:nothing must return a ModelHandler, got int"):
        beam(handlers, "nothing", "w.npy", arguments={})
    with pytest.raises(
        ValueError, match="files or version must be given, so that the labels of another model are told apart"
    ):
        beam(handlers, "Whole", "w.npy", files=[])
    versions = {beam(handlers, "Whole", "w.npy", files=[], version=v).fingerprint() for v in ("1", "2")}
    assert len(versions) == 2
