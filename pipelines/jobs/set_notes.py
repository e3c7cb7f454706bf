"""Notes on the labelled sets before a run: few rows, missing classes, rows in two sets, which change what its figures mean."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.pipelines.pool.content_ids import content_ids
from distilbeam.pipelines.pool.datasets import Inputs
from distilbeam.pipelines.pool.labelled_sets import LabelledSet
from distilbeam.pipelines.pool.pool_files import open_parquet
from distilbeam.pipelines.pool.read_splits import read_groups
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.storage.stores import store_of

_FEW = 100  # validation rows, with which a share is known to 10 points
_LOOKED_AT = 65_536  # rows of the pool that are compared with the sets
_BYTES = 64 * 2**20  # of them that are read
_NAMED = 3  # classes that are named


def notes_on(inputs: Inputs, id_column: str | None = None) -> list[str]:
    """Say, in sentences, what limits the estimates: few rows, classes without any, rows or ids that are in several sets.

    Args:
      inputs: the data of a run.
      id_column: column with the ids, where there is one; sets without it are not compared by it.
    """
    return [
        *_few_rows(inputs),
        *_missing_classes(inputs),
        *_contradictions(inputs),
        *_shared_rows(inputs),
        *_shared_ids(inputs, id_column),
        *_shared_with_pool(inputs),
    ]


def require_different_sets(inputs: Inputs) -> None:
    """Refuse sets that are one: rows that are in both are a note, all of them a mistake.

    Raises:
      ValueError: the validation or the test set is the labelled set.
    """
    learned = set(inputs.labelled.ids)
    for name, one in (("data.validation", inputs.validation), ("data.test", inputs.test)):
        if set(one.ids) == learned:
            raise ValueError(
                f"{name} must not be data.labelled: all of its {len(one.ids):,} rows are there and no others, so that a student would "
                "be judged by what it learned; divide your labelled rows into sets"
            )


def _few_rows(inputs: Inputs) -> Iterator[str]:
    rows = len(inputs.validation.truth)
    if rows < _FEW:
        yield (
            f"data.validation has {rows:,} rows: shares are known to ± {98 / math.sqrt(rows):.0f} points, the teacher's mistakes too"
        )


def _missing_classes(inputs: Inputs) -> Iterator[str]:
    for name, one, what in (
        ("data.labelled", inputs.labelled, "the first student cannot know them"),
        ("data.validation", inputs.validation, "how often the teacher errs there is not measured"),
    ):
        counts = np.bincount(one.truth, minlength=len(inputs.classes))
        missing = [*compress(inputs.classes, counts == 0)]
        if missing:
            more = f" and {len(missing) - _NAMED:,} more" if len(missing) > _NAMED else ""
            yield (
                f"{name} has no row of {len(missing):,} of the {len(inputs.classes):,} classes ({', '.join(missing[:_NAMED])}{more}): {what}"
            )


def _contradictions(inputs: Inputs) -> Iterator[str]:
    """Rows of one set that the student cannot tell apart and that have different classes."""
    for name, one in _sets(inputs):
        classes: dict[bytes, set[int]] = defaultdict(set)
        for row, truth in zip(one.ids, one.truth.tolist(), strict=True):
            classes[row].add(truth)
        odd = sum(len(classes[row]) > 1 for row in one.ids)
        if odd:
            yield (
                f"{odd:,} of the {len(one.ids):,} rows of {name} have the input of another row of it and another class: at most one of "
                "them is right"
            )


def _sets(inputs: Inputs) -> list[tuple[str, LabelledSet]]:
    sets = [("data.labelled", inputs.labelled), ("data.validation", inputs.validation)]
    return sets if inputs.test is inputs.validation else [*sets, ("data.test", inputs.test)]


def _shared_ids(inputs: Inputs, column: str | None) -> Iterator[str]:
    """Ids that are in two sets, of rows whose content is in one: an edited row, or ids that are not unique."""
    if column is None:
        return
    known = [(name, dict(zip(ids, one.ids, strict=True))) for name, one in _sets(inputs) if (ids := _ids(one, column))]
    for place, (name, rows) in enumerate(known):
        for other_name, others in known[:place]:
            odd = sum(others.get(key, row) != row for key, row in rows.items())
            if odd:
                yield (
                    f"{odd:,} of the {len(rows):,} ids of {name} are in {other_name} too, with another content: one row that was "
                    "edited, or two that share an id"
                )


def _ids(one: LabelledSet, column: str) -> list[Any]:
    """Read the ids of a set; none where a file has no such column."""
    found: list[Any] = []
    for path in dict.fromkeys(unit.path for unit in one.plan.units):
        file = open_parquet(path)
        if column not in file.schema_arrow.names:
            return []
        found += file.read(columns=[column])[column].to_pylist()
    return found if len(found) == len(one.ids) else []


def _shared_rows(inputs: Inputs) -> Iterator[str]:
    test = None if inputs.test is inputs.validation else inputs.test
    for name, one, other_name, other, what in (
        (
            "data.validation",
            inputs.validation,
            "data.labelled",
            inputs.labelled,
            "checkpoints are chosen by what was learned",
        ),
        ("data.test", test, "data.labelled", inputs.labelled, "the final table knows their answers"),
        ("data.test", test, "data.validation", inputs.validation, "checkpoints were chosen by them"),
    ):
        if one is not None and (count := _shared(one, set(other.ids))):
            yield f"{count:,} of the {len(one.ids):,} rows of {name} are in {other_name} too: {what}"


def _shared_with_pool(inputs: Inputs) -> Iterator[str]:
    looked_at = _pool_ids(inputs.pool, tuple(dict.fromkeys(inputs.student_columns)))
    pool = set(looked_at)
    for name, one, what in (
        ("data.labelled", inputs.labelled, "labels may be bought that are known"),
        ("data.validation", inputs.validation, "a student may be judged by what it learned"),
        ("data.test", inputs.test, "a student may be judged by what it learned"),
    ):
        if (one is not inputs.validation or name == "data.validation") and (count := _shared(one, pool)):
            seen = (
                "the pool"
                if len(looked_at) == inputs.pool.rows
                else f"{len(looked_at):,} rows of the pool that were looked at"
            )
            yield f"{count:,} of the {len(one.ids):,} rows of {name} are in {seen}: {what}"


def _shared(one: LabelledSet, others: set[bytes]) -> int:
    return sum(row in others for row in one.ids)


def _pool_ids(pool: Pool, columns: Sequence[str]) -> list[bytes]:
    """Hash rows of the pool, all of a small one, of a larger one those of some row groups."""
    if store_of(pool.units[0].path).by_request:  # where reading costs money
        return []
    groups = [(unit.path, group) for unit in pool.units for group in range(*unit.row_groups)]
    ids: list[bytes] = []
    size = 0
    for i in np.random.default_rng(pool.rows).permutation(len(groups)):
        path, group = groups[i]
        try:
            for batch in read_groups(open_parquet(path), path, [group], columns, _LOOKED_AT):
                ids += content_ids(pa.Table.from_batches([batch]))
                size += batch.nbytes
                if len(ids) >= _LOOKED_AT or size >= _BYTES:
                    return ids
        except ValueError:  # a damaged file, which the phase that needs it names
            continue
    return ids
