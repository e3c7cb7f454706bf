"""The settings of an ingest of text for a language model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distilbeam.settings import Section, validated


class CorpusOptions(Section):
    """How text or conversations become blocks of tokens."""

    format: Literal["lm", "chat"] = Field(
        description="text, or conversations of which the assistant's turns are learned"
    )
    tokenizer: str = Field(min_length=1, description="folder of the tokenizer: the teacher's")
    sequence_length: int = Field(ge=2, le=2**20, description="tokens of a block: the longest context that is labelled")
    column: str | None = Field(
        None, min_length=1, description="of JSON lines and Parquet: the column; text for lm, messages for chat"
    )
    max_record_bytes: int = Field(
        16 * 2**20, ge=1, le=2**30, description="a longer line of JSON is a bad one, so that memory is bounded"
    )
    file_bytes: int = Field(256 * 2**20, ge=1, description="bytes of a pool file before compression, about")

    @property
    def column_read(self) -> str:
        """The column of JSON lines and Parquet files."""
        return self.column or ("text" if self.format == "lm" else "messages")


def corpus_options(**settings: Any) -> CorpusOptions:
    """Validate settings; see `CorpusOptions`.

    Raises:
      ValueError: a setting that is not valid; a sentence for each.
    """
    return validated(CorpusOptions, settings)
