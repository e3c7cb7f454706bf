"""The command that uses a student: `predict`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbeam.pipelines.cli.options import (
    DebugOption,
    InputColumnOption,
    LogOption,
    TrustOption,
    console,
    errors,
    stop_at_once,
)
from distilbeam.pipelines.engine.display import Display, configure_logs

STREAM = "-"


def predict(
    student: Annotated[
        Path,
        typer.Argument(
            metavar="STUDENT",
            help="Directory of a student, of an export, of a finished run, for the student that it has kept, or of a Hugging "
            "Face classifier.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Parquet, CSV, JSON lines, text or images: a file, a directory or a quoted glob pattern; may be repeated. "
            "'-' reads JSON lines from standard input.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Folder of the predictions; what is in it already is not predicted again. '-': standard output."
        ),
    ] = STREAM,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Also give the k most probable classes with their probabilities.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Also give the logits of all classes.")] = False,
    columns: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Columns of the data to carry along, such as an id.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows whose inputs are in memory at a time.")] = 1024,
    file_rows: Annotated[int, typer.Option(min=1, help="Rows of a file of predictions, at most.")] = 65_536,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="parquet, csv, jsonl, text or images, where the files' names do not say it."),
    ] = None,
    input_column: InputColumnOption = None,
    trust: TrustOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Predict the class of every row with a student; a call that was stopped goes on."""
    stream = STREAM in data
    if stream != (out == STREAM) or (stream and len(data) > 1):
        raise ValueError(
            "--data - (standard input) and --out - (standard output) must be given together and alone: files are predicted "
            "into a folder, --out FOLDER"
        )
    if stream and format_ not in (None, "jsonl"):
        raise ValueError(f"--format must be jsonl for standard input, got {format_}")
    said = errors if stream else console  # standard output is the predictions'
    configure_logs(log_level, said)
    signal.signal(signal.SIGINT, stop_at_once)
    with Display(said).waiting("loading"):
        from distilbeam.pipelines.prediction.opened_model import open_model
        from distilbeam.pipelines.prediction.predict_files import PredictOptions
        from distilbeam.student.trust import trust as trust_code

        trust_code(*(trust or ()))
        directory, model = open_model(student, input_column)
    carried = tuple(dict.fromkeys(columns.split(","))) if columns else ()
    options = PredictOptions(top_k, logits, carried, batch_rows, file_rows, format_)
    if stream:
        _predict_stream(model, options)
    else:
        _predict_files(directory, model, data, out, options)


def _predict_files(directory: Path, model: Any, data: list[str], out: str, options: Any) -> None:
    from distilbeam.pipelines.prediction.predict_files import predict_files

    with Display(console).step(f"predict with {directory}") as progress:
        found = predict_files(model, data, out, options, progress)
    if found.changed:
        _say(f"{len(found.changed):,} file(s) changed and were predicted again: {', '.join(found.changed[:5])}.")
    if found.gone:
        _say(
            f"{len(found.gone):,} file(s) are not named any more, their predictions stay: {', '.join(found.gone[:5])}."
        )
    if found.first is not None:
        first = found.first
        where = f"row {first['source_row']:,} of {first['source_file']}: {first['reason']}"
        _say(f"{found.without:,} row(s) have no prediction, and a reason instead; the first is {where}.")
    _say(
        f"{found.rows:,} row(s) of {found.files:,} file(s), {found.predicted:,} predicted by this call. Predictions: {out}"
    )
    if found.rows and found.without == found.rows:
        raise RuntimeError(f"none of the {found.rows:,} row(s) has an input that the student can use")


def _predict_stream(model: Any, options: Any) -> None:
    from distilbeam.pipelines.prediction.predict_lines import predict_lines

    try:
        rows, without = predict_lines(model, sys.stdin.buffer, sys.stdout.buffer, options)
    except BrokenPipeError:  # whoever read has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter would flush and fail once more
        raise typer.Exit(1) from None
    if without:
        errors.print(f"{without:,} of {rows:,} line(s) have no prediction, and a reason instead", soft_wrap=True)
    if rows and without == rows:
        raise RuntimeError(f"none of the {rows:,} line(s) has an input that the student can use")


def _say(sentence: str) -> None:
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)
