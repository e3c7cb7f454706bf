"""What a teacher's numbers are: logits, log-probabilities, probabilities; and nothing that is taken for another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from distilbeam.teacher import TeacherMisfit
from distilbeam.teacher.answers import AnswerError, AnswerForm, labels

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(64, 5)) * 3
PROBABILITIES = softmax(LOGITS, axis=1)


def test_each_kind_becomes_the_same_labels() -> None:
    wanted = log_softmax(LOGITS, axis=1)
    for kind, answers in (("logits", LOGITS), ("log-probabilities", wanted), ("probabilities", PROBABILITIES)):
        made = AnswerForm(kind)(answers)  # type: ignore[arg-type]
        assert made.dtype == np.float32
        np.testing.assert_allclose(log_softmax(made, axis=1), wanted, rtol=1e-5, atol=1e-6)


def test_the_logarithm_is_taken_in_double_precision_and_zero_is_impossible() -> None:
    made = AnswerForm("probabilities")(np.array([[1e-300, 0.5, 0.5], [0.0, 1.0, 0.0], [-1e-9, 0.25, 0.75]]))
    np.testing.assert_allclose(made[0], [np.log(1e-300), np.log(0.5), np.log(0.5)], rtol=1e-6)
    np.testing.assert_array_equal(made[1], [-np.inf, 0, -np.inf])
    np.testing.assert_array_equal(made[2], np.float32([-np.inf, np.log(0.25), np.log(0.75)]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_probabilities_are_not_taken_for_logits(rows: int, dtype: str) -> None:
    if (rows, dtype) in ((1, "float16"), (2, "float16")):
        pytest.skip("few rounded rows are no evidence")
    with pytest.raises(
        TeacherMisfit, match=r"teacher.answers is 'logits', but .* say teacher.answers = 'probabilities'"
    ):
        AnswerForm("logits")(PROBABILITIES[:rows].astype(dtype))


def test_hard_labels_are_not_taken_for_logits() -> None:
    form = AnswerForm("logits")
    form(np.eye(3, dtype=np.float32)[[0]])  # one row may be chance
    with pytest.raises(TeacherMisfit, match="sum to 1"):
        form(np.eye(3, dtype=np.float32)[[1, 1, 2]])


def test_a_coincidence_is_no_evidence() -> None:
    form = AnswerForm("logits")
    form(np.array([[0.25, 0.755]], np.float32))  # sums to 1 within the tolerance of 16 bits
    form(np.array([[0.5, -2.0], [0.25, 0.75]], np.float32))  # the first settles it
    for _ in range(10):
        form(np.array([[0.25, 0.75]] * 8, np.float32))


def test_two_classes_whose_logits_lie_in_the_unit_interval_are_logits() -> None:
    logits = np.random.default_rng(1).random((10_000, 2)).astype(np.float32)
    for start in range(0, 10_000, 100):  # a hundred teachers
        AnswerForm("logits")(logits[start : start + 100])


def test_rows_that_failed_prove_nothing() -> None:
    form = AnswerForm("logits")
    form(np.full((8, 3), np.nan, np.float32))
    answers = np.float32([[np.nan, 0, 0], [3, -1, 2]])
    np.testing.assert_array_equal(form(answers), answers)


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("probabilities", LOGITS),
        ("log-probabilities", LOGITS),
        ("log-probabilities", PROBABILITIES),
        ("probabilities", np.log(PROBABILITIES)),
    ],
)
def test_what_is_no_distribution_is_refused(kind: Any, answers: np.ndarray) -> None:
    with pytest.raises(TeacherMisfit, match=f"teacher.answers is '{kind}', .* say what the numbers are"):
        AnswerForm(kind)(answers)


def test_one_row_that_is_no_distribution_is_an_error_of_the_row() -> None:
    form, answers = AnswerForm("probabilities"), PROBABILITIES.copy()
    answers[7] *= 1.5
    with pytest.raises(AnswerError, match=r"rows must lie in \[0, 1\] and sum to 1, got .* with the sum 1.5"):
        form(answers)
    np.testing.assert_allclose(
        form(np.delete(answers, 7, axis=0)), np.log(np.delete(PROBABILITIES, 7, axis=0)), rtol=1e-5
    )


@pytest.mark.parametrize("classes", [2, 1000, 50_000])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_enough_for_a_distribution(classes: int, dtype: str) -> None:
    import torch

    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(16, classes)) * 4)
    rounded = torch.softmax(logits, 1).to(getattr(torch, dtype)).float().numpy()
    made = AnswerForm("probabilities")(rounded)
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(made, np.log(rounded.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("kind", ["logits", "probabilities", "log-probabilities"])
def test_what_has_another_shape_or_type_is_for_the_caller(kind: Any) -> None:
    for answers in (np.zeros(4), np.zeros((4, 1)), np.arange(3), np.array([["a", "b"]])):
        made = AnswerForm(kind)(answers)
        assert made.shape == answers.shape


def test_labels_have_a_finite_number_and_none_that_is_not_one() -> None:
    inf, nan = np.inf, np.nan
    rows = np.float32([[0, 1], [-inf, 1], [-inf, -inf], [inf, 1], [nan, 1], [-inf, nan], [inf, -inf]])
    np.testing.assert_array_equal(labels(rows), [True, True, False, False, False, False, False])
    assert len(labels(np.empty((0, 3), np.float32))) == 0
