"""Names with brackets, slashes and colons are printed as they are, by every table, line and help text."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from distilbeam.pipelines.engine.display import Display, plain_console
from distilbeam.pipelines.forecast.rates import Forecast, Line, forecast_table
from distilbeam.pipelines.report.tables import CLASS_COLUMNS, class_rows, console_table
from distilbeam.pipelines.sections import PricesSection
from distilbeam.teacher.softlabels.plain_table import PlainTable

NAMES = ["[pos]", "[/INST]", "[bold]loud[/bold]", ":smile:", r"back\[slash", "\\"]


def shown(console: Console | None = None, *things: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False) if console is None else console
    for thing in things:
        console.print(thing)
    return out.getvalue()


def test_tables_show_names_literally_on_any_console() -> None:
    rows = [{"class": name, "examples": 3, "recall": 0.5, "precision": None, "f1": None} for name in NAMES]
    worst = [{"class": name, "mistaken_for": [{"class": "[neg]", "examples": 2}]} for name in NAMES]
    text = shown(None, console_table("On [x].parquet", CLASS_COLUMNS, class_rows(rows, worst)))
    assert all(name in text for name in (*NAMES, "[neg] 2", "On [x].parquet"))
    forecast = Forecast((Line("label [/x]", 1, 1, 1),), 1, 0, PricesSection())
    assert "label [/x]" in shown(None, forecast_table(forecast))
    table = PlainTable("[header]", title="[title]")
    table.add_row("[/cell]")
    assert all(name in shown(None, table) for name in ("[header]", "[title]", "[/cell]"))


@pytest.mark.parametrize("name", NAMES)
def test_lines_show_names_literally(name: str) -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=200, force_terminal=True, legacy_windows=False))
    with display.step(f"evaluate {name}") as progress:
        progress.step(1, 2, f"loss of {name}")
    with display.waiting(f"loading {name}"):
        pass
    display.say(f"a sentence about {name}")
    assert f"evaluate {name}" in out.getvalue()
    assert f"a sentence about {name}" in out.getvalue()


def test_the_command_lines_console_does_too() -> None:
    console = plain_console()
    console.file = io.StringIO()
    console.width = 200
    console.print(f"Wrote {NAMES}")
    assert console.file.getvalue() == f"Wrote {NAMES}\n"


def test_help_texts_and_errors_of_the_command_line() -> None:
    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        code = "from distilbeam.pipelines.cli.main import main; main()"
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)

    for command in ("serve-teacher", "verify", "evaluate"):
        assert "[teacher]" in cli(command, "--help").stdout
    missing = cli("run", "x[/INST].toml")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: no configuration file at x[/INST].toml;")
    assert "[/INST]" in cli("evaluate", "x", "--[/INST]").stderr
