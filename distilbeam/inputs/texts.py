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

from distilbeam.inputs.columns import is_bytes, is_text, plain, require_values
from distilbeam.inputs.config import InputConfig, InputError, MakeInput, require_columns
from distilbeam.inputs.tokens import padded


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
        pad_id = self.config.pad_id or 0
        ids += ids >= pad_id
        lengths = np.add.reduceat(np.append(times, 0), counted.indptr[:-1]) * (np.diff(counted.indptr) > 0)
        return padded(ids, np.concatenate([[0], np.cumsum(lengths)]), self.config.max_length, pad_id)


@dataclass
class TokenInput:
    """Tokenises to int64 [n, max_length] with a `tokenizer.json` of the Hugging Face tokenizers library.

    Texts are cut and filled at the side that the file says, the end where it says none, with its own padding.

    Attributes:
      pad_id: the id that fills a shorter text.
    """

    config: InputConfig
    pad_id: int = field(init=False)
    _tokenizer: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            import tokenizers
        except ImportError as e:
            raise ValueError("input.tokenizer needs the tokenizers library; install distilbeam[hf]") from e
        path = str(self.config.tokenizer)
        if not Path(path).is_file():
            raise ValueError(f"input.tokenizer: {path} does not exist; give the tokenizer.json of the model")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"input.tokenizer: {path} is no tokenizer.json of the tokenizers library: {e}") from e
        self.pad_id = _padding(self._tokenizer, path) if self.config.pad_id is None else self.config.pad_id
        own = {name: getattr(self._tokenizer, name) or {} for name in ("truncation", "padding")}
        sides = {name: settings.get("direction", "right") for name, settings in own.items()}
        self._tokenizer.enable_truncation(self.config.max_length, direction=sides["truncation"])
        self._tokenizer.enable_padding(
            length=self.config.max_length, pad_id=self.pad_id, direction=sides["padding"].lower()
        )

    @property
    def vocabulary(self) -> int:
        """Number of ids that the tokenizer may give: one more than the highest."""
        return int(max(self._tokenizer.get_vocab().values(), default=-1)) + 1

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Tokenise a batch; see `make_input`."""
        encodings = self._tokenizer.encode_batch(_texts(batch, self.config))
        return np.array([e.ids for e in encodings], np.int64).reshape(len(batch), self.config.max_length)


_PADDING_NAMES = ("[PAD]", "<pad>", "<PAD>", "[pad]", "<|pad|>")


def _padding(tokenizer: Any, path: str) -> int:
    """Find the id that a tokenizer pads with: its setting, a token of a usual name, or 0 where that is no word."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    for name in _PADDING_NAMES:
        if (number := tokenizer.token_to_id(name)) is not None:
            return int(number)
    first = tokenizer.id_to_token(0)
    if first is None:
        return 0
    beyond = max(tokenizer.get_vocab().values()) + 1
    raise ValueError(
        f"input.pad_id must be given: {path} names no padding, and its id 0 is the token {first!r}; a model that was trained "
        f"with the tokenizer says which id it pads with, a student may take {beyond}, one more than there are"
    )


def _hashed(texts: list[str], config: InputConfig, buckets: int, **options: Any) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=buckets, analyzer=config.analyzer, ngram_range=config.ngrams, dtype=np.float32, **options
    )
    return vectorizer.transform(texts)


def _texts(batch: pa.RecordBatch, config: InputConfig) -> list[str]:
    require_columns(batch, config.columns)
    name = config.columns[0]
    column = plain(batch.column(name))
    if is_bytes(column.type):  # text that came over a wire, or that was stored as bytes
        try:
            column = column.cast(pa.large_string())
        except pa.ArrowInvalid as e:
            raise InputError(f"column {name} must hold text in UTF-8: {e}") from e
    if not is_text(column.type):
        raise InputError(f"column {name} must hold text, got {column.type}")
    require_values(column, name)
    texts: list[str] = column.to_pylist()
    return texts
