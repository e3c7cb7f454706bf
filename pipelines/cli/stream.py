"""The command for messages: `stream`."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbeam.pipelines.cli.options import (
    BeamArgument,
    ConfigArgument,
    DebugOption,
    LogOption,
    SetOption,
    TrustOption,
    end_stopped,
)
from distilbeam.pipelines.engine.display import Display, configure_logs, plain_console

if TYPE_CHECKING:
    from distilbeam.pipelines.streaming.state import StreamState

console = plain_console()
_EVERY_S = 10.0  # between two lines on the state, where nobody can see them change


def _option(*names: str, help: str, metavar: str | None = None) -> Any:  # noqa: A002
    """Declare an option under its name with dashes and, for scripts of the former command, with underscores."""
    spellings = dict.fromkeys([*names, *(f"--{name[2:].replace('-', '_')}" for name in names)])
    return typer.Option(*spellings, help=help, metavar=metavar)


def stream(
    config: ConfigArgument,
    beam_options: BeamArgument = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:PLACE",
            help="kafka:HOST:PORT,...:TOPIC, kafka-java:... (Beam's own), pubsub:SUBSCRIPTION, parquet:FILES, or "
            "letters:FOLDER, dead letters that are asked again.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The soft-label dataset: a directory, or gs://BUCKET/PATH.")] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:TYPE,...",
            help="Columns of a message, such as key:string,x:float32[64]; NAME:TYPE=ORIGIN takes the message's key, value, "
            "timestamp, partition, offset or header.NAME.",
        ),
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="key: the message's key is the id.")] = None,
    dead_letters: Annotated[
        str | None, _option("--dead-letters", help="Folder of messages without a label; beside --out by default.")
    ] = None,
    window_s: Annotated[
        float | None, _option("--window-s", help="Length of a window in seconds; 60 by default.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Shards of a window; 1 by default.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Kafka: resume (behind what is settled, the default), earliest or latest."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Kafka: latest, for what the topic has now, or a time; then the job ends.")
    ] = None,
    event_time: Annotated[
        str | None,
        _option(
            "--event-time",
            metavar="COLUMN",
            help="Column that says when a message's event was: milliseconds (int64) or seconds (float64) since 1970, or ISO 8601 "
            "text; the message's own time by default.",
        ),
    ] = None,
    allowed_lateness_s: Annotated[
        float | None,
        _option("--allowed-lateness-s", help="Seconds after its window's end that a message is still labelled; 60."),
    ] = None,
    max_wait_s: Annotated[
        float | None, _option("--max-wait-s", help="Seconds that messages wait for a batch to fill; 1 by default.")
    ] = None,
    max_rows: Annotated[
        int | None, _option("--max-rows", help="Rows at which a window is written before it closes.")
    ] = None,
    max_failures: Annotated[
        str | None,
        _option(
            "--max-failures", help="Stop when more messages than this have no label: a number, or a share such as 5%."
        ),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="json, bytes, avro or protobuf; json by default.")
    ] = None,
    definition: Annotated[
        str | None, typer.Option(help="File of the Avro schema, or the Protobuf descriptor set.")
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Schema registry of Avro and Protobuf, instead of --definition."),
    ] = None,
    registry_client: Annotated[
        list[str] | None,
        _option(
            "--registry-client",
            metavar="KEY=VALUE",
            help="Setting of the registry's client, or @FILE of them: basic.auth.user.info, bearer.auth.token, ssl.ca.location.",
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Full name of the Protobuf message.")] = None,
    consumer: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Kafka: setting of the client, or @FILE of them; may be repeated."),
    ] = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Tell the job that works on --out to commit what was asked, and to end.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the state as a line of JSON, every two seconds.")
    ] = False,
    metrics_port: Annotated[
        int | None, _option("--metrics-port", help="Serve the state at this port, /metrics for Prometheus.")
    ] = None,
    trust: TrustOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what has no label; read nothing, ask nobody.")
    ] = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Label messages as they come, each once: from Kafka or Pub/Sub to soft labels, a set of shards per window."""
    options = {
        "id": id_,
        "format": format_,
        "source": source,
        "out": out,
        "schema": schema,
        "dead_letters": dead_letters,
        "shards": shards,
        "window_s": window_s,
        "start": start,
        "until": until,
        "allowed_lateness_s": allowed_lateness_s,
        "max_wait_s": max_wait_s,
        "max_rows": max_rows,
        "max_failures": max_failures,
        "definition": definition,
        "registry": registry,
        "registry_client": registry_client,
        "event_time": event_time,
        "message": message,
        "consumer": consumer,
    }
    configure_logs(log_level, console)
    if out is None:
        raise ValueError("--out must be given: where the labels go")
    if drain:
        _drain(out)
        return
    if source is None:
        raise ValueError("--source must be given, such as kafka:localhost:9092:TOPIC")
    from distilbeam.pipelines.config import LabelConfig, load_any_config

    settings = load_any_config(config, overrides or ())
    if not isinstance(settings, LabelConfig):
        raise ValueError(
            f"distilbeam stream is for labelling jobs, {config} describes a run: leave out [selection], [student] and [training]"
        )
    if trust:
        from distilbeam.student.trust import trust as trust_code

        trust_code(*trust)
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.streaming.job import StreamJob
        from distilbeam.pipelines.streaming.settings import StreamSettings
        from distilbeam.pipelines.streaming.state import serve_state

    shown = _Shown(as_json)
    say = Display(plain_console(stderr=as_json)).say
    job = StreamJob(settings, StreamSettings.of(options), beam_options or [], shown.report, say)
    if dry_run:
        say(job.plan())
        return
    if metrics_port is not None:
        serve_state(job.state, metrics_port)
    _stop_on_signals(job, say)
    state = job.run()
    if as_json:
        print(json.dumps(state.to_json()), flush=True)
        return
    say(state.sentence())
    if state.dead_letters:
        say(f"Messages without a label, and why: {job.settings.letters}")
    say(f"Labels: {out}")


def _stop_on_signals(job: Any, say: Any) -> None:
    """Let SIGTERM and Ctrl-C commit what was asked; a second one ends at once."""

    def stop(*_: object) -> None:
        if stop.told:  # type: ignore[attr-defined]
            end_stopped("stopped; the same command goes on from here")
        stop.told = True  # type: ignore[attr-defined]
        say("Committing what was asked; Ctrl-C again ends at once.")
        job.stop()

    stop.told = False  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _drain(out: str) -> None:
    from distilbeam.pipelines.streaming.stop_file import ask_to_stop

    ask_to_stop(out)
    console.print(f"The job that works on {out} commits what was asked, and ends.", soft_wrap=True)


class _Shown:
    """Shows the state: lines of JSON, one line that changes on a terminal, or a line every now and then."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self._said, self._last = as_json, time.monotonic(), ""

    def report(self, state: StreamState) -> None:
        """Show it, where it is time to."""
        every = 2.0 if self.as_json else 1.0 if console.is_terminal else _EVERY_S
        if time.monotonic() - self._said < every:
            return
        self._said = time.monotonic()
        if self.as_json:
            print(json.dumps(state.to_json()), flush=True)
        elif (sentence := state.sentence()) != self._last:
            self._last = sentence
            console.print(sentence, highlight=False, soft_wrap=True)
            sys.stdout.flush()
