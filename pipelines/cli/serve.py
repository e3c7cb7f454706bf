"""The commands that serve a model over gRPC, as TensorFlow Serving would: `serve-teacher`, `serve-student`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distilbeam.pipelines.cli.options import DebugOption, InputColumnOption, LogOption, TrustOption, console
from distilbeam.pipelines.engine.display import Display, configure_logs

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")]
HostOption = Annotated[
    str,
    typer.Option(
        help="Address to listen on; 0.0.0.0 for every network of this machine, with a certificate or --insecure."
    ),
]
NameOption = Annotated[str, typer.Option(help="Name of the model, as clients ask for it.")]
VersionOption = Annotated[
    int | None, typer.Option(min=0, help="Version of the model; made from its fingerprint without one.")
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Send the k most probable classes instead of all logits.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Requests that are read and written at once.")]
CertOption = Annotated[Path | None, typer.Option(help="Certificate of the server; turns encryption on.")]
KeyOption = Annotated[Path | None, typer.Option(help="Key of the certificate.")]
ClientsOption = Annotated[Path | None, typer.Option(help="Authority whose certificates clients must show.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Serve other machines without encryption; the network must be trusted.")
]
MaxRowsOption = Annotated[int, typer.Option(min=1, help="Most rows in a request.")]
MaxQueuedOption = Annotated[int, typer.Option(min=0, help="Requests that may wait; others are told to come again.")]


def serve_teacher(
    config: Annotated[Path, typer.Argument(help="TOML file with a [teacher] section, such as a run's configuration.")],
    port: PortOption = 8500,
    host: HostOption = "127.0.0.1",
    name: NameOption = "teacher",
    version: VersionOption = None,
    top_k: TopKOption = None,
    threads: ThreadsOption = 8,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    client_ca_file: ClientsOption = None,
    insecure: InsecureOption = False,
    max_rows: MaxRowsOption = 16384,
    max_queued: MaxQueuedOption = 512,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Serve a teacher over gRPC, as TensorFlow Serving would, until the process is interrupted."""
    configure_logs(log_level, console)
    from distilbeam.teacher.config import read_teacher_config
    from distilbeam.teacher.tfserving.serve import serve

    options = _options(
        host, name, version, top_k, threads, cert_file, key_file, client_ca_file, insecure, max_rows, max_queued
    )
    serve(read_teacher_config(config), port, options, ready=_announce)


def serve_student(
    student: Annotated[
        Path,
        typer.Argument(
            metavar="STUDENT",
            help="Directory of a student, of an export, of a finished run, or of a Hugging Face classifier.",
            show_default=False,
        ),
    ],
    port: PortOption = 8500,
    host: HostOption = "127.0.0.1",
    name: NameOption = "student",
    version: VersionOption = None,
    top_k: TopKOption = None,
    threads: ThreadsOption = 8,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    client_ca_file: ClientsOption = None,
    insecure: InsecureOption = False,
    max_rows: MaxRowsOption = 16384,
    max_queued: MaxQueuedOption = 512,
    input_column: InputColumnOption = None,
    trust: TrustOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Serve a student over gRPC, as TensorFlow Serving would: logits, and each row's class and confidence."""
    configure_logs(log_level, console)
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.prediction import serve_student as serving
        from distilbeam.pipelines.prediction.opened_model import open_model
        from distilbeam.student.trust import trust as trust_code

        options = _options(
            host, name, version, top_k, threads, cert_file, key_file, client_ca_file, insecure, max_rows, max_queued
        )
        trust_code(*(trust or ()))
        _, model = open_model(student, input_column)
    serving.serve_student(model, port, options, _announce)


def _options(
    host: str,
    name: str,
    version: int | None,
    top_k: int | None,
    threads: int,
    cert_file: Path | None,
    key_file: Path | None,
    client_ca_file: Path | None,
    insecure: bool,
    max_rows: int,
    max_queued: int,
) -> Any:
    from distilbeam.teacher.tfserving.serve_options import ServeOptions

    return ServeOptions(
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


def _announce(server: Any) -> None:
    console.print(
        f"Serving {server.fingerprint} at {server.address} as '{server.options.name}'. Ctrl-C ends it.",
        highlight=False,
        soft_wrap=True,
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
