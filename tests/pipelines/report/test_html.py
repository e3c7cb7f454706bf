"""What a report says in sentences: how many rows the teacher labelled, in how many calls."""

from __future__ import annotations

from typing import Any

import pytest

from distilbeam.pipelines.report.html import calls_sentences


@pytest.mark.parametrize(
    ("paid", "sentence"),
    [
        (300, "The teacher labelled 300 of the 1,500 examples of the pool (20%); 1,200 calls saved."),
        # 13 rows have the text of others, or were asked for the uniform comparison
        (287, "The teacher labelled 300 of the 1,500 examples of the pool (20%) in 287 calls; 1,200 calls saved."),
    ],
)
def test_rows_with_a_label_and_calls_that_were_paid_are_told_apart(paid: int, sentence: str) -> None:
    results: dict[str, Any] = {
        "calls": {"labels": paid, "labelled": 300, "saved": 1_200, "validation": 100},
        "pool_rows": 1_500,
        "rounds": [{"summary": {"failed": 0}}],
        "wrong_share": 0.1,
    }
    assert calls_sentences(results)[0] == sentence
