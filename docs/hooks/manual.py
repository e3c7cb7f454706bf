"""MkDocs' hooks: pages made from the code, documents that lie beside the code, and links between them.

`deploy/README.md` and the like stay where a reader of the repository looks for them and are pages of the manual too. A link
that leads to one of them, or to a picture, is followed; one that leads to any other file of the repository becomes its path.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # for as long as MkDocs reads this file

from reference_pages import PARTS, pages  # noqa: E402

DOCUMENTS = {  # in the repository -> in the manual
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "README.md",
    "RESULTS.md": "results.md",
    "deploy/README.md": "operations/deploying.md",
    "examples/README.md": "tutorials/index.md",
    "kernels/README.md": "reference/kernels-measured.md",
    "selection/README.md": "reference/selection-methods.md",
}
_CODE_OR_LINK = re.compile(
    r"^ *```.*?^ *```\s*?$|`[^`\n]+`|(?<!\\)(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def on_config(config: Any) -> Any:
    """Show mkdocstrings the parts as they are installed: `distilbeam.<part>`."""
    installed = Path(tempfile.mkdtemp(prefix="distilbeam-docs-"))
    config.extra["installed"] = str(installed)
    code = shutil.ignore_patterns("__pycache__", "*.pyi", "*.so")
    shutil.copytree(ROOT / "distilbeam", installed / "distilbeam", ignore=code)
    for part in PARTS:  # copied, since links would be followed back to here
        shutil.copytree(ROOT / part, installed / "distilbeam" / part, ignore=code)
        (installed / "distilbeam" / part / "__init__.py").touch()  # without one mkdocstrings looks no further
    for path in (installed / "distilbeam").rglob("*.py"):  # the name by which its examples are shown as code
        path.write_text(path.read_text().replace(" Example:\n", " Examples:\n"))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(installed)]
    return config


on_config.mkdocs_priority = 100  # type: ignore[attr-defined]  # before mkdocstrings reads its own configuration


def on_files(files: Any, config: Any) -> Any:
    """Add what is made from the code, the documents beside it, and the pictures that they show."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for source, name in DOCUMENTS.items():
        if (ROOT / "docs" / name).exists():
            continue
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for name in sorted(pictures()):
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where their targets are in the manual; a page with a program gives it the room of the list of headings."""
    if '--8<-- "examples/' in markdown:
        page.meta["hide"] = ["toc"]
    return with_links(markdown, page.file.src_uri)


def on_post_build(config: Any) -> None:
    """Take away what `on_config` made."""
    shutil.rmtree(config.extra["installed"])


def pictures() -> set[str]:
    """List the pictures outside docs/ that pages show, by their paths in the repository."""
    found = set()
    sources = [ROOT / source for source in DOCUMENTS] + sorted((ROOT / "docs").rglob("*.md"))
    for path in sources:
        if path.exists():
            for target in (match["target"] for match in _CODE_OR_LINK.finditer(path.read_text()) if match["target"]):
                place = _place(path.relative_to(ROOT).as_posix(), target)
                if place.endswith((".png", ".svg")) and not place.startswith("docs/"):
                    found.add(place)
    return found


def with_links(markdown: str, name: str) -> str:
    """Change the links of a page.

    Args:
      markdown: its text.
      name: its path under docs/, or the one that a document beside the code has there.

    Returns:
      The text with links that MkDocs can follow.
    """
    origin = f"docs/{name}"
    if not (ROOT / origin).exists():
        origin = next((source for source, page in DOCUMENTS.items() if page == name), origin)

    def change(match: re.Match[str]) -> str:
        image, text, target = match["image"], match["text"], match["target"]
        if re.match(r"[a-z+]+:|#", target):
            return match.group()
        path, hash_, anchor = target.partition("#")
        place = _place(origin, path)
        if image:
            page = place.removeprefix("docs/") if place.startswith("docs/") else f"pictures/{place}"
        else:
            page = place.removeprefix("docs/") if place.startswith("docs/") else DOCUMENTS.get(place, "")
        if not page:  # a file of the repository that is no page
            return (
                text
                if text.strip("`") == place
                else f"{text} (`{place}`)"
                if text.strip("`") not in place
                else f"`{place}`"
            )
        relative = posixpath.relpath(page, posixpath.dirname(name) or ".")
        return f"{image}[{text}]({relative}{hash_}{anchor})"

    # code is passed over, but not the code that is the text of a link
    return _CODE_OR_LINK.sub(lambda match: match.group() if match["target"] is None else change(match), markdown)


def _place(origin: str, target: str) -> str:
    """Give the path in the repository that a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target.partition("#")[0]))
