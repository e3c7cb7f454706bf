"""What a source does with its batches in its own step: several questions at once, outcomes in order, nothing behind an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from apache_beam.utils.timestamp import Timestamp
from served_linear import CLASSES, INPUT, Linear, X, serving
from threadpoolctl import ThreadpoolController, threadpool_info

from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.streaming.batch_source import BatchSource
from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.label_messages import LabelMessages
from distilbeam.pipelines.streaming.message import Message, MessageBatch
from distilbeam.teacher.config import parse_teacher_config
from distilbeam.teacher.protocol import TeacherChanged, TeacherUnavailable
from distilbeam.teacher.softlabels import SoftLabelSpec, decode

ROWS = 5


class Meeting(Linear):
    """Answers a batch only when as many others are being asked about as the barrier says."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def logits(self, batch: Any) -> Any:
        if len(batch) == ROWS:  # and not the question that tells whether it is the same teacher
            self.barrier.wait(30)
        return super().logits(batch)


def source(*addresses: str, parallel: int) -> tuple[BatchSource, SoftLabelSpec]:
    asked = {"kind": "tfserving", "addresses": list(addresses), "model": "teacher", "input": INPUT, "attempts": 1}
    text = teacher_text(parse_teacher_config({**asked, "parallel": parallel}))
    spec = SoftLabelSpec(num_classes=CLASSES, teacher=cached_teacher(text).fingerprint(), carried=("x",))
    label = LabelMessages(Decoder("key:string,x:float32[4]"), Labelling(text, spec, "key"), "topic")
    return BatchSource(label), spec


def batches(count: int) -> Iterator[tuple[MessageBatch, Timestamp]]:
    for number in range(count):
        start = number * ROWS
        messages = [
            Message(0, i, 0, None, json.dumps({"key": str(i), "x": X[i].tolist()}).encode())
            for i in range(start, start + ROWS)
        ]
        yield MessageBatch(tuple(messages), ((0, start, start + ROWS - 1),)), Timestamp(number)


def given_by(source: BatchSource, stamped: Any) -> Iterator[Any]:
    source.start_bundle()
    try:
        yield from source.done_with(stamped)
    finally:
        source.finish_bundle()
        source.teardown()


def test_a_server_is_asked_as_many_questions_at_once_as_it_takes_and_the_order_stays() -> None:
    barrier = threading.Barrier(4)
    with ExitStack() as stack:
        addresses = [stack.enter_context(serving(Meeting(barrier))) for _ in range(4)]
        asking, spec = source(*addresses, parallel=4)
        found = list(given_by(asking, batches(8)))
    assert not barrier.broken, "four of them met, twice"
    assert [float(each.timestamp) for each in found] == list(range(8))
    assert [each.value.covers for each in found] == [((0, 5 * i, 5 * i + 4),) for i in range(8)]
    assert [len(each.value.letters) for each in found] == [0] * 8
    logits = (X @ Linear.weights).astype(np.float64)
    right = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    said = np.concatenate([decode(each.value.labels, spec).logprobs for each in found])
    np.testing.assert_allclose(said, right, atol=5e-3)


def test_the_next_batch_is_read_while_one_is_asked_about_and_no_more_are_held() -> None:
    teacher, taken = Linear(), []
    with serving(teacher) as address:
        asking, _ = source(address, parallel=1)
        before, teacher.rows = teacher.rows, []
        assert before, "it was asked who it is"

        def reading() -> Iterator[Any]:
            teacher.wait.clear()
            for batch in batches(4):
                if len(taken) == 1:
                    assert teacher.rows == [], "nobody has answered yet"
                    teacher.wait.set()
                taken.append(batch)
                yield batch

        ahead = [len(taken) - i for i, _ in enumerate(given_by(asking, reading()))]
    assert max(ahead) <= 3
    assert teacher.rows[:4] == [ROWS] * 4
    assert len(teacher.rows) == 5, "one question more at the end of a bundle: is it the same teacher?"


def test_nobody_is_asked_about_late_messages() -> None:
    teacher = Linear()
    with serving(teacher) as address:
        asking, _ = source(address, parallel=1)
        before = len(teacher.rows)
        late = [(replace(batch, late=True), time) for batch, time in batches(2)]
        found = list(given_by(asking, late))
    assert len(teacher.rows) == before
    assert [[item["stage"] for item in each.value.letters] for each in found] == [["late"] * ROWS] * 2
    assert [each.value.covers for each in found] == [((0, 0, 4),), ((0, 5, 9),)]


def test_what_cannot_be_asked_ends_the_bundle() -> None:
    with ExitStack() as servers:
        asking, _ = source(servers.enter_context(serving(Linear())), parallel=1)

        def reading() -> Iterator[Any]:
            for number, batch in enumerate(batches(8)):
                if number == 4:
                    servers.close()
                yield batch

        found: list[Any] = []
        with pytest.raises(TeacherUnavailable):
            found.extend(given_by(asking, reading()))
    assert [float(each.timestamp) for each in found] == list(range(len(found)))
    assert 2 <= len(found) <= 4


def test_a_bundle_in_which_the_teacher_changed_counts_for_nothing() -> None:
    teacher = Linear()
    with serving(teacher) as address:
        asking, _ = source(address, parallel=1)

        def reading() -> Iterator[Any]:
            for number, batch in enumerate(batches(4)):
                if number == 2:
                    teacher.weights = -teacher.weights
                yield batch

        with pytest.raises(TeacherChanged):
            list(given_by(asking, reading()))


def test_a_thread_that_asks_keeps_to_one_and_leaves_the_others_alone() -> None:
    found: list[Any] = []

    def look() -> None:
        import torch

        ThreadpoolController().limit(limits=2, user_api="openmp")
        label.start_thread()
        _ = torch.ones(64, 64) @ torch.ones(64, 64)
        found.extend((torch.get_num_threads(), *_openmp()))

    label = LabelMessages(Decoder("key:string,x:float32[4]"), Labelling("", SoftLabelSpec(CLASSES, teacher="t")), "t")
    before = _openmp()
    label.start_bundle()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    label.finish_bundle()
    assert found
    assert set(found) == {1}
    assert _openmp() == before


def _openmp() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "openmp"]
