"""The PTransforms on a stream: Beam's TestStream decides what comes when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream as beam_test_stream
from apache_beam.transforms.trigger import AccumulationMode, AfterProcessingTime, Repeatedly
from apache_beam.transforms.window import FixedWindows, Sessions, TimestampedValue
from problem import CLASSES, make_table

from distilbeam.pipelines import LabelExamples, SelectExamples, WriteSoftLabels, run
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.transforms.combine_gains import KEPT_GAINS, GatheredGains, GatherGains
from distilbeam.pipelines.transforms.select_examples import window_name
from distilbeam.selection.gains import margin_gain
from distilbeam.selection.games.rad import rad_marginals
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher import load_teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest

Events = beam_test_stream.TestStream  # under its own name pytest would take it for a test
FIRST, SECOND = "window=19700101T000000Z-19700101T000100Z", "window=19700101T000100Z-19700101T000200Z"


@pytest.fixture
def student(problem: dict[str, Any], tmp_path: Path) -> Path:
    return run(problem, base=tmp_path, until=("train", 0)) / "students" / "round=000"


@pytest.fixture
def spec(problem: dict[str, Any]) -> SoftLabelSpec:
    teacher = load_teacher(problem["teacher"])
    return SoftLabelSpec(num_classes=CLASSES, teacher=teacher.fingerprint(), carried=("x",))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def batches(rows: int, seed: int, step: int = 10) -> list[pa.RecordBatch]:
    return make_table(rows, seed, labelled=False).to_batches(max_chunksize=step)


def keys_of(items: Sequence[pa.RecordBatch]) -> set[str]:
    return {key for batch in items for key in batch["key"].to_pylist()}


def stamped(items: Sequence[pa.RecordBatch], second: int) -> list[TimestampedValue]:
    return [TimestampedValue(batch, second) for batch in items]


def select_label_write(
    source: Any, problem: dict[str, Any], student: Path, spec: SoftLabelSpec, out: Path, budget: int = 12
) -> Any:
    """The streaming graph: select per window, label, write."""
    return (
        source
        | beam.WindowInto(FixedWindows(60))
        | SelectExamples(student, budget, wrong_share=0.1)
        | LabelExamples(problem["teacher"], spec, id_column="key")
        | WriteSoftLabels(out, spec, shards=2)
    )


def stream(events: Any, transform: Any) -> Any:
    """Run a transform on a stream, on the runner that plays TestStream without a download."""
    options = PipelineOptions(["--streaming", "--runner=BundleBasedDirectRunner"])
    pipeline = beam.Pipeline(options=options)
    transform(pipeline | events)
    result = pipeline.run()
    result.wait_until_finish()
    return result


def ids(dataset: Path, window: str) -> list[str]:
    manifest = read_manifest(dataset)
    tables = [pq.read_table(p) for p in manifest.paths() if p.name.startswith(window)]
    return sorted(key for table in tables for key in table["example_id"].to_pylist())


def test_two_windows_in_one_bundle_never_mix(
    problem: dict[str, Any], student: Path, spec: SoftLabelSpec, tmp_path: Path
) -> None:
    one, two = batches(60, 7), batches(50, 8)
    together = [event for pair in zip(stamped(one, 5), stamped([*two, two[0]], 65), strict=True) for event in pair]
    events = Events().add_elements(together[:-1]).advance_watermark_to(60).advance_watermark_to_infinity()
    out = tmp_path / "labels"
    stream(events, lambda source: select_label_write(source, problem, student, spec, out))
    assert len(ids(out, FIRST)) == len(ids(out, SECOND)) == 12
    assert set(ids(out, FIRST)) <= keys_of(one)
    assert set(ids(out, SECOND)) <= keys_of(two)
    entries = read_manifest(out).entries
    assert {entry.extra["window"] for entry in entries} == {
        FIRST.removeprefix("window="),
        SECOND.removeprefix("window="),
    }
    assert len(entries) <= 4
    for window, pool in ((FIRST, one), (SECOND, two)):
        tables = [pq.read_table(p) for p in read_manifest(out).paths() if p.name.startswith(window)]
        table = pa.concat_tables(tables)
        everything = pa.Table.from_batches(pool)
        gains = margin_gain(load_student(student).logits(everything.combine_chunks().to_batches()[0]))
        marginals = rad_marginals(gains, 0.1 * len(gains), 12).probabilities
        position = {key: i for i, key in enumerate(everything["key"].to_pylist())}
        found = [position[key] for key in table["example_id"].to_pylist()]
        np.testing.assert_allclose(table["gain"].to_numpy(), gains[found], rtol=1e-6)
        np.testing.assert_allclose(table["inclusion_probability"].to_numpy(), marginals[found], rtol=1e-5)


class FileCounter:
    """A counter that counts in a file; the runner that plays TestStream forgets the metrics of all but one bundle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def inc(self, count: int) -> None:
        self.path.write_text(f"{int(self.path.read_text()) + count}")


@pytest.mark.parametrize(("watermark", "counted"), [(60, 30), (61, 0)], ids=["given to us", "dropped by the runner"])
def test_late_examples_cost_nothing(
    problem: dict[str, Any],
    student: Path,
    spec: SoftLabelSpec,
    tmp_path: Path,
    watermark: int,
    counted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = FileCounter(tmp_path / "late_rows")
    counter.path.write_text("0")
    real = Metrics.counter
    monkeypatch.setattr(Metrics, "counter", lambda space, name: counter if name == "late_rows" else real(space, name))
    on_time, late = batches(40, 7), batches(30, 8)
    events = (
        Events()
        .add_elements(stamped(on_time, 5))
        .advance_watermark_to(watermark)
        .add_elements(stamped(late, 6))
        .advance_watermark_to_infinity()
    )
    out = tmp_path / "labels"
    stream(events, lambda source: select_label_write(source, problem, student, spec, out))
    assert len(ids(out, FIRST)) == 12
    assert set(ids(out, FIRST)) <= keys_of(on_time)
    assert counter.path.read_text() == f"{counted}"


class FailOnce(beam.DoFn):
    """Passes everything on, and fails behind it the first time: a bundle that is repeated after its work was done."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def process(self, element: Any) -> Any:
        yield element
        if not self.mark.exists():
            self.mark.touch()
            raise OSError("the worker is taken away")


def test_a_repeated_bundle_writes_the_same_shards(
    problem: dict[str, Any], student: Path, spec: SoftLabelSpec, tmp_path: Path
) -> None:
    events = lambda: Events().add_elements(stamped(batches(60, 7), 5)).advance_watermark_to_infinity()  # noqa: E731
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    stream(events(), lambda source: select_label_write(source, problem, student, spec, undisturbed))
    mark = tmp_path / "mark"
    stream(
        events(),
        lambda source: select_label_write(source, problem, student, spec, disturbed) | beam.ParDo(FailOnce(mark)),
    )
    assert mark.exists(), "the bundle was disturbed"
    one, other = (read_manifest(d).entries for d in (undisturbed, disturbed))
    assert [(e.key, e.checksum, e.rows) for e in one] == [(e.key, e.checksum, e.rows) for e in other]
    assert sum(e.rows for e in one) == 12


def test_late_labels_of_a_graph_without_choice_go_to_shards_of_their_own(
    problem: dict[str, Any], spec: SoftLabelSpec, tmp_path: Path
) -> None:
    on_time, late = batches(20, 7), batches(10, 8)
    events = (
        Events()
        .add_elements(stamped(on_time, 5))
        .advance_watermark_to(61)
        .add_elements(stamped(late, 6))
        .advance_watermark_to_infinity()
    )
    out = tmp_path / "labels"

    def graph(source: Any) -> Any:
        labelled = LabelExamples(problem["teacher"], spec, id_column="key")
        return source | beam.WindowInto(FixedWindows(60), allowed_lateness=600) | labelled | WriteSoftLabels(out, spec)

    stream(events, graph)
    entries = read_manifest(out).entries
    assert sorted((e.rows, e.extra["firing"]) for e in entries) == [(10, 1), (20, 0)]
    assert all(entry.path.startswith(f"{FIRST}-00000-") for entry in entries)
    assert set(ids(out, FIRST)) == keys_of([*on_time, *late])


def test_a_window_that_is_met_again_replaces_nothing(
    problem: dict[str, Any], spec: SoftLabelSpec, tmp_path: Path
) -> None:
    out = tmp_path / "labels"

    def job(items: Sequence[pa.RecordBatch]) -> None:
        labelled = LabelExamples(problem["teacher"], spec, id_column="key")
        events = Events().add_elements(stamped(items, 5)).advance_watermark_to_infinity()
        stream(
            events, lambda source: source | beam.WindowInto(FixedWindows(60)) | labelled | WriteSoftLabels(out, spec)
        )

    first, second = batches(100, 7), batches(1, 8)
    for items in (first, second, first[::-1]):  # the last one repeats the first, in another order
        job(items)
    assert sorted(entry.rows for entry in read_manifest(out).entries) == [1, 100]
    assert set(ids(out, FIRST)) == keys_of([*first, *second])


def test_windows_that_would_spend_the_budget_twice_are_refused(student: Path) -> None:
    select = SelectExamples(student, 5, wrong_share=0.1)
    fires_often = {
        "trigger": Repeatedly(AfterProcessingTime(5)),
        "accumulation_mode": AccumulationMode.DISCARDING,
    }
    for window, sentence in (
        (beam.WindowInto(Sessions(60)), "windows must not merge, .*, got Sessions; use FixedWindows"),
        (beam.WindowInto(FixedWindows(60), **fires_often), "windows must fire once: .*, got Repeatedly and 0 s"),
        (
            beam.WindowInto(FixedWindows(60), allowed_lateness=90),
            "windows must fire once: .*, got DefaultTrigger and 90 s",
        ),
        (beam.Map(lambda batch: batch), "a stream must have windows: the global one never ends"),
    ):
        pipeline = beam.Pipeline(options=PipelineOptions(["--runner=BundleBasedDirectRunner", "--streaming"]))
        source = pipeline | Events().add_elements(batches(5, 7)) | window
        with pytest.raises(ValueError, match=sentence):
            _ = source | select


def test_many_gains_take_bounded_memory_and_the_solution_is_close(rng: np.random.Generator) -> None:
    gains = rng.beta(1, 3, KEPT_GAINS + 50_000).astype(np.float32)
    parts = np.array_split(gains, 7)
    combine = GatherGains()
    accumulators = [combine.create_accumulator() for _ in range(3)]
    for i, part in enumerate(parts):
        combine.add_input(accumulators[i % 3], part)
    merged = combine.merge_accumulators(accumulators)
    assert merged.count == len(gains)
    assert not merged._kept
    threshold = merged.solve(0.1, 1000)
    marginals = threshold.marginals(gains)
    assert marginals.sum() == pytest.approx(1000, abs=1e-6)
    exact = rad_marginals(gains, 0.1 * len(gains), 1000)
    assert threshold.value == pytest.approx(exact.value, rel=1e-5)
    both = (marginals > 0) & (exact.probabilities > 0)
    np.testing.assert_allclose(marginals[both], exact.probabilities[both], rtol=0.01)
    other = GatheredGains().merge(combine.merge_accumulators([combine.add_input(GatheredGains(), gains)]))
    assert other.solve(0.1, 1000).to_json() == threshold.to_json(), "the order of merging does not matter"


def test_few_gains_are_solved_exactly_in_any_order(rng: np.random.Generator) -> None:
    gains = rng.beta(1, 3, 500).astype(np.float32)
    one, other = GatheredGains(), GatheredGains()
    for part in np.array_split(gains, 5):
        one.add(part)
    for part in reversed(np.array_split(gains, 3)):
        other = GatheredGains().add(part).merge(other)
    exact = rad_marginals(gains, 25.0, 60).probabilities
    np.testing.assert_allclose(one.solve(0.05, 60).marginals(gains), exact, rtol=1e-6, atol=1e-12)
    assert one.solve(0.05, 60) == other.solve(0.05, 60)


def test_many_shards_and_carries_choose_exactly_the_budget(student: Path, tmp_path: Path) -> None:
    for seed in range(5):
        out = tmp_path / str(seed)
        out.mkdir()
        with beam.Pipeline(options=pipeline_options()) as pipeline:
            chosen = (
                pipeline
                | beam.Create(batches(120, 7, step=3))
                | SelectExamples(student, 17, wrong_share=0.2, seed=seed)
            )
            _ = chosen | beam.Map(
                lambda b, out=out: (out / f"{b['key'][0]}").write_text(json.dumps(b["key"].to_pylist()))
            )
        keys = [key for file in out.iterdir() for key in json.loads(file.read_text())]
        assert len(keys) == len(set(keys)) == 17


def test_window_names_are_file_names() -> None:
    window = FixedWindows(0.5).assign(FixedWindows.AssignContext(1_767_225_600.7))[0]
    assert window_name(window) == "20260101T000000.500000Z-20260101T000001Z"


def test_write_soft_labels_refuses_no_shards(spec: SoftLabelSpec) -> None:
    with pytest.raises(ValueError, match="shards must be at least 1, got 0"):
        WriteSoftLabels("labels", spec, shards=0)
