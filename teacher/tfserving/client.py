"""A teacher behind TensorFlow Serving's PredictionService.

A model's answers to a fixed batch identify it. Where neither the model nor the configuration says the shape of an input, it
is that of the first row that comes.

A batch is cut by rows and by bytes, and a bounded number of pieces is in flight. The version of the model is read from
every answer: when the server begins to answer with another one, the labels would be a mixture, and the job stops.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import make_input
from distilbeam.teacher.answers import AnswerForm
from distilbeam.teacher.backends.local import OutputOrder, function_sources, named_inputs
from distilbeam.teacher.config import TfServingConfig
from distilbeam.teacher.protocol import NotPickled, TeacherChanged, TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.tfserving.calling import RequestRefused, Servers, in_window
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.signatures import SERVICE, TOP_K, Signature, model_spec, read_signature
from distilbeam.teacher.tfserving.tensors import STRING, as_type, to_array, to_proto

Float32 = npt.NDArray[np.float32]
Inputs = Mapping[str, npt.NDArray[Any]]

_PROBE_ROWS = 8
_PROBE_SIZE = 16  # for sizes that neither signature nor configuration nor a row says
_MOST_PROBED = 2**24  # numbers of an input that a server may make us send it by saying its shape
_MOST_ANSWERED = 2**27  # logits of one request: 512 MiB
_MOST_CLASSES = 2**22  # an answer of the k best classes is spread over all of them: 16 MiB a row


class TfServingTeacher(NotPickled):
    """Asks a server.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: the model has no such signature, input or output, or a file cannot be read.
      TeacherUnavailable: no server answers, or none has the model.
    """

    def __init__(self, config: TfServingConfig) -> None:
        self._config = config
        self._input = make_input(config.input)
        self._form, self._order = AnswerForm(config.answers), OutputOrder(config.classes, "teacher.classes")
        self.parallel = config.parallel
        self._num_classes: int | None = None  # of every answer, once there was one
        self._seen: dict[str, tuple[int, ...]] = {}  # shapes of a row of the first batch, where nobody says them
        self._first = threading.Lock()
        self._servers = Servers(config)
        try:
            self._signature: Signature = read_signature(self._servers, config)
            self._threads = ThreadPoolExecutor(config.parallel, thread_name_prefix="tfserving")
            self._probed = self._probe() if self._shapes_are_known() else None
        except BaseException:
            self._servers.close()
            raise

    def fingerprint(self) -> str:
        """Identify the answers by name, version and the answers to a fixed batch; see `Teacher`.

        Raises:
          ValueError: neither the model nor the configuration nor a batch before says the shape of the input.
        """
        now = self._probe()
        with self._first:
            then = self._probed = now if self._probed is None else self._probed
        tolerance = self._config.probe_tolerance
        same = now.shape == then.shape and np.allclose(now, then, rtol=0, atol=tolerance, equal_nan=True)
        if not same:
            raise TeacherChanged(
                f"the teacher changed while it was being asked: model '{self._config.model}' of version "
                f"{self._signature.version} answers the same questions differently by more than {tolerance}; put the former "
                "model back, or start a new run directory"
            )
        digest = hashlib.blake2b(digest_size=8)
        digest.update(
            self._config.model_dump_json(include={"input", "signature", "input_name", "output_name"}).encode()
        )
        digest.update(_coarse(then, tolerance))
        digest.update(self._config.meaning().encode())
        for file in function_sources(self._config.input):
            digest.update(Path(file).read_bytes())
        name = f"tfserving:{self._config.model}:{self._signature.version}"
        return f"{name}:{digest.hexdigest()}{self._order.meaning()}"

    def logits(self, batch: pa.RecordBatch) -> Float32:
        """Answer a batch; see `Teacher`."""
        return self._order(self._form(self._ask(self._made(batch))))

    def in_pieces(self, batch: pa.RecordBatch, rows: int) -> list[tuple[int, Float32 | Exception]]:
        """Answer a batch by requests in flight together, each of which succeeds or fails by itself.

        Args:
          batch: n rows.
          rows: most rows in one request; fewer where `batch_rows` or `batch_bytes` say so.

        Returns:
          For each request in order the number of its rows, and the answers, float32, or why there are none.

        Raises:
          TeacherChanged: see `logits`.
          TeacherMisfit: see `logits`.
          TeacherUnavailable: see `logits`.
        """
        requests: list[tuple[int, Inputs | Exception]] = []
        for start in range(0, len(batch), rows):
            part = batch.slice(start, rows)
            try:
                named = self._made(part)
                requests += [(_rows_of(piece), piece) for piece in self._pieces(named)]
            except (TeacherChanged, TeacherMisfit, TeacherUnavailable):
                raise
            except Exception as e:  # noqa: BLE001  (a user's function may raise anything; it is asked again with fewer rows)
                requests.append((len(part), e))
        answers = in_window(self._attempt, [request for _, request in requests], self._threads)
        return [(count, answer) for (count, _), answer in zip(requests, answers, strict=True)]

    def arrange(self, classes: Sequence[str]) -> None:
        """Answer in the order of the job's classes, where `teacher.classes` names the outputs; see `LocalTeacher`."""
        self._order.arrange(classes)

    def close(self) -> None:
        """Close threads and connections; see `Teacher`."""
        self._threads.shutdown(cancel_futures=True)
        self._servers.close()

    def _made(self, batch: pa.RecordBatch) -> Inputs:
        """Make the inputs of a batch; the first one says the shape that nobody else says."""
        inputs = self._named(self._input(batch))
        if self._probed is None and len(batch):
            self._see(inputs)
        return inputs

    def _named(self, made: npt.NDArray[Any] | Inputs) -> Inputs:
        named = named_inputs(made, self._signature.inputs)
        return {name: as_type(array, self._signature.inputs[name][0]) for name, array in named.items()}

    def _ask(self, inputs: Inputs) -> Float32:
        pieces = list(self._pieces(inputs))
        answers: list[Float32] = in_window(self._predict, pieces, self._threads)
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def _attempt(self, inputs: Inputs | Exception) -> Float32 | Exception:
        if isinstance(inputs, Exception):
            return inputs
        try:
            return self._order(self._form(self._predict(inputs)))
        except (TeacherChanged, TeacherMisfit, TeacherUnavailable):
            raise
        except Exception as e:  # noqa: BLE001  (of these rows; the others of the same call are answered)
            return e

    def _pieces(self, inputs: Inputs) -> Iterator[Inputs]:
        rows = len(next(iter(inputs.values())))
        row_bytes = max(1, sum(map(_size_bytes, inputs.values())) // max(1, rows))
        answered = _MOST_ANSWERED // max(1, self._num_classes or 1)
        step = max(1, min(self._config.batch_rows, self._config.batch_bytes // row_bytes, answered))
        for start in range(0, max(1, rows), step):
            yield {name: array[start : start + step] for name, array in inputs.items()}

    def _predict(self, inputs: Inputs) -> Float32:
        messages = load_messages()
        request = messages.predict.PredictRequest(output_filter=self._signature.outputs)
        request.model_spec.CopyFrom(model_spec(self._config))
        for name, array in inputs.items():
            request.inputs[name].CopyFrom(to_proto(array))
        response = self._servers.call(f"{SERVICE}/Predict", request, messages.predict.PredictResponse)
        version = response.model_spec.version.value
        if version != self._signature.version:
            raise TeacherChanged(
                f"the teacher changed while it was being asked: model '{self._config.model}' was version "
                f"{self._signature.version}, now {version}; set teacher.version, or start a new run directory"
            )
        missing = [name for name in self._signature.outputs if name not in response.outputs]
        if missing:
            there = ", ".join(sorted(response.outputs)[:10]) or "nothing"
            raise RequestRefused(f"the server's answer has no {missing[0]}, only {there}")
        try:
            outputs = {name: to_array(response.outputs[name]) for name in self._signature.outputs}
        except ValueError as e:
            raise RequestRefused(f"the server's answer cannot be read: {e}") from e
        return self._checked(outputs, len(next(iter(inputs.values()))))

    def _checked(self, outputs: Inputs, rows: int) -> Float32:
        """Make logits [rows, C] of an answer, or refuse it before anything of its declared size is made."""
        if self._signature.sparse:
            num_classes = _require_sparse(outputs, rows)
        else:
            kept = outputs[self._signature.outputs[0]]
            if kept.ndim < 1 or len(kept) != rows:
                raise RequestRefused(f"the server's answer has the shape {list(kept.shape)}, {rows:,} rows were asked")
            if kept.dtype.kind != "f":
                raise RequestRefused(f"the server's answer must be floating-point numbers, got {_type_name(kept)}")
            num_classes = math.prod(kept.shape[1:])
        if num_classes > _MOST_CLASSES:
            raise RequestRefused(f"the server answers with {num_classes:,} classes, more than {_MOST_CLASSES:,}")
        if self._num_classes is None:
            self._num_classes = num_classes
        if num_classes != self._num_classes:
            raise TeacherChanged(
                f"the teacher changed while it was being asked: model '{self._config.model}' had {self._num_classes:,} "
                f"classes, now {num_classes:,}; put the former model back, or start a new run directory"
            )
        if self._signature.sparse:
            return _spread(outputs, num_classes)
        return kept if self._config.answers == "probabilities" else kept.astype(np.float32, copy=False)

    def _see(self, inputs: Inputs) -> None:
        """Ask about a batch of the shape of rows that have come."""
        with self._first:
            if self._probed is None:
                self._seen = {name: array.shape[1:] for name, array in inputs.items()}
                self._probed = self._probe()

    def _probe(self) -> Float32:
        """Ask about a fixed batch."""
        return self._ask({name: self._question(name, *info) for name, info in self._signature.inputs.items()})

    def _question(self, name: str, type_number: int, shape: tuple[int, ...] | None) -> npt.NDArray[Any]:
        sizes = self._row_shape(name, shape)
        if type_number == STRING:
            return np.full((_PROBE_ROWS, *sizes), self._config.probe_text.encode(), object)
        values = np.random.default_rng(0).normal(size=(_PROBE_ROWS, *sizes)).astype(np.float32)
        made = values if type_number not in _INTEGERS else np.abs(values * 3)
        return as_type(made, type_number)

    def _shapes_are_known(self) -> bool:
        """Tell whether model or configuration say the shapes of all inputs."""
        shapes = (shape for _, shape in self._signature.inputs.values())
        return self._configured is not None or all(
            shape is not None and min(shape[1:], default=0) >= 0 for shape in shapes
        )

    @property
    def _configured(self) -> tuple[int, ...] | None:
        return self._config.probe_shape or self._config.input.shape

    def _row_shape(self, name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        """Find the shape of a row: what the model says, and for what it leaves open the configuration or a row."""
        told = self._configured or self._seen.get(name)
        if shape is None:
            if told is None:
                raise ValueError(
                    "teacher.probe_shape must be given: the model does not say the shape of its input, and there is no row yet "
                    "that has it"
                )
            return told
        if told is None or len(told) != len(shape) - 1:
            told = (_PROBE_SIZE,) * (len(shape) - 1)
        sizes = tuple(size if size >= 0 else other for size, other in zip(shape[1:], told, strict=True))
        if math.prod(sizes) > _MOST_PROBED:
            raise ValueError(
                f"the model says that an input has the shape {list(shape)}, which is more than {_MOST_PROBED:,} numbers; check "
                "the server, or give teacher.probe_shape"
            )
        return sizes


_INTEGERS = frozenset({3, 4, 5, 6, 9, 17, 22, 23})


def _rows_of(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def _size_bytes(array: npt.NDArray[Any]) -> int:
    return sum(map(len, array.ravel().tolist())) if array.dtype == object else array.nbytes


def _require_sparse(outputs: Inputs, rows: int) -> int:
    """Check the k best classes of an answer and return the number of all classes."""
    kept, classes, tail, count = (outputs[name] for name in TOP_K)
    if count.size != 1 or count.dtype.kind not in "iu":
        raise RequestRefused("the server's num_classes must be one whole number")
    num_classes = int(count.reshape(-1)[0])
    shapes = {"top_k_logprobs": kept.shape[:1], "top_k_classes": classes.shape[:1], "tail_logmass": tail.shape}
    for name, shape in shapes.items():
        if shape != (rows,):
            raise RequestRefused(f"the server's {name} is of {list(outputs[name].shape)}, {rows:,} rows were asked")
    if kept.ndim != 2 or kept.shape != classes.shape or kept.shape[1] > num_classes:
        raise RequestRefused(
            f"the server's k best classes disagree: log-probabilities {list(kept.shape)}, classes {list(classes.shape)} of "
            f"{num_classes:,}"
        )
    if kept.dtype.kind != "f" or tail.dtype.kind != "f" or classes.dtype.kind not in "iu":
        raise RequestRefused(
            "the server's k best classes must be whole numbers, their log-probabilities floating-point ones"
        )
    if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
        raise RequestRefused(f"the server's k best classes must be from 0 to {num_classes - 1:,}")
    return num_classes


def _type_name(array: npt.NDArray[Any]) -> str:
    return "text" if array.dtype == object else array.dtype.name


def _spread(outputs: Inputs, num_classes: int) -> Float32:
    """Rebuild log-probabilities of all classes: those that did not travel share the tail."""
    kept, classes = outputs["top_k_logprobs"], outputs["top_k_classes"]
    left_out = num_classes - kept.shape[1]
    share = outputs["tail_logmass"] - np.float32(math.log(left_out)) if left_out else np.zeros(len(kept), np.float32)
    full = np.repeat(share.astype(np.float32)[:, None], num_classes, axis=1)
    np.put_along_axis(full, classes.astype(np.int64), kept.astype(np.float32), axis=1)
    return full


def _coarse(answers: Float32, tolerance: float) -> bytes:
    """Describe answers so that the last bits, which servers do not repeat exactly, hardly ever show.

    A value moves to the next step of the grid when it lies within the server's noise of the edge; the steps are wide.
    """
    flat = answers.reshape(len(answers), -1).astype(np.float64)
    flat = np.where(np.isneginf(flat), -1e4, flat)  # an impossible class
    best = flat.argmax(axis=1)
    spread = np.take_along_axis(flat, best[:, None], axis=1)[:, 0] - flat.mean(axis=1)
    steps = np.floor(spread / (50 * tolerance) + 0.5).astype("<i8")
    return b"".join([str(answers.shape[1:]).encode(), best.astype("<i8").tobytes(), steps.tobytes()])
