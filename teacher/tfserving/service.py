"""The services of TensorFlow Serving in front of any teacher or student.

Each input of the signature is a column that the teacher reads: arrays of numbers arrive as fixed-size bytes with their
shape and type, strings as binary, so that the teacher's own preprocessing applies. The output is `logits`, or, with
`top_k`, the k largest log-probabilities, their classes, the log-mass of the others and the number of classes, so that
big label spaces do not travel. A model whose classes are known by name gives the `prediction` of each row and its `confidence`
too, each to be asked for by `output_filter`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import log_softmax, softmax

from distilbeam.inputs.config import InputConfig, InputError
from distilbeam.teacher.answers import labels
from distilbeam.teacher.protocol import Teacher, TeacherChanged, TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.softlabels.codec import TAIL_FLOOR
from distilbeam.teacher.softlabels.selecting import largest
from distilbeam.teacher.tfserving.calling import MISFIT
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.receiving import Gate, Limits, Refused
from distilbeam.teacher.tfserving.signatures import TOP_K
from distilbeam.teacher.tfserving.tensors import FLOAT, INT32, INT64, STRING, to_array, to_proto

Code = grpc.StatusCode
SIGNATURE = "serving_default"
_PREDICT = "tensorflow.serving.ml_predict"
_AVAILABLE = 30  # ModelVersionStatus.State, get_model_status.proto


class ModelService:
    """Answers requests about one teacher.

    Args:
      teacher: the teacher; it is asked by one thread at a time.
      inputs: what the teacher reads.
      name: name of the model.
      version: version of the model.
      top_k: classes to send, or None for the logits of all.
      limits: what is taken from clients.
      classes: names of the classes in the order of the logits, to give the `prediction` and `confidence` of each row too.
    """

    def __init__(
        self,
        teacher: Teacher,
        inputs: InputConfig,
        name: str,
        version: int,
        top_k: int | None,
        limits: Limits | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._teacher, self._inputs = teacher, inputs
        self.gate = Gate(limits or Limits())
        self._name, self._version, self._top_k = name, version, top_k
        self._names = None if classes is None else np.array(classes, object)
        self._lock = threading.Lock()

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return the handlers of the services, to be added to a server."""
        m = load_messages()
        predict = {
            "Predict": self.gate.handler(self.predict, m.predict.PredictRequest, check=self._require_few),
            "GetModelMetadata": self.gate.handler(self.metadata, m.metadata.GetModelMetadataRequest),
        }
        status = {"GetModelStatus": self.gate.handler(self.status, m.status.GetModelStatusRequest)}
        return [
            grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", predict),
            grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", status),
        ]

    def predict(self, request: Any) -> Any:
        """Answer PredictionService.Predict."""
        self._require_model(request.model_spec)
        if request.model_spec.signature_name not in ("", SIGNATURE):
            raise Refused(Code.INVALID_ARGUMENT, f"the model has the signature {SIGNATURE} only")
        outputs = self._outputs(self._batch(request.inputs))
        unknown = [name for name in request.output_filter if name not in outputs]
        if unknown:
            raise Refused(Code.INVALID_ARGUMENT, f"output '{unknown[0]}' is unknown; there are {', '.join(outputs)}")
        response = load_messages().predict.PredictResponse()
        self._describe(response.model_spec)
        response.model_spec.signature_name = SIGNATURE
        for name in request.output_filter or outputs:
            response.outputs[name].CopyFrom(to_proto(outputs[name]))
        return response

    def metadata(self, request: Any) -> Any:
        """Answer PredictionService.GetModelMetadata."""
        self._require_model(request.model_spec)
        if list(request.metadata_field) != ["signature_def"]:
            raise Refused(Code.INVALID_ARGUMENT, "metadata_field must be signature_def")
        messages = load_messages()
        signatures = messages.metadata.SignatureDefMap()
        signature = signatures.signature_def[SIGNATURE]
        signature.method_name = _PREDICT
        for name in self._inputs.columns:
            _tensor_info(signature.inputs[name], f"{name}:0", *self._input_type())
        for name, info in self._output_types().items():
            _tensor_info(signature.outputs[name], f"{name}:0", *info)
        response = messages.metadata.GetModelMetadataResponse()
        self._describe(response.model_spec)
        response.metadata["signature_def"].Pack(signatures)
        return response

    def status(self, request: Any) -> Any:
        """Answer ModelService.GetModelStatus."""
        self._require_model(request.model_spec)
        response = load_messages().status.GetModelStatusResponse()
        response.model_version_status.add(version=self._version, state=_AVAILABLE)
        return response

    def _require_model(self, spec: Any) -> None:
        if spec.name != self._name:
            raise Refused(Code.NOT_FOUND, f"model '{spec.name}' is not served here; there is '{self._name}'")
        if spec.HasField("version") and spec.version.value != self._version:
            raise Refused(Code.NOT_FOUND, f"version {spec.version.value} is not served here; there is {self._version}")
        if spec.version_label:
            raise Refused(Code.NOT_FOUND, f"version label '{spec.version_label}' is unknown; no labels are served here")

    def _describe(self, spec: Any) -> None:
        spec.name = self._name
        spec.version.value = self._version

    def _batch(self, inputs: Mapping[str, Any]) -> pa.RecordBatch:
        columns = self._inputs.columns
        if set(inputs) != set(columns):
            found = ", ".join(sorted(inputs)) or "none"
            raise Refused(Code.INVALID_ARGUMENT, f"the inputs must be {', '.join(sorted(columns))}, got {found}")
        try:
            made = [_column(name, to_array(inputs[name]), self._inputs) for name in columns]
            return pa.RecordBatch.from_arrays([column for column, _ in made], schema=pa.schema([f for _, f in made]))
        except ValueError as e:  # pa.ArrowInvalid is one
            raise Refused(Code.INVALID_ARGUMENT, str(e)) from e

    def _require_few(self, request: Any) -> None:
        most = self.gate.limits.rows
        for proto in request.inputs.values():
            dims = proto.tensor_shape.dim
            rows = max(dims[0].size if len(dims) else 1, len(proto.string_val))
            if rows > most:
                raise Refused(
                    Code.INVALID_ARGUMENT,
                    f"a request must have at most {most:,} rows here, got {rows:,}; ask about fewer at a time",
                )

    def _outputs(self, batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
        try:
            with self._lock:
                logits = self._teacher.logits(batch)
        except InputError as e:
            raise Refused(Code.INVALID_ARGUMENT, str(e)) from e
        except TeacherUnavailable as e:
            raise Refused(Code.UNAVAILABLE, str(e)) from e
        except (TeacherChanged, TeacherMisfit) as e:  # of every request, whatever its rows
            raise Refused(Code.FAILED_PRECONDITION, f"{MISFIT}{e}") from e
        except Exception as e:  # a model may raise anything; the client asks again with fewer rows
            raise Refused(Code.INTERNAL, f"{type(e).__name__}: {e}") from e
        named = {} if self._names is None else _named(logits, self._names)
        return ({"logits": logits} if self._top_k is None else _largest(logits, self._top_k)) | named

    def _input_type(self) -> tuple[int, list[int] | None]:
        if self._inputs.kind in ("image", "text", "raw"):
            return STRING, [-1]
        if self._inputs.kind == "tokens":
            return INT64, [-1, -1]
        if self._inputs.kind == "tensor" and len(self._inputs.columns) == 1:
            return FLOAT, None if self._inputs.shape is None else [-1, *self._inputs.shape]
        return FLOAT, None

    def _output_types(self) -> dict[str, tuple[int, list[int] | None]]:
        named = {} if self._names is None else {"prediction": (STRING, [-1]), "confidence": (FLOAT, [-1])}
        if self._top_k is None:
            return {"logits": (FLOAT, [-1, -1]), **named}
        k = self._top_k
        sparse = zip(TOP_K, [(FLOAT, [-1, k]), (INT32, [-1, k]), (FLOAT, [-1]), (INT32, [])], strict=True)
        return {**dict(sparse), **named}


def _tensor_info(info: Any, name: str, dtype: int, shape: list[int] | None) -> None:
    info.name, info.dtype = name, dtype
    if shape is None:
        info.tensor_shape.unknown_rank = True
    else:
        for size in shape:
            info.tensor_shape.dim.add(size=size)


def _column(name: str, array: npt.NDArray[Any], inputs: InputConfig) -> tuple[pa.Array, pa.Field]:
    if array.ndim == 0:
        raise ValueError(f"input {name} must have one row per example, got a single value")
    if array.dtype == object:
        if array.ndim != 1:
            raise ValueError(f"input {name} must be one string per example, got shape {list(array.shape)}")
        column = pa.array(array.tolist(), pa.binary())
        return column, pa.field(name, column.type)
    if inputs.kind == "tokens" and array.ndim == 2 and array.shape[1] and array.dtype.kind in "iu":
        lists = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
        return lists, pa.field(name, lists.type)
    width = int(np.prod(array.shape[1:], dtype=np.int64)) * array.itemsize
    data = pa.py_buffer(np.ascontiguousarray(array).tobytes())
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, data])
    metadata = {"dtype": array.dtype.name, "shape": json.dumps(array.shape[1:] or (1,))}
    return column, pa.field(name, column.type, metadata=metadata)


def _named(logits: npt.NDArray[np.float32], names: npt.NDArray[np.object_]) -> dict[str, npt.NDArray[Any]]:
    """Give the class of each row and its probability; of rows that have no distribution no name, and NaN."""
    finite = labels(logits)
    best = np.where(finite[:, None], logits, np.float32(0)).argmax(axis=1)
    probability = softmax(np.where(finite[:, None], logits, np.float64(np.nan)), axis=1)[np.arange(len(best)), best]
    return {"prediction": np.where(finite, names[best], ""), "confidence": probability.astype(np.float32)}


def _largest(logits: npt.NDArray[np.float32], k: int) -> dict[str, npt.NDArray[Any]]:
    """Keep the k most probable classes; rows that have no distribution travel as NaN, for the client to find them."""
    num_classes = logits.shape[1]
    finite = labels(logits)
    logprobs = log_softmax(np.where(finite[:, None], logits, np.float32(0)), axis=1)
    classes = largest(logprobs, min(k, num_classes))
    kept = np.take_along_axis(logprobs, classes, axis=1)
    rest = np.exp(logprobs)
    np.put_along_axis(rest, classes, 0, axis=1)
    tail = np.log(np.maximum(rest.sum(axis=1), np.exp(TAIL_FLOOR)))
    kept[~finite] = np.nan
    return dict(zip(TOP_K, (kept, classes.astype(np.int32), tail, np.array(num_classes, np.int32)), strict=True))
