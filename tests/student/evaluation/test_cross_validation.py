"""Folds, and what is said of rows by models that have not learned them."""

from __future__ import annotations

import numpy as np
import pytest

from distilbeam.student.evaluation.cross_validation import folds, held_out_logits


@pytest.mark.parametrize(("rows", "count"), [(2, 2), (7, 3), (60, 5), (5, 5)])
def test_every_row_is_in_one_fold_of_nearly_equal_size(rows: int, count: int) -> None:
    parts = folds(rows, count, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert {len(part) for part in parts} <= {rows // count, -(-rows // count)}
    assert all((np.diff(part) > 0).all() for part in parts)
    again = folds(rows, count, 0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_other_seeds_deal_otherwise() -> None:
    assert any(not np.array_equal(a, b) for a, b in zip(folds(60, 5, 0), folds(60, 5, 1), strict=True))


@pytest.mark.parametrize("count", [1, 4])
def test_folds_without_rows_are_a_sentence(count: int) -> None:
    with pytest.raises(ValueError, match=f"folds must be at least 2 and at most the 3 rows, got {count}"):
        folds(3, count, 0)


def test_rows_get_the_logits_of_the_model_that_left_them_out() -> None:
    parts = folds(7, 3, 1)
    joined = held_out_logits(lambda number, rows: np.stack([np.full(len(rows), number), rows], axis=1), parts)
    assert joined.dtype == np.float32
    for number, part in enumerate(parts):
        assert (joined[part, 0] == number).all()
    assert joined[:, 1].tolist() == list(range(7))
