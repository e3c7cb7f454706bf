"""Pages of the manual that are made from the code while it is built: every setting, every command, the public names.

Nothing of them is stored, so that nothing of them can be out of date. This needs no MkDocs; `manual.py` hands the pages to it.
"""

from __future__ import annotations

from pathlib import Path

import typer.main

import distilbeam
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.cli.settings import by_section, file_words, files_of, said_of_sections, setting_files
from distilbeam.setting_docs import Setting, together

ROOT = Path(__file__).resolve().parents[2]
PARTS = {  # in the order of the manual
    "pipelines": "The run, and PTransforms for pipelines of your own.",
    "student": "Students: loading soft labels, training, prediction.",
    "teacher": "Teachers, and the soft-label format.",
    "selection": "Which examples to buy, and how far to trust their labels.",
    "kernels": "Losses and low-precision layers.",
}


def settings_page() -> str:
    """Write the page of all settings, in Markdown."""
    files = setting_files()
    said = said_of_sections(files)
    lines = [
        "# Settings",
        "",
        "Every setting of every file, made from the code; `distilbeam settings [SECTION]` prints the same. Any of them can be",
        "given on the command line: `--set section.key=value`. A part of a name in capitals is a name of your own.",
        "",
    ]
    for (section, kind), settings in by_section(together(files)).items():
        of_kind = f', kind = "{kind}"' if kind else ""
        names = files_of(settings)
        lines += [f"## [{section}]{of_kind}", "", f"{_plain(said[section, kind])} *{file_words(names)}.*", ""]
        lines += ["| setting | type and default | what it means |", "|---|---|---|"]
        lines += [_row(setting, names) for setting in settings]
        lines.append("")
    return "\n".join(lines) + "\n"


def _row(setting: Setting, of_section: tuple[str, ...]) -> str:
    default = "**must be given**" if setting.required else f"`{setting.default}`"
    allowed = f"<br>Allowed: {_plain(setting.allowed)}." if setting.allowed else ""
    where = "" if setting.files == of_section else f"<br>*{file_words(setting.files)}.*"
    return f"| `{setting.name}` | {setting.type}<br>{default} | {_plain(setting.sentence)}{allowed}{where} |"


def _plain(text: str) -> str:
    """Keep Markdown from reading signs in a sentence that is no Markdown; what stands in backticks stays."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        for sign in "\\*_|<>[]":
            parts[place] = parts[place].replace(sign, f"\\{sign}")
    return "`".join(part.replace("|", "\\|") if place % 2 else part for place, part in enumerate(parts))


def commands_page() -> str:
    """Write the page of all commands, in Markdown, from what `--help` prints."""
    group = typer.main.get_command(app)
    context = group.make_context("distilbeam", [], resilient_parsing=True)
    lines = [
        "# Commands",
        "",
        "Every command and option, made from the code; `distilbeam COMMAND --help` prints the same. What fails is one sentence on",
        "standard error; exit status 2 means wrong input, 1 work that failed, 130 stopped. `--debug` shows the traceback.",
        "Beam's own options follow `--`; one that Beam does not know is an error.",
        "",
    ]
    for name in group.list_commands(context):  # type: ignore[attr-defined]  # the app has several: it is a group
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(inner))
        lines += [f"## {name}", "", _plain(" ".join((command.help or "").split())), "", "```"]
        lines += [f"distilbeam {name} {usage}", "```", "", "| option | what it does |", "|---|---|"]
        for parameter in command.get_params(inner):
            if (record := parameter.get_help_record(inner)) is not None:
                lines.append(f"| `{record[0]}` | {_plain(' '.join(record[1].split()))} |")
        lines.append("")
    return "\n".join(lines)


def api_page(part: str) -> str:
    """Write the page of a part's public names, in Markdown that mkdocstrings fills."""
    lines = [f"# distilbeam.{part}", "", PARTS[part], ""]
    names = distilbeam.public_names(ROOT / part / "__init__.pyi")
    lines += [f"Names: {', '.join(f'`{name}`' for name in sorted(names))}.", ""]
    for name, source in sorted(names.items(), key=lambda item: (item[1], item[0])):
        module = f"distilbeam.{part}{source}" if source.startswith(".") else source
        lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Make all of them.

    Returns:
      Path under docs/ -> Markdown.
    """
    made = {"reference/settings.md": settings_page(), "reference/commands.md": commands_page()}
    return made | {f"reference/{part}.md": api_page(part) for part in PARTS}
