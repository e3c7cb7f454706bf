"""Tables whose titles, headers and cells are shown as they are: a name such as `[pos]` or `:x:` is no markup; and those of inspections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

_BAR_WIDTH = 40


class PlainTable(Table):
    """A rich table that takes text literally, whatever console shows it; its arguments are those of `rich.table.Table`."""

    def __init__(self, *headers: str, title: str | None = None, **options: Any) -> None:
        style = options.get("title_style") or "table.title"
        super().__init__(title=None if title is None else Text(title, style), **options)
        for header in headers:
            self.add_column(header)

    def add_column(self, header: RenderableType = "", *arguments: Any, **options: Any) -> None:
        """Add a column; see `rich.table.Table`."""
        super().add_column(_literal(header), *arguments, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row; see `rich.table.Table`."""
        super().add_row(*(None if cell is None else _literal(cell) for cell in cells), **options)


def facts_table(title: str, facts: Mapping[str, str]) -> PlainTable:
    """Show names and what is said of each."""
    table = PlainTable(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def bytes_table(each: str, sizes: Mapping[str, float], digits: int) -> PlainTable:
    """Show the bytes of each column per row or label (`each`), the largest first, with so many digits."""
    table = PlainTable("column", f"bytes per {each}", title="Columns", title_justify="left")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{size:,.{digits}f}")
    return table


def confidence_table(title: str, counted: str, counts: Sequence[int]) -> PlainTable:
    """Show how many of what is `counted` have their largest probability in each of equal parts of [0, 1]."""
    table = PlainTable("largest probability", counted, "", title=title, title_justify="left")
    bins, most = len(counts), max(1, *counts)
    for i, count in enumerate(counts):
        bar = "█" * round(_BAR_WIDTH * count / most)
        table.add_row(f"{i / bins:.2f} to {(i + 1) / bins:.2f}", f"{count:,}", bar)
    return table


def _literal(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell
