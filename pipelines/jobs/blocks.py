"""A pool of blocks of tokens, as a job with a teacher of tokens resolves it: their length, their tokenizer, the labels' form."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.inputs.blocks import BLOCK_COLUMNS, TOKENIZER_KEY, block_length
from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
from distilbeam.pipelines.pool.datasets import require_columns
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.pipelines.sections import LabelsSection
from distilbeam.storage.paths import readable, to_path
from distilbeam.teacher.config import TeacherConfig
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.tokens.protocol import TokenForm

ID = "example_id"
COLUMNS = (ID, *BLOCK_COLUMNS)
_READERS = 8  # a footer is mostly waiting for the filesystem


class Blocks:
    """What a job of labels of tokens knows of its pool.

    Args:
      teacher: the configuration of who labels.
      labels: the form of the labels.
      what: the setting that names the pool, for errors.
    """

    def __init__(self, teacher: TeacherConfig, labels: LabelsSection, what: str = "data.pool") -> None:
        self._teacher, self._labels, self._what = teacher, labels, what

    def teacher_text(self, pool: Pool) -> str:
        """Describe the teacher, and the form of its labels, as text that travels to workers.

        Args:
          pool: the pool as it is now.

        Raises:
          ValueError: it holds no blocks of one length.
        """
        labels = self._labels
        require_columns(pool.columns, COLUMNS, self._what)
        form = TokenForm(
            kind=labels.kind,
            k=labels.k or 0,
            temperature=labels.temperature,
            storage=labels.storage,
            sequence_length=block_length(pa.schema(pool.types), self._what),
            carried=BLOCK_COLUMNS,
        )
        return teacher_text(self._teacher, form=asdict(form))

    def spec(self, teacher: str, pool: Pool) -> SoftLabelSpec:
        """Return the specification of the labels; loads the teacher.

        Args:
          teacher: what `teacher_text` returned.
          pool: the pool.

        Raises:
          ValueError: a file of the pool is of another tokenizer than the teacher's.
        """
        answering: Any = cached_teacher(teacher)
        spec: SoftLabelSpec = answering.spec
        for path, tokenizer in tokenizers_of(pool).items():
            found = (tokenizer["fingerprint"], tokenizer["num_classes"])
            if found != (spec.tokenizer, spec.num_classes):
                raise ValueError(
                    f"{self._what}: the blocks of {path} were made with another tokenizer ({found[1]:,} ids, {found[0]}) than the "
                    f"teacher's ({spec.num_classes:,} ids, {spec.tokenizer}); ingest the text with --tokenizer and the teacher's folder"
                )
        return spec

    def rows_at_once(self, spec: SoftLabelSpec) -> int:
        """Return the blocks of one request: what the teacher takes in one forward pass, so that little is asked twice."""
        length = spec.sequence_length or 1
        tokens: int = getattr(self._teacher, "batch_tokens", length)
        return max(1, tokens // length)


def tokenizers_of(pool: Pool) -> dict[str, dict[str, Any]]:
    """Read which tokenizer made the files of a pool: what `ingest` wrote into their footers.

    Args:
      pool: the pool.

    Returns:
      The first file of each tokenizer, and its fingerprint, number of ids and hash of its chat template. Files that say
      nothing are passed over.
    """

    def read(path: str) -> bytes | None:
        return (pq.read_schema(readable(to_path(path))).metadata or {}).get(TOKENIZER_KEY)

    paths = [path for _, path in pool.paths]
    found: dict[bytes, str] = {}
    with ThreadPoolExecutor(_READERS) as readers:
        for path, text in zip(paths, readers.map(read, paths), strict=True):
            if text is not None:
                found.setdefault(text, path)
    return {path: json.loads(text) for text, path in found.items()}
