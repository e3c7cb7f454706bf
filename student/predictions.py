"""Predictions: a class and its probability for each row of a table, or the reason why a row has none.

Softmax in float64 of the logits, the largest first and ties by the order of the classes, as `argmax` breaks them. A row
without a usable input (a missing value, bytes that are no image, a number that is not finite) costs its neighbours nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import softmax

from distilbeam.inputs.config import InputConfig
from distilbeam.student.data.bad_rows import ALONE
from distilbeam.student.data.usable_rows import find_usable

BATCH_ROWS = 1024
NAMES = ("prediction", "confidence", "top_classes", "top_probabilities", "logits", "reason")


class Predictor(ABC):
    """A model that answers tables.

    Attributes:
      classes: names of the classes in the order of the logits.
      input: which columns are read, and how.
      columns: names of the columns that it reads.
      input_shape: shape of one example's input.
    """

    classes: tuple[str, ...]
    input: InputConfig
    columns: tuple[str, ...]
    input_shape: tuple[int, ...]

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify the model by all that its answers depend on."""

    @abstractmethod
    def inputs(self, batch: pa.RecordBatch) -> Any:
        """Make the input of a batch, an array [rows, *input_shape]."""

    @abstractmethod
    def logits_of_inputs(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Compute the logits of inputs, float32 [rows, C]."""

    def predict(
        self, data: Any, *, top_k: int | None = None, logits: bool = False, batch_rows: int = BATCH_ROWS
    ) -> pa.Table:
        """Predict the class of every row.

        Args:
          data: a table or a record batch with the columns that the model reads, or what Arrow makes one of: a data frame
            (of pandas, polars, ...), a mapping of columns, a list of mappings, one for each row; for a model of one column
            a list of its values too, such as texts.
          top_k: also give the k most probable classes; all of them where there are fewer.
          logits: also give the logits.
          batch_rows: most rows whose inputs are in memory at a time.

        Returns:
          A table of as many rows in the same order: `prediction` (string, the class's name) and `confidence` (float32,
          its probability); with `top_k` the lists `top_classes` and `top_probabilities`, the most probable first; with
          `logits` the list `logits` in the order of `classes`; `reason` (string): null, or why the row has no usable
          input, where all else is null.

        Raises:
          ValueError: a column is missing, the data are no table, or `top_k` or `batch_rows` is not positive.
        """
        for name, number in (("top_k", top_k), ("batch_rows", batch_rows)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number:,}")
        table = as_table(data, self.columns)
        missing = [name for name in self.columns if name not in table.column_names]
        if missing:
            raise ValueError(
                f"the data must have the column(s) {', '.join(missing)} that the student reads; they have "
                f"{', '.join(table.column_names) or 'none'}"
            )
        wanted = table.select(list(self.columns))
        parts = [self._of_batch(batch, top_k, logits) for batch in wanted.to_batches(max_chunksize=batch_rows)]
        none = np.empty((0, len(self.classes)))
        return pa.concat_tables(parts) if parts else self._table(0, [], none, {}, top_k, logits)

    def _of_batch(self, batch: pa.RecordBatch, top_k: int | None, logits: bool) -> pa.Table:
        usable = find_usable(self.inputs, batch, self.input_shape)
        reasons = {row: re.sub(ALONE, "it", reason) for row, reason in usable.reasons.items()}
        answers_NC = np.empty((0, len(self.classes)))
        if usable.inputs is not None and len(usable.rows):
            answers_NC = np.asarray(self.logits_of_inputs(usable.inputs), np.float64)
        odd = ~np.isfinite(answers_NC).all(axis=1)
        reasons |= dict.fromkeys(usable.rows[odd].tolist(), "the student's logits of it are not finite numbers")
        return self._table(batch.num_rows, usable.rows[~odd], answers_NC[~odd], reasons, top_k, logits)

    def _table(
        self,
        rows: int,
        answered: Sequence[int] | npt.NDArray[np.int64],
        logits_NC: npt.NDArray[np.float64],
        reasons: Mapping[int, str],
        top_k: int | None,
        with_logits: bool,
    ) -> pa.Table:
        """Put the answers of some rows in their places, and reasons in those of the others."""
        missing = np.ones(rows, bool)
        missing[answered] = False
        probabilities_NC = softmax(logits_NC, axis=1)
        order_NK = np.argsort(-logits_NC, axis=1, kind="stable")[:, : top_k or 1]  # as argmax breaks ties
        top_NK = np.take_along_axis(probabilities_NC, order_NK, axis=1).astype(np.float32)
        names = pa.array(self.classes, pa.string())
        places = np.zeros(rows, np.int64)
        places[answered] = np.arange(len(answered))
        at = pa.array(places, mask=missing)
        columns = {
            "prediction": names.take(pa.array(order_NK[:, 0])).take(at),
            "confidence": pa.array(top_NK[:, 0]).take(at),
        }
        if top_k is not None:
            columns["top_classes"] = _lists(names.take(pa.array(order_NK.reshape(-1))), missing)
            columns["top_probabilities"] = _lists(pa.array(top_NK.reshape(-1)), missing)
        if with_logits:
            columns["logits"] = _lists(pa.array(logits_NC.astype(np.float32).reshape(-1)), missing)
        columns["reason"] = pa.array([reasons.get(row) for row in range(rows)], pa.string())
        return pa.table(columns)


def as_table(data: Any, columns: Sequence[str]) -> pa.Table:
    """Make a table of what users have; see `Predictor.predict`.

    Raises:
      ValueError: Arrow makes none of it.
    """
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    try:
        if isinstance(data, Mapping):
            return pa.table(dict(data))
        if isinstance(data, list | tuple):
            if all(isinstance(row, Mapping) for row in data):
                return pa.Table.from_pylist(list(data)) if data else pa.table({name: pa.nulls(0) for name in columns})
            if len(columns) == 1:
                return pa.table({columns[0]: pa.array(data)})
        elif not isinstance(data, str | bytes) and (hasattr(data, "__arrow_c_stream__") or hasattr(data, "columns")):
            return pa.table(data)
    except (pa.ArrowException, TypeError) as e:
        raise ValueError(f"the data must be a table, and Arrow makes none of them: {str(e).splitlines()[0]}") from e
    raise ValueError(
        f"the data must be a table with the columns {', '.join(columns)}, a data frame, a mapping of columns or a list of "
        f"rows, got {type(data).__name__}"
    )


def without_prediction(predicted: pa.Table, reasons: Mapping[int, str]) -> pa.Table:
    """Take away what was predicted for some rows, and give the reasons why: that they could not even be read."""
    if not reasons:
        return predicted
    unread = np.zeros(predicted.num_rows, bool)
    unread[list(reasons)] = True
    said = predicted["reason"].to_pylist()
    for row, reason in reasons.items():
        said[row] = reason
    left = predicted.take(pa.array(np.arange(predicted.num_rows), mask=unread))
    return left.set_column(left.column_names.index("reason"), "reason", pa.array(said, pa.string()))


def require_free(names: Iterable[str], more: Sequence[str] = ()) -> None:
    """Check that columns which are carried along have no name of a prediction's.

    Raises:
      ValueError: one has.
    """
    taken = [name for name in names if name in (*NAMES, *more)]
    if taken:
        raise ValueError(
            "the columns carried along must have other names than those of the predictions, got "
            f"{', '.join(taken)}; rename them"
        )


def _lists(values: pa.Array, missing: npt.NDArray[np.bool_]) -> pa.Array:
    """Make lists of equally many values for the rows that have any, null for the others."""
    answered = int((~missing).sum())
    lengths = np.where(missing, 0, len(values) // answered if answered else 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(missing))
