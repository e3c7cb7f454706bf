"""Documents become token ids, with a mask of those that are to be predicted.

A text begins as its tokenizer begins one (with a first token, where it has one) and ends with the end of text. All of its
tokens are predicted. A conversation is what the tokenizer's chat template makes of it, and the assistant's tokens are
predicted: those between `{% generation %}` and `{% endgeneration %}` of the template. A template that does not say
which these are would have every label of a corpus left out in silence, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.inputs.tokenizer import TokenizerFolder
from distilbeam.pipelines.corpus.documents import PIECE_BYTES, BadRecord, Document

_AT_ONCE = 512  # documents that are tokenised together, in the tokenizer's threads
_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Tokens:
    """Tokens of a document, or of a piece of one.

    Attributes:
      ids: int32 [n].
      mask: uint8 [n], 1 for what is to be predicted.
      begins: whether a document begins with them.
      record: number of the document's record.
    """

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    begins: bool
    record: int


def require_template(tokenizer: TokenizerFolder) -> None:
    """Refuse a tokenizer whose chat template does not mark the assistant's tokens.

    Raises:
      ValueError: it has no template, or one without `{% generation %}`.
    """
    template = tokenizer.tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template] if template else []
    if not texts:
        raise ValueError(
            f"--tokenizer: {tokenizer.folder} has no chat template, which --format chat needs; use --format lm"
        )
    if not any(_GENERATION.search(text) for text in texts):
        raise ValueError(
            f"--tokenizer: the chat template in {tokenizer.folder} does not mark the assistant's tokens, so that none would be "
            "learned; put {% generation %} and {% endgeneration %} around what the assistant says in chat_template"
        )


def tokenise(
    documents: Iterable[Document | BadRecord], tokenizer: TokenizerFolder, format_: str
) -> Iterator[Tokens | BadRecord]:
    """Make tokens of documents.

    Args:
      documents: in their order.
      tokenizer: the tokenizer.
      format_: `lm` or `chat`.

    Yields:
      Their tokens in that order; a document without any yields nothing.
    """
    if format_ == "chat":
        for document in documents:
            yield document if isinstance(document, BadRecord) else _conversation(document, tokenizer)
        return
    waiting: list[Document] = []
    size = 0
    for document in documents:
        if isinstance(document, BadRecord):
            yield document
            continue
        waiting.append(document)
        size += len(document.value)
        if len(waiting) == _AT_ONCE or size >= PIECE_BYTES:
            yield from _texts(waiting, tokenizer)
            waiting, size = [], 0
    yield from _texts(waiting, tokenizer)


def _texts(documents: list[Document], tokenizer: TokenizerFolder) -> Iterator[Tokens]:
    found: dict[int, list[int]] = {}
    for begins in (True, False):
        numbers = [i for i, document in enumerate(documents) if document.begins == begins]
        if numbers:
            texts = [documents[i].value for i in numbers]
            ids = tokenizer.tokenizer(texts, add_special_tokens=begins, verbose=False)["input_ids"]
            found |= dict(zip(numbers, ids, strict=True))
    end = tokenizer.end_of_text
    for i, document in enumerate(documents):
        ids = found[i]
        if document.ends and (not ids or ids[-1] != end):
            ids = [*ids, end]
        if not document.value and document.begins:  # an empty text teaches nothing
            continue
        array = np.array(ids, np.int32)
        yield Tokens(array, np.ones(len(array), np.uint8), document.begins, document.record)


def _conversation(document: Document, tokenizer: TokenizerFolder) -> Tokens | BadRecord:
    try:
        found: Any = tokenizer.tokenizer.apply_chat_template(
            document.value, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as e:  # noqa: BLE001  (a template may raise anything; the record keeps it)
        return BadRecord(
            document.record, f"the chat template refuses it: {(str(e).splitlines() or [type(e).__name__])[0]}"
        )
    ids, mask = np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], np.uint8)
    if not mask.any():
        return BadRecord(
            document.record,
            "no token is the assistant's: it says nothing here, or the template has no {% generation %} around it",
        )
    return Tokens(ids, mask, True, document.record)
