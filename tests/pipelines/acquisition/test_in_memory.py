"""A run whose strategy sees the examples together, against the selector over the pool in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import labels_of, make_table

from distilbeam.pipelines.acquisition import in_memory as choice
from distilbeam.pipelines.acquisition.in_memory import CANDIDATES, candidates_share
from distilbeam.pipelines.acquisition.score import Candidates
from distilbeam.pipelines.engine.phase import PhaseError
from distilbeam.pipelines.steps import run
from distilbeam.selection.gains import gain_named, margin_gain
from distilbeam.selection.rounding import shard_rng
from distilbeam.selection.strategies.herding import herd
from distilbeam.selection.strategies.registry import selector
from distilbeam.selection.strategies.selectors import CandidatePool
from distilbeam.student.checkpoint import Student, load_student


@pytest.fixture
def herding(problem: dict[str, Any]) -> dict[str, Any]:
    problem["selection"] |= {"method": "herding", "compare_uniform": False}
    return problem


def hidden(student: Student, table: pa.Table) -> np.ndarray:
    """What the head of the problem's student, one hidden layer, sees of a table, from its weights."""
    x = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    weights = {name: value.numpy() for name, value in student.module.state_dict().items()}
    first = next(name for name in weights if name.endswith("layers.0.weight"))
    hidden: np.ndarray = np.maximum(x @ weights[first].T + weights[first.replace("weight", "bias")], 0)
    return hidden


def seen(student: Student, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The margin gains and the embeddings of a table, which are those that the weights say."""
    if not len(table):
        return np.zeros(0), np.zeros((0, 8), np.float32)
    logits, embeddings = student.logits_and_embeddings(table.combine_chunks().to_batches()[0])
    np.testing.assert_allclose(embeddings, hidden(student, table), rtol=1e-5, atol=1e-5)
    return margin_gain(logits), embeddings


def test_each_round_chooses_what_the_selector_does(herding: dict[str, Any], tmp_path: Path) -> None:
    root = run(herding, base=tmp_path)
    pool, labelled = make_table(240, 1, labelled=False), make_table(15, 2, labelled=True)
    left, bought = np.arange(240), np.zeros(0, np.int64)
    for number in range(2):
        student = load_student(root / "students" / f"round={number:03d}")
        gains, points = seen(student, pool.take(left))
        known = np.concatenate([seen(student, labelled)[1], seen(student, pool.take(bought))[1]])
        wanted = left[herd(points, gains.astype(np.float32), known, 30, shard_rng(0, number, "herding"))]
        labels = labels_of(root / "labels" / f"round={number:03d}")
        assert labels["pool_row"].to_pylist() == sorted(wanted.tolist())
        np.testing.assert_array_equal(labels["inclusion_probability"], np.ones(30))
        np.testing.assert_allclose(labels["gain"], gains[np.searchsorted(left, np.sort(wanted))], rtol=1e-5, atol=1e-6)
        bought = np.concatenate([bought, wanted])
        left = np.setdiff1d(left, wanted)


def test_a_choice_that_was_lost_is_made_again_in_the_same_way(herding: dict[str, Any], tmp_path: Path) -> None:
    root = run(herding, base=tmp_path, until=("select", 0))
    picks = root / "selected" / "round=000" / "picks"
    before = {path.name: pq.read_table(path) for path in picks.iterdir()}
    shutil.rmtree(picks)
    for path in list((root / "selected" / "round=000" / "gains").iterdir())[:3]:
        path.unlink()  # as if the score phase had been killed before these
    run(herding, base=tmp_path, until=("select", 0))
    assert {path.name: pq.read_table(path) for path in picks.iterdir()} == before


def test_a_part_of_a_large_pool_are_candidates(
    herding: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "CANDIDATES", 150)
    root = run(herding, base=tmp_path, until=("label", 0))
    files = list((root / "selected" / "round=000" / "embeddings").glob("*.parquet"))
    candidates = sum(pq.read_metadata(path).num_rows for path in files)
    share = 150 / 240
    assert abs(candidates - 150) < 5 * np.sqrt(240 * share * (1 - share))  # five standard deviations
    rows = {(path.stem, row) for path in files for row in pq.read_table(path)["row"].to_pylist()}
    picks = (root / "selected" / "round=000" / "picks").glob("*.parquet")
    chosen = {(path.stem, row) for path in picks for row in pq.read_table(path)["row"].to_pylist()}
    assert len(chosen) == 30
    assert chosen <= rows


def test_every_runner_chooses_the_same(herding: dict[str, Any], tmp_path: Path) -> None:
    chosen = []
    for name, flags in (("one", []), ("two", ["--direct_running_mode=multi_threading", "--direct_num_workers=2"])):
        herding["run"]["directory"] = name
        root = run(herding, base=tmp_path, beam_flags=flags, until=("label", 0))
        chosen.append(labels_of(root / "labels" / "round=000"))
    assert chosen[0].equals(chosen[1])


def test_candidates_are_all_while_they_are_few_and_enough_for_the_budget() -> None:
    assert candidates_share(CANDIDATES, 10) == 1
    assert candidates_share(10 * CANDIDATES, 10) == pytest.approx(0.1)
    assert candidates_share(10 * CANDIDATES, CANDIDATES) == pytest.approx(0.4)
    assert candidates_share(10 * CANDIDATES, 5 * CANDIDATES) == 1


def test_drawn_candidates_are_the_same_for_a_unit_and_differ_between_units_and_rounds() -> None:
    rows = np.arange(1000)
    first = Candidates(0.5, 0, 0, "")
    assert first.drawn("a", rows).tolist() == first.drawn("a", rows).tolist()
    assert first.drawn("a", rows).tolist() != first.drawn("b", rows).tolist()
    assert first.drawn("a", rows).tolist() != Candidates(0.5, 0, 1, "").drawn("a", rows).tolist()
    assert Candidates(1.0, 0, 0, "").drawn("a", rows).tolist() == rows.tolist()


def test_a_student_without_a_linear_head_is_refused(
    herding: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "headless.py").write_text(
        "import torch\n"
        "class Scores(torch.nn.Bilinear):\n    def forward(self, x): return super().forward(x, x)\n"
        "def scores(input_shape, num_classes): return Scores(input_shape[0], input_shape[0], num_classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    herding["student"] = {"kind": "headless:scores", "input": {"columns": ["x"]}}
    with pytest.raises(
        PhaseError, match=r"a student must end in a torch.nn.Linear of 3 outputs to have embeddings, Scores"
    ):
        run(herding, base=tmp_path, until=("select", 0))


def known(root: Path) -> tuple[CandidatePool, pa.Table]:
    """What the first round of a run knows of its pool."""
    student = load_student(root / "students" / "round=000")
    pool, labelled = make_table(240, 1, labelled=False), make_table(15, 2, labelled=True)
    logits, points = student.logits_and_embeddings(pool.combine_chunks().to_batches()[0])
    return CandidatePool(240, logits, points, seen(student, labelled)[1]), pool


def picked(root: Path) -> tuple[list[int], np.ndarray]:
    """The rows of the pool that the first round bought, and the probabilities with which it did."""
    labels = labels_of(root / "labels" / "round=000")
    return labels["pool_row"].to_pylist(), labels["inclusion_probability"].to_numpy()


@pytest.mark.parametrize("name", ["k-center", "cluster-margin", "badge"])
def test_strategies_that_compare_choose_in_a_run_as_in_the_library(
    herding: dict[str, Any], tmp_path: Path, name: str
) -> None:
    herding["selection"]["method"] = name
    root = run(herding, base=tmp_path, until=("label", 0))
    pool, _ = known(root)
    rows, probabilities = picked(root)
    assert rows == np.flatnonzero(selector(name).select(pool, 30, shard_rng(0, 0, name))).tolist()
    np.testing.assert_array_equal(probabilities, np.ones(30))


def wrong_share_of(root: Path) -> float:
    """The share of the validation set that the teacher has wrong."""
    answers = labels_of(root / "teacher" / "validation")["teacher_logprobs"].combine_chunks()
    said = answers.flatten().to_numpy().reshape(-1, 3).argmax(axis=1)
    return float((said != make_table(60, 3, labelled=True)["label"].to_numpy()).mean())


def test_a_game_that_no_sketch_plays_is_drawn_with_its_marginals(herding: dict[str, Any], tmp_path: Path) -> None:
    herding["selection"]["method"] = "rad-loss"
    root = run(herding, base=tmp_path, until=("label", 0))
    pool, _ = known(root)
    rows, probabilities = picked(root)
    assert len(rows) == 30
    expected = selector("rad-loss", wrong=240 * wrong_share_of(root)).probabilities(pool, 30)
    assert expected is not None
    assert 0 < wrong_share_of(root) < 1
    np.testing.assert_allclose(probabilities, expected[rows], rtol=1e-4)


@pytest.mark.parametrize("name", ["entropy", "least_confidence"])
def test_the_largest_gains_of_a_name_are_a_strategy(herding: dict[str, Any], tmp_path: Path, name: str) -> None:
    herding["selection"]["method"] = name
    root = run(herding, base=tmp_path, until=("label", 0))
    pool, _ = known(root)
    gains = gain_named(name)(pool.logits)
    assert picked(root)[0] == sorted(np.argsort(-gains)[:30].tolist())
    np.testing.assert_allclose(labels_of(root / "labels" / "round=000")["gain"], gains[picked(root)[0]], rtol=1e-5)


OWN = """
import numpy as np
from distilbeam.selection import Selector


class Lowest(Selector):
    name = "lowest"
    reads = ("gains",)

    def _select(self, pool, budget, rng):
        chosen = np.zeros(pool.size, bool)
        chosen[np.argsort(pool.gains_by("margin", self.name), kind="stable")[:budget]] = True
        return chosen


class Blind(Selector):
    name = "blind"

    def _select(self, pool, budget, rng):
        return np.arange(pool.size) < budget
"""


@pytest.mark.parametrize("name", ["Lowest", "Blind"])
def test_a_strategy_of_a_users_own_file_is_named_and_chooses(
    herding: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "own_strategy.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    herding["selection"] |= {"method": f"own_strategy:{name}", "compare_uniform": True}
    root = run(herding, base=tmp_path)  # to its report, which tells what a round bought
    pool, _ = known(root)
    lowest = np.argsort(margin_gain(pool.logits), kind="stable")[:30]
    assert picked(root)[0] == (sorted(lowest.tolist()) if name == "Lowest" else list(range(30)))
    assert any((root / "selected" / "round=000" / "gains").glob("*.parquet")) == (name == "Lowest")
    assert selector(f"own_strategy:{name}").select(pool, 3, np.random.default_rng(0)).sum() == 3
