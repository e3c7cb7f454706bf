"""Texts longer than a Hugging Face model has positions for, and images of 16 bits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from distilbeam.teacher import ask, load_teacher
from distilbeam.teacher.backends.huggingface import positions

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "stop", "it", "now"]


@pytest.mark.parametrize(("name", "usable"), [("Bert", 6), ("Roberta", 4), ("GPT2", 6), ("XLNet", None)])
def test_positions_are_those_that_a_model_has_rows_for(name: str, usable: int | None) -> None:
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    sizes: dict[str, Any] = {
        "GPT2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6, **special},
        "XLNet": {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8},
    }.get(name, {**SIZES, "max_position_embeddings": 6, **special})
    config = getattr(transformers, f"{name}Config")(vocab_size=20, **sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    assert positions(model) == usable
    with torch.no_grad():
        model(torch.full((1, usable or 9), 5))
        if usable is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, usable + 1), 5))


def test_a_long_text_is_cut_where_the_model_ends(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)})  # knows no limit
    assert tokenizer.model_max_length > 10**9
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), num_labels=3, max_position_embeddings=6, initializer_range=1.0, **SIZES
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    texts = ["stop", "stop it now " * 10]
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=6, return_tensors="pt")
        expected = model(**tokens).logits.numpy()
    settings = {"kind": "huggingface", "model": "bert", "input": {"kind": "text", "column": "t"}, "device": "cpu"}
    for longer in ({}, {"max_length": 512}):
        answers = ask(load_teacher({**settings, **longer}, base=tmp_path), pa.record_batch({"t": texts}), 3)
        assert answers.errors == []
        np.testing.assert_allclose(answers.logits, expected, atol=1e-5)


def test_grey_of_16_bits_is_no_white_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)

    def png(array: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(array).save(out, "PNG")
        return out.getvalue()

    settings = {"kind": "huggingface", "model": "vit", "input": {"kind": "image", "column": "x"}, "device": "cpu"}
    teacher = load_teacher(settings, base=tmp_path)
    deep, shallow = teacher.logits(pa.record_batch({"x": [png(pixels.astype(np.uint16) * 257), png(pixels)]}))
    np.testing.assert_allclose(deep, shallow, atol=1e-5)
