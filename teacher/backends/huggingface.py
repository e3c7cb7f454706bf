"""A teacher that is a Hugging Face classifier in a local folder.

The folder's own tokenizer or image processor prepares the input. Weights are read from safetensors only, code in the
folder is not executed, and nothing is downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilbeam.inputs.config import InputError
from distilbeam.teacher.backends.local import LocalTeacher, first_line
from distilbeam.teacher.backends.torch import as_numpy, find_device, torch_out_of_memory, torch_state
from distilbeam.teacher.config import HuggingFaceConfig
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Inputs


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
        settings = config.model_dump_json(include={"input", "dtype", "max_length"}) + config.meaning()
        if not Path(config.model).is_dir():
            raise ValueError(
                f"teacher.model: {config.model} must be a folder with config.json and safetensors on this disk"
            )
        raw = config.input.model_copy(update={"kind": "raw"})
        name = f"huggingface:{Path(config.model).name}"
        super().__init__(name, Artefact([config.model], settings), config, raw)
        self._prepare, self._model = self._load()
        self._names_itself(_outputs(self._model.config, config.model), "id2label in its config.json")

    def _state(self) -> object:
        return torch_state(self._model, self._device)

    @torch.inference_mode()
    def _run(self, inputs: Inputs) -> npt.NDArray[Any]:
        model = self._require_open()
        assert isinstance(inputs, np.ndarray)
        if not len(inputs):
            return np.empty((0, model.config.num_labels), np.float32)
        tensors = {name: self._moved(tensor) for name, tensor in self._prepare(inputs.tolist()).items()}
        return as_numpy(model(**tensors).logits)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)

    def _load(self) -> tuple[Callable[[list[bytes]], Any], Any]:
        logging.getLogger("torchao").setLevel(
            logging.ERROR
        )  # it names each of its libraries that is for other hardware
        try:
            import transformers
        except ImportError as e:
            raise ValueError("a teacher of kind huggingface needs transformers; install distilbeam[hf]") from e
        _keep_quiet(transformers)
        text = self._config.input.kind == "text"
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            part = transformers.AutoTokenizer if text else transformers.AutoImageProcessor
            processor = part.from_pretrained(self._config.model, **options)
            kind = "AutoModelForSequenceClassification" if text else "AutoModelForImageClassification"
            model, report = getattr(transformers, kind).from_pretrained(
                self._config.model, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as e:  # of a damaged folder anything
            what = "text" if text else "image"
            raise ValueError(
                f"teacher.model: {self._config.model} holds no {what} classifier with safetensors: {first_line(e)}"
            ) from e
        if report["missing_keys"]:
            raise ValueError(
                f"teacher.model: {self._config.model} holds no weights for {', '.join(sorted(report['missing_keys'])[:3])}: "
                "they would be drawn at random; name a model that was trained to classify"
            )
        if text and processor.pad_token is None:  # texts of different lengths cannot stand in one request
            self.set_batch_rows(1)
        elif text and model.config.pad_token_id is None:  # by it some find the last token of a row
            model.config.pad_token_id = processor.pad_token_id
        prepare = self._texts(processor, positions(model)) if text else _images(processor)
        return prepare, model.to(device=self._device, dtype=self._dtype).eval()

    def _texts(self, tokenizer: Any, places: int | None) -> Callable[[list[bytes]], Any]:
        limits = (self._config.max_length, tokenizer.model_max_length, places)
        longest = min(limit for limit in limits if limit is not None)

        def prepare(rows: list[bytes]) -> Any:
            texts = [row.decode() for row in rows]
            # model_max_length is 10^30 for tokenizers that know no limit
            truncation = {"truncation": True, "max_length": longest} if longest < 10**9 else {}
            padding = tokenizer.pad_token is not None
            return tokenizer(texts, padding=padding, return_tensors="pt", **truncation)

        return prepare

    def _out_of_memory(self, error: Exception) -> bool:
        return torch_out_of_memory(error)

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _outputs(config: Any, folder: str) -> list[str]:
    """Give the names of a classifier's outputs in their order, and refuse a model that is no classifier of one class each."""
    kind = getattr(config, "problem_type", None)
    if kind == "multi_label_classification":
        raise ValueError(
            f"teacher.model: {folder} gives each row several labels (problem_type {kind!r}), whose outputs are no distribution "
            "over classes; name a model of one label per row"
        )
    if kind == "regression" or config.num_labels < 2:
        raise ValueError(
            f"teacher.model: {folder} answers with {config.num_labels} number(s) (problem_type {kind!r}), which is a "
            "regression and no choice among classes; name a model with an output for each class"
        )
    names = {int(place): str(name) for place, name in config.id2label.items()}
    if sorted(names) != list(range(config.num_labels)):
        raise ValueError(
            f"teacher.model: id2label in {folder}/config.json must name the outputs 0 to {config.num_labels - 1}"
        )
    return [names[place] for place in range(config.num_labels)]


def _keep_quiet(transformers: Any) -> None:
    """Keep bars and notes of the libraries off standard error, which is for our sentences; errors are raised as before."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # notes about libraries that transformers imports


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

    from distilbeam.inputs.images import read_bytes_image

    def prepare(rows: list[bytes]) -> Any:
        try:
            images = [read_bytes_image(row) for row in rows]
        except (UnidentifiedImageError, OSError) as e:
            raise InputError(f"the input must be encoded images: {e}") from e
        return processor(images=images, return_tensors="pt")

    return prepare
