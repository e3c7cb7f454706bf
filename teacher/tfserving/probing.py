"""The shape of a served teacher's input, found in the first rows where neither the server nor the configuration says it.

The teacher is fingerprinted by its answers to a fixed batch, which must have a shape that the model takes. All rows of a
pool have one shape, so that every process and every night finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from distilbeam.inputs.config import InputError, make_input
from distilbeam.teacher.config import TeacherConfig, TfServingConfig

FIRST_ROWS = 64  # rows that are looked at; the first may be a bad one


def with_probe_shape(config: TeacherConfig, rows: Callable[[], Iterable[pa.RecordBatch]]) -> TeacherConfig:
    """Write the shape of the first row's input into a served teacher's configuration.

    Args:
      config: the teacher, with absolute paths.
      rows: reads the first rows, with the columns of the input; called only where the shape is not configured.

    Returns:
      The configuration with `probe_shape`; as it is where the teacher is none that is served, where the shape is given, and
      where the rows do not say it.

    Raises:
      ValueError: a file that the input needs cannot be loaded.
    """
    if not isinstance(config, TfServingConfig) or config.probe_shape or config.input.shape:
        return config
    make = make_input(config.input)
    for batch in rows():
        for row in range(len(batch)):
            try:
                made = make(batch.slice(row, 1))
            except InputError:
                continue
            shape = made.shape[1:] if isinstance(made, np.ndarray) else ()
            return config.model_copy(update={"probe_shape": shape}) if shape else config
    return config
