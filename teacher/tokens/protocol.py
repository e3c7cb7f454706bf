"""The protocol of a teacher of tokens: labels for blocks, never logits, of which one block's would take hundreds of megabytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyarrow as pa

from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels


@runtime_checkable
class TokenTeacher(Protocol):
    """A language model that is asked about blocks.

    Like every teacher it is made where it is used, closed afterwards, and never pickled.

    Attributes:
      num_classes: the highest id that its tokenizer can emit, plus one.
      max_length: most tokens of a block; None for any number.
      source: where its log-probabilities are from, as the specification has it.
    """

    num_classes: int
    max_length: int | None
    source: str

    def fingerprint(self) -> str:
        """Identify the answers; see `Teacher`."""
        ...

    def tokenizer_fingerprint(self) -> str:
        """Identify what its ids mean; see `distilbeam.inputs.tokenizer`."""
        ...

    def token_labels(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> TokenLabels:
        """Label blocks.

        Args:
          blocks: n blocks, with `example_id` where labels are drawn.
          spec: the form of the labels.

        Returns:
          The labels. A block with a position whose logits are no numbers has NaN there.

        Raises:
          InputError: an id that the tokenizer cannot emit.
          Exception: see `Teacher.logits`.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; a second call does nothing."""
        ...


@dataclass(frozen=True)
class TokenForm:
    """The form in which labels of tokens are stored, as the driver resolves it; the teacher says the rest.

    Attributes:
      kind: `top_k` or `sampled`.
      k: classes kept, or draws.
      temperature: what logits are divided by.
      storage: `float32` or `float16`.
      sequence_length: tokens of a block.
      carried: columns that are stored beside the labels.
    """

    kind: str
    k: int
    temperature: float
    storage: str
    sequence_length: int
    carried: tuple[str, ...]
