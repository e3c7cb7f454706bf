"""The arrows between the rooms of a part: who imports whom. `python tests/support/arrows.py` lists them.

A room is a folder of a part, or a module that lies beside the folders.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "pipelines", "selection", "student", "teacher")


def rooms(part: str) -> dict[str, str]:
    """Return the room of each module of a part, by the module's dotted name in the part."""
    found = {}
    for path in sorted((ROOT / part).rglob("*.py")):
        inside = path.relative_to(ROOT / part)
        found[".".join(inside.with_suffix("").parts).removesuffix(".__init__")] = inside.with_suffix("").parts[0]
    return found


def imported_names(path: Path) -> Iterator[str]:
    """List what a file imports anywhere, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(part: str) -> Counter[tuple[str, str]]:
    """Count the imports from one room of a part to another."""
    room_of = rooms(part)
    found: Counter[tuple[str, str]] = Counter()
    for name, room in room_of.items():
        path = ROOT / part / Path(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for target in set(imported_names(file)):
            inside = target.removeprefix(f"distilbeam.{part}.")
            while inside and inside not in room_of:
                inside = inside.rpartition(".")[0]
            if target.startswith(f"distilbeam.{part}.") and inside and room_of[inside] != room:
                found[room, room_of[inside]] += 1
    return found


if __name__ == "__main__":
    for part in PARTS:
        print(f"{part}: {len(set(rooms(part).values()))} rooms, {len(arrows(part))} arrows")
        for (source, target), count in sorted(arrows(part).items()):
            print(f"  {source} -> {target} ({count})")
