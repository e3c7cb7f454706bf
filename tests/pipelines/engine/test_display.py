"""The display where the output is a file: whole tables and whole lines, whatever the width of a terminal elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from problem import SUPPORT

ROOT = Path(__file__).resolve().parents[3]
COST = {
    "rows_labelled": 4_000_000_000,
    "seconds": 12_345.6,
    "teacher_calls": 3_999_999_999,
    "dead_letters": 1_234_567,
    "retried": 7_654_321,
    "bytes_written": 98_765_432_100_000,
    **{f"{name}_s": 1_234_567.8 for name in ("read", "score", "teacher", "encode", "write")},
}
TABLES = {
    "work": (
        f"from distilbeam.pipelines.jobs.work_log import work_table as table\nprinted = table({{'label': {COST!r}}})",
        ["4,000,000,000", "3,999,999,999", "98,765,432.1", "1234567.8", "7,654,321"],
    ),
    "exports": (
        "from distilbeam.pipelines.report.tables import EXPORT_COLUMNS, console_table\n"
        "printed = console_table('t' * 300, EXPORT_COLUMNS, [['x' * 90] * len(EXPORT_COLUMNS)])",
        ["t" * 300, "x" * 90],
    ),
    "pareto": (
        "from distilbeam.pipelines.report.tables import PARETO_COLUMNS, console_table\n"
        "printed = console_table('t', PARETO_COLUMNS, [['x' * 90] * len(PARETO_COLUMNS)])",
        ["x" * 90],
    ),
    "a soft-label dataset": (
        "from pathlib import Path\n"
        "from distilbeam.teacher.softlabels import SoftLabelSpec\n"
        "from distilbeam.teacher.softlabels.inspect import Inspection, Sample\n"
        "sample = Sample('i' * 120, (('c' * 120, 0.5),))\n"
        "printed = Inspection(Path('/labels'), SoftLabelSpec(num_classes=2), 1, 4_000_000_000, 9, {'k' * 120: 1.0}, "
        "(1,) * 10, 10, (sample,))",
        ["4,000,000,000", "i" * 120, "c" * 120, "k" * 120],
    ),
}


def printed(code: str) -> str:
    """Run a program whose output is a pipe, in a terminal of 80 columns."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    environment |= {"COLUMNS": "80", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_file_is_as_wide_as_what_is_in_it(name: str) -> None:
    make, cells = TABLES[name]
    show = "from distilbeam.pipelines.cli.options import console\nconsole.print(printed)"
    text = printed(f"{make}\n{show}")
    assert "…" not in text
    words = re.sub(r"[^\S\n]*[│┃][^\S\n]*", " ", text)
    for cell in cells:
        assert cell in words, text
    assert max(map(len, text.splitlines())) < 5_000, "no line is filled up to a width that there is not"


def test_a_log_line_in_a_file_is_one_line() -> None:
    sentence = "word " * 60 + "end"
    text = printed(
        "import logging\n"
        "from distilbeam.pipelines.cli.options import console\n"
        "from distilbeam.pipelines.engine.display import configure_logs\n"
        "configure_logs('warning', console)\n"
        f"logging.getLogger('distilbeam.phases').warning({sentence!r})\n"
    )
    (line,) = text.splitlines()
    assert line.endswith(f"WARNING  {sentence}")


def test_no_command_has_a_console_of_its_own() -> None:
    assert [
        path for path in (ROOT / "pipelines").rglob("*.py") if re.search(r"(?<!plain_)\bConsole\(", path.read_text())
    ] == [ROOT / "pipelines" / "engine" / "display.py"]
