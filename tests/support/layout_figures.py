"""Figures of the layout: files, rooms, arrows, lines, long functions, comments. `python tests/support/layout_figures.py [ROOT]`.

ROOT is another checkout to be counted the same way, such as an older one.

* at the top: modules that lie beside the folders of a part
* arrows: pairs of rooms of which one imports the other, see `arrows.py`; backward: those that close a circle
* lines: of all modules, blank ones included
* long functions: with more than 40 lines, from `def` to the end, decorators left out and docstrings counted; and without docstrings
* comments: lines with a comment that is no instruction to a tool, as a share of the lines that are not blank
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

import arrows

LONG = 40
TOOLS = ("# noqa", "# type:", "# ruff:", "# pragma", "#!")


def backward(pairs: set[tuple[str, str]]) -> int:
    """Count the arrows between rooms that reach each other in both directions."""
    reach = {a: {b for x, b in pairs if x == a} for a, _ in pairs}
    for _ in reach:
        reach = {a: there | {c for b in there for c in reach.get(b, ())} for a, there in reach.items()}
    return sum(a in reach.get(b, ()) for a, b in pairs)


def lengths(tree: ast.AST) -> list[tuple[int, int]]:
    """Measure each function: its lines with and without its docstring."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            said = ast.get_docstring(node) is not None
            found.append((lines, lines - ((first.end_lineno or 0) - first.lineno + 1 if said else 0)))
    return found


def comments(text: str) -> int:
    """Count the lines with a comment for readers."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and not t.string.startswith(TOOLS) for t in tokens)


def main() -> None:
    """Print a line for each part."""
    arrows.ROOT = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else arrows.ROOT
    words = ("at the top", "rooms", "arrows", "backward", "modules", "lines", "long", "without docstring", "functions")
    print(f"{'':<11}" + "".join(f"{word:>{len(word) + 2}}" for word in words) + "  comments")
    for part in ("distilbeam", *arrows.PARTS):
        paths = sorted((arrows.ROOT / part).rglob("*.py"))
        texts = [path.read_text() for path in paths]
        measured = [length for text in texts for length in lengths(ast.parse(text))]
        pairs = set() if part == "distilbeam" else set(arrows.arrows(part))
        full = sum(bool(line.strip()) for text in texts for line in text.splitlines())
        figures = (
            len(list((arrows.ROOT / part).glob("*.py"))),
            len(set(arrows.rooms(part).values())),
            len(pairs),
            backward(pairs),
            len(paths),
            sum(len(text.splitlines()) for text in texts),
            sum(whole > LONG for whole, _ in measured),
            sum(bare > LONG for _, bare in measured),
            len(measured),
        )
        row = "".join(f"{figure:>{len(word) + 2},}" for figure, word in zip(figures, words, strict=True))
        print(f"{part:<11}{row}  {sum(map(comments, texts)) / full:8.1%}")


if __name__ == "__main__":
    main()
