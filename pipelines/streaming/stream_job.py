"""The streaming job by its former command and as a Flex Template starts it; `distilbeam stream` is the same job.

    python -m distilbeam.pipelines.streaming.stream_job --config=job.toml --source=pubsub:projects/P/subscriptions/S \
        --schema='key:string,x:float32[64]' --out=gs://bucket/labels --runner=DataflowRunner ...

The configuration is that of a labelling job. With `budget`, `student` and `wrong_share` in its section [watch] the budget is
chosen from each window; without them every message is labelled. `--source=parquet:FILES` (a pattern, or a folder) reads Parquet files
instead, as a
bounded job. What this job does not know goes to Beam.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.streaming.job import StreamJob
from distilbeam.pipelines.streaming.pipeline import LabelStream as LabelStream  # its documented place
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.settings import SET_HELP, SET_METAVAR


def parser() -> argparse.ArgumentParser:
    """Return the parser of the job's own options."""
    options = argparse.ArgumentParser(prog="python -m distilbeam.pipelines.streaming.stream_job", allow_abbrev=False)
    add = options.add_argument
    add("--config", required=True, help="configuration of a labelling job (TOML)")
    add("--set", action="append", default=[], metavar=SET_METAVAR, help=SET_HELP)
    add(
        "--source",
        required=True,
        help="kafka:BROKER,...:TOPIC, kafka-java:BROKER,...:TOPIC, pubsub:SUBSCRIPTION or parquet:FILES",
    )
    add("--schema", default="", help="columns of a message: name:type or name:type[shape], =ORIGIN, ...")
    add("--id", help="key: the message's key is the id")
    add("--out", required=True, help="the soft-label dataset: a directory, or gs://bucket/path")
    add("--dead_letters", help="directory of messages without a label; beside the dataset without it")
    add("--window_s", type=float, help="length of a window in seconds (60)")
    add("--shards", type=int, help="shards of a window (1)")
    add("--start", help="kafka: resume, earliest or latest (resume)")
    add("--until", help="kafka: latest or a time, at which the job ends")
    add("--allowed_lateness_s", type=float, help="seconds after its window's end that a message is still labelled (60)")
    add("--max_wait_s", type=float, help="seconds that messages wait for a batch to fill (1)")
    add("--max_rows", type=int, help="rows at which a window is written before it closes")
    add("--max_failures", help="dead letters at which the job ends: a number or a share such as 5%%")
    add("--format", help="json, bytes, avro or protobuf (json)")
    add("--definition", help="file of the Avro schema or the Protobuf descriptor set")
    add("--registry", help="address of the schema registry of Avro and Protobuf, instead of --definition")
    add(
        "--registry_client",
        action="append",
        help="setting of the registry's client, KEY=VALUE or @FILE; may be repeated",
    )
    add("--event_time", help="column that says when a message's event was; its own time without one")
    add("--message", help="full name of the Protobuf message")
    add("--consumer", action="append", help="kafka: setting of the client, KEY=VALUE or @FILE; may be repeated")
    return options


def stream_options(flags: Sequence[str], source: str) -> PipelineOptions:
    """Turn Beam's flags into options, checked, for a pipeline of one's own around `LabelStream`.

    Args:
      flags: Beam's options.
      source: `kind:place`; messages mean streaming.
    """
    options = pipeline_options(flags)
    if not source.startswith("parquet:"):
        options.view_as(StandardOptions).streaming = True
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the pipeline and run it."""
    own, flags = parser().parse_known_args(arguments)
    config = load_any_config(Path(own.config), own.set)
    if not isinstance(config, LabelConfig):
        raise ValueError(f"--config must describe a labelling job, {own.config} describes a run")
    settings = StreamSettings.of({name: value for name, value in vars(own).items() if name not in ("config", "set")})
    state = StreamJob(config, settings, flags).run()
    print(json.dumps(state.to_json()), file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, RuntimeError) else 2)
