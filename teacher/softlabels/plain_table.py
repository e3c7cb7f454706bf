"""Tables whose titles, headers and cells are shown as they are: a name such as `[pos]` or `:x:` is no markup."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


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


def _literal(cell: RenderableType) -> RenderableType:
    return Text(cell) if isinstance(cell, str) else cell
