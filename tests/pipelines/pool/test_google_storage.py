"""A labelling job in Google Cloud Storage, against an emulator over HTTP; needs gcsfs and gcp-storage-emulator.

The emulator knows no conditions on an upload, so that leases are tested with S3 only.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from labelling import shards, write_job
from object_store import copy_folder
from problem import asked
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.storage.paths import list_files, to_path
from distilbeam.teacher.softlabels import read_manifest

pytest.importorskip("gcsfs", reason="needs the extra gcp")
server = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
pytestmark = pytest.mark.filterwarnings("ignore")  # Google's packages warn of their own future


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setattr(logging.getLogger("gcp_storage_emulator"), "disabled", True)
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    yield to_path("gs://bucket")
    emulator.stop()


def test_a_job_in_a_bucket(tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "d"
    engine = {"unit_rows": 60, "shard_rows": 20, "batch_rows": 20, "teacher_batch": 20}
    write_job(
        directory, run={"directory": "gs://bucket/job"}, data={"pool": "gs://bucket/pool/*.parquet"}, engine=engine
    )
    copy_folder(directory / "pool", bucket / "pool")
    monkeypatch.chdir(directory)
    forget_models()

    def call(*words: str) -> str:
        result = CliRunner().invoke(app, [*words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    call("label", "label.toml")
    call("label", "label.toml")
    assert len(asked(directory)) == 240
    call("label", "label.toml", "--set", "run.directory=job", "--set", "data.pool=pool")
    there = read_manifest(bucket / "job" / "labels")
    assert [(entry.key, entry.rows, entry.checksum) for entry in there.entries] == shards(directory)
    assert "everything is as the manifest says" in call("verify", "gs://bucket/job/labels")
    (bucket / "pool" / "0.parquet").unlink()
    call("label", "label.toml")
    assert read_manifest(bucket / "job" / "labels").rows == 180
    assert len(list_files(bucket / "job" / "labels", "*.parquet")) == 9
