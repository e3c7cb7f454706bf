"""The same command on runners that are somewhere else: what they are given, and that it can be carried out there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from job_service import Submitted, job_service
from problem import CLASSES, write_problem
from wheel import build_wheel

from distilbeam.pipelines.beam_options import pipeline_options
from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.labelling_job import opened_job
from distilbeam.pipelines.phases import PhaseError
from distilbeam.teacher.softlabels import read_manifest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def label(base: Path, *flags: str, out: str = "job") -> list[tuple[str, int, str]]:
    """Label the small problem's pool with Beam's options; return the shards."""
    if not (base / "pool").exists():
        write_problem(base, pool_rows=80)
    config = {
        "run": {"directory": out},
        "data": {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": CLASSES},
        "teacher": {
            "kind": "torch",
            "model": "logging_teacher:LoggingTeacher",
            "arguments": {"log": str(base / "asked.log")},
            "input": {"columns": ["x"]},
        },
        "engine": {"unit_rows": 20, "shard_rows": 20, "batch_rows": 16, "teacher_batch": 8},
    }
    with opened_job(parse_label_config(config), base) as job:
        job.label(job.plan(), pipeline_options(flags), lambda *_: None)
        return [(entry.key, entry.rows, entry.checksum) for entry in read_manifest(job.dataset).entries]


def require_one_line(submitted: Submitted) -> None:
    """Fail unless the pipeline is linear: no side input, no state, no branch, nothing that some runner drops silently."""
    from apache_beam.portability.api import beam_runner_api_pb2

    consumed: list[str] = []
    produced: list[str] = []
    for transform in submitted.primitives.values():
        assert len(transform.inputs) <= 1, transform.unique_name
        assert len(transform.outputs) <= 1, transform.unique_name
        consumed += transform.inputs.values()
        produced += transform.outputs.values()
        if transform.spec.urn == "beam:transform:pardo:v1":
            work = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
            assert not work.side_inputs
            assert not work.state_specs
            assert not work.timer_family_specs
    assert len(consumed) == len(set(consumed)), "a collection is read once"
    assert len(set(produced) - set(consumed)) <= 1, "there is one end"
    names = [transform.unique_name for transform in submitted.pipeline.components.transforms.values()]
    assert any(name.startswith("Reshuffle") for name in names), "items are spread over workers"


REMOTE = [
    ("FlinkRunner", ["--flink_master=cluster:8081"], {"flink_master": "cluster:8081"}),
    ("SparkRunner", ["--spark_master_url=spark://cluster:7077"], {"spark_master_url": "spark://cluster:7077"}),
    ("PrismRunner", [], {}),
    ("PortableRunner", [], {}),
]


@pytest.mark.parametrize(("runner", "flags", "options"), REMOTE, ids=[name for name, _, _ in REMOTE])
def test_a_runner_with_a_job_service_gets_one_linear_pipeline_and_gives_the_same_labels(
    tmp_path: Path, runner: str, flags: list[str], options: dict[str, str]
) -> None:
    expected = label(tmp_path, out="local")
    with job_service(execute=True) as (endpoint, submitted):
        flags = [f"--runner={runner}", f"--job_endpoint={endpoint}", "--environment_type=LOOPBACK", *flags]
        assert label(tmp_path, *flags, out="remote") == expected
    assert len(submitted) == 1
    require_one_line(submitted[0])
    for name, value in options.items():
        assert submitted[0].options[name] == value


def test_the_wheel_and_the_image_go_with_the_pipeline(tmp_path: Path, wheel: Path) -> None:
    with job_service(execute=False) as (endpoint, submitted):
        flags = ["--runner=FlinkRunner", f"--job_endpoint={endpoint}", f"--extra_package={wheel}"]
        image = ["--environment_type=DOCKER", "--environment_config=example.org/distilbeam:1"]
        with pytest.raises(
            PhaseError, match=r"label: 4 item\(s\) could not be done although the runner reported success"
        ):
            label(tmp_path, *flags, *image)
    assert len(submitted) == 2, "what the runner says it did is looked for, and tried again"
    for one in submitted:
        require_one_line(one)
        assert one.staged[wheel.name] == wheel.read_bytes()
        assert one.staged["extra_packages.txt"].decode().split() == [wheel.name]
        environments = one.pipeline.components.environments.values()
        images = [environment.payload for environment in environments if "docker" in environment.urn]
        assert images
        assert all(b"example.org/distilbeam:1" in payload for payload in images)


def test_dataflow_job_without_submitting_it(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apitools", reason="needs the extra gcp")
    jobs: list[Any] = []

    def run_only(pipeline: Any, _options: Any) -> Any:
        result = pipeline.run()
        jobs.append(result.job)
        return None

    monkeypatch.setattr("distilbeam.pipelines.phases.run_watched", run_only)
    monkeypatch.setattr("distilbeam.pipelines.phases.totals", lambda _: {})
    flags = [
        "--runner=DataflowRunner",
        "--project=project",
        "--region=europe-west1",
        "--temp_location=gs://bucket/temp",
        "--staging_location=gs://bucket/staging",
        "--sdk_container_image=example.org/distilbeam:1",
        f"--extra_package={wheel}",
        "--max_num_workers=20",
        "--no_auth",
        "--dry_run",
    ]
    with pytest.raises(PhaseError, match="although the runner reported success"):
        label(tmp_path, *flags)
    assert len(jobs) == 2
    submitted = Submitted(jobs[0].proto_pipeline, {})
    require_one_line(submitted)
    environments = list(submitted.pipeline.components.environments.values())
    assert {environment.urn for environment in environments} == {"beam:env:docker:v1"}
    assert all(b"example.org/distilbeam:1" in environment.payload for environment in environments)
    staged = [dependency.role_payload for environment in environments for dependency in environment.dependencies]
    assert any(wheel.name.encode() in role for role in staged)


def test_a_misspelt_option_of_a_remote_runner_is_refused() -> None:
    with pytest.raises(ValueError, match="--flink_mastr is not a Beam option; did you mean --flink_master"):
        pipeline_options(["--runner=FlinkRunner", "--flink_mastr=x"])
