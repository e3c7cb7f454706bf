"""A trained student on disk: `model.safetensors`, `student.json` and a model card, committed together by one rename.

`student.json` holds the configuration, the classes in the order of the logits, the shape of the input and what the
training wants remembered; a tokenizer lies beside it. No pickle is read, and what the folder says is checked before a
network is built by it. The folder of a student of kind `huggingface` is one of transformers besides, with config.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distilbeam.inputs.config import make_input, with_padding
from distilbeam.storage.atomic import committed_directory
from distilbeam.student.model_card import CARD, Card
from distilbeam.student.networks.build import build_student, count_parameters
from distilbeam.student.networks.config import HUGGINGFACE, KINDS, StudentConfig
from distilbeam.student.networks.embedding import seen_by_head
from distilbeam.student.networks.huggingface import CONFIG
from distilbeam.student.networks.huggingface_files import load_files, write_files
from distilbeam.student.other_folders import held_instead
from distilbeam.student.own_files import TOKENIZER, content_of, found_in, with_own_files
from distilbeam.student.predictions import Predictor
from distilbeam.student.trust import code_of, require_trusted

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "student.json"
OWN = f"{__name__.rsplit('.', 1)[0]}."  # factories of ours, such as that of pruned students
FORWARD_ROWS = 256  # the last rows are filled up to as many: a row's logits depend on its neighbours by rounding alone
FORWARD_NUMBERS = 2**18  # of input in one forward pass, where that is more rows


class Description(BaseModel):
    """What `student.json` says; what later releases add is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    config: StudentConfig
    classes: tuple[str, ...] = Field(min_length=1)
    input_shape: tuple[Annotated[int, Field(ge=0, lt=2**48)], ...]
    num_parameters: int = Field(ge=0)
    extra: dict[str, Any] = {}
    _said: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, said: dict[str, Any]) -> Description:
        """Check what a folder says."""
        description = cls.model_validate(said)
        description._said.update(said)
        return description

    @property
    def meaning(self) -> dict[str, Any]:
        """What a student's answers mean, word for word: a setting that a later release adds changes no fingerprint."""
        return {name: self._said[name] for name in ("config", "classes", "input_shape")}


class Student(Predictor):
    """A trained student, ready to answer; `predict` gives classes, `logits` what they are made of.

    Attributes:
      module: the network in evaluation mode.
      config: its configuration.
      classes: names of the classes in the order of the logits.
      input: which columns are read, and how.
      columns: their names.
      input_shape: shape of one example's input.
      num_parameters: how many numbers training adjusted.
      size_bytes: size of the weights on disk.
      extra: what the training wanted remembered.
    """

    def __init__(self, module: nn.Module, config: StudentConfig, description: Description, weights: Path) -> None:
        self.module = module.eval().requires_grad_(requires_grad=False)
        self.config = config
        self.classes = description.classes
        self.input = config.input
        self.columns = config.input.columns
        self.input_shape = description.input_shape
        self.num_parameters = description.num_parameters
        self.size_bytes = weights.stat().st_size
        self.extra = description.extra
        self._make_input = make_input(self.config.input)
        self._fingerprint = _digest(weights, config, description)

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Compute the logits of a batch.

        Args:
          batch: with the columns that the student reads.

        Returns:
          float32 [rows, C]; the rows around a row move its values by rounding alone, about 1e-7 of their size.

        Raises:
          ValueError: a column is missing or of another width.
        """
        return self.logits_of_inputs(self._make_input(batch))

    def inputs(self, batch: pa.RecordBatch) -> Any:
        """Make the input of a batch; see `preprocess.make_input`."""
        return self._make_input(batch)

    def logits_and_embeddings(self, batch: pa.RecordBatch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Compute the logits of a batch, and in the same pass what the last linear layer sees.

        Args:
          batch: with the columns that the student reads.

        Returns:
          Logits float32 [rows, C], see `logits`, and embeddings float32 [rows, d].

        Raises:
          ValueError: see `logits`; or the student does not end in a linear layer.
        """
        return self.embeddings_of_inputs(self._make_input(batch))

    def embeddings_of_inputs(self, inputs: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Compute what `logits_and_embeddings` does, of inputs that are arrays already, [rows, *input_shape]."""
        with seen_by_head(self.module, len(self.classes)) as seen:
            logits = self.logits_of_inputs(inputs)
        if not seen:
            return logits, np.empty((0, 1), np.float32)
        return logits, np.concatenate([part.numpy() for part in seen])[: len(logits)]  # the last block was filled up

    def logits_of_inputs(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Compute the logits of inputs that are arrays already, [rows, *input_shape]."""
        if inputs.shape[1:] != self.input_shape:
            raise ValueError(
                f"inputs must have the shape {list(self.input_shape)} that the student was trained on, "
                f"got {list(inputs.shape[1:])}"
            )
        numbers = max(1, math.prod(self.input_shape))
        many = max(1, FORWARD_NUMBERS // (FORWARD_ROWS * numbers)) * FORWARD_ROWS
        starts = [*range(0, len(inputs) - many + 1, many)]
        starts += range(len(starts) * many, len(inputs), FORWARD_ROWS)
        parts = [self._block(inputs[i:j]) for i, j in pairwise([*starts, len(inputs)])]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)

    def zeros(self, rows: int) -> torch.Tensor:
        """Make an input of zeros, of the type that the network takes."""
        return torch.zeros(rows, *self.input_shape, dtype=self._input_dtype)

    def fingerprint(self) -> str:
        """Identify the student by its weights and configuration."""
        return self._fingerprint

    @property
    def _input_dtype(self) -> torch.dtype:
        return torch.int64 if self.config.input.gives_ids else torch.float32

    def _block(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        tensor = torch.tensor(inputs, dtype=self._input_dtype)  # copies: Arrow's memory is read-only
        if len(inputs) < FORWARD_ROWS:
            tensor = torch.cat([tensor, self.zeros(FORWARD_ROWS - len(inputs))])
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = self.module(tensor)[: len(inputs)].float().numpy()
        return logits


def save_student(
    directory: str | Path,
    module: nn.Module,
    config: StudentConfig,
    classes: Sequence[str],
    input_shape: Sequence[int],
    extra: Mapping[str, Any] | None = None,
    files: Callable[[Path], None] | None = None,
) -> Path:
    """Write a student; the directory appears complete or not at all.

    Args:
      directory: where; it must not exist, or be empty.
      module: the trained network.
      config: its configuration.
      classes: names of the classes in the order of the logits.
      input_shape: shape of one example's input.
      extra: what else to remember, plain data.
      files: writes further files into the directory it is given before the commit.

    Returns:
      The directory.

    Raises:
      FileExistsError: the directory already holds something.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} already holds a student; choose another directory or remove it")
    config = config.model_copy(update={"input": with_padding(config.input)})
    description = {
        "format_version": FORMAT_VERSION,
        "classes": list(classes),
        "input_shape": list(input_shape),
        "num_parameters": count_parameters(module),
        "extra": dict(extra or {}),
    }
    with committed_directory(directory) as temporary:
        own_input = with_own_files(config.input, temporary)
        if config.kind == HUGGINGFACE:
            config = write_files(module, config, classes, temporary)
        else:
            tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
            save_file(tensors, temporary / WEIGHTS)
        whole = config.model_copy(update={"input": own_input})
        description["config"] = whole.model_dump(mode="json")
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        if files is not None:
            files(temporary)
        card = Card(config, list(classes), count_parameters(module), dict(extra or {}))
        (temporary / CARD).write_text(card.text())
    return directory


def load_student(directory: str | Path, trust: Sequence[str] = ()) -> Student:
    """Read a student.

    Args:
      directory: written by `save_student`.
      trust: modules, or `module:name`, whose code the folder may call: its factory and the function of its input.

    Returns:
      The student, on the CPU.

    Raises:
      ValueError: the directory holds no student, one of a newer format, or weights that do not fit its description;
        or it names code that nobody trusts (see `student.trust`).
    """
    directory = Path(directory)
    description = _read(directory)
    config = description.config.model_copy(update={"input": found_in(description.config.input, directory)})
    require_trusted(code_of(config), directory / DESCRIPTION, trust)
    if config.kind == HUGGINGFACE:
        try:
            network = load_files(directory, config, len(description.classes))
        except ValueError as e:
            raise _misfit(directory / WEIGHTS, e) from e
        return Student(network, config, description, directory / WEIGHTS)
    if config.kind in KINDS or config.kind.startswith(OWN):
        _require_shapes(directory / WEIGHTS, config, description)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn only to be replaced
        module = build_student(config, description.input_shape, len(description.classes))
    try:
        module.load_state_dict(load_file(directory / WEIGHTS))
    except (RuntimeError, OSError, SafetensorError) as e:
        raise _misfit(directory / WEIGHTS, e) from e
    return Student(module, config, description, directory / WEIGHTS)


def _read(directory: Path) -> Description:
    path = directory / DESCRIPTION
    try:
        said = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ValueError(f"{directory} holds no student: {DESCRIPTION} is missing{held_instead(directory)}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e
    version = said.get("format_version") if isinstance(said, dict) else None
    if isinstance(said, dict) and said.get("unit") == "token":
        raise ValueError(
            f"{directory} holds a language model, which classifies nothing: 'distilbeam evaluate' measures it, and in Python "
            "load_language_model or AutoModelForCausalLM opens it"
        )
    if version != FORMAT_VERSION:
        raise ValueError(f"{directory} has format version {version!r}, this release reads {FORMAT_VERSION}")
    try:
        return Description.of(said)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path} does not describe a student: {name}: {first['msg']}; copy the folder again, or train the student anew"
        ) from e


def _require_shapes(weights: Path, config: StudentConfig, description: Description) -> None:
    """Compare the weights' shapes with those of the network that is described, before memory is taken for either."""
    try:
        with safe_open(weights, "pt") as file:
            there = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        with torch.device("meta"):
            module = build_student(config, description.input_shape, len(description.classes))
    except (RuntimeError, OverflowError, OSError, SafetensorError) as e:
        raise _misfit(weights, e) from e
    here = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise _misfit(
                weights, f"{name} is {_shape(there.get(name))} there and {_shape(here.get(name))} by {DESCRIPTION}"
            )


def _misfit(weights: Path, why: object) -> ValueError:
    return ValueError(
        f"{weights} does not hold the weights of this student: {why}; copy the folder again, or train the student anew"
    )


def _shape(shape: list[int] | None) -> str:
    return "missing" if shape is None else f"of the shape {shape}"


def _digest(weights: Path, config: StudentConfig, description: Description) -> str:
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=16)
    digest.update(json.dumps(description.meaning, sort_keys=True).encode())
    if config.kind == HUGGINGFACE:  # heads, activations and the like stand there
        digest.update((weights.parent / CONFIG).read_bytes())
    if config.input.tokenizer and description.config.input.tokenizer == TOKENIZER:
        digest.update(str(content_of(config.input)).encode())
    return digest.hexdigest()
