"""The commands about teachers and their labels: `serve-teacher`, `inspect`, `verify`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbeam.pipelines.cli.options import console
from distilbeam.pipelines.engine.display import configure_logs

DatasetArgument = Annotated[
    str, typer.Argument(help="A soft-label dataset, such as run/labels/round=000 or s3://bucket/job/labels.")
]


def serve_teacher(
    config: Annotated[Path, typer.Argument(help="TOML file with a [teacher] section, such as a run's configuration.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8500,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 for every network of this machine, with a certificate or --insecure."
        ),
    ] = "127.0.0.1",
    name: Annotated[str, typer.Option(help="Name of the model, as clients ask for it.")] = "teacher",
    version: Annotated[
        int | None, typer.Option(min=0, help="Version of the model; made from its fingerprint without one.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Send the k most probable classes instead of all logits.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Requests that are read and written at once.")] = 8,
    cert_file: Annotated[Path | None, typer.Option(help="Certificate of the server; turns encryption on.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Key of the certificate.")] = None,
    client_ca_file: Annotated[Path | None, typer.Option(help="Authority whose certificates clients must show.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without encryption; the network must be trusted.")
    ] = False,
    max_rows: Annotated[int, typer.Option(min=1, help="Most rows in a request.")] = 16384,
    max_queued: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; others are told to come again.")
    ] = 512,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Serve a teacher over gRPC, as TensorFlow Serving would, until the process is interrupted."""
    configure_logs(log_level, console)
    from distilbeam.teacher.config import read_teacher_config
    from distilbeam.teacher.tfserving.serve import ServeOptions, serve

    options = ServeOptions(
        host=host,
        name=name,
        version=version,
        top_k=top_k,
        threads=threads,
        cert_file=_text(cert_file),
        key_file=_text(key_file),
        client_ca_file=_text(client_ca_file),
        insecure=insecure,
        max_rows=max_rows,
        max_queued=max_queued,
    )

    def announce(server: Any) -> None:
        console.print(
            f"Serving {server.fingerprint} at {server.address} as '{name}'. Ctrl-C ends it.",
            highlight=False,
            soft_wrap=True,
        )

    serve(read_teacher_config(config), port, options, ready=announce)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def inspect(
    path: DatasetArgument,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of rows.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Show what a soft-label dataset is: its specification, shards, sizes, the teacher's confidence, some rows."""
    configure_logs("warning", console)
    from distilbeam.teacher.softlabels.inspect import inspect_labels

    console.print(inspect_labels(path, samples=samples, seed=seed))


def verify(
    path: DatasetArgument,
    teacher: Annotated[
        Path | None, typer.Option(help="TOML file with a [teacher] section: label a random sample again and compare.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows to label again.")] = 256,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference of a probability that is no problem.")
    ] = 2e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Check a soft-label dataset against its manifest; exit status 1 where something is wrong."""
    configure_logs("warning", console)
    from distilbeam.teacher.config import read_teacher_config
    from distilbeam.teacher.load import load_teacher
    from distilbeam.teacher.softlabels import read_manifest
    from distilbeam.teacher.softlabels.verify import verify_labels

    with ExitStack() as stack:
        asked = complete = None
        if teacher is not None:
            from distilbeam.pipelines.jobs.pool_rows import with_read_columns

            told = read_teacher_config(teacher)
            asked = load_teacher(told, classes=read_manifest(path).spec.classes)
            stack.callback(asked.close)
            complete = partial(with_read_columns, dataset=path, config=teacher, columns=told.input.columns)
        result = verify_labels(path, asked, sample=sample, tolerance=tolerance, seed=seed, complete=complete)
    if teacher is not None:
        from distilbeam.pipelines.jobs.pool_check import pool_problems

        result = replace(result, problems=(*result.problems, *pool_problems(teacher, path)))
    console.print(result)
    if not result.ok:
        raise typer.Exit(1)
