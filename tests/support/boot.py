"""What the entry point of Beam's worker images does: fetch what the job staged, install it, become a worker.

A worker pool starts it with the arguments of the container contract. The staged wheels are installed into a directory of
this worker alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
from apache_beam.portability.api import (
    beam_artifact_api_pb2,
    beam_artifact_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    beam_runner_api_pb2,
    endpoints_pb2,
)
from google.protobuf import json_format, text_format


def main() -> None:
    """Fetch, install, become a worker."""
    parser = argparse.ArgumentParser()
    for name in ("id", "logging_endpoint", "artifact_endpoint", "provision_endpoint", "control_endpoint"):
        parser.add_argument(f"--{name}")
    arguments = parser.parse_args()
    header = [("worker_id", arguments.id)]
    with grpc.insecure_channel(arguments.provision_endpoint) as channel:
        provision = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        info = provision.GetProvisionInfo(beam_provision_api_pb2.GetProvisionInfoRequest(), metadata=header).info
    target = Path(tempfile.mkdtemp(dir=os.environ["BOOT_DIRECTORY"]))
    with grpc.insecure_channel(arguments.artifact_endpoint) as channel:
        artifacts = beam_artifact_api_pb2_grpc.ArtifactRetrievalServiceStub(channel)
        for dependency in info.dependencies:
            role = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(dependency.role_payload)
            request = beam_artifact_api_pb2.GetArtifactRequest(artifact=dependency)
            data = b"".join(part.data for part in artifacts.GetArtifact(request, metadata=header))
            (target / role.staged_name).write_bytes(data)
    for wheel in target.glob("*.whl"):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
        subprocess.run([*install, str(target / "site"), str(wheel)], check=True)
    environment = {
        **os.environ,
        "WORKER_ID": arguments.id,
        "PIPELINE_OPTIONS": json_format.MessageToJson(info.pipeline_options),
        "CONTROL_API_SERVICE_DESCRIPTOR": _descriptor(arguments.control_endpoint),
        "LOGGING_API_SERVICE_DESCRIPTOR": _descriptor(arguments.logging_endpoint),
        "SEMI_PERSISTENT_DIRECTORY": str(target),
        "PYTHONPATH": os.pathsep.join([str(target / "site"), os.environ.get("PYTHONPATH", "")]),
    }
    os.execve(sys.executable, [sys.executable, "-m", "apache_beam.runners.worker.sdk_worker_main"], environment)


def _descriptor(url: str) -> str:
    return text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=url))


if __name__ == "__main__":
    main()
