"""Predict with an exported student: numpy and the runtime of its file are all that is needed; distilbeam is not.

A copy lies in every export, beside `export.json` and the model:

    python EXPORT/reader.py < rows.jsonl                # {"text": "..."} a line -> {"prediction": ..., "confidence": ...}

    from reader import Export                           # with EXPORT on the path
    Export("EXPORT").predict([{"text": "where is my card"}])

`model.onnx` needs onnxruntime, `model.pt2` torch; images are decoded by Pillow, a tokenizer.json is read by tokenizers, where a
student has them. What is computed here is what `export.json` says under `input`; the rest, under `graph`, is in the model's file.
Hashed n-grams are those of scikit-learn's HashingVectorizer: MurmurHash3 (x86, 32 bits, seed 0) of an n-gram's UTF-8, as a signed
number h, falls into bucket |h| mod n; as a vector it counts +1, or -1 where h < 0, and rows have unit length.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
WORDS, SPACES = re.compile(r"(?u)\b\w\w+\b"), re.compile(r"\s\s+")
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Pillow's Transpose


class Export:
    """An exported student.

    Args:
      folder: the export; this file's own without it.
      threads: most threads of one operation; the runtime's choice without it.

    Attributes:
      classes: names of the classes in the order of the logits.
      columns: what a row must have.
    """

    def __init__(self, folder: str | Path | None = None, threads: int | None = None) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.about: dict[str, Any] = json.loads((self.folder / "export.json").read_text())
        self.input: dict[str, Any] = self.about["input"]
        self.classes: list[str] = self.about["classes"]
        self.columns: list[str] = self.input["columns"]
        self._run = _opened(self.folder / self.about["file"], threads)
        self._make = _maker(self.input, self.folder)

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> Array:
        """Make the model's input of rows, one mapping of columns each; a path or bytes is an image."""
        for row in rows:
            missing = [name for name in self.columns if name not in row]
            if missing:
                raise ValueError(
                    f"a row must have the column(s) {', '.join(self.columns)}, got {', '.join(row) or 'none'}"
                )
        made = self._make([[row[name] for name in self.columns] for row in rows])
        shape = (len(rows), *self.about["input_shape"])
        if made.size != np.prod(shape):
            raise ValueError(f"an example must have the shape {list(shape[1:])}, got {list(made.shape[1:])}")
        dtype = np.dtype(self.about["input_dtype"])
        made = np.rint(made) if dtype.kind in "iu" and made.dtype.kind == "f" else made
        return np.ascontiguousarray(made.reshape(shape), dtype)

    def logits(self, rows: Sequence[Mapping[str, Any]]) -> Array:
        """Compute the logits of rows, float32 [rows, classes]."""
        return self._run(self.inputs(rows))

    def predict(self, rows: Sequence[Mapping[str, Any]], top_k: int | None = None) -> list[dict[str, Any]]:
        """Give the most probable class of each row with its probability, and the `top_k` most probable ones."""
        if not rows:
            return []
        logits = self.logits(rows).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        order = np.argsort(-logits, axis=1, kind="stable")
        found = []
        for row, best in zip(probabilities, order, strict=True):
            answer = {"prediction": self.classes[best[0]], "confidence": float(row[best[0]])}
            if top_k is not None:
                answer["top_classes"] = [self.classes[i] for i in best[:top_k]]
                answer["top_probabilities"] = [float(row[i]) for i in best[:top_k]]
            found.append(answer)
        return found


def _opened(file: Path, threads: int | None) -> Callable[[Array], Array]:
    if file.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda inputs: session.run(None, {name: inputs})[0]
    import torch

    module = torch.export.load(file).module()

    def run(inputs: Array) -> Array:
        with torch.inference_mode():
            logits: Array = module(torch.from_numpy(inputs)).numpy()
        return logits

    return run


def _maker(config: Mapping[str, Any], folder: Path) -> Callable[[list[list[Any]]], Array]:
    kind = config.get("kind", "tensor")
    if kind == "tensor":
        return lambda rows: _numbers(rows, config)
    if kind == "image":
        return lambda rows: np.stack([_pixels(value, config) for (value,) in rows])
    if kind == "tokens":
        return lambda rows: _padded([value for (value,) in rows], config)
    if kind == "text" and config.get("tokenizer"):
        tokenizer = _tokenizer(folder / config["tokenizer"], config)
        return lambda rows: np.array([e.ids for e in tokenizer.encode_batch([text for (text,) in rows])], np.int64)
    if kind == "text":
        hashed = _ids if config.get("ngram_form", "vector") == "ids" else _vectors
        return lambda rows: hashed([text for (text,) in rows], config)
    raise ValueError(f"input of kind {kind} is made by code of its own ({config.get('function')}), which is not here")


# numbers and images


def _numbers(rows: list[list[Any]], config: Mapping[str, Any]) -> Array:
    """Put the numbers of each row side by side; bytes hold numbers of the type `dtype`."""
    dtype = np.dtype(config.get("dtype", "float32")).newbyteorder("<")
    read = [
        [np.frombuffer(value, dtype) if isinstance(value, bytes) else np.ravel(value) for value in row] for row in rows
    ]
    return _scaled(np.array([np.concatenate(row) for row in read]), config, 1.0)


def _scaled(values: Array, config: Mapping[str, Any], scale: float) -> Array:
    """Compute (x * scale - mean) / std over the last axis, where the graph does not."""
    scale = config.get("scale") or scale
    type_ = np.result_type(values.dtype, np.float32)
    out = values.astype(type_, copy=False) * type_.type(scale) if scale != 1 else values
    out = out - np.asarray(config["mean"], type_) if config.get("mean") else out
    out = out / np.asarray(config["std"], type_) if config.get("std") else out
    return out.astype(np.float32, copy=False)


def _pixels(value: Any, config: Mapping[str, Any]) -> Array:
    """Decode an image to [height, width, channels], upright and of the student's size; an array [h, w(, c)] is taken as it is."""
    if isinstance(value, np.ndarray):
        return value if value.ndim == 3 else value[:, :, None]
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as opened:
        opened.load()
        turn = TURNS.get(opened.getexif().get(0x0112, 1))
        mode = config.get("mode", "RGB")
        if opened.mode == "F" or opened.mode.startswith("I"):  # deeper than 8 bits
            image = Image.fromarray(
                (np.asarray(opened) * (255 / (1 if opened.mode == "F" else 65535))).astype(np.float32)
            )
        elif opened.mode == "P" and "transparency" in opened.info:
            image = opened.convert("RGBA").convert(mode)
        else:
            image = opened.convert(mode)
    image = image if turn is None else image.transpose(Image.Transpose(turn))
    if config.get("size"):
        height, width = config["size"]
        resize: Any = ImageOps.fit if config.get("resize") == "crop" else Image.Image.resize
        image = resize(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3 if mode == "RGB" else 1, axis=2)


# text and ids


def ngrams(text: str, config: Mapping[str, Any]) -> Iterator[str]:
    """List a text's n-grams, each as often as it occurs."""
    analyzer, (least, most) = config.get("analyzer", "word"), config.get("ngrams", (1, 2))
    text = text.lower()
    if analyzer == "word":
        words = WORDS.findall(text)
        for n in range(least, most + 1):
            yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        return
    text = SPACES.sub(" ", text)
    if analyzer == "char":
        for n in range(least, most + 1):
            yield from (text[i : i + n] for i in range(len(text) - n + 1))
        return
    for word in (f" {word} " for word in text.split()):
        for n in range(least, most + 1):
            yield from (word[i : i + n] for i in range(max(1, len(word) - n + 1)))
            if len(word) <= n:  # a short word counts once
                break


@lru_cache(maxsize=2**18)
def murmur3(text: str) -> int:
    """Hash a text to a signed number of 32 bits."""
    data, mask, h = text.encode(), 0xFFFFFFFF, 0
    whole = len(data) & ~3
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 & mask
        k = ((k << 15 | k >> 17) & mask) * 0x1B873593 & mask
        h ^= k
        if i < whole:
            h = ((h << 13 | h >> 19) & mask) * 5 + 0xE6546B64 & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    h ^= h >> 16
    return h - 2**32 if h >= 2**31 else h


def _vectors(texts: Sequence[str], config: Mapping[str, Any]) -> Array:
    buckets = config.get("buckets", 4096)
    out = np.zeros((len(texts), buckets), np.float32)
    for row, text in zip(out, texts, strict=True):
        for ngram, times in Counter(ngrams(text, config)).items():
            h = murmur3(ngram)
            row[abs(h) % buckets] += times if h >= 0 else -times
    lengths = np.sqrt((out.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return (out / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _ids(texts: Sequence[str], config: Mapping[str, Any]) -> Array:
    buckets, pad = config.get("buckets", 4096) - 1, config.get("pad_id") or 0
    rows = [sorted(abs(murmur3(ngram)) % buckets for ngram in ngrams(text, config)) for text in texts]
    return _padded([[number + (number >= pad) for number in row] for row in rows], config)


def _padded(rows: Sequence[Sequence[int]], config: Mapping[str, Any]) -> Array:
    length = config.get("max_length", 128)
    out = np.full((len(rows), length), config.get("pad_id") or 0, np.int64)
    for filled, row in zip(out, rows, strict=True):
        filled[: len(row[:length])] = row[:length]
    return out


def _tokenizer(file: Path, config: Mapping[str, Any]) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    own = {name: getattr(tokenizer, name) or {} for name in ("truncation", "padding")}
    length = config.get("max_length", 128)
    tokenizer.enable_truncation(length, direction=own["truncation"].get("direction", "right"))
    side = own["padding"].get("direction", "right").lower()
    tokenizer.enable_padding(length=length, pad_id=config["pad_id"], direction=side)
    return tokenizer


def main() -> None:
    """Answer the JSON lines of standard input on standard output, a line for a line; of one that has no answer the reason."""
    export = Export()
    for line in sys.stdin:
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a line must be a JSON object, got {type(row).__name__}")
                answer = export.predict([row])[0]
            except (ValueError, TypeError, OSError) as e:
                answer = {"prediction": None, "confidence": None, "reason": str(e)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
