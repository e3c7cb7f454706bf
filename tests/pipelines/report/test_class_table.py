"""The table of classes on a console of 80 columns: long names take more lines, and no figure is cut."""

from __future__ import annotations

import io

from rich.console import Console

from distilbeam.pipelines.report.tables import CLASS_COLUMNS, class_rows, class_table, console_table

LONG = "what_can_i_ask_you_about_the_transfer_of_money_between_accounts_abroad"


def shown(width: int) -> list[str]:
    classes = [
        {"class": LONG, "examples": 1234, "recall": 0.123, "precision": 0.456, "f1": 0.194},
        {"class": "balance", "examples": 30, "recall": 1.0, "precision": None, "f1": None},
    ]
    worst = [
        {
            "class": LONG,
            "mistaken_for": [{"class": f"another_class_with_a_long_name_{i}", "examples": i} for i in (7, 5)],
        }
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(console_table("Classes", CLASS_COLUMNS, class_rows(classes, worst)))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_no_figure_is_cut_at_80_columns() -> None:
    lines = shown(80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for figure in ("1,234", "12.3%", "45.6%", "19.4%", "100.0%", "examples", "precision"):
        assert figure in text
    assert "…" not in text
    parts = [line[:14].rstrip() for line in lines]
    assert "balance" in " ".join(parts)


def test_where_there_is_room_a_class_has_a_line() -> None:
    assert [line.split()[0] for line in shown(220) if "%" in line] == [LONG, "balance"]


def test_of_many_classes_a_terminal_shows_those_with_the_lowest_recall() -> None:
    classes = [
        {"class": f"class_{i:02d}", "examples": 10, "recall": (i * 7 % 30) / 30, "precision": 0.5, "f1": 0.5}
        for i in range(30)
    ]

    def lines(count: int) -> list[str]:
        console = Console(file=io.StringIO(), width=120)
        console.print(class_table(classes[:count], []))
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    printed = lines(30)
    assert printed[0].rstrip() == "20 of 30 classes, the lowest recall first"
    named = [line.split()[0] for line in printed if " class_" in line]
    assert named == [row["class"] for row in sorted(classes, key=lambda row: row["recall"])[:20]]
    printed = lines(20)
    assert printed[0].rstrip() == "Classes, the lowest recall first"
    assert sum(" class_" in line for line in printed) == 20
