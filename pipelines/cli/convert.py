"""The command `convert`: token labels from and to the data sets of other trainers of language models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distilbeam.pipelines.cli.options import DebugOption, console
from distilbeam.pipelines.engine.display import Display, configure_logs

if TYPE_CHECKING:
    from distilbeam.pipelines.conversion.importing import Converted

_ALIGNMENTS = ("auto", "own", "next")


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="With --from: files, directories or glob patterns of JSON lines, Parquet or Arrow. With --to: token labels.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write: token labels with --from, Parquet files with --to.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORM",
            help="axolotl, distillkit, or lists (columns input_ids, token_ids and logprobs of lists).",
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="FORM", help="axolotl.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="--from: folder of the teacher's tokenizer.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="--from: tokens of a block; several rows share one, each a segment.")
    ] = None,
    alignment: Annotated[
        str,
        typer.Option(
            help="Which token list j describes: 'own' (token j) or 'next' (token j + 1). auto: --from looks into the data, --to "
            "writes 'next'."
        ),
    ] = "auto",
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="--from: classes to keep; the fewest of a list without it.")
    ] = None,
    teacher: Annotated[str, typer.Option(help="--from: name of the teacher, for the labels to say.")] = "",
    temperature: Annotated[
        float, typer.Option(help="--from: what the teacher's logits were divided by, for the labels to say.")
    ] = 1.0,
    compression: Annotated[
        str | None,
        typer.Option(
            help="--from distillkit: the YAML file of its logprob_compressor; the compression_config.yaml beside each file."
        ),
    ] = None,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Make token labels of log-probabilities that were prepared for another trainer, or such a data set of token labels."""
    configure_logs("warning", console)
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"--alignment must be one of {', '.join(_ALIGNMENTS)}, got {alignment}")
    if (from_ is None) == (to is None):
        raise ValueError("one of --from and --to must be given: --from axolotl, distillkit or lists, or --to axolotl")
    if to is not None:
        _write_axolotl(sources, out, to, alignment)
        return
    from distilbeam.pipelines.conversion.rows import FORMS

    form = next((one for one in FORMS if one == from_), None)
    if form is None:
        raise ValueError(f"--from must be one of {', '.join(FORMS)}, got {from_}")
    if compression is not None and form != "distillkit":
        raise ValueError(f"--compression is for --from distillkit, got --from {form}")
    if tokenizer is None or sequence_length is None:
        raise ValueError("--tokenizer and --sequence-length must be given with --from")
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.conversion.alignment import ALIGNMENTS
        from distilbeam.pipelines.conversion.importing import ConvertOptions, convert_labels
        from distilbeam.storage.paths import to_path
    chosen = next((one for one in ALIGNMENTS if one == alignment), None)
    options = ConvertOptions(form, tokenizer, sequence_length, chosen, k, teacher, temperature, compression)
    for sentence in _sentences(convert_labels(sources, to_path(out), options, Display(console)), out):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _write_axolotl(sources: list[str], out: str, to: str, alignment: str) -> None:
    if to != "axolotl":
        raise ValueError(f"--to must be axolotl, got {to}")
    if len(sources) != 1:
        raise ValueError(f"--to takes one dataset of token labels, got {len(sources)}")
    from distilbeam.pipelines.conversion.exporting import write_axolotl

    rows, labels = write_axolotl(sources[0], Path(out), "own" if alignment == "own" else "next", Display(console))
    console.print(
        f"Wrote {out}: {rows:,} row(s) with {labels:,} labels; the mass of the other tokens has no place in this form.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _sentences(found: Converted, out: str) -> Iterator[str]:
    counts, length, evidence = found.counts, found.spec.sequence_length or 0, found.evidence
    padding = 1 - counts["tokens"] / (found.blocks * length)
    yield (
        f"{found.blocks:,} blocks of {length:,} tokens in {out}: {counts['rows']:,} row(s) of {found.files:,} file(s), {found.made:,} "
        f"of which were read now; {counts['labels']:,} labels of {found.spec.k} classes, {padding:.1%} padding."
    )
    yield (
        f"Lists describe {'their own token' if found.alignment == 'own' else 'the next token'}: the token is among the classes in "
        f"{evidence.share('own'):.2f} (own) and {evidence.share('next'):.2f} (next)."
    )
    if counts["empty"]:
        yield f"{counts['empty']:,} row(s) without a label are left out."
    if counts["unknown"]:
        yield f"{counts['unknown']:,} label(s) do not say the log-probability of the token that is there (NaN)."
    if counts["whole"]:
        yield (
            f"{counts['whole']:,} label(s) leave nothing for other tokens: where their log-probabilities were normalised over the "
            "kept ones, the teacher's own are lost; convert them from before that where there are such."
        )
