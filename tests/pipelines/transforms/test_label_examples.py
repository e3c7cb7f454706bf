"""The PTransforms inside somebody else's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from problem import CLASSES, make_table

from distilbeam.pipelines import LabelExamples, SelectExamples, run
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.selection.gains import margin_gain
from distilbeam.selection.games.rad import rad_marginals
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher import load_teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, decode


@pytest.fixture
def student(problem: dict[str, Any], tmp_path: Path) -> Path:
    return run(problem, base=tmp_path, until=("train", 0)) / "students" / "round=000"


def batches(rows: int = 60, seed: int = 7, step: int = 13) -> list[pa.RecordBatch]:
    return make_table(rows, seed, labelled=False).to_batches(max_chunksize=step)


def through(elements: list[Any], transform: Any, tmp_path: Path, window: Any = None) -> list[pa.RecordBatch]:
    """Run a transform and return the batches that come out, by their first key."""
    out = tmp_path / "out"
    out.mkdir(parents=True, exist_ok=True)

    def keep(batch: pa.RecordBatch) -> None:
        key = "key" if "key" in batch.schema.names else "example_id"
        pq.write_table(pa.Table.from_batches([batch]), out / f"{batch[key][0]}.parquet")

    with beam.Pipeline(options=pipeline_options()) as pipeline:
        source = pipeline | beam.Create(elements)
        if window is not None:
            source = source | beam.Map(lambda item: TimestampedValue(item[1], item[0])) | beam.WindowInto(window)
        results = source | transform
        _ = results | beam.Map(keep)
    return [pq.read_table(file).combine_chunks().to_batches()[0] for file in sorted(out.glob("*.parquet"))]


def spec_of(problem: dict[str, Any], **settings: Any) -> SoftLabelSpec:
    teacher = load_teacher(problem["teacher"])
    return SoftLabelSpec(num_classes=CLASSES, teacher=teacher.fingerprint(), carried=("x",), **settings)


def test_label_examples(problem: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(problem)
    labelled = through(batches(), LabelExamples(problem["teacher"], spec, id_column="key"), tmp_path)
    table = pa.Table.from_batches(labelled)
    assert sorted(table["example_id"].to_pylist()) == sorted(make_table(60, 7, labelled=False)["key"].to_pylist())
    x = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    logits = 2.5 * x[:, :CLASSES]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(decode(table, spec).logprobs, expected, rtol=1e-3, atol=1e-3)


def test_a_row_without_an_answer_fails_loudly_or_goes_to_the_dead_letters(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    problem["teacher"]["arguments"]["fail_below"] = -1.0
    spec = spec_of(problem)
    with pytest.raises(Exception, match=r"row\(s\) have no label, the first '7-\d+': .*makes the teacher raise"):
        through(batches(), LabelExamples(problem["teacher"], spec, id_column="key"), tmp_path)
    dead = tmp_path / "dead"
    labelled = through(batches(), LabelExamples(problem["teacher"], spec, id_column="key", dead_letters=dead), tmp_path)
    kept = {key for batch in labelled for key in batch["example_id"].to_pylist()}
    lost = {row["example_id"] for file in dead.iterdir() for row in pq.read_table(file).to_pylist()}
    assert lost
    assert kept | lost == set(make_table(60, 7, labelled=False)["key"].to_pylist())
    assert not kept & lost


def test_another_teacher_than_the_specifications_is_refused(problem: dict[str, Any], tmp_path: Path) -> None:
    spec = SoftLabelSpec(num_classes=CLASSES, teacher="torch:other:0")
    with pytest.raises(
        Exception, match=r"the teacher changed: these labels are of torch:other:0, the worker has loaded"
    ):
        through(batches(), LabelExamples(problem["teacher"], spec, id_column="key"), tmp_path)


def test_select_examples_takes_exactly_the_budget_with_the_games_marginals(student: Path, tmp_path: Path) -> None:
    chosen = pa.Table.from_batches(through(batches(), SelectExamples(student, 12, wrong_share=0.1), tmp_path))
    assert chosen.num_rows == 12
    pool = make_table(60, 7, labelled=False)
    gains = margin_gain(load_student(student).logits(pool.combine_chunks().to_batches()[0]))
    exact = rad_marginals(gains, 6.0, 12).probabilities
    for row in chosen.to_pylist():
        index = int(row["key"].split("-")[1])
        assert row["gain"] == pytest.approx(gains[index], rel=1e-6)
        assert row["inclusion_probability"] == pytest.approx(exact[index], rel=1e-5)


def test_a_repeated_pipeline_chooses_the_same(student: Path, tmp_path: Path) -> None:
    select = SelectExamples(student, 12, wrong_share=0.1, seed=5)
    one = through(batches(), select, tmp_path / "1")
    other = through(list(reversed(batches())), select, tmp_path / "2")
    assert one == other


def test_windows_never_mix(student: Path, tmp_path: Path) -> None:
    elements = [(60 * (i % 2), batch) for i, batch in enumerate(batches(rows=104))]
    chosen = through(elements, SelectExamples(student, 5, wrong_share=0.1), tmp_path, FixedWindows(60))
    window_of = {key: start for start, batch in elements for key in batch["key"].to_pylist()}
    found = [window_of[key] for batch in chosen for key in batch["key"].to_pylist()]
    assert sorted(found) == [0] * 5 + [60] * 5


def test_a_small_window_is_chosen_whole_and_equal_batches_do_not_confuse(student: Path) -> None:
    batch = batches(rows=4)[0]
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        sizes = (
            pipeline
            | beam.Create([batch, batch, batch.slice(0, 0)])
            | SelectExamples(student, 100, wrong_share=0.1)
            | beam.Map(lambda b: b.num_rows)
        )

        def two_of_four(counts: list[int]) -> None:
            assert sorted(counts) == [4, 4]

        assert_that(sizes, two_of_four)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"budget": 0, "wrong_share": 0.1}, "budget must be at least 1, got 0"),
        ({"budget": 1, "wrong_share": 1.5}, "wrong_share must be between 0 and 1, got 1.5"),
        (
            {"budget": 1, "wrong_share": 0.1, "gain": "size"},
            "gain must be one of margin, entropy, least_confidence, got 'size'",
        ),
    ],
)
def test_select_examples_refuses(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SelectExamples("student", **arguments)


def test_estimates_need_their_student(problem: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="estimates and student must be given together"):
        LabelExamples(problem["teacher"], spec_of(problem), student="somewhere")
