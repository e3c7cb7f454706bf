"""The commands about data that comes in: `ingest`, and `label --watch`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbeam.pipelines.cli.options import SetOption, console, stop_at_once
from distilbeam.pipelines.engine.display import Display, configure_logs


def ingest(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... [-- BEAM OPTIONS]",
            help="Files, directories or glob patterns; .gz and .zst are unpacked. Beam's options are for tfrecord and images.",
        ),
    ],
    out: Annotated[
        str, typer.Option(help="Directory of the pool, or gs://bucket/pool, s3://...; must not be there yet.")
    ],
    format_: Annotated[str, typer.Option("--format", help="csv, jsonl, tfrecord, text, images, lm or chat.")],
    id_column: Annotated[
        str | None, typer.Option("--id", help="Column with unique ids; the hash of the content serves without one.")
    ] = None,
    class_column: Annotated[
        str | None, typer.Option(help="images: column for the name of the folder that an image is in.")
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:DTYPE]=COLUMN,...",
            help="csv: columns (or patterns) that become one vector; may be repeated.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N,N", help="csv: shape of a vector; may be repeated.")
    ] = None,
    column_type: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="COLUMN=TYPE",
            help="int64, float64, bool, string or binary, where the found type is wrong.",
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="csv: columns of files without a header.")
    ] = None,
    delimiter: Annotated[str, typer.Option(help="csv: what separates fields; 'tab' for a tabulator.")] = ",",
    max_record_bytes: Annotated[
        int, typer.Option(help="csv, jsonl, text, lm, chat: a longer record is a bad one; bounds memory.")
    ] = 16 * 2**20,
    tokenizer: Annotated[str | None, typer.Option(help="lm, chat: folder of the teacher's tokenizer.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="lm, chat: tokens of a block, the longest context that is labelled.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="lm, chat: column of JSON lines and Parquet; text or messages without it.")
    ] = None,
    overrides: SetOption = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Make a pool of Parquet files out of CSV, JSON lines, TFRecord, text or images, without exact duplicates.

    With --format lm or chat: blocks of tokens for a language model; a later call adds new and changed sources.
    """
    configure_logs(log_level, console)
    from distilbeam.extras import require_extras
    from distilbeam.pipelines.needs import needs_of_ingest

    require_extras(needs_of_ingest(format_, out))
    display = Display(console)
    sources, flags = _split(sources)
    of_corpus = {"tokenizer": tokenizer, "sequence_length": sequence_length, "column": column}
    if format_ in ("lm", "chat"):
        given = {name: value for name, value in of_corpus.items() if value is not None}
        _ingest_corpus(sources, out, {"format": format_, "max_record_bytes": max_record_bytes, **given}, overrides)
        return
    if any(value is not None for value in of_corpus.values()):
        raise ValueError(f"--tokenizer, --sequence-length and --column are for --format lm and chat, got {format_}")
    with display.waiting("loading"):
        from distilbeam.pipelines.ingest.ingesting import ingest as ingest_sources
        from distilbeam.pipelines.ingest.settings import ingest_options
        from distilbeam.settings import override
        from distilbeam.storage.paths import to_path

        beam = _beam_options(flags)
    settings = {
        "format": format_,
        "id_column": id_column,
        "class_column": class_column,
        "delimiter": "\t" if delimiter == "tab" else delimiter,
        "columns": tuple(columns.split(",")) if columns else (),
        "vectors": _vectors(vector or [], shape or []),
        "types": dict(_pair(text, "--type", "COLUMN=TYPE") for text in column_type or []),
        "max_record_bytes": max_record_bytes,
    }
    for text in overrides or ():
        override(settings, text)
    options = ingest_options(**settings)
    place = to_path(out)
    summary = ingest_sources(sources, place, options, beam=beam, display=display)
    for sentence in _sentences(summary, place):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _ingest_corpus(sources: list[str], out: str, settings: dict[str, Any], overrides: list[str] | None) -> None:
    display = Display(console)
    for name in ("tokenizer", "sequence_length"):
        if name not in settings:
            raise ValueError(f"--{name.replace('_', '-')} must be given for --format {settings['format']}")
    with display.waiting("loading"):
        from distilbeam.pipelines.corpus.ingesting import DEAD_LETTERS, ingest_corpus
        from distilbeam.pipelines.corpus.settings import corpus_options
        from distilbeam.settings import override
        from distilbeam.storage.paths import to_path

    for text in overrides or ():
        override(settings, text)
    summary = ingest_corpus(sources, to_path(out), corpus_options(**settings), display)
    length = settings["sequence_length"]
    padding = 1 - summary.tokens / (summary.blocks * length)
    sentences = [
        f"{summary.blocks:,} blocks of {length:,} tokens in {out}: {summary.pool_files:,} file(s) of {summary.sources:,} source(s), "
        f"{summary.made:,} of which were read now.",
        f"{summary.tokens:,} tokens in {summary.segments:,} segments, {summary.predicted:,} to be predicted; {padding:.1%} padding.",
    ]
    if summary.first_bad:
        first = summary.first_bad
        sentences.append(
            f"{summary.bad:,} bad record(s) are in {to_path(out) / DEAD_LETTERS}, the first: {first['file']} line {first['line']:,}: "
            f"{first['error']}"
        )
    for sentence in sentences:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Part the sources from Beam's options, which follow `--` and begin with the first word that looks like one."""
    end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    if not end:
        raise ValueError("SOURCE must come before the '--' that Beam's options follow")
    return words[:end], words[end:]


def _beam_options(flags: list[str]) -> Any:
    if not flags:
        return None
    from distilbeam.pipelines.engine.beam_options import pipeline_options  # Beam takes seconds to import

    return pipeline_options(flags)


def _vectors(vectors: list[str], shapes: list[str]) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for text in vectors:
        name, patterns = _pair(text, "--vector", "NAME[:DTYPE]=COLUMN,...")
        name, _, dtype = name.partition(":")
        made[name] = {"columns": patterns.split(","), **({"dtype": dtype} if dtype else {})}
    for text in shapes:
        name, numbers = _pair(text, "--shape", "NAME=N,N")
        if name not in made:
            raise ValueError(f"--shape must name a vector of --vector, got {name}")
        made[name]["shape"] = numbers.split(",")
    return made


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option} takes {form}, got '{text}'")
    return name, value


def _sentences(summary: Any, out: Path) -> Iterator[str]:
    columns = ", ".join(f"{name} ({type_})" for name, type_ in summary.columns.items())
    yield f"{summary.rows:,} examples in {out}: {summary.pool_files} file(s), {summary.bytes / 1e6:.1f} MB; columns {columns}."
    yield (
        f"Read {summary.records:,} records from {summary.files:,} file(s); left out {summary.duplicates:,} duplicate(s) "
        f"and {summary.bad:,} bad record(s)."
    )
    if summary.first_bad:
        first = summary.first_bad
        line = "" if first["line"] is None else f" line {first['line']:,}"
        yield f"Bad records are in {out / '_dead_letters.jsonl'}, the first: {first['file']}{line}: {first['error']}"


def watch_directory(settings: Any, directory: Path, flags: list[str]) -> None:
    """Label what arrives in a directory; the part of `label` behind `--watch`."""
    from distilbeam.pipelines.engine.beam_options import pipeline_options
    from distilbeam.pipelines.jobs.labelling import opened_job
    from distilbeam.pipelines.jobs.watch import watch
    from distilbeam.storage.paths import is_remote

    if is_remote(settings.run.directory) or directory.parts[:1] in (("gs:",), ("s3:",)):
        raise ValueError(
            f"--watch needs a directory that files arrive in and a run.directory on a file system, got {directory} and "
            f"{settings.run.directory}; label an object store's pool without it, every so often"
        )
    display, options = Display(console), pipeline_options(flags)
    signal.signal(signal.SIGINT, stop_at_once)
    with opened_job(settings) as job:
        totals = watch(job, directory, options, display)
    sentences = [
        f"{totals['windows']:,} window(s), {totals['files']:,} file(s), {totals['rows']:,} rows: {totals['labelled']:,} "
        f"labelled, {totals['failed']:,} failed; {totals['passed_over']:,} file(s) passed over"
    ]
    if totals["unreadable"]:
        sentences.append(f"Never whole: {', '.join(totals['unreadable'][:5])}; they are taken when they are")
    for sentence in (*sentences, f"Labels: {job.dataset}"):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
