"""Configuration of a model's input: which columns of an Arrow batch become it, and how.

The same configuration serves the teacher and, separately, the student. Reading costs nothing where the column already
is the array: a `fixed_size_binary` column of float32 is viewed, not copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from distilbeam.settings import Section

MakeInput = Callable[[pa.RecordBatch], Any]


class InputError(ValueError):
    """Rows that do not have the input that a model needs."""


class InputConfig(Section):
    """Which columns are read and how they become an array of one row per example.

    `tensor` reads numbers, `image` decodes bytes, `text` makes token ids or hashed n-grams, `tokens` reads lists of
    token ids, `raw` passes text and bytes on as they are, `function` calls your own function on the batch. Numbers x
    become (x * scale - mean) / std. Pixels of any depth count from 0 to 255 before that, and images stand as their
    camera was held.
    """

    kind: Literal["tensor", "image", "text", "tokens", "raw", "function"] = Field(
        "tensor", description="what the columns hold"
    )
    columns: tuple[str, ...] = Field(description="columns to read; `column` may name a single one", min_length=1)
    shape: tuple[int, ...] | None = Field(None, description="tensor: shape of one example; without it, one dimension")
    dtype: str = Field("float32", description="tensor: type of numbers stored as bytes, unless the field says its own")
    scale: float | None = Field(None, description="factor on the stored numbers; 1, and 1/255 for images")
    mean: tuple[float, ...] = Field((), description="subtracted: one number, or one per feature or image channel")
    std: tuple[float, ...] = Field((), description="divided by: one number, or one per feature or image channel")
    size: tuple[int, int] | None = Field(
        None, description="image: height and width in pixels; needed when images differ"
    )
    resize: Literal["stretch", "crop"] = Field("stretch", description="image: change the aspect, or cut the middle out")
    mode: Literal["RGB", "L"] = Field("RGB", description="image: colour or grey")
    layout: Literal["chw", "hwc"] = Field("chw", description="image: order of channel, height and width")
    tokenizer: str | None = Field(None, description="text: a tokenizer.json; without it, hashed n-grams")
    max_length: int = Field(128, ge=1, description="text, tokens: ids kept and padded to")
    pad_id: int | None = Field(
        None, ge=0, description="text, tokens: id that fills the rest; the tokenizer's own, and 0 without a tokenizer"
    )
    vocabulary: int | None = Field(
        None, ge=2, description="tokens: number of ids that there are; text: that of the tokenizer unless given"
    )
    buckets: int = Field(4096, ge=2, le=2**22, description="text: number of hashed features")
    analyzer: Literal["word", "char", "char_wb"] = Field("word", description="text: n-grams of words or characters")
    ngrams: tuple[int, int] = Field((1, 2), description="text: shortest and longest n-gram")
    ngram_form: Literal["vector", "ids"] = Field(
        "vector",
        description="text without a tokenizer: one number per bucket, or the buckets' ids for an embedding bag",
    )
    function: str | None = Field(None, description="function: 'module:function', called with the batch of `columns`")

    @model_validator(mode="before")
    @classmethod
    def _column_is_columns(cls, data: Any) -> Any:
        if isinstance(data, dict) and "column" in data:
            if "columns" in data:
                raise ValueError("column and columns must not both be given")
            data = {**data, "columns": [data["column"]]}
            del data["column"]
        if isinstance(data, dict) and data.get("pad_id") is None and not data.get("tokenizer"):
            data = {**data, "pad_id": 0}
        return data

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind in ("image", "text", "tokens", "raw") and len(self.columns) != 1:
            raise ValueError(f"columns must be one column for {self.kind} input, got {len(self.columns)}")
        if (self.kind == "function") != (self.function is not None):
            raise ValueError("function must be given for input of kind 'function', and only for it")
        if self.shape is not None and (not self.shape or min(self.shape) < 1):
            raise ValueError(f"shape must be positive whole numbers, got {list(self.shape)}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive whole numbers, got {list(self.size)}")
        if not 1 <= self.ngrams[0] <= self.ngrams[1]:
            raise ValueError(f"ngrams must be two ascending positive numbers, got {list(self.ngrams)}")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        if self.tokenizer and self.ngram_form == "ids":
            raise ValueError("tokenizer and ngram_form 'ids' must not both be given: a tokenizer makes ids of its own")
        if self.kind == "tokens" and self.vocabulary is None:
            raise ValueError("vocabulary must be given for input of kind 'tokens': the number of ids that there are")
        if self.vocabulary is not None and self.pad_id is not None and self.pad_id >= self.vocabulary:
            raise ValueError(f"pad_id must be below the vocabulary of {self.vocabulary:,}, got {self.pad_id:,}")
        _number_type(self.dtype)
        return self

    @property
    def gives_ids(self) -> bool:
        """Whether the input is int64 ids [max_length] for an embedding rather than numbers."""
        return self.gives_sequence or (self.kind == "text" and self.ngram_form == "ids")

    @property
    def gives_sequence(self) -> bool:
        """Whether the input is token ids in the order of the text."""
        return self.kind == "tokens" or (self.kind == "text" and self.tokenizer is not None)

    def files(self) -> tuple[str, ...]:
        """Return the files that the input depends on."""
        return (self.tokenizer,) if self.tokenizer else ()

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("tokenizer",) if self.tokenizer else ()


def make_input(config: InputConfig) -> MakeInput:
    """Make the function that turns a batch into a model's input.

    Args:
      config: the configuration.

    Returns:
      A picklable function from a record batch of n rows to an array [n, *shape], C-contiguous and possibly a read-only
      view of the batch. float32; int64 for ids (`config.gives_ids`), `bytes` objects for kind `raw`, and for kind
      `function` whatever the function returns: an array, or a mapping of input names to arrays. It raises `InputError`,
      a `ValueError`, when a column is missing or a row does not have the shape of the others.

    Raises:
      ValueError: a file or function that the configuration names cannot be loaded.
    """
    if config.kind == "tensor":
        from distilbeam.inputs.tensors import TensorInput

        return TensorInput(config)
    if config.kind == "image":
        from distilbeam.inputs.images import ImageInput

        return ImageInput(config)
    if config.kind == "text":
        from distilbeam.inputs.texts import text_input

        return text_input(config)
    if config.kind == "tokens":
        from distilbeam.inputs.tokens import ListInput

        return ListInput(config)
    if config.kind == "raw":
        from distilbeam.inputs.raw import RawInput

        return RawInput(config)
    from distilbeam.inputs.functions import FunctionInput

    return FunctionInput(config)


def vocabulary_size(config: InputConfig) -> int:
    """Give the number of ids that an input may hold, which is the height of an embedding.

    Args:
      config: of an input that gives ids.

    Raises:
      ValueError: it gives none, or its tokenizer cannot be loaded.
    """
    if not config.gives_ids:
        raise ValueError(f"input of kind {config.kind!r} must give ids to have a vocabulary; it gives numbers")
    if config.vocabulary is not None:
        return config.vocabulary
    if config.tokenizer is None:
        return config.buckets
    from distilbeam.inputs.texts import TokenInput

    tokens = TokenInput(config)
    return max(tokens.vocabulary, tokens.pad_id + 1)


def padding_id(config: InputConfig) -> int:
    """Give the id that fills the rows of an input that gives ids.

    Args:
      config: of an input that gives ids.

    Raises:
      ValueError: it gives none, or its tokenizer cannot be loaded or names no padding.
    """
    if not config.gives_ids:
        raise ValueError(f"input of kind {config.kind!r} must give ids to have a padding id; it gives numbers")
    if config.pad_id is not None:
        return config.pad_id
    from distilbeam.inputs.texts import TokenInput

    return TokenInput(config).pad_id


def with_padding(config: InputConfig) -> InputConfig:
    """Write the padding id into a configuration, so that it stays what it was when the tokenizer's file changes.

    Raises:
      ValueError: see `padding_id`.
    """
    return config.model_copy(update={"pad_id": padding_id(config)}) if config.gives_ids else config


def load_object(name: str, setting: str) -> Any:
    """Import what `module:name` says.

    Args:
      name: dotted module, colon, dotted name in it.
      setting: the setting that holds it, for the message.

    Raises:
      ValueError: not of that form, no such module, or no such name in it.
    """
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ValueError(f"{setting} must be 'module:name', got '{name}'")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise ValueError(f"{setting}: module '{e.name}' is not installed; install it or put it on PYTHONPATH") from e
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{setting}: module '{module}' has no '{path}'")
        found = getattr(found, part)
    return found


def require_columns(batch: pa.RecordBatch, columns: tuple[str, ...]) -> None:
    """Check that a batch has columns.

    Raises:
      InputError: it lacks one.
    """
    for name in columns:
        if name not in batch.schema.names:
            raise InputError(f"the input must have a column {name}; the columns are {', '.join(batch.schema.names)}")


def normalised(
    values: npt.NDArray[Any], config: InputConfig, default_scale: float, per: str, channels: int
) -> npt.NDArray[np.float32]:
    """Compute (x * scale - mean) / std over the last axis.

    Args:
      values: numbers [..., channels].
      config: the configuration.
      default_scale: scale where the configuration has none.
      per: what a number of mean and std belongs to, for the message.
      channels: size of the last axis.

    Returns:
      float32 of the same shape; the values themselves where there is nothing to do. Numbers that float32 does not hold
      are computed with in float64 before they are rounded once.

    Raises:
      InputError: mean or std has another length than 1 or `channels`, or a finite number is beyond float32.
    """
    scale = default_scale if config.scale is None else config.scale
    for name, numbers in (("mean", config.mean), ("std", config.std)):
        if len(numbers) not in (0, 1, channels):
            raise InputError(f"{name} must be one number or one per {per} ({channels:,}), got {len(numbers):,}")
    type_ = np.result_type(values.dtype, np.float32)
    out: npt.NDArray[Any] = values
    if scale != 1 or config.mean or config.std:
        out = values.astype(type_, copy=False)
    with np.errstate(over="ignore"):
        if scale != 1:
            out = out * type_.type(scale)
        if config.mean:
            out = out - np.asarray(config.mean, type_)
        if config.std:
            out = out / np.asarray(config.std, type_)
        rounded: npt.NDArray[np.float32] = out.astype(np.float32, copy=False)
    if values.dtype.kind == "f" and rounded is not values:
        _require_finite(rounded, values, config)
    return rounded


def _require_finite(made: npt.NDArray[np.float32], stored: npt.NDArray[Any], config: InputConfig) -> None:
    lost = ~np.isfinite(made)
    if lost.any() and (lost := lost & np.isfinite(stored)).any():
        place = np.unravel_index(int(lost.argmax()), lost.shape)
        raise InputError(
            f"column {', '.join(config.columns)} has numbers beyond float32, which ends at 3.4e38: row {place[0]:,} has "
            f"{stored[place]}; set input.scale, or leave the row out"
        )


def _number_type(name: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(name)
    except TypeError as e:
        raise ValueError(f"dtype must be the name of a number type such as float32, got '{name}'") from e
    if dtype.kind not in "fiub":
        raise ValueError(f"dtype must be a number type such as float32, got '{name}'")
    return dtype.newbyteorder("<")
