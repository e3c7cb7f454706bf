"""What is checked before the first message is read: columns, the dataset, the topic."""

from __future__ import annotations

import shutil
import socket

from apache_beam.options.pipeline_options import CrossLanguageOptions, PipelineOptions

from distilbeam.extras import Need, require_extras
from distilbeam.pipelines.config import LabelConfig
from distilbeam.pipelines.engine.prism import Runner
from distilbeam.pipelines.needs import needs_of
from distilbeam.pipelines.streaming.decode import Decoder, make_decoder, parse_columns
from distilbeam.pipelines.streaming.registry import Registry
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.storage.paths import to_path
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries

_SERVICE = "sdks:java:io:expansion-service:shadowJar"
_ANSWER_S = 10.0


def require_installed(settings: StreamSettings, config: LabelConfig, runner: Runner) -> None:
    """Check that the packages are there.

    Args:
      settings: the job's options.
      config: the configuration of the labelling job.
      runner: the runner that does it.

    Raises:
      ValueError: an extra is missing.
    """
    needs = list(needs_of(config))
    if settings.kind == "kafka":
        needs.append(Need(f"--source {settings.source}", "kafka"))
    if settings.format == "avro":
        needs.append(Need("--format avro", "kafka", ("fastavro",)))
    if settings.kind == "pubsub":
        native = runner.reads_pubsub
        needs.append(
            Need(f"--source {settings.source}", "gcp" if native else "pubsub", ("apitools",) if native else None)
        )
    require_extras(needs)


def decoder_of(settings: StreamSettings, config: LabelConfig) -> Decoder:
    """Make the decoder and check that its rows have the columns that are read, carried and hold the id.

    Raises:
      ValueError: a column is missing, or the schema, the format or its definition is not valid.
    """
    schema = settings.columns
    id_column = config.data.id
    if settings.id == "key":
        if id_column is None:
            raise ValueError("--id key needs data.id in the configuration: it names the column that the key becomes")
        if not schema or id_column not in parse_columns(schema)[0]:
            schema = ",".join(filter(None, (schema, f"{id_column}:string=key")))
    types, _ = parse_columns(schema)
    wanted = [("data.id", id_column)] if id_column is not None else []
    wanted += [("data.carry", name) for name in config.data.carry]
    wanted += [("teacher.input.columns", name) for name in config.teacher.input.columns]
    for setting, name in wanted:
        if name not in types:
            raise ValueError(f"--schema must have the column {name} of {setting}, it has {', '.join(types)}")
    definition = settings.definition_path()
    if definition is not None and not definition.is_file():
        raise ValueError(f"--definition: there is no file {definition}")
    registry = Registry.of(settings.registry, settings.registry_client) if settings.registry else None
    return make_decoder(schema, settings.format, definition, settings.message, settings.event_time, registry)


def require_expansion_service(options: PipelineOptions) -> None:
    """Check that the service answers that is to bring Beam's own Kafka connector, where one is named.

    Where none is named Beam fetches and starts one, which takes Java and Maven Central.

    Raises:
      ValueError: nobody listens there, or there is no Java to start one.
    """
    service = options.view_as(CrossLanguageOptions).beam_services.get(_SERVICE)
    how = f"""name one with -- --beam_services='{{"{_SERVICE}": "HOST:PORT"}}'"""
    if service is None:
        if shutil.which("java") is None:
            raise ValueError(f"--source kafka-java: needs Java 17, or an expansion service that runs elsewhere: {how}")
        return
    host, _, port = service.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _ANSWER_S).close()
    except (OSError, ValueError) as e:
        raise ValueError(
            f"--source kafka-java: no expansion service answers at {service} ({e}); start it, or {how}"
        ) from e


def require_same_dataset(out: str, spec: SoftLabelSpec) -> None:
    """Check that a dataset that is there already means the same.

    Raises:
      ValueError: it is of another teacher, form or other classes.
    """
    files = manifest_files(to_path(out))
    if not files:
        return
    there = read_entries(files[-1:])[0].spec
    if differing := there.differences(spec):
        raise ValueError(
            f"--out: the labels in {out} are others than this job's; they differ in {', '.join(differing)}. Put these back, or "
            "choose another --out"
        )
