"""The map: every folder says what is in it, and what is said is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("distilbeam", "pipelines", "selection", "student", "teacher", "kernels")
OTHERS = ("benchmarks", "deploy", "docs", "examples", "tests")
LISTED = (
    "distilbeam",
    "pipelines",
    "selection",
    "student",
    "teacher",
    "benchmarks",
    "examples",
)  # kernels' rooms share one layout


def folders(*tops: str) -> Iterator[Path]:
    """The folders with modules, the top ones first."""
    for top in tops:
        yield ROOT / top
        yield from sorted({path.parent for path in (ROOT / top).rglob("*.py")} - {ROOT / top})


def map_of(folder: Path) -> str:
    """What a folder says of itself: its package docstring and its README."""
    package, readme = folder / "__init__.py", folder / "README.md"
    said = ast.get_docstring(ast.parse(package.read_text())) if package.exists() else None
    return "\n".join([said or "", readme.read_text() if readme.exists() else ""]).strip()


def named(folder: Path) -> str:
    return folder.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("folder", [*folders(*PARTS), *(ROOT / name for name in OTHERS)], ids=named)
def test_a_folder_says_what_it_is(folder: Path) -> None:
    assert len(map_of(folder).split()) >= 8, f"{named(folder)} needs a README.md of ten lines, or a package docstring"


@pytest.mark.parametrize("folder", [f for f in folders(*LISTED) if f.name != "__pycache__"], ids=named)
def test_every_module_has_its_place_on_the_map(folder: Path) -> None:
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    text = map_of(folder)
    missing = sorted(name for name in modules if not re.search(rf"\b{name}\b", text))
    assert missing == [], f"the docstring or README.md of {named(folder)} does not name {', '.join(missing)}"


@pytest.mark.parametrize("folder", [f for f in folders(*PARTS) if "Read in this order:" in map_of(f)], ids=named)
def test_the_order_of_reading_names_what_is_there(folder: Path) -> None:
    order = map_of(folder).partition("Read in this order:")[2].partition("\nImports:")[0]
    words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", order))  # with an underscore: no plain English
    modules = {path.stem for path in folder.glob("*.py")}
    assert words <= modules | {"make_input"}, f"{named(folder)} names modules that it has not"


@pytest.mark.parametrize("part", ["pipelines", "student", "teacher", "selection", "kernels"])
def test_the_readme_of_a_part_leads_to_its_rooms(part: str) -> None:
    text = (ROOT / part / "README.md").read_text()
    rooms = sorted(path.parent.name for path in (ROOT / part).glob("*/__init__.py"))
    assert [room for room in rooms if not re.search(rf"\b{room}\b", text)] == []


PAGES = [*ROOT.glob("*.md"), *(page for top in (*PARTS, *OTHERS) for page in sorted((ROOT / top).rglob("*.md")))]


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in page.parts], ids=named)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []
