"""The cache of answers that were paid for already: found by row, copied instead of asked again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from distilbeam.teacher.softlabels import SoftLabelSpec, decode, read_manifest


def known_logits(
    datasets: Sequence[str], spec: SoftLabelSpec, pool_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Look rows up in soft-label datasets of the same pool.

    Only dense labels hold every class, so that rows of other kinds are not found; they give labels of any kind. The row groups to
    read are chosen by the statistics of `pool_row`, which ascends within a dataset.

    Args:
      datasets: directories of datasets made from the same frozen pool.
      spec: the specification wanted; shards of another teacher or form are passed over, of another temperature not.
      pool_rows: int64 [n], rows of the pool.

    Returns:
      float32 [n, classes] the teacher's logits, of which a temperature of 1 makes log-probabilities; NaN where nothing
      is known.
    """
    found = np.full((len(pool_rows), spec.num_classes), np.nan, np.float32)
    if not len(pool_rows):
        return found
    position = {int(row): i for i, row in enumerate(pool_rows)}
    bounds = [("pool_row", ">=", int(pool_rows.min())), ("pool_row", "<=", int(pool_rows.max()))]
    for directory in datasets:
        manifest = read_manifest(directory)
        for path in manifest.paths():
            if (manifest.spec.kind, manifest.spec.teacher) == ("dense", spec.teacher):
                table = pq.read_table(path, filters=bounds, page_checksum_verification=True)
                here = [position.get(row, -1) for row in table["pool_row"].to_pylist()]
                wanted = np.flatnonzero(np.array(here, np.int64) >= 0)
                if len(wanted):
                    logprobs = decode(table.take(wanted), manifest.spec).logprobs
                    found[np.array(here)[wanted]] = logprobs * np.float32(manifest.spec.temperature)
    return found
