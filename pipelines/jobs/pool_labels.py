"""The soft labels of a pool that may grow, as a labelling job's configuration resolves them: pool, teacher, form, places."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

from distilbeam.pipelines.config import LabelConfig
from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
from distilbeam.pipelines.jobs.blocks import Blocks
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.labelling.comparing import changed_files
from distilbeam.pipelines.labelling.contents import read_contents
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.shard_plan import Bounds
from distilbeam.pipelines.pool.first_rows import first_rows
from distilbeam.pipelines.pool.reserved_names import require_free_for_labelling
from distilbeam.pipelines.pool.splits import Pool, plan_pool
from distilbeam.storage.paths import to_path
from distilbeam.teacher.softlabels import ManifestEntry, SoftLabelSpec, read_manifest
from distilbeam.teacher.softlabels.manifest import manifest_files
from distilbeam.teacher.softlabels.placing import placed_entries
from distilbeam.teacher.tfserving.probing import with_probe_shape


class PoolLabels:
    """The soft labels of a pool, in the directory of one labelling job.

    Args:
      config: the configuration.
      directory: the job's directory, held by this process where anything is to be done.

    Raises:
      ValueError: a column that is read or carried has a name of ours.
    """

    def __init__(self, config: LabelConfig, directory: RunDirectory) -> None:
        data, read = config.data, config.teacher.input.columns
        require_free_for_labelling(data.carry, read, data.id, "data.carry")
        self.blocks = Blocks(config.teacher, config.labels) if config.labels_tokens else None
        self.config, self.directory = config, directory

    @property
    def dataset(self) -> Path:
        """The soft-label dataset."""
        return self.directory.root / "labels"

    @property
    def dead_letters(self) -> Path:
        """Directory of the rows that could not be labelled."""
        return self.directory.dead_letters("labels")

    @property
    def contents_file(self) -> Path:
        """What is known of the contents of the pool's files."""
        return self.directory.root / "contents.json"

    @property
    def superseded(self) -> Path:
        """Folder of the datasets of other teachers and forms."""
        return self.directory.root / "superseded"

    @property
    def bounds(self) -> Bounds:
        """How large a shard may be."""
        return Bounds(self.config.engine.shard_rows, self.config.engine.shard_bytes)

    @cached_property
    def teacher(self) -> str:
        """The teacher as text that travels to workers."""
        if self.blocks is not None:
            return self.blocks.teacher_text(self.pool())
        columns = self.config.teacher.input.columns
        told = with_probe_shape(self.config.teacher, first_rows(self.pool, columns))
        return teacher_text(told, self.config.data.classes)

    @cached_property
    def spec(self) -> SoftLabelSpec:
        """How the answers are stored."""
        data, labels = self.config.data, self.config.labels
        if self.blocks is not None:
            return self.blocks.spec(self.teacher, self.pool())
        return SoftLabelSpec(
            num_classes=data.num_classes or len(data.classes),
            kind=labels.kind,
            k=labels.k,
            temperature=labels.temperature,
            storage=labels.storage,
            classes=data.classes or None,
            teacher=cached_teacher(self.teacher).fingerprint(),
            carried=data.carry,
        )

    def work(self, output: Path, dead_letters: Path) -> Label:
        """Return the label phase's work, into given directories."""
        return Label(
            labelling=self.labelling,
            output=str(output),
            dead_letters=str(dead_letters),
            columns=self.columns,
            picks=None,
            batch_rows=self.config.engine.batch_rows,
            growing=True,
            max_failures=self.config.engine.max_failures,
            flush_s=self.config.engine.flush_s,
            retry=self.config.engine.retry,
        )

    @cached_property
    def labelling(self) -> Labelling:
        """What is done with rows."""
        return Labelling(
            self.teacher,
            self.spec,
            id_column=self.id_column,
            teacher_batch=self.blocks.rows_at_once(self.spec) if self.blocks else self.config.engine.teacher_batch,
            question=() if set(self.input_columns) <= set(self.spec.carried) else self.input_columns,
        )

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that the teacher reads."""
        return tuple(self.config.teacher.input.columns)

    def pool(self) -> Pool:
        """Plan the pool as it is now: its footers are read."""
        where = to_path(self.config.data.pool)
        return plan_pool(where, self.config.engine.unit_rows, "data.pool", self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the pool that are read."""
        data = self.config.data
        columns = [*data.carry, *self.config.teacher.input.columns, *([self.id_column] if self.id_column else [])]
        return tuple(dict.fromkeys(columns))

    @property
    def id_column(self) -> str | None:
        """Column with the ids; that of blocks is `example_id`."""
        return self.config.data.id or ("example_id" if self.blocks is not None else None)

    def token_sentences(self, blocks: int) -> list[str]:
        """Say what some rows are where they are blocks of tokens; nothing of other rows."""
        if self.blocks is None:
            return []
        length = self.spec.sequence_length or 0
        return [
            f"The blocks without a label have {blocks * length:,} tokens; their context of {length:,} tokens is fixed by labelling. "
            f"A block's labels take at most {self.spec.label_bytes:,} bytes."
        ]

    def entries(self, dataset: Path) -> tuple[ManifestEntry, ...]:
        """List the shards that are committed, and those that will be when the directory is held: a killed process placed them."""
        there = read_manifest(dataset).entries if manifest_files(dataset) else ()
        keys = {entry.key for entry in there}
        return there + tuple(entry for entry in placed_entries(dataset) if entry.key not in keys)

    def set_aside(self, spec: SoftLabelSpec) -> Path:
        """Name the folder in which labels of a teacher and form are set aside."""
        digest = hashlib.blake2b(f"{spec.meaning()} {spec.teacher}".encode(), digest_size=8).hexdigest()
        return self.superseded / digest

    def changed_files(self) -> list[str]:
        """Read all labelled rows of the pool and list the files that hold something else."""
        contents = read_contents(self.contents_file)
        pool = contents.versioned(self.pool())
        known = contents.touched(pool, check_all=True)
        changed = changed_files(pool, known, self.dataset, self.entries(self.dataset), self.labelling)
        others = [
            name for name, footer in pool.files if name in contents.files and contents.files[name].footer != footer
        ]
        return sorted({*changed, *others})
