"""The cache of answers that were paid for already: found by row, copied instead of asked again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.teacher.softlabels import SoftLabelSpec, decode, read_manifest
from distilbeam.teacher.softlabels.token_labels import decode_tokens


def known_logits(
    datasets: Sequence[str], spec: SoftLabelSpec, pool_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Look rows up in soft-label datasets of the same pool.

    Only dense labels hold every class, so that rows of other kinds are not found; they give labels of any kind. Labels of tokens are
    found where they are of the very form that is wanted. The row groups to
    read are chosen by the statistics of `pool_row`, which ascends within a dataset.

    Args:
      datasets: directories of datasets made from the same frozen pool.
      spec: the specification wanted; shards of another teacher or form are passed over, of another temperature not.
      pool_rows: int64 [n], rows of the pool.

    Returns:
      float32 [n, classes] the teacher's logits, of which a temperature of 1 makes log-probabilities, and of tokens what
      `TokenLabels.pack` gives; NaN where nothing is known.
    """
    found = np.full((len(pool_rows), spec.answer_width), np.nan, np.float32)
    if not len(pool_rows):
        return found
    position = {int(row): i for i, row in enumerate(pool_rows)}
    bounds = [("pool_row", ">=", int(pool_rows.min())), ("pool_row", "<=", int(pool_rows.max()))]
    for directory in datasets:
        manifest = read_manifest(directory)
        for path in manifest.paths():
            if _gives(manifest.spec, spec):
                table = pq.read_table(path, filters=bounds, page_checksum_verification=True)
                here = [position.get(row, -1) for row in table["pool_row"].to_pylist()]
                wanted = np.flatnonzero(np.array(here, np.int64) >= 0)
                if len(wanted):
                    found[np.array(here)[wanted]] = _answers(table.take(wanted), manifest.spec)
    return found


def _gives(there: SoftLabelSpec, wanted: SoftLabelSpec) -> bool:
    """Tell whether the answers that are wanted can be read from labels that are there."""
    if there.teacher != wanted.teacher:
        return False
    return there.meaning() == wanted.meaning() if wanted.unit == "token" else there.kind == "dense"


def _answers(labels: pa.Table, spec: SoftLabelSpec) -> npt.NDArray[np.float32]:
    if spec.unit == "token":
        return decode_tokens(labels, spec).pack()
    logits: npt.NDArray[np.float32] = decode(labels, spec).logprobs * np.float32(spec.temperature)
    return logits
