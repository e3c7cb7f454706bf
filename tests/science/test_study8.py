"""Study 8 over a little text: it runs, goes on where it stopped, and compares what it says it compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks.science import report8, study8, token_problems
from benchmarks.science.cells import Store

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
METHODS = ("plain", "12 draws")
STEPS, FEW = 2, 100


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study8")


@pytest.mark.slow
def test_it_runs_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study8.TRAINING, "epochs", 1)
    given = study8.Arguments(
        range(1), Store(place / "cells"), None, place / "out", ("forms",), METHODS, steps=STEPS, documents=FEW
    )
    rows = study8.collect(given)
    assert [row["method"] for row in rows] == list(METHODS)
    plain, drawn = rows
    assert plain["tokens"] == drawn["tokens"] > 0  # the same text
    assert 1 <= drawn["classes_a_token"] <= 12
    assert plain["bits_per_byte"] != drawn["bits_per_byte"]
    assert plain["teacher_bits_per_byte"] == drawn["teacher_bits_per_byte"]
    monkeypatch.setattr(token_problems, "train_language_model", None)  # computing again would fail
    assert study8.collect(given) == rows


@pytest.mark.slow
def test_a_label_of_all_classes_is_of_all_ids(place: Path) -> None:
    problem = token_problems.TokenProblem(place / "token-problems", STEPS, FEW)
    labels = problem.labels(token_problems.WHOLE, "held-out")
    (file,) = labels.glob("*.parquet")
    table = pq.read_table(file)
    logprobs = np.array(table["teacher_logprobs"].to_pylist()).reshape(len(table), -1, problem.ids)
    named = np.array(table["teacher_classes"].to_pylist()).reshape(logprobs.shape)[..., 0] >= 0
    assert named.any()
    np.testing.assert_allclose(np.exp(logprobs[named]).sum(axis=1), 1, atol=2e-3)  # halves


def test_parts_are_of_each_text_and_pools_are_apart() -> None:
    texts = [f"text {number}" for number in range(4000)]
    found = pd.Series([token_problems._part(text) for text in texts]).value_counts()
    assert set(found.index) == set(token_problems.PARTS)
    for name, share in token_problems.PARTS.items():
        expected = len(texts) * share / 100
        assert abs(found[name] - expected) < 5 * np.sqrt(expected)


def _rows(leads: dict[str, float], sizes: dict[str, float], seeds: int = 5) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    of_seed = rng.normal(0, 1, seeds)  # far larger than any difference: comparisons are within the seed
    return [
        {
            "text": "64k tokens",
            "method": method,
            "seed": seed,
            "bits_per_byte": 3 + of_seed[seed] + lead + 1e-4 * rng.normal(),
            "kl": 0.1,
            "agreement": 0.5,
            "teacher_bits_per_byte": 2.0,
            "tokens": 100.0,
            "bytes_a_token": sizes.get(method, 20.0),
            "classes_a_token": 3.0,
        }
        for method, lead in leads.items()
        for seed in range(seeds)
    ]


def test_the_report_compares_within_the_seed_at_the_nearest_bytes(tmp_path: Path) -> None:
    leads = {"plain": 0.0, "12 draws": -0.2, "top 8": 0.1, "top 20": 0.0, "top 20, half hard": -0.1}
    sizes = {"12 draws": 40.0, "top 8": 30.0, "top 20": 70.0, "top 20, half hard": 70.0}
    rows = _rows(leads, sizes)
    found = {(one.question, one.method, one.other): one for one in report8.questions(pd.DataFrame(rows))}
    assert ("draws minus top-k of the nearest bytes", "12 draws", "top 8") in found
    assert ("draws minus top-k of the nearest bytes", "12 draws", "top 20") not in found
    half = found["half hard minus soft alone", "top 20, half hard", "top 20"]
    np.testing.assert_allclose(half.differences, -0.1, atol=5e-3)
    report8.write_report(tmp_path, rows)
    page = (tmp_path / "study8.md").read_text()
    assert "| 64k tokens | 12 draws | plain | -0.200 ± 0.0" in page
    line = next(line for line in page.splitlines() if "| 64k tokens | top 20 | plain |" in line)
    assert "*" not in line  # no difference is none
    assert (tmp_path / "study8-bytes.png").stat().st_size > 1000


def test_two_seeds_are_not_judged() -> None:
    rows = _rows({"plain": 0.0, "12 draws": -0.2}, {}, seeds=2)
    assert list(report8.questions(pd.DataFrame(rows))) == []
