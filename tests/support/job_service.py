"""A job service of our own, for the runners that submit to one: Flink's, Spark's and Prism's look like it from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.job import utils
from apache_beam.runners.portability import local_job_service
from apache_beam.runners.runner import PipelineState


@dataclass
class Submitted:
    """A pipeline as a job service got it: its proto, its options by name, its staged files by name."""

    pipeline: Any
    options: dict[str, Any]
    staged: dict[str, bytes] = field(default_factory=dict)

    @property
    def primitives(self) -> dict[str, Any]:
        """The transforms that are not made of others, by their names."""
        transforms = self.pipeline.components.transforms.values()
        return {t.unique_name: t for t in transforms if not t.subtransforms and t.spec.urn and t.outputs != t.inputs}


@contextmanager
def job_service(execute: bool) -> Iterator[tuple[str, list[Submitted]]]:
    """Start a job service; yield its endpoint and the list of what is submitted.

    Args:
      execute: whether to carry pipelines out; otherwise they are reported as done at once, without having done anything.
    """
    submitted: list[Submitted] = []

    class Job(local_job_service.BeamJob):
        def _invoke_runner(self) -> Any:
            options = {name[12:-3]: value for name, value in utils.struct_to_dict(self._pipeline_options).items()}
            submitted.append(Submitted(self._pipeline_proto, options, _staged(self._pipeline_proto)))
            if execute:
                return super()._invoke_runner()
            return SimpleNamespace(wait_until_finish=lambda: None, state=PipelineState.DONE, monitoring_infos=list)

    server = local_job_service.LocalJobServicer(beam_job_type=Job)
    port = server.start_grpc_server()
    try:
        yield f"localhost:{port}", submitted
    finally:
        server.stop()


def _staged(pipeline: Any) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for environment in pipeline.components.environments.values():
        for dependency in environment.dependencies:
            role = beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(dependency.role_payload)
            place = beam_runner_api_pb2.ArtifactFilePayload.FromString(dependency.type_payload)
            assert dependency.type_urn == common_urns.artifact_types.FILE.urn
            with open(place.path, "rb") as file:  # noqa: PTH123
                files[role.staged_name] = file.read()
    return files
