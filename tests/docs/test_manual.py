"""The manual: its generated pages have everything that the code has, its links lead somewhere, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import distilbeam
from distilbeam.pipelines.cli.settings import setting_files
from distilbeam.setting_docs import together

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manual_hooks", ROOT / "docs/hooks/manual.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_and_command_has_its_line(hooks: ModuleType) -> None:
    made = hooks.pages()
    sections: dict[str, str] = {}
    for name, text in re.findall(r"^## \[(.+?)\](.*?)(?=^## |\Z)", made["reference/settings.md"], re.M | re.S):
        sections[name] = sections.get(name, "") + text  # one for each kind of teacher
    for setting in together(setting_files()):
        assert f"| `{setting.name}` | " in sections[setting.section], setting.dotted
    commands = made["reference/commands.md"]
    out = subprocess.run(
        [sys.executable, "-m", "distilbeam", "--help"], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r"^  ([a-z][a-z-]+) ", out.partition("Commands:")[2], re.M)
    assert {"run", "serve-teacher", "settings"} <= set(names)
    assert re.findall(r"^## (.+)$", commands, re.M) == names
    assert "| `--max-failures " in commands.partition("## run\n")[2].partition("## ")[0]


@pytest.mark.parametrize("part", distilbeam.PARTS)
def test_every_public_name_is_on_the_page_of_its_part(hooks: ModuleType, part: str) -> None:
    shown = re.findall(r"^::: .*\.(\w+)$", hooks.pages()[f"reference/{part}.md"], re.M)
    assert sorted(shown) == sorted(distilbeam.public_names(ROOT / part / "__init__.pyi"))


def test_links_lead_to_where_things_are_in_the_manual(hooks: ModuleType) -> None:
    changed = hooks.with_links(
        "[a](../../deploy/README.md#messages) [b](../security.md) ![c](../../selection/guarantee.png) `[d](../x.md)`\n"
        "[table](../../deploy/crontab) [`deploy/crontab`](../../deploy/crontab) [f](https://x.org/) [g](#here)\n"
        "```\n[h](../y.md)\n```\n",
        "guides/labelling.md",
    )
    assert changed == (
        "[a](../operations/deploying.md#messages) [b](../security.md) ![c](../pictures/selection/guarantee.png) `[d](../x.md)`\n"
        "table (`deploy/crontab`) `deploy/crontab` [f](https://x.org/) [g](#here)\n"
        "```\n[h](../y.md)\n```\n"
    )
    # a document that lies beside the code: its links start there
    assert hooks.with_links("[a](../docs/security.md)", "operations/deploying.md") == "[a](../security.md)"


def test_commands_of_the_manual_are_commands() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "RESULTS.md"]
    out = subprocess.run(
        [sys.executable, "-m", "distilbeam", "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"^  ([a-z][a-z-]+) ", out.partition("Commands:")[2], re.M))
    said = {
        (page.name, name)
        for page in pages
        for block in re.findall(r"```(?:sh)?\n(.*?)```|`([^`\n]+)`", page.read_text(), re.S)
        for name in re.findall(r"^(?:\$ )?distilbeam ([a-z][a-z-]+)\b", "".join(block), re.M)
    }
    assert len(said) > 20
    assert sorted((page, name) for page, name in said if name not in known) == []


def test_settings_of_the_manual_are_settings() -> None:
    every = {setting.dotted for setting in together(setting_files())}
    sections = {name.partition(".")[0] for name in every}
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "deploy/README.md"]
    said = {
        (page.name, f"{section}.{key}")
        for page in pages
        for section, key in re.findall(r"`([a-z]+)\.([a-z_]+(?:\.[a-z_]+)?)(?= = |=|`)", page.read_text())
        if section in sections
    }
    assert len(said) > 30
    known = every | {"engine.log", "student.json"}  # files
    assert sorted((page, name) for page, name in said if name not in known) == []


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra docs; make docs builds it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    page = (tmp_path / "site/reference/selection.html").read_text()
    assert "Compute the entropy of the probabilities" in page
    assert (tmp_path / "site/pictures/selection/guarantee.png").exists()
