"""Labelling jobs whose pool and output are in an object store: a real S3 server over HTTP, and the package that users use."""

from __future__ import annotations

import base64
import bz2
import hashlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
from job_service import job_service
from labelling import Command, calls_by_row, pool_ids, start, write_job
from labelling import shards as shards_on_disk
from object_store import BUSY, DENIED, ObjectStore, Request, copy_folder, object_store
from problem import asked, make_table, write_problem
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.phase import PhaseError
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.pipelines.pool.splits import plan_pool
from distilbeam.progress import Progress
from distilbeam.storage.files import read_json, write_parquet
from distilbeam.storage.lease import leased
from distilbeam.storage.paths import list_files, readable, to_path
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.teacher.softlabels import merge_manifests, read_manifest

ENGINE = {"unit_rows": 60, "shard_rows": 60, "batch_rows": 60, "teacher_batch": 60}  # a shard for each of four files
SMALL = {"unit_rows": 60, "shard_rows": 20, "batch_rows": 20, "teacher_batch": 20}  # twelve shards


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def bucket(store: ObjectStore, request: pytest.FixtureRequest) -> Path:
    """A bucket of the test's own."""
    return store.bucket(hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20])


@pytest.fixture
def job(tmp_path: Path, bucket: Path) -> Callable[..., None]:
    """Write a job whose pool and directory are in the bucket; the pool's local copy stays for comparison."""

    def write(**more: dict[str, Any]) -> None:
        places = {"run": {"directory": f"{bucket}job"}, "data": {"pool": f"{bucket}pool"}}
        sections = {name: {**places.get(name, {}), **more.get(name, {})} for name in {*places, *more}}
        write_job(tmp_path, **{"engine": ENGINE, **sections})
        copy_folder(tmp_path / "pool", bucket / "pool")

    return write


def shards(bucket: Path) -> list[tuple[str, int, str]]:
    return [(entry.key, entry.rows, entry.checksum) for entry in read_manifest(bucket / "job" / "labels").entries]


def labelled_ids(bucket: Path) -> list[str]:
    paths = read_manifest(bucket / "job" / "labels").paths()
    return [key for path in paths for key in pq.read_table(readable(path))["example_id"].to_pylist()]


def add_file(tmp_path: Path, bucket: Path, name: str, rows: int, seed: int) -> None:
    write_parquet(tmp_path / "pool" / name, make_table(rows, seed, labelled=False))
    (bucket / "pool" / name).write_bytes((tmp_path / "pool" / name).read_bytes())


def test_a_store_holds_what_a_disk_would(
    tmp_path: Path, bucket: Path, job: Callable[..., None], command: Command
) -> None:
    job()
    command("label", "--set", "run.directory=job", "--set", "data.pool=pool")
    (tmp_path / "asked.log").unlink()
    output = command("plan", "--sample", "0")
    assert "The pool has 240 rows in 4 file(s); 0 are labelled, 240 are not." in output
    assert "4 file(s) new: 0.parquet, 1.parquet, 2.parquet, 3.parquet." in output
    assert not asked(tmp_path)
    output = command("label")
    assert f"Labels: {bucket}job/labels" in output
    assert shards(bucket) == shards_on_disk(tmp_path)
    for path in read_manifest(bucket / "job" / "labels").paths():
        assert path.read_bytes() == (tmp_path / "job" / "labels" / path.name).read_bytes()
    assert set(calls_by_row(tmp_path).values()) == {1}
    metrics = read_json(bucket / "job" / "metrics.json")
    assert (metrics["labelled"], metrics["rows"], metrics["failed"]) == (240, 240, 0)


def test_a_pool_that_grows_pays_for_the_new_rows(
    tmp_path: Path, bucket: Path, job: Callable[..., None], command: Command
) -> None:
    job()
    command("label")
    add_file(tmp_path, bucket, "4.parquet", rows=30, seed=9)  # new
    add_file(tmp_path, bucket, "0.parquet", rows=20, seed=10)  # changed
    (bucket / "pool" / "1.parquet").unlink()  # gone
    (tmp_path / "pool" / "1.parquet").unlink()
    output = command("plan", "--sample", "0")
    assert "170 rows in 4 file(s); 120 are labelled, 50 are not." in output
    assert "1 file(s) gone: 1.parquet" in output
    (tmp_path / "asked.log").unlink()
    command("label", "--prune")
    assert len(asked(tmp_path)) == 50
    assert sorted(labelled_ids(bucket)) == sorted(pool_ids(tmp_path))
    named = {path.name for path in read_manifest(bucket / "job" / "labels").paths()}
    assert {path.name for path in list_files(bucket / "job" / "labels", "*.parquet")} == named


def test_two_processes_killed_in_the_middle_pay_once(
    tmp_path: Path, bucket: Path, job: Callable[..., None], command: Command
) -> None:
    job(
        teacher={"arguments": {"log": "asked.log", "delay_s": 0.1}},
        engine={**SMALL, "batch_rows": 5, "teacher_batch": 5},
    )
    flags = ["--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    process = start(tmp_path, *flags)
    while len(list_files(bucket / "job" / "labels" / "_manifest", "*.json")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = shards(bucket)
    assert 3 <= len(before) < 12
    command("label")  # the machine tells that the lease's process is gone
    assert set(before) < set(shards(bucket))
    assert sorted(labelled_ids(bucket)) == sorted(pool_ids(tmp_path))
    assert len(set(labelled_ids(bucket))) == 240
    calls = calls_by_row(tmp_path)
    assert set(calls) == set(pool_ids(tmp_path))
    assert sum(calls.values()) <= 240 + 2 * SMALL["shard_rows"], "at most one shard per worker is asked again"
    command("label", "--set", "run.directory=job", "--set", "data.pool=pool")
    assert shards(bucket) == shards_on_disk(tmp_path)


def test_a_refused_upload_ends_in_a_sentence_and_commits_nothing_half(
    tmp_path: Path, bucket: Path, store: ObjectStore, job: Callable[..., None], command: Command
) -> None:
    job(engine={**SMALL, "attempts": 1})
    folder = f"{str(bucket)[5:]}job/labels/"
    uploads, entries = itertools.count(), itertools.count()

    def refuses(request: Request) -> tuple[str, str] | None:
        if request.method != "PUT" or not request.key.startswith(folder):
            return None
        if request.key.endswith(".json"):  # every third entry, after its shard was taken
            return DENIED if next(entries) % 3 == 2 else None
        return DENIED if next(uploads) % 4 == 0 else None

    with (
        store.refusing(refuses),
        pytest.raises(
            PhaseError,
            match=r"label: \d+ item\(s\) could not be done, the first .* StoreError: s3://\w+/job/labels/\S+ could not be written: ",
        ),
    ):
        command("label")
    committed = read_manifest(bucket / "job" / "labels")
    there = {path.name for path in list_files(bucket / "job" / "labels", "*.parquet")}
    assert {path.name for path in committed.paths()} < there, "a shard whose entry was refused is not in the dataset"
    assert 0 < committed.rows < 240
    (tmp_path / "asked.log").unlink()
    command("label")
    assert not asked(tmp_path), "what the store did not take was kept among the temporary files"
    assert sorted(labelled_ids(bucket)) == sorted(pool_ids(tmp_path))


def test_a_store_that_is_busy_for_a_moment_is_waited_for(
    tmp_path: Path, bucket: Path, store: ObjectStore, job: Callable[..., None], command: Command
) -> None:
    job()
    seen: Counter[tuple[str, str]] = Counter()

    def refuses(request: Request) -> tuple[str, str] | None:
        seen[request.method, request.key] += 1
        return (
            BUSY
            if request.method == "PUT" and "labels" in request.key and seen[request.method, request.key] == 1
            else None
        )

    with store.refusing(refuses):
        command("label")
    assert read_json(bucket / "job" / "work.json")["label"]["retried"] == 0
    assert sorted(labelled_ids(bucket)) == sorted(pool_ids(tmp_path))
    assert set(calls_by_row(tmp_path).values()) == {1}, "nothing was asked again"


@pytest.mark.parametrize("what", ["gone", "truncated"])
def test_an_object_that_breaks_after_the_plan_costs_its_neighbours_nothing(
    tmp_path: Path, bucket: Path, job: Callable[..., None], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job()
    config = load_any_config(tmp_path / "label.toml")
    assert isinstance(config, LabelConfig)
    broken = bucket / "pool" / "2.parquet"
    sentence = {"gone": "pool: no such file: s3://", "truncated": r"s3://\S+/pool/2.parquet cannot be read as Parquet"}[
        what
    ]
    with opened_job(config.relative_to(tmp_path)) as labelling:
        plan = labelling.plan()
        data = broken.read_bytes()
        broken.unlink()
        if what == "truncated":
            broken.write_bytes(data[: len(data) // 2])
        with pytest.raises(PhaseError, match=sentence):
            labelling.label(plan, pipeline_options(), Progress())
    assert read_manifest(bucket / "job" / "labels").rows == 180
    if what == "truncated":
        with (
            opened_job(config.relative_to(tmp_path)) as labelling,
            pytest.raises(ValueError, match=r"data.pool: s3://\S+/pool/2.parquet cannot be read"),
        ):
            labelling.plan()


def test_the_second_of_two_jobs_says_who_is_at_work(bucket: Path, job: Callable[..., None], command: Command) -> None:
    job()
    with (
        leased(bucket / "job", "run.directory", "--set run.directory=..."),
        pytest.raises(
            ValueError,
            match=rf"{bucket}job is being worked on by process {os.getpid()} on \S+; wait for it to end or choose another run.directory",
        ),
    ):
        command("label")
    with leased(bucket / "job", "run.directory", "--set run.directory=..."):
        pass


def test_rows_that_fail_are_in_the_stores_dead_letters(
    tmp_path: Path, bucket: Path, job: Callable[..., None], command: Command
) -> None:
    job(teacher={"arguments": {"log": "asked.log", "fail_below": -1.0}})
    command("label")
    failed = read_json(bucket / "job" / "metrics.json")["failed"]
    assert 0 < failed < 60
    assert len(labelled_ids(bucket)) == 240 - failed
    (bucket / "pool" / "3.parquet").unlink()
    command("label", "--prune")
    after = read_json(bucket / "job" / "metrics.json")
    assert after["rows"] + after["failed"] == 180
    add_file(tmp_path, bucket, "9.parquet", rows=60, seed=21)
    with pytest.raises(PhaseError, match=r"rows have no label, engine.max_failures allows 0.*\(see s3://"):
        command("label", "--max-failures", "0")


def test_labels_of_another_form_are_set_aside_and_come_back(
    tmp_path: Path, bucket: Path, store: ObjectStore, job: Callable[..., None], command: Command
) -> None:
    job()
    command("label")
    dense = shards(bucket)
    other = ["--set", "labels.kind=top_k", "--set", "labels.k=2"]
    with pytest.raises(ValueError, match=r"240 labels in s3://.* differ in kind"):
        command("label", *other)
    copies = itertools.count()

    def refuses(request: Request) -> tuple[str, str] | None:
        return DENIED if request.method == "PUT" and "/superseded/" in request.key and next(copies) >= 5 else None

    with store.refusing(refuses), pytest.raises(OSError, match=r"could not be moved to s3://\S+/superseded/"):
        command("label", "--relabel", *other)
    (tmp_path / "asked.log").unlink()
    command("label", *other)  # the move is finished first
    assert len(asked(tmp_path)) == 240
    assert {entry.spec.kind for entry in read_manifest(bucket / "job" / "labels").entries} == {"top_k"}
    command("label", "--relabel")
    assert len(asked(tmp_path)) == 240, "the dense labels were not asked for again"
    assert shards(bucket) == dense


def test_requests_grow_with_the_work_and_a_call_without_work_needs_few(
    bucket: Path, store: ObjectStore, job: Callable[..., None], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilbeam.pipelines.jobs.labelling._GATHERED_FROM", 10)
    job(engine=SMALL)
    with store.counted() as first:
        command("label")
    count = len(shards(bucket))
    assert count == 12
    # of a shard: is it there (2), its rows (3), itself, its entry, and its entry once more when they are gathered
    # the pool's rows are read once more to be compared, and whether a file is the one that was planned is asked twice a shard
    assert len(first) <= 18 * count + 120, first
    with store.counted() as second:
        command("label")
    assert len(second) <= 64, second
    (entries,) = list_files(bucket / "job" / "labels" / "_manifest")
    assert entries.suffix == ".jsonl", "many entries are gathered in one object"
    with store.counted() as planned:
        command("plan", "--sample", "0")
    assert len(planned) <= 30, planned


def test_labels_are_read_where_they_are(
    tmp_path: Path, bucket: Path, store: ObjectStore, job: Callable[..., None], command: Command
) -> None:
    job()
    command("label")
    place = f"{bucket}job/labels"
    dataset = SoftLabelDataset(place, batch_size=50, seed=1)
    with store.counted() as requests:
        batches = list(dataset)
    assert sum(len(batch["teacher_logprobs"]) for batch in batches) == 240
    assert len(requests) <= 3 * 4, "of a file with one row group: is it the same, how long is it, its columns"
    assert SoftLabelDataset(bucket / "job" / "labels", batch_size=50, seed=1).rows == 240
    assert f"Soft labels in {place}" in CliRunner().invoke(app, ["inspect", place], catch_exceptions=False).output
    verified = CliRunner().invoke(app, ["verify", place, "--teacher", "label.toml"], catch_exceptions=False)
    assert "everything is as the manifest says" in verified.output
    merged = merge_manifests(bucket / "all", [bucket / "job" / "labels"])
    assert sum(pq.read_metadata(readable(path)).num_rows for path in merged.paths()) == merged.rows == 240
    with pytest.raises(ValueError, match=r"datasets must be in one bucket, .* copy one beside the other"):
        merge_manifests(tmp_path / "here", [bucket / "job" / "labels"])
    first, second, *_ = list_files(bucket / "job" / "labels", "*.parquet")
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + b"x")
    second.unlink()
    verified = CliRunner().invoke(app, ["verify", place], catch_exceptions=False)
    assert verified.exit_code == 1
    said = " ".join(verified.output.split())
    assert f"{first} must have the checksum" in said
    assert f"{second} is missing" in said
    first.write_bytes(whole)
    with pytest.raises(ValueError, match=rf"{second} is missing"):
        SoftLabelDataset(place, batch_size=50, seed=1)


def require_urls(pipeline: Any, bucket: Path) -> None:
    """Fail unless a pipeline's proto says where the pool, the labels, the dead letters and the errors are."""
    from apache_beam.internal import pickler
    from apache_beam.portability.api import beam_runner_api_pb2

    payloads = [
        beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload).do_fn.payload
        for transform in pipeline.components.transforms.values()
        if transform.spec.urn == "beam:transform:pardo:v1"
    ]
    functions = [found[0] if isinstance(found := pickler.loads(payload), tuple) else found for payload in payloads]
    (run,) = (function for function in functions if hasattr(function, "submission"))
    job = f"{bucket}job"
    assert (run.work.output, run.work.dead_letters) == (f"{job}/labels", f"{job}/deadletter/labels")
    assert run.submission.errors == f"{job}/errors/label"
    plain = b"".join(bz2.decompress(base64.b64decode(payload)) for payload in payloads)
    for number in range(4):
        assert f"{bucket}pool/{number}.parquet".encode() in plain


def test_a_runner_somewhere_else_gets_the_urls_and_gives_the_same_labels(
    tmp_path: Path, bucket: Path, job: Callable[..., None], command: Command
) -> None:
    job()
    with job_service(execute=True) as (endpoint, submitted):
        command("label", "--", "--runner=PortableRunner", f"--job_endpoint={endpoint}", "--environment_type=LOOPBACK")
    (one,) = submitted
    require_urls(one.pipeline, bucket)
    command("label", "--set", "run.directory=job", "--set", "data.pool=pool")
    assert shards(bucket) == shards_on_disk(tmp_path)


def test_dataflow_gets_the_urls(
    bucket: Path, job: Callable[..., None], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("apitools", reason="needs the extra gcp")
    jobs: list[Any] = []
    monkeypatch.setattr(
        "distilbeam.pipelines.engine.phase.run_watched", lambda pipeline, _: jobs.append(pipeline.run().job)
    )
    monkeypatch.setattr("distilbeam.pipelines.engine.phase.totals", lambda _: {})
    job()
    flags = ["--runner=DataflowRunner", "--project=project", "--region=europe-west1", "--no_auth", "--dry_run=True"]
    image = ["--sdk_container_image=example.org/distilbeam:1", "--temp_location=gs://bucket/temp"]
    with pytest.raises(PhaseError, match="although the runner reported success"):
        command("label", "--", *flags, *image, "--max_num_workers=20")
    require_urls(jobs[0].proto_pipeline, bucket)


def test_ingest_puts_the_summary_last(
    tmp_path: Path, bucket: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("key,a\n" + "".join(f"k{i},{i}.5\n" for i in range(50)))
    words = ["ingest", "rows.csv", "--format", "csv", "--id", "key", "--out"]

    def ingest(out: str) -> str:
        result = CliRunner().invoke(app, [*words, out], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    ingest("pool")
    out = f"{bucket}pool"
    refused = store.refusing(lambda r: DENIED if r.method == "PUT" and r.key.endswith("_ingest.json") else None)
    with refused, pytest.raises(OSError, match=r"pool/_ingest.json could not be written"):
        ingest(out)
    assert len(list_files(bucket / "pool", "*.parquet")) == 1
    assert f"50 examples in {out}: 1 file(s)" in ingest(out)
    assert f"50 examples in {out}: 1 file(s)" in ingest(out), "a second call finds it done"
    for file in (tmp_path / "pool").iterdir():
        assert (bucket / "pool" / file.name).read_bytes() == file.read_bytes()
    assert plan_pool(bucket / "pool", 10).digest == plan_pool(tmp_path / "pool", 10).digest
    assert not list(tmp_path.glob(".*.ingest"))
    (bucket / "other" / "stranger").write_text("x")
    with pytest.raises(ValueError, match=r"--out: s3://\S+/other holds something else already"):
        ingest(f"{bucket}other")


def test_watching_is_refused(job: Callable[..., None], command: Command) -> None:
    job()
    with pytest.raises(
        ValueError, match=r"--watch needs a directory .* and a run.directory on a file system, got incoming"
    ):
        command("label", "--watch", "incoming")
    with pytest.raises(ValueError, match=r"--watch needs a directory that files arrive in"):
        command("label", "--watch", "s3://b/incoming", "--set", "run.directory=job")


def test_what_is_not_for_stores_is_refused(tmp_path: Path, bucket: Path, command: Command) -> None:
    settings = write_problem(tmp_path)
    settings["run"]["directory"] = f"{bucket}run"
    (tmp_path / "label.toml").write_text(tomli_w.dumps(settings))
    with pytest.raises(
        ValueError, match=r"run.directory must be on a file system, a run trains students there; got s3://"
    ):
        command("run")
    assert to_path(f"{bucket}run").exists() is False
