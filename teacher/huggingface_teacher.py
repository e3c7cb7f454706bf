"""A teacher that is a Hugging Face classifier in a local folder.

The folder's own tokenizer or image processor prepares the input. Weights are read from safetensors only, code in the
folder is not executed, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilbeam.teacher.artefact import Artefact
from distilbeam.teacher.config import HuggingFaceConfig
from distilbeam.teacher.halving import Inputs
from distilbeam.teacher.local import LocalTeacher, first_line
from distilbeam.teacher.preprocess import InputError
from distilbeam.teacher.torch_teacher import find_device, torch_out_of_memory


class HuggingFaceTeacher(LocalTeacher):
    """Answers with a sequence or image classification model of transformers.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: transformers is not installed, or the folder holds no such model.
    """

    def __init__(self, config: HuggingFaceConfig) -> None:
        self._config = config
        self._device = find_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        settings = config.model_dump_json(include={"input", "dtype", "max_length"})
        raw = config.input.model_copy(update={"kind": "raw"})
        name = f"huggingface:{Path(config.model).name}"
        super().__init__(name, Artefact([config.model], settings), raw, config.batch_rows)
        self._prepare, self._model = self._load()

    @torch.inference_mode()
    def _run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        model = self._require_open()
        assert isinstance(inputs, np.ndarray)
        if not len(inputs):
            return np.empty((0, model.config.num_labels), np.float32)
        tensors = {name: self._moved(tensor) for name, tensor in self._prepare(inputs.tolist()).items()}
        answer: npt.NDArray[np.float32] = model(**tensors).logits.float().cpu().numpy()
        return answer

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    def _load(self) -> tuple[Callable[[list[bytes]], Any], Any]:
        try:
            import transformers
        except ImportError as e:
            raise ValueError("a teacher of kind huggingface needs transformers; install distilbeam[hf]") from e
        text = self._config.input.kind == "text"
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            if text:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self._config.model, **options)
            else:
                processor = transformers.AutoImageProcessor.from_pretrained(self._config.model, **options)
            kind = "AutoModelForSequenceClassification" if text else "AutoModelForImageClassification"
            model = getattr(transformers, kind).from_pretrained(self._config.model, use_safetensors=True, **options)
        except (OSError, ValueError, KeyError) as e:
            what = "text" if text else "image"
            raise ValueError(
                f"teacher.model: {self._config.model} holds no {what} classifier with safetensors: {first_line(e)}"
            ) from e
        prepare = self._texts(tokenizer, positions(model)) if text else _images(processor)
        return prepare, model.to(device=self._device, dtype=self._dtype).eval()

    def _texts(self, tokenizer: Any, places: int | None) -> Callable[[list[bytes]], Any]:
        limits = (self._config.max_length, tokenizer.model_max_length, places)
        longest = min(limit for limit in limits if limit is not None)

        def prepare(rows: list[bytes]) -> Any:
            texts = [row.decode() for row in rows]
            # model_max_length is 10^30 for tokenizers that know no limit
            truncation = {"truncation": True, "max_length": longest} if longest < 10**9 else {}
            return tokenizer(texts, padding=True, return_tensors="pt", **truncation)

        return prepare

    def _out_of_memory(self, error: Exception) -> bool:
        return torch_out_of_memory(error)

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def positions(model: Any) -> int | None:
    """Count the tokens that a model has positions for; None where it has no table of them and names no limit."""
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _POSITION_TABLES]
    sizes = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)  # RoBERTa counts from there
        for table in tables
        if isinstance(table, torch.nn.Embedding)
    ]
    named = getattr(model.config, "max_position_embeddings", None)
    sizes += [named] if isinstance(named, int) and named > 0 else []
    return min(sizes, default=None)


_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


def _images(processor: Any) -> Callable[[list[bytes]], Any]:
    from PIL import UnidentifiedImageError

    from distilbeam.teacher.inputs.images import read_bytes_image

    def prepare(rows: list[bytes]) -> Any:
        try:
            images = [read_bytes_image(row) for row in rows]
        except (UnidentifiedImageError, OSError) as e:
            raise InputError(f"the input must be encoded images: {e}") from e
        return processor(images=images, return_tensors="pt")

    return prepare
