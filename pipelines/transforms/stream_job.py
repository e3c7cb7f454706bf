"""The streaming job: messages from Pub/Sub or Kafka to soft labels, a set of shards per window.

    python -m distilbeam.pipelines.transforms.stream_job --config=job.toml --source=pubsub:projects/P/subscriptions/S \
        --schema='key:string,x:float32[64]' --out=gs://bucket/labels --runner=DataflowRunner ...

The configuration is that of a labelling job. With `budget`, `student` and `wrong_share` in its section [watch] the budget is
chosen from each window; without them every message is labelled. `--source=parquet:PATTERN` reads Parquet files instead, as a
bounded job. What this job does not know goes to Beam.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.transforms.window import FixedWindows

from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
from distilbeam.pipelines.transforms.label_examples import LabelExamples
from distilbeam.pipelines.transforms.messages import MessagesToBatches, parse_schema
from distilbeam.pipelines.transforms.select_examples import SelectExamples
from distilbeam.pipelines.transforms.write_soft_labels import WriteSoftLabels
from distilbeam.settings import SET_HELP, SET_METAVAR
from distilbeam.teacher.softlabels import SoftLabelSpec

SOURCES = ("pubsub", "kafka", "parquet")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the job's own options."""
    options = argparse.ArgumentParser(prog="python -m distilbeam.pipelines.transforms.stream_job", allow_abbrev=False)
    options.add_argument("--config", required=True, help="configuration of a labelling job (TOML)")
    options.add_argument("--set", action="append", default=[], metavar=SET_METAVAR, help=SET_HELP)
    options.add_argument(
        "--source", required=True, help="pubsub:SUBSCRIPTION, kafka:BROKER,...:TOPIC or parquet:PATTERN"
    )
    options.add_argument("--schema", default="", help="columns of a message: name:type or name:type[shape], ...")
    options.add_argument("--out", required=True, help="the soft-label dataset: a directory, or gs://bucket/path")
    options.add_argument("--dead_letters", help="directory of rows without an answer; they fail the batch without it")
    options.add_argument("--window_s", type=float, default=60.0, help="length of a window in seconds")
    options.add_argument("--shards", type=int, default=1, help="shards of a window")
    return options


class LabelStream(beam.PTransform):
    """Windowed record batches to the manifest entries of soft labels: choose where there is a budget, label, write.

    Args:
      config: the configuration of a labelling job.
      base: directory that the configuration's relative paths are relative to.
      out: the soft-label dataset.
      shards: shards of a window.
      dead_letters: directory for rows that the teacher cannot answer.
    """

    def __init__(
        self, config: LabelConfig, base: Path, out: str, *, shards: int = 1, dead_letters: str | None = None
    ) -> None:
        super().__init__()
        self.config, self.base, self.out, self.shards, self.dead_letters = config, base, out, shards, dead_letters

    def expand(self, batches: Any) -> Any:
        watch = self.config.watch
        spec = _spec(self.config, self.base)
        if watch.budget is not None and watch.student is not None and watch.wrong_share is not None:
            student = self.base / watch.student
            batches = batches | SelectExamples(
                student, watch.budget, wrong_share=watch.wrong_share, gain=watch.gain, seed=watch.seed
            )
        label = LabelExamples(
            self.config.teacher,
            spec,
            id_column=self.config.data.id,
            base=self.base,
            teacher_batch=self.config.engine.teacher_batch,
            dead_letters=self.dead_letters,
        )
        return batches | label | WriteSoftLabels(self.out, spec, shards=self.shards)


def read_source(pipeline: Any, source: str, schema: str, window_s: float) -> Any:
    """Read record batches.

    Args:
      pipeline: the pipeline.
      source: `kind:place`; see the module.
      schema: columns of a message; Parquet files bring their own.
      window_s: length of the windows of messages in seconds; files are one window.

    Raises:
      ValueError: an unknown kind, no place, or messages without a schema.
    """
    kind, _, place = source.partition(":")
    if kind not in SOURCES or not place:
        raise ValueError(f"--source takes {', '.join(f'{name}:PLACE' for name in SOURCES)}, got '{source}'")
    if kind == "parquet":
        tables = pipeline | "ReadParquet" >> beam.io.ReadFromParquetBatched(place)
        return tables | "Batches" >> beam.FlatMap(lambda table: table.to_batches())
    if not schema:
        raise ValueError(
            f"--schema must be given for messages from {kind}, such as --schema='key:string,x:float32[64]'"
        )
    if kind == "pubsub":
        from apache_beam.io.gcp.pubsub import ReadFromPubSub

        messages = pipeline | "ReadMessages" >> ReadFromPubSub(subscription=place)
    else:
        from apache_beam.io.kafka import ReadFromKafka

        brokers, _, topic = place.rpartition(":")
        read = ReadFromKafka({"bootstrap.servers": brokers}, [topic])
        messages = pipeline | "ReadMessages" >> read | "Values" >> beam.Map(lambda record: record[1])
    # messages are windowed first, so that no batch holds those of two windows
    return messages | "Window" >> beam.WindowInto(FixedWindows(window_s)) | MessagesToBatches(parse_schema(schema))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the pipeline and run it."""
    own, flags = parser().parse_known_args(arguments)
    config = load_any_config(Path(own.config), own.set)
    if not isinstance(config, LabelConfig):
        raise ValueError(f"--config must describe a labelling job, {own.config} describes a run")
    options = stream_options(flags, own.source)
    base = Path(own.config).resolve().parent
    with beam.Pipeline(options=options) as pipeline:
        batches = read_source(pipeline, own.source, own.schema, own.window_s)
        entries = batches | LabelStream(config, base, own.out, shards=own.shards, dead_letters=own.dead_letters)
        _ = entries | "Committed" >> beam.Map(lambda entry: print(json.dumps(entry), file=sys.stderr))


def stream_options(flags: Sequence[str], source: str) -> PipelineOptions:
    """Turn Beam's flags into options, checked; a source of messages means streaming."""
    options = pipeline_options(flags)
    if not source.startswith("parquet:"):
        options.view_as(StandardOptions).streaming = True
    return options


def _spec(config: LabelConfig, base: Path) -> SoftLabelSpec:
    data, labels = config.data, config.labels
    return SoftLabelSpec(
        num_classes=data.num_classes or len(data.classes),
        kind=labels.kind,
        k=labels.k,
        temperature=labels.temperature,
        storage=labels.storage,
        classes=data.classes or None,
        teacher=cached_teacher(teacher_text(config.teacher.relative_to(base), data.classes)).fingerprint(),
        carried=data.carry,
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
