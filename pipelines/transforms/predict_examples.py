"""Predictions inside somebody else's pipeline: record batches through a student, or rows through Beam's RunInference.

`PredictExamples` is one linear step of batches, bounded or not. `StudentModelHandler` gives the same model to RunInference, which
makes batches of single rows by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.prediction.opened_model import Model, cached_model
from distilbeam.pipelines.prediction.predict_files import PredictOptions, answered
from distilbeam.pipelines.prediction.rows import Rows
from distilbeam.pipelines.prediction.values import from_json
from distilbeam.student.predictions import require_free
from distilbeam.student.trust import trusted


class PredictExamples(beam.PTransform):
    """Turn record batches of examples into record batches of predictions, row for row.

    Args:
      model: directory of a student, an export, a finished run or a Hugging Face classifier, which workers can read.
      columns: columns of the examples to carry along, such as an id.
      top_k: give the k most probable classes too.
      logits: give the logits too.
      input_column: of the texts or images, for a Hugging Face classifier.
      trust: modules whose code the student may call, besides what this process trusts; see `student.trust`.

    A batch that comes out has the carried columns and what `student.predictions.Predictor.predict` gives: a row without a usable
    input has a `reason` instead of a class, and costs its neighbours nothing.

    Raises:
      ValueError: a carried column has a name of ours.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        columns: Sequence[str] = (),
        top_k: int | None = None,
        logits: bool = False,
        input_column: str | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        require_free(columns)
        self.model, self.input_column, self.trust = str(Path(model).resolve()), input_column, (*trusted(), *trust)
        self.options = PredictOptions(top_k, logits, tuple(columns))

    def expand(self, batches: Any) -> Any:
        return batches | "Predict" >> beam.ParDo(_PredictBatch(self))


class _PredictBatch(beam.DoFn):
    def __init__(self, asked: PredictExamples) -> None:
        self.model, self.options = (asked.model, asked.input_column, asked.trust), asked.options
        self.counters = {name: Metrics.counter("PredictExamples", name) for name in ("rows", "without")}

    def process(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        table = pa.Table.from_batches([batch])
        missing = [name for name in self.options.columns if name not in table.column_names]
        if missing:
            raise ValueError(
                f"columns: a batch must have {', '.join(missing)} to carry along, it has {', '.join(table.column_names)}"
            )
        with threads(1):
            said = answered(cached_model(*self.model), Rows(table, table), self.options)
        self.counters["rows"].inc(table.num_rows)
        self.counters["without"].inc(table.num_rows - said["reason"].null_count)
        carried = table.select(list(self.options.columns))
        fields = pa.schema([*carried.schema, *said.schema])
        whole = pa.Table.from_arrays([*carried.columns, *said.columns], schema=fields).combine_chunks()
        yield from whole.to_batches()


class StudentModelHandler(ModelHandler[Mapping[str, Any], PredictionResult, Model]):
    """Runs a student in `apache_beam.ml.inference.base.RunInference`.

    Args:
      model: directory of a student, an export, a finished run or a Hugging Face classifier, which workers can read.
      top_k: give the k most probable classes too.
      input_column: of the texts or images, for a Hugging Face classifier.
      min_batch_size, max_batch_size: rows that Beam puts into one call.
      trust: modules whose code the student may call, besides what this process trusts.

    An element is a mapping with the columns that the student reads; its `PredictionResult.inference` is a mapping of
    `prediction`, `confidence`, with `top_k` the two lists, and `reason`.

    Example:
      >>> from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
      >>> step = RunInference(KeyedModelHandler(StudentModelHandler("run/exports/round=003/onnx")))
    """

    def __init__(
        self,
        model: str | Path,
        *,
        top_k: int | None = None,
        input_column: str | None = None,
        min_batch_size: int = 1,
        max_batch_size: int = 1024,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__(min_batch_size=min_batch_size, max_batch_size=max_batch_size)
        self._model = (str(Path(model).resolve()), input_column, (*trusted(), *trust))
        self._options = PredictOptions(top_k)

    def load_model(self) -> Model:
        """Load the model, once for each process."""
        return cached_model(*self._model)

    def run_inference(
        self, batch: Sequence[Mapping[str, Any]], model: Model, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Predict rows; a row that is not as the model reads it has a reason, and costs its neighbours nothing."""
        if inference_args:
            raise ValueError(f"a student takes no inference_args, got {', '.join(inference_args)}; leave them out")
        arrays, reasons = {}, dict[int, str]()
        for name in model.columns:
            arrays[name], more = from_json([row.get(name) for row in batch], name, model.input)
            reasons = more | reasons
        with threads(1):
            said = answered(model, Rows(pa.table(arrays), pa.table({}), reasons), self._options)
        answers = zip(batch, said.to_pylist(), strict=True)
        return [PredictionResult(row, answer, self._model[0]) for row, answer in answers]

    def get_metrics_namespace(self) -> str:
        """Name the counters of RunInference."""
        return "StudentModelHandler"
