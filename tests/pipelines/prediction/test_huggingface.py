"""A Hugging Face classifier's folder predicts as a student does, in the order and by the names of its id2label."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.prediction.huggingface import kind_of
from distilbeam.pipelines.prediction.opened_model import open_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "stop", "it", "now"]
NAMES = {0: "calm", 1: "angry", 2: "sad"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), id2label=NAMES, initializer_range=1.0, **SIZES)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def by_transformers(folder: Path, rows: list[str]) -> tuple[list[str], list[float]]:
    classify = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    found = [classify(row)[0] for row in rows]
    return [row["label"] for row in found], [row["score"] for row in found]


def test_texts_as_transformers_itself_classifies_them(texts: Path, tmp_path: Path) -> None:
    rows = ["stop", "stop it now", "it it it", "now"]
    names, scores = by_transformers(texts, rows)
    directory, model = open_model(texts)
    assert directory == texts
    assert model.classes == ("calm", "angry", "sad")
    found = model.predict([*rows, None])
    assert found["prediction"].to_pylist() == [*names, None]
    np.testing.assert_allclose(found["confidence"].to_numpy()[:4], scores, atol=1e-5)
    assert "missing" in found["reason"][4].as_py()
    pq.write_table(pa.table({"query": rows, "id": range(4)}), tmp_path / "rows.parquet")
    words = ["predict", str(texts), "--data", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--input-column", "query", "--columns", "id"])
    assert done.exit_code == 0, done.exception
    assert pq.read_table(tmp_path / "out")["prediction"].to_pylist() == names


def test_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, id2label=NAMES, initializer_range=1.0, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    files = []
    for seed in range(3):
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        files.append(out.getvalue())
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "vit"), device="cpu")
    expected = [classify(Image.open(io.BytesIO(file)))[0]["label"] for file in files]
    found = open_model(tmp_path / "vit")[1].predict({"image": [*files, b"none"]})
    assert found["prediction"].to_pylist() == [*expected, None]
    assert "no image that can be read" in found["reason"][3].as_py()


def test_what_is_no_classifier(texts: Path, student: Path, tmp_path: Path) -> None:
    assert kind_of(texts) == "text"
    assert kind_of(student) is None
    with pytest.raises(ValueError, match=r"--input-column is for a Hugging Face folder, a student knows its columns"):
        open_model(student, "query")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="must hold a student"):
        open_model(tmp_path)
