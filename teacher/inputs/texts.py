"""Text as token ids, or as hashed n-grams.

Hashed n-grams need no vocabulary: every n-gram adds +1 or -1 to the bucket that its hash names, and each row has unit
length (Weinberger et al., Feature Hashing for Large Scale Multitask Learning, arXiv:0902.2206).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.preprocess import InputConfig, InputError, MakeInput, require_columns


def text_input(config: InputConfig) -> MakeInput:
    """Choose between token ids and hashed n-grams."""
    return TokenInput(config) if config.tokenizer else NgramInput(config)


@dataclass(frozen=True)
class NgramInput:
    """Hashes n-grams to float32 [n, buckets]."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Hash a batch; see `make_input`."""
        from sklearn.feature_extraction.text import HashingVectorizer

        texts = _texts(batch, self.config)
        if not texts:
            return np.empty((0, self.config.buckets), np.float32)
        vectorizer = HashingVectorizer(
            n_features=self.config.buckets,
            analyzer=self.config.analyzer,
            ngram_range=self.config.ngrams,
            dtype=np.float32,
        )
        hashed: npt.NDArray[np.float32] = vectorizer.transform(texts).toarray()
        return hashed


@dataclass
class TokenInput:
    """Tokenises to int64 [n, max_length] with a `tokenizer.json` of the Hugging Face tokenizers library."""

    config: InputConfig
    _tokenizer: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            import tokenizers
        except ImportError as e:
            raise ValueError("input.tokenizer needs the tokenizers library; install distilbeam[hf]") from e
        path = str(self.config.tokenizer)
        if not Path(path).is_file():
            raise ValueError(f"input.tokenizer: {path} does not exist; give the tokenizer.json of the model")
        self._tokenizer = tokenizers.Tokenizer.from_file(path)
        self._tokenizer.enable_truncation(self.config.max_length)
        self._tokenizer.enable_padding(length=self.config.max_length, pad_id=self.config.pad_id)

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Tokenise a batch; see `make_input`."""
        encodings = self._tokenizer.encode_batch(_texts(batch, self.config))
        return np.array([e.ids for e in encodings], np.int64).reshape(len(batch), self.config.max_length)


def _texts(batch: pa.RecordBatch, config: InputConfig) -> list[str]:
    require_columns(batch, config.columns)
    name = config.columns[0]
    column = batch.column(name)
    if pa.types.is_binary(column.type):  # text that came over a wire
        try:
            column = column.cast(pa.string())
        except pa.ArrowInvalid as e:
            raise InputError(f"column {name} must hold text in UTF-8: {e}") from e
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(f"column {name} must hold text, got {column.type}")
    if column.null_count:
        raise InputError(f"column {name} must not have missing values, got {column.null_count:,}")
    texts: list[str] = column.to_pylist()
    return texts
