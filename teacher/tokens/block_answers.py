"""A teacher of tokens as a teacher of rows: what labelling asks, one row of numbers for each block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.blocks import block_fields
from distilbeam.teacher.protocol import NotPickled, TeacherChanged, TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.tokens.protocol import TokenForm, TokenTeacher

_TRIED = 2  # tokens: one has a label


class BlockAnswers(NotPickled):
    """Answers each block with its labels as one row of numbers (`TokenLabels.pack`); see `Teacher`.

    Args:
      teacher: the teacher of tokens; closed with this.
      form: how its labels are stored.

    Attributes:
      teacher: the teacher.
      spec: the specification of its labels.

    Raises:
      ValueError: the blocks are longer than what the teacher reads, or the form is none that it can have.
    """

    def __init__(self, teacher: TokenTeacher, form: TokenForm) -> None:
        if teacher.max_length is not None and form.sequence_length > teacher.max_length:
            raise ValueError(
                f"the pool's blocks have {form.sequence_length:,} tokens, the teacher reads at most {teacher.max_length:,}; ingest "
                f"the text again with --sequence-length {teacher.max_length}"
            )
        self.teacher = teacher
        kind: Any = form.kind
        storage: Any = form.storage
        self.spec = SoftLabelSpec(
            num_classes=teacher.num_classes,
            kind=kind,
            k=form.k,
            temperature=form.temperature,
            storage=storage,
            teacher=teacher.fingerprint(),
            carried=form.carried,
            unit="token",
            sequence_length=form.sequence_length,
            tokenizer=teacher.tokenizer_fingerprint(),
            source=teacher.source,
        )

    @property
    def parallel(self) -> int:
        """Requests that the teacher keeps in flight."""
        return int(getattr(self.teacher, "parallel", 1))

    def fingerprint(self) -> str:
        """Identify the answers; see `Teacher`."""
        return self.teacher.fingerprint()

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer blocks: float32 [n, `spec.answer_width`], NaN where a block's logits are no numbers."""
        return self.teacher.token_labels(batch, self.spec).pack()

    def in_pieces(self, batch: pa.RecordBatch, rows: int) -> list[tuple[int, npt.NDArray[np.float32] | Exception]]:
        """Answer blocks, each of which succeeds or fails by itself where the teacher can tell; see `TfServingTeacher`.

        Args:
          batch: n blocks.
          rows: most blocks that are asked about together, where it cannot.
        """
        each = getattr(self.teacher, "labels_of_each", None)
        if each is not None:
            found = each(batch, self.spec)
            return [(1, one if isinstance(one, Exception) else one.pack()) for one in found]
        pieces: list[tuple[int, npt.NDArray[np.float32] | Exception]] = []
        for start in range(0, len(batch), rows):
            part = batch.slice(start, rows)
            try:
                pieces.append((len(part), self.logits(part)))
            except (TeacherChanged, TeacherMisfit, TeacherUnavailable):
                raise
            except Exception as e:  # noqa: BLE001  (it is asked again with fewer blocks)
                pieces.append((len(part), e))
        return pieces

    def try_form(self) -> None:
        """Ask about a text of two tokens, so that what a server refuses whatever the blocks is known before they are paid.

        Raises:
          TeacherMisfit: it allows fewer classes than the labels have.
          TeacherUnavailable: it cannot be reached.
        """
        length = self.spec.sequence_length or 0
        text = np.minimum(np.arange(length), 1), (np.arange(length) < _TRIED).astype(int), np.ones(length, int)
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(values, field.type.value_type), type=field.type)
            for values, field in zip(text, block_fields(length), strict=True)
        ]
        names = [field.name for field in block_fields(length)]
        self.logits(pa.record_batch([pa.array(["tried"]), *columns], ["example_id", *names]))

    def close(self) -> None:
        """Give back what the teacher holds."""
        self.teacher.close()
