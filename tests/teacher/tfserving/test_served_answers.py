"""What a served teacher answers: pieces that fail by themselves, misfits, classes of probability 0, probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import log_softmax, softmax
from served_linear import BATCH, CLASSES, Connect, Linear, X, serving

from distilbeam.teacher import TeacherMisfit, ask


def batch(rows: int, seed: int = 0) -> tuple[np.ndarray, pa.RecordBatch]:
    x = np.random.default_rng(seed).normal(size=(rows, 4)).clip(-3, 3).astype(np.float32)
    return x, pa.record_batch({BATCH.schema.names[0]: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)})


class Made(Linear):
    """Answers what a function makes of the logits."""

    def __init__(self, make: Any, poison: float = np.inf) -> None:
        super().__init__(poison)
        self.make = make

    def logits(self, batch: pa.RecordBatch) -> np.ndarray:
        answer: np.ndarray = self.make(super().logits(batch))
        return answer


@pytest.mark.parametrize("parallel", [1, 4])
def test_only_the_request_with_the_poisoned_row_is_asked_again(connect: Connect, parallel: int) -> None:
    n, poisoned = 4096, [77, 1500, 1501, 4000]
    x, rows = batch(n)
    x[poisoned, 0] = 9
    rows = pa.record_batch({rows.schema.names[0]: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)})
    teacher = Linear(poison=5)
    with serving(teacher) as address:
        remote = connect(address, parallel=parallel)
        teacher.rows.clear()
        answers = ask(remote, rows, CLASSES, batch_size=256)
    assert [error.row for error in answers.errors] == poisoned
    assert answers.calls == sum(teacher.rows) <= 1.3 * n
    good = np.delete(np.arange(n), poisoned)
    np.testing.assert_allclose(answers.logits[good], x[good] @ Linear.weights, rtol=1e-4, atol=1e-5)


def test_requests_that_are_cut_by_bytes_fail_by_themselves(connect: Connect) -> None:
    x, _ = batch(256)
    x[100, 0] = 9
    rows = pa.record_batch({BATCH.schema.names[0]: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)})
    teacher = Linear(poison=5)
    with serving(teacher) as address:
        remote = connect(address, batch_bytes=16 * 16)
        teacher.rows.clear()
        answers = ask(remote, rows, CLASSES, batch_size=256)
    assert [error.row for error in answers.errors] == [100]
    assert answers.calls == sum(teacher.rows) == 256 + 16  # sixteen rows a request: those of one are asked alone


def test_another_number_of_classes_is_found_on_the_first_requests(connect: Connect) -> None:
    teacher = Linear()
    _, rows = batch(4096)
    with serving(teacher) as address:
        remote = connect(address, parallel=4)
        teacher.rows.clear()
        with pytest.raises(
            TeacherMisfit, match=rf"must answer with shape \[256, {CLASSES + 1}\], got \[256, {CLASSES}\]"
        ):
            ask(remote, rows, CLASSES + 1, batch_size=256)
        assert sum(teacher.rows) <= 4 * 256 + 2


def test_probabilities_of_a_server_are_refused_or_said(connect: Connect) -> None:
    _, rows = batch(600)
    with serving(Made(lambda z: softmax(z, axis=1))) as address:
        with pytest.raises(TeacherMisfit, match=r"say teacher.answers = 'probabilities'"):
            ask(connect(address), rows, CLASSES)
        said = connect(address, answers="probabilities")
        answers = ask(said, rows, CLASSES)
        assert said.fingerprint() != connect(address).fingerprint()
    with serving(Linear()) as address:
        wanted = ask(connect(address), rows, CLASSES)
        with pytest.raises(TeacherMisfit, match=r"teacher.answers is 'probabilities'"):
            ask(connect(address, answers="probabilities"), rows, CLASSES)
    np.testing.assert_allclose(log_softmax(answers.logits, 1), log_softmax(wanted.logits, 1), rtol=1e-4, atol=1e-5)


def test_a_misfit_of_the_server_s_own_teacher_stops_the_client(connect: Connect) -> None:
    class Misfit(Linear):
        def logits(self, batch: pa.RecordBatch) -> np.ndarray:
            if len(batch) > 8:  # the probe of the fingerprint is answered
                raise TeacherMisfit("teacher.answers is 'logits', but")
            return super().logits(batch)

    teacher = Misfit()
    with (
        serving(teacher) as address,
        pytest.raises(
            TeacherMisfit, match=r"the server cannot answer as it is configured .*teacher.answers is 'logits'"
        ),
    ):
        ask(connect(address), BATCH, CLASSES)
    assert set(teacher.rows) == {8}


def impossible(z: np.ndarray) -> np.ndarray:
    return np.where(np.arange(CLASSES) == z.argmin(axis=1, keepdims=True), -np.inf, z).astype(np.float32)


@pytest.mark.parametrize("top_k", [None, CLASSES, 2])
def test_a_class_of_probability_zero_travels(connect: Connect, top_k: int | None) -> None:
    with serving(Made(impossible), top_k=top_k) as address:
        remote = connect(address)
        answers = ask(remote, BATCH, CLASSES)
        assert remote.fingerprint() == connect(address).fingerprint()
    assert answers.ok.all()
    wanted = log_softmax(impossible(X @ Linear.weights), axis=1)
    if top_k != 2:
        np.testing.assert_allclose(log_softmax(answers.logits, axis=1), wanted, rtol=1e-4, atol=1e-5)
    assert (answers.logits.argmax(axis=1) == wanted.argmax(axis=1)).all()


def test_the_order_of_a_served_model_is_said(connect: Connect) -> None:
    names = [f"c{i}" for i in range(CLASSES)]
    with serving(Linear()) as address:
        remote = connect(address, classes=names)
        remote.arrange(names[::-1])
        np.testing.assert_allclose(remote.logits(BATCH), (X @ Linear.weights)[:, ::-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            ask(remote, BATCH, CLASSES).logits, (X @ Linear.weights)[:, ::-1], rtol=1e-4, atol=1e-5
        )
