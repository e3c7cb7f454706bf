"""Text as token ids, or as hashed n-grams.

Hashed n-grams need no vocabulary. As a vector, every n-gram adds +1 or -1 to the bucket that its hash names, and each
row has unit length (Weinberger et al., Feature Hashing for Large Scale Multitask Learning, arXiv:0902.2206). As ids,
every n-gram is the number of its bucket, for a bag of embeddings (Joulin et al., Bag of Tricks for Efficient Text
Classification, arXiv:1607.01759): a row costs max_length numbers however many buckets there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.inputs.tokens import padded
from distilbeam.teacher.preprocess import InputConfig, InputError, MakeInput, require_columns


def text_input(config: InputConfig) -> MakeInput:
    """Choose between token ids and the two forms of hashed n-grams."""
    if config.tokenizer:
        return TokenInput(config)
    return NgramInput(config) if config.ngram_form == "vector" else NgramIdInput(config)


@dataclass(frozen=True)
class NgramInput:
    """Hashes n-grams to float32 [n, buckets]."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Hash a batch; see `make_input`."""
        texts = _texts(batch, self.config)
        if not texts:
            return np.empty((0, self.config.buckets), np.float32)
        hashed: npt.NDArray[np.float32] = _hashed(texts, self.config, self.config.buckets).toarray()
        return hashed


@dataclass(frozen=True)
class NgramIdInput:
    """Hashes n-grams to int64 [n, max_length]: a bucket's id for every n-gram of the text, then `pad_id`.

    Ids ascend, so that of a text with more n-grams than max_length those of the highest buckets are left out: a choice
    by hash, which favours no part of the text.
    """

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Hash a batch; see `make_input`."""
        texts = _texts(batch, self.config)
        if not texts:
            return np.empty((0, self.config.max_length), np.int64)
        counted = _hashed(texts, self.config, self.config.buckets - 1, norm=None, alternate_sign=False)
        counted.sort_indices()
        times = counted.data.astype(np.int64)
        ids = np.repeat(counted.indices.astype(np.int64), times)
        ids += ids >= self.config.pad_id
        lengths = np.add.reduceat(np.append(times, 0), counted.indptr[:-1]) * (np.diff(counted.indptr) > 0)
        return padded(ids, np.concatenate([[0], np.cumsum(lengths)]), self.config.max_length, self.config.pad_id)


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

    @property
    def vocabulary(self) -> int:
        """Number of the tokenizer's ids."""
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Tokenise a batch; see `make_input`."""
        encodings = self._tokenizer.encode_batch(_texts(batch, self.config))
        return np.array([e.ids for e in encodings], np.int64).reshape(len(batch), self.config.max_length)


def _hashed(texts: list[str], config: InputConfig, buckets: int, **options: Any) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=buckets, analyzer=config.analyzer, ngram_range=config.ngrams, dtype=np.float32, **options
    )
    return vectorizer.transform(texts)


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
