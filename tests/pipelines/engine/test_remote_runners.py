"""The same command on runners that are somewhere else: what they are given, and that it can be carried out there."""

from __future__ import annotations

import os
import signal
import site
import socket
import subprocess
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_service import Submitted, job_service
from problem import CLASSES, SUPPORT, write_problem
from wheel import build_wheel

from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.phase import PhaseError
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.progress import Progress
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
    with opened_job(parse_label_config(config).relative_to(base)) as job:
        job.label(job.plan(), pipeline_options(flags), Progress())
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


@pytest.fixture
def other_environment(tmp_path: Path) -> Path:
    """Make an environment with everything but the project itself; return its interpreter."""
    directory = tmp_path / "environment"
    venv.create(directory, with_pip=False, symlinks=True)
    packages = next(directory.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))  # editable installs are not followed
    python = directory / "bin" / "python"
    lacks = subprocess.run([python, "-c", "import distilbeam"], cwd="/", capture_output=True, text=True, check=False)
    if "No module named 'distilbeam'" not in lacks.stderr:
        pytest.skip("the project is installed in a form that every environment sees")
    return python


@contextmanager
def worker_pool(python: Path, directory: Path) -> Iterator[str]:
    """Run Beam's worker pool in an environment; yield its address."""
    boot = directory / "boot"
    boot.write_text(f'#!/bin/sh\nexec {python} {SUPPORT / "boot.py"} "$@"\n')
    boot.chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "BOOT_DIRECTORY": str(directory), "OMP_NUM_THREADS": "1"}
    with (directory / "pool.log").open("w") as log:
        pool = subprocess.Popen(
            [*command, f"--container_executable={boot}"], env=environment, cwd="/", stdout=log, stderr=log
        )
        try:
            _wait_for_port(port, pool)
            yield f"localhost:{port}"
        finally:
            pool.send_signal(signal.SIGINT)  # on which it stops its workers; jobs of some shells are deaf to it
            try:
                pool.wait(timeout=10)
            except subprocess.TimeoutExpired:
                pool.kill()
                pool.wait()


def _wait_for_port(port: int, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        assert process.poll() is None, "the worker pool ended"
        with socket.socket() as attempt:
            if attempt.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no worker pool answers on port {port}")


@pytest.mark.slow
def test_the_staged_wheel_is_all_that_a_worker_elsewhere_needs(
    tmp_path: Path, wheel: Path, other_environment: Path
) -> None:
    expected = label(tmp_path, out="local")
    place = tmp_path / "worker"
    place.mkdir()
    with worker_pool(other_environment, place) as address, job_service(execute=True) as (endpoint, _):
        flags = ["--runner=PortableRunner", f"--job_endpoint={endpoint}", f"--extra_package={wheel}"]
        external = ["--environment_type=EXTERNAL", f"--environment_config={address}"]
        assert label(tmp_path, *flags, *external, out="remote") == expected
    installed = list(place.glob("*/site/distilbeam/pipelines/labelling/phase.py"))
    assert installed, "the worker was started by the pool and installed the wheel that was staged"


def test_dataflow_job_without_submitting_it(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apitools", reason="needs the extra gcp")
    jobs: list[Any] = []

    def run_only(pipelines: list[Any], _options: Any) -> list[Any]:
        jobs.extend(pipeline.run().job for pipeline in pipelines)
        return []

    monkeypatch.setattr("distilbeam.pipelines.engine.submission.run_watched", run_only)
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
        "--dry_run=True",
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
