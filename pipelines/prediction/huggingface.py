"""A Hugging Face classifier in a local folder, which predicts as a student does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.extras import Need, require_extras
from distilbeam.inputs.config import InputConfig, InputError, make_input
from distilbeam.inputs.images import read_bytes_image
from distilbeam.storage.files import read_json
from distilbeam.student.predictions import Predictor
from distilbeam.teacher.config import parse_teacher_config
from distilbeam.teacher.load import load_teacher

CONFIG = "config.json"
ROWS = 32  # of a forward pass
_KINDS: dict[str, Literal["text", "image"]] = {
    "ForSequenceClassification": "text",
    "ForImageClassification": "image",
}


class HuggingFaceClassifier(Predictor):
    """A sequence or image classifier of transformers; its classes are those of `id2label`.

    Args:
      directory: with `config.json`, safetensors, and the tokenizer or image processor.
      column: the texts, or the bytes of the images; `text` or `image` without it.

    Raises:
      ValueError: transformers is not installed, or the folder holds no such classifier.
    """

    def __init__(self, directory: Path, column: str | None = None) -> None:
        require_extras([Need("a Hugging Face folder", "hf", way_round="name a student or an export")])
        kind = kind_of(directory)
        assert kind is not None
        section = {"kind": "huggingface", "model": str(directory), "input": {"kind": kind, "columns": [column or kind]}}
        self._teacher = load_teacher(parse_teacher_config(section))
        self.input = InputConfig(kind=kind, columns=(column or kind,))
        self.columns, self.input_shape = self.input.columns, ()
        named = read_json(directory / CONFIG).get("id2label") or {}
        outputs = max(2, len(named))
        self.classes = tuple(str(named.get(str(place), f"LABEL_{place}")) for place in range(outputs))
        self._raw = make_input(self.input.model_copy(update={"kind": "raw"}))

    def fingerprint(self) -> str:
        """Identify the classifier by its files."""
        return self._teacher.fingerprint()

    def inputs(self, batch: pa.RecordBatch) -> npt.NDArray[Any]:
        """Read the texts or images as bytes, objects [rows]; images are decoded once to find those that are none."""
        made: npt.NDArray[Any] = self._raw(_bytes_of_images(batch, self.columns[0]))
        if self.input.kind == "image":
            for row, data in enumerate(made):
                try:
                    read_bytes_image(data)
                except (OSError, ValueError, SyntaxError) as e:
                    raise InputError(f"column {self.columns[0]}, row {row}: no image that can be read: {e}") from e
        return made

    def logits_of_inputs(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Compute the logits of texts or images, float32 [rows, C], a few at a time: the longest text pads its neighbours."""
        parts = [
            self._teacher.logits(
                pa.record_batch({self.columns[0]: pa.array(inputs[i : i + ROWS].tolist(), pa.binary())})
            )
            for i in range(0, len(inputs), ROWS)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)


def kind_of(directory: Path) -> Literal["text", "image"] | None:
    """Tell what a Hugging Face classifier classifies; None where the folder holds none."""
    if not (directory / CONFIG).is_file():
        return None
    found = read_json(directory / CONFIG)
    names = found.get("architectures") if isinstance(found, dict) else None
    for name in names or ():
        for ending, kind in _KINDS.items():
            if str(name).endswith(ending):
                return kind
    return None


def _bytes_of_images(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """Take the field `bytes` of structs, as Hugging Face datasets stores images."""
    if name not in batch.schema.names or not pa.types.is_struct(batch.schema.field(name).type):
        return batch
    return pa.record_batch({name: batch.column(name).field("bytes")})
