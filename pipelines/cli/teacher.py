"""The commands about soft labels: `inspect`, `verify`, `to-dataset`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from distilbeam.pipelines.cli.options import JsonOption, console, give_json, json_apart
from distilbeam.pipelines.engine.display import configure_logs

DatasetArgument = Annotated[
    str, typer.Argument(help="A soft-label dataset, such as run/labels/round=000 or s3://bucket/job/labels.")
]


def inspect(
    path: DatasetArgument,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of rows.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Labels of tokens: folder of their tokenizer; the labelling job's teacher without it."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Show what a soft-label dataset is: its specification, shards, sizes, the teacher's confidence, some rows."""
    configure_logs("warning", console)
    from distilbeam.teacher.softlabels import read_manifest
    from distilbeam.teacher.softlabels.inspect import inspect_labels

    if read_manifest(path).spec.unit == "token":
        from distilbeam.pipelines.jobs.label_text import decoder_of
        from distilbeam.teacher.softlabels.inspect_tokens import inspect_token_labels

        console.print(inspect_token_labels(path, decoder_of(path, tokenizer), samples=samples, seed=seed))
        return
    if tokenizer is not None:
        raise ValueError(f"--tokenizer is for labels of tokens, {path} holds labels of examples: leave it out")
    console.print(inspect_labels(path, samples=samples, seed=seed))


def verify(
    path: DatasetArgument,
    teacher: Annotated[
        Path | None, typer.Option(help="TOML file with a [teacher] section: label a random sample again and compare.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Rows to label again; 256, or 16 blocks of tokens, without it.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference of a probability that is no problem.")
    ] = 2e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many rows the teacher would be asked about; ask nobody.")
    ] = False,
    json_file: JsonOption = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Check a soft-label dataset against its manifest; exit status 1 where something is wrong."""
    with json_apart(json_file):
        configure_logs("warning", console)
        _verify(path, teacher, sample, tolerance, seed, dry_run, json_file)


def _verify(
    path: str,
    teacher: Path | None,
    sample: int | None,
    tolerance: float,
    seed: int,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    from distilbeam.teacher.config import labels_tokens, read_teacher_config
    from distilbeam.teacher.load import load_teacher
    from distilbeam.teacher.softlabels import read_manifest
    from distilbeam.teacher.softlabels.verify import verify_labels
    from distilbeam.teacher.softlabels.verify_tokens import wanted_form

    if dry_run and teacher is None:
        raise ValueError("--dry-run is for --teacher: without a teacher nobody is asked; leave it out")
    with ExitStack() as stack:
        asked = complete = None
        if teacher is not None:
            from distilbeam.pipelines.jobs.pool_rows import with_read_columns

            told = read_teacher_config(teacher)
            spec = read_manifest(path).spec
            if labels_tokens(told) != (spec.unit == "token"):
                raise ValueError(
                    f"--teacher: {path} holds labels of unit '{spec.unit}', a teacher of kind {told.kind!r} makes others; give the "
                    "configuration that they were made with"
                )
            form = wanted_form(spec, served=told.kind != "causal_lm") if spec.unit == "token" else None
            if dry_run:
                _say_what_is_asked(path, sample or (256 if form is None else 16), "rows" if form is None else "blocks")
                return
            asked = load_teacher(told, classes=spec.classes, form=form)
            sample = sample or (256 if form is None else 16)
            stack.callback(asked.close)
            complete = partial(with_read_columns, dataset=path, config=teacher, columns=told.input.columns)
        result = verify_labels(path, asked, sample=sample or 256, tolerance=tolerance, seed=seed, complete=complete)
    if teacher is not None:
        from distilbeam.pipelines.jobs.pool_check import pool_problems

        result = replace(result, problems=(*result.problems, *pool_problems(teacher, path)))
    give_json(json_file, result.to_json())
    console.print(result)
    if not result.ok:
        raise typer.Exit(1)


def _say_what_is_asked(path: str, sample: int, unit: str) -> None:
    from distilbeam.teacher.softlabels import read_manifest

    there = sum(entry.rows for entry in read_manifest(path).entries)
    console.print(
        f"The teacher would be asked about {min(sample, there):,} of the {there:,} {unit} of {path}; nothing was asked.",
        soft_wrap=True,
    )


def to_dataset(
    place: Annotated[
        str,
        typer.Argument(metavar="LABELS", help="A soft-label dataset, or the directory of a run or a labelling job."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of Parquet files to write; must not be there yet.")],
    id_column: Annotated[
        str | None,
        typer.Option(
            "--id", help="Name of the column with the ids; data.id of the run or the job, else example_id, without it."
        ),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="What the names of the added columns label, label_name and confidence begin with.")
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Write soft labels with each row's class, its name and its confidence, for datasets.load_dataset and others."""
    configure_logs("warning", console)
    from distilbeam.pipelines.jobs.labels_of_place import id_of, ids_of_sets, splits_of
    from distilbeam.teacher.softlabels import write_dataset

    splits = splits_of(place)
    rows = write_dataset(splits, out, id_column or id_of(place), prefix, ids_of_sets(place, splits))
    said = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    console.print(
        f"Wrote {out}: {said} row(s). Next: datasets.load_dataset('{out}')",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
