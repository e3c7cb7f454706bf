"""The command that says what can be set: `settings`."""

from __future__ import annotations

import difflib
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from pydantic import BaseModel

from distilbeam.pipelines.cli.options import DebugOption, console
from distilbeam.pipelines.engine.display import Display
from distilbeam.setting_docs import Setting, sections_of, together


def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            help="A section (training, student.input), or one setting (training.lr); all if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead, an object for each.")] = False,
    debug: DebugOption = False,  # noqa: ARG001  # read from the arguments, where an error finds it
) -> None:
    """Print every setting: its type, default, allowed values and what it means."""
    with Display(console).waiting("loading"):
        files = setting_files()
    found = chosen(together(files), section)
    if as_json:
        print(json.dumps([asdict(setting) for setting in found], indent=2, ensure_ascii=False))
        return
    width = min(shutil.get_terminal_size().columns, 100)
    for line in setting_lines(found, said_of_sections(files), width):
        console.print(line, soft_wrap=True)


def setting_files() -> dict[str, type[BaseModel]]:
    """Give the classes of all files of settings, by what a file is called."""
    from distilbeam.pipelines.config import LabelConfig, RunConfig, TokenRunConfig
    from distilbeam.pipelines.corpus.settings import CorpusOptions
    from distilbeam.pipelines.ingest.settings import IngestOptions
    from distilbeam.student.language.config import TokenLaunchConfig
    from distilbeam.student.training.launch import LaunchConfig  # torch takes seconds to import

    ingest = type("IngestFile", (BaseModel,), {"__annotations__": {"ingest": IngestOptions}})
    corpus = type("CorpusFile", (BaseModel,), {"__annotations__": {"corpus": CorpusOptions}})
    return {
        "run": RunConfig,
        "run of a language model": TokenRunConfig,
        "labelling job": LabelConfig,
        "training": LaunchConfig,
        "language model training": TokenLaunchConfig,
        "ingest": ingest,
        "ingest of lm and chat": corpus,
    }


def said_of_sections(files: Mapping[str, type[BaseModel]]) -> dict[tuple[str, str], str]:
    """Give what the class of each section and kind says of it, where several files have it the first one's."""
    said: dict[tuple[str, str], str] = {}
    for model in files.values():
        for section, kind, sentence in sections_of(model):
            said.setdefault((section, kind), sentence)
    return said


def chosen(every: Sequence[Setting], name: str | None) -> list[Setting]:
    """Choose the settings of a section and of those inside it, or the one of that name.

    Raises:
      ValueError: there is neither.
    """
    if name is None:
        return list(every)
    wanted = name.strip("[]")
    found = [
        setting
        for setting in every
        if wanted in (setting.section, setting.dotted) or setting.section.startswith(f"{wanted}.")
    ]
    if not found:
        names = dict.fromkeys(part for setting in every for part in (setting.section, setting.dotted))
        same = list(dict.fromkeys(setting.dotted for setting in every if setting.name == wanted))
        near = same or difflib.get_close_matches(wanted, names, n=1, cutoff=0.7)
        sections = ", ".join(dict.fromkeys(setting.section.partition(".")[0] for setting in every))
        raise ValueError(
            f"{name} is no section and no setting; "
            + (f"did you mean {' or '.join(near[:3])}?" if near else f"the sections are {sections}")
        )
    return found


def by_section(found: Sequence[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Gather settings by section and kind, in the order in which these are first met."""
    gathered: dict[tuple[str, str], list[Setting]] = {}
    for setting in found:
        gathered.setdefault((setting.section, setting.kind), []).append(setting)
    return gathered


def files_of(found: Sequence[Setting]) -> tuple[str, ...]:
    """Give the files that have any of some settings."""
    return tuple(dict.fromkeys(name for setting in found for name in setting.files))


def file_words(names: Sequence[str]) -> str:
    """Say what files have something, as in "Run, labelling job"."""
    words = ", ".join(names)
    return words[:1].upper() + words[1:]


def setting_lines(found: Sequence[Setting], said: Mapping[tuple[str, str], str], width: int) -> Iterator[str]:
    """Write settings as text of a width, a heading for each section.

    Args:
      found: the settings.
      said: section and kind -> what is said of them.
      width: most characters of a line, where a word allows it.

    Yields:
      Lines.
    """
    for place, ((section, kind), settings) in enumerate(by_section(found).items()):
        if place:
            yield ""
        files = files_of(settings)
        of_kind = f' kind = "{kind}"' if kind else ""
        yield f"[{section}]{of_kind}"
        yield from textwrap.wrap(f"{said.get((section, kind), '')} ({file_words(files)}.)", width)
        for setting in settings:
            yield f"  {setting.name}{_value(setting)}"
            more = [f"Allowed: {setting.allowed}."] * bool(setting.allowed)
            more += [f"{file_words(setting.files)}."] * (setting.files != files)
            for text in (setting.sentence, *more):
                indent = " " * 6
                yield from textwrap.wrap(
                    text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
                )


def _value(setting: Setting) -> str:
    return f": {setting.type}, " + ("must be given" if setting.required else f"default {setting.default}")
