"""A row that fails costs its neighbours nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbeam.inputs.config import InputConfig, InputError, make_input
from distilbeam.teacher import TeacherChanged, TeacherMisfit, TeacherUnavailable, ask, load_teacher


class Scripted:
    """Answers [row, -row, 0] and does what its script says when a row is in the batch."""

    def __init__(self, script: dict[int, Callable[[np.ndarray, int], np.ndarray]], parallel: int = 1) -> None:
        self.script, self.parallel = script, parallel
        self.batches: list[list[int]] = []

    def fingerprint(self) -> str:
        return "scripted"

    def logits(self, batch: pa.RecordBatch) -> np.ndarray:
        rows = batch["row"].to_pylist()
        self.batches.append(rows)
        answer = np.array([[r, -r, 0] for r in rows], np.float32).reshape(-1, 3)
        for place, row in enumerate(rows):
            if row in self.script:
                answer = self.script[row](answer, place)
        return answer

    def close(self) -> None:
        pass


def raising(error: Exception) -> Callable[[np.ndarray, int], np.ndarray]:
    def act(_: np.ndarray, __: int) -> np.ndarray:
        raise error

    return act


def poisoned(value: float) -> Callable[[np.ndarray, int], np.ndarray]:
    def act(answer: np.ndarray, place: int) -> np.ndarray:
        answer[place, 1] = value
        return answer

    return act


def rows(n: int) -> pa.RecordBatch:
    return pa.record_batch({"row": list(range(n))})


def check_the_rest(answers: Any, n: int, bad: set[int]) -> None:
    good = [r for r in range(n) if r not in bad]
    np.testing.assert_array_equal(answers.logits[good], np.array([[r, -r, 0] for r in good]).reshape(-1, 3))
    assert np.isnan(answers.logits[sorted(bad)]).all()
    np.testing.assert_array_equal(answers.ok, [r not in bad for r in range(n)])
    assert [e.row for e in answers.errors] == sorted(bad)


ACTIONS: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], str, str]] = {
    "raises": (raising(RuntimeError("no such token")), "teacher", "RuntimeError: no such token"),
    "input": (raising(InputError("column x must hold text, got int64")), "input", "column x must hold text, got int64"),
    "nan": (poisoned(np.nan), "answer", "the teacher's logits must be finite, 1 of 3 are NaN or infinite"),
    "inf": (poisoned(np.inf), "answer", "the teacher's logits must be finite, 1 of 3 are NaN or infinite"),
    "short": (lambda a, _: a[:-1], "answer", "the teacher must answer with shape [1, 3], got [0, 3]"),
    "words": (
        lambda a, _: np.full(a.shape, "yes", object),
        "teacher",
        "ValueError: could not convert string to float: 'yes'",
    ),
    "classes": (lambda a, _: a[:, :2], "answer", "the teacher must answer with shape [1, 3], got [1, 2]"),
}


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.dictionaries(st.integers(0, 69), st.sampled_from(sorted(ACTIONS)), max_size=6),
)
def test_exactly_the_bad_rows_fail(n: int, batch_size: int, bad: dict[int, str]) -> None:
    bad = {row: action for row, action in bad.items() if row < n}
    for row in (0, n - 1):  # a teacher that answers neither the first nor the last row is taken for a misfit
        bad.pop(row, None) if bad.get(row) == "classes" else None
    if bad.get(0, bad.get(n - 1)) is not None:
        bad = {row: "raises" if action == "classes" else action for row, action in bad.items()}
    teacher = Scripted({row: ACTIONS[action][0] for row, action in bad.items()})
    answers = ask(teacher, rows(n), 3, batch_size=batch_size)
    check_the_rest(answers, n, set(bad))
    for error in answers.errors:
        _, stage, message = ACTIONS[bad[error.row]]
        assert (error.stage, error.error) == (stage, message)
        assert error.attempts == sum(error.row in batch for batch in teacher.batches)
    assert answers.requests == len(teacher.batches)
    assert answers.calls == sum(map(len, teacher.batches))


def test_a_clean_batch_is_asked_once() -> None:
    teacher = Scripted({})
    answers = ask(teacher, rows(100), 3, batch_size=32)
    assert [len(b) for b in teacher.batches] == [32, 32, 32, 4]
    assert (answers.calls, answers.requests, answers.errors) == (100, 4, [])


def test_one_bad_row_costs_its_request_again_and_a_sixteenth_of_it() -> None:
    answers = ask(Scripted({137: ACTIONS["raises"][0]}), rows(256), 3, batch_size=256)
    # the request, its first row, the other 255 in sixteenths, and the 16 rows of that which failed
    assert (answers.requests, answers.calls) == (1 + 1 + 16 + 16, 256 + 256 + 16)
    answers = ask(Scripted({700: ACTIONS["raises"][0]}), rows(1024), 3, batch_size=1024)
    assert (answers.requests, answers.calls) == (1 + 1 + 16 + (1 + 16) + 4, 1024 + 1024 + 64 + 4)


@pytest.mark.parametrize("action", ["raises", "input", "short"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_an_error_of_every_row_costs_twice_the_rows(action: str, parallel: int) -> None:
    act = ACTIONS[action][0]
    teacher = Scripted(dict.fromkeys(range(800), act))
    answers = ask(Pieces(teacher, 4) if parallel == 4 else teacher, rows(800), 3, batch_size=256)
    assert answers.calls == sum(map(len, teacher.batches)) == 2 * 800
    assert [error.row for error in answers.errors] == list(range(800))
    assert {error.attempts for error in answers.errors} == {2}


def test_the_neighbours_of_rows_that_fail_in_a_row_are_answered() -> None:
    bad = {0, 255, *range(40, 60)}
    answers = ask(Scripted(dict.fromkeys(bad, ACTIONS["raises"][0])), rows(256), 3)
    check_the_rest(answers, 256, bad)
    assert answers.calls == 2 * 256


class Pieces:
    """A teacher whose requests in flight succeed or fail one by one."""

    def __init__(self, teacher: Scripted, parallel: int) -> None:
        self.teacher, self.parallel = teacher, parallel

    def fingerprint(self) -> str:
        return self.teacher.fingerprint()

    def logits(self, _: pa.RecordBatch) -> np.ndarray:
        raise AssertionError("asked in pieces")

    def in_pieces(self, batch: pa.RecordBatch, rows: int) -> list[tuple[int, np.ndarray | Exception]]:
        return [self._piece(batch.slice(start, rows)) for start in range(0, len(batch), rows)]

    def _piece(self, batch: pa.RecordBatch) -> tuple[int, np.ndarray | Exception]:
        try:
            return len(batch), self.teacher.logits(batch)
        except RuntimeError as e:
            return len(batch), e
        except InputError as e:
            return len(batch), e

    def close(self) -> None:
        pass


@pytest.mark.parametrize("parallel", [1, 4])
def test_one_poison_row_in_a_thousand_costs_at_most_1_3_times_the_calls(parallel: int) -> None:
    n = 100_000
    bad = set(np.random.default_rng(0).choice(n, n // 1000, replace=False).tolist())
    teacher = Scripted(dict.fromkeys(bad, ACTIONS["raises"][0]))
    answers = ask(teacher if parallel == 1 else Pieces(teacher, parallel), rows(n), 3, batch_size=256)
    check_the_rest(answers, n, bad)
    assert answers.calls <= 1.3 * n


def test_another_number_of_classes_is_found_on_the_first_request() -> None:
    act = ACTIONS["classes"][0]
    for teacher in (Scripted(dict.fromkeys(range(2000), act)), Scripted(dict.fromkeys(range(1), act))):
        with pytest.raises(TeacherMisfit, match=r"must answer with shape \[\d+, 3\], got \[\d+, 2\]: .*teacher.output"):
            ask(teacher, rows(len(teacher.script)), 3, batch_size=256)
        assert sum(map(len, teacher.batches)) <= 258
    labels = Scripted({0: lambda a, _: a[:, 0]})  # the class itself, as classifiers have it for their first output
    with pytest.raises(TeacherMisfit, match=r"shape \[1, 3\], got \[1\]"):
        ask(labels, rows(1), 3)


def test_a_row_of_another_number_of_classes_is_a_dead_letter_of_a_teacher_that_fits() -> None:
    teacher = Scripted({1: ACTIONS["classes"][0]})
    ask(teacher, rows(1), 3)
    answers = ask(teacher, rows(3).slice(1, 1), 3)
    assert answers.errors[0].error == "the teacher must answer with shape [1, 3], got [1, 2]"


def test_a_class_of_probability_zero_is_a_label() -> None:
    answers = ask(Scripted({3: poisoned(-np.inf)}), rows(8), 3)
    assert answers.ok.all()
    np.testing.assert_array_equal(answers.logits[3], [3, -np.inf, 0])


def test_no_class_at_all_is_no_label() -> None:
    answers = ask(Scripted({3: lambda a, place: np.where(np.arange(len(a))[:, None] == place, -np.inf, a)}), rows(8), 3)
    check_the_rest(answers, 8, {3})
    assert answers.errors[0].error == (
        "the teacher's logits must hold a finite one, all 3 are -inf: no class is possible"
    )


def test_nan_rows_cost_no_further_request() -> None:
    answers = ask(Scripted({7: ACTIONS["nan"][0]}), rows(64), 3, batch_size=64)
    assert (answers.requests, answers.errors[0].attempts) == (1, 1)


def test_a_row_is_given_up_after_attempts_alone() -> None:
    teacher = Scripted({2: ACTIONS["raises"][0]})
    answers = ask(teacher, rows(4), 3, attempts=3)
    assert teacher.batches.count([2]) == 3
    assert answers.errors[0].attempts == 1 + 3


def test_a_row_that_recovers_is_answered() -> None:
    tries = iter([True, True, False])

    def flaky(answer: np.ndarray, _: int) -> np.ndarray:
        if next(tries):
            raise RuntimeError("busy")
        return answer

    answers = ask(Scripted({0: flaky}), rows(1), 3, attempts=3)
    check_the_rest(answers, 1, set())


@pytest.mark.parametrize(
    "error", [TeacherChanged("changed"), TeacherMisfit("another"), TeacherUnavailable("down"), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_a_row_stops_the_job(error: BaseException) -> None:
    with pytest.raises(type(error)):
        ask(Scripted({5: raising(error)}), rows(10), 3)  # type: ignore[arg-type]


def test_parallel_teachers_get_several_batches_at_once() -> None:
    teacher = Scripted({}, parallel=3)
    ask(teacher, rows(100), 3, batch_size=10)
    assert [len(b) for b in teacher.batches] == [30, 30, 30, 10]


def test_no_rows_are_no_request() -> None:
    answers = ask(Scripted({}), rows(0), 3)
    assert (answers.logits.shape, answers.requests, len(answers.ok)) == ((0, 3), 0, 0)


def test_long_messages_are_cut() -> None:
    answers = ask(Scripted({0: raising(RuntimeError("x" * 10_000))}), rows(1), 3)
    assert len(answers.errors[0].error) == 500


@pytest.mark.parametrize("name", ["batch_size", "attempts"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ask(Scripted({}), rows(1), 3, **{name: 0})


def test_rows_with_bad_input_are_found_by_bisection() -> None:
    class Reader(Scripted):
        def logits(self, batch: pa.RecordBatch) -> np.ndarray:
            return make_input(InputConfig(columns=("x",)))(batch)

    column = pa.array([[1.0, 2, 3], [4.0, 5], [7.0, 8, 9], None, [1.0, 2, 3]])
    answers = ask(Reader({}), pa.record_batch({"x": column}), 3)
    assert [(e.row, e.stage) for e in answers.errors] == [(1, "answer"), (3, "input")]
    assert answers.errors[1].error == "column x must not have missing values, got 1"
    np.testing.assert_array_equal(answers.logits[[0, 2, 4]], [[1, 2, 3], [7, 8, 9], [1, 2, 3]])


class Prepared:
    """Doubles the column `x`, whose input is made for all rows at once unless one of them has none."""

    def __init__(self, error: type[Exception] = InputError) -> None:
        self.error = error
        self.prepared_rows: list[int] = []
        self.asked: list[int] = []

    def fingerprint(self) -> str:
        return "prepared"

    def prepared(self, batch: pa.RecordBatch) -> np.ndarray:
        self.prepared_rows.append(len(batch))
        return self._inputs(batch)

    def answer(self, inputs: np.ndarray) -> np.ndarray:
        self.asked.append(len(inputs))
        return 2 * inputs

    def logits(self, batch: pa.RecordBatch) -> np.ndarray:
        return self.answer(self._inputs(batch))

    def close(self) -> None:
        pass

    def _inputs(self, batch: pa.RecordBatch) -> np.ndarray:
        if batch["x"].null_count:
            raise self.error("a row has no x")
        return np.asarray(batch["x"], np.float32)[:, None] * np.ones(3, np.float32)


@pytest.mark.parametrize(("missing", "error"), [(None, InputError), (5, InputError), (5, RuntimeError)])
def test_inputs_that_are_made_together_are_asked_in_requests_of_the_same_size(
    missing: int | None, error: type[Exception]
) -> None:
    values = [float(i) if i != missing else None for i in range(20)]
    teacher = Prepared(error)
    answers = ask(teacher, pa.record_batch({"x": pa.array(values, pa.float32())}), 3, batch_size=8)
    assert teacher.prepared_rows == [20]
    if missing is None:
        assert teacher.asked == [8, 8, 4]
        assert answers.calls == 20
        assert not answers.errors
    else:
        assert [(error.row, error.stage) for error in answers.errors] == [
            (missing, "input" if error is InputError else "teacher")
        ]
    wanted = np.array([2 * i for i in range(20) if i != missing], np.float32)
    np.testing.assert_array_equal(answers.logits[answers.ok], np.repeat(wanted[:, None], 3, axis=1))


def test_a_local_teacher_says_the_same_however_its_input_is_made() -> None:
    arguments = {"in_features": 2, "out_features": 3}
    config = {"kind": "torch", "model": "torch.nn:Linear", "arguments": arguments, "input": {"columns": ["a", "b"]}}
    teacher: Any = load_teacher(config)
    batch = pa.record_batch({name: pa.array(np.arange(10) + seed, pa.float32()) for seed, name in enumerate("ab")})
    prepared = teacher.prepared(batch)
    np.testing.assert_array_equal(teacher.answer(prepared[3:7]), teacher.logits(batch.slice(3, 4)))
    np.testing.assert_array_equal(ask(teacher, batch, 3, batch_size=4).logits[4:8], teacher.logits(batch.slice(4, 4)))
