"""What a folder that holds no student holds instead, where it can be seen from outside: for the sentence that refuses it."""

from __future__ import annotations

from pathlib import Path


def held_instead(directory: Path) -> str:
    """Say what is there instead of a student, as the end of a sentence about it; nothing where that cannot be told."""
    if directory.is_file():
        return "; it is a file"
    if (directory / "_manifest").is_dir():
        return "; it holds soft labels, which students learn from"
    if (directory / "students").is_dir() and (directory / "config.toml").exists():
        return f"; it is the directory of a run, whose students are in {directory / 'students'}"
    if (directory / "labels" / "_manifest").is_dir():
        return "; it is the directory of a labelling job, which trains no student"
    if (directory / "_predict.json").exists():
        return "; it holds predictions"
    inside = sorted(path.parent for name in ("student.json", "export.json") for path in directory.glob(f"*/{name}"))
    return f"; name one of those inside it, such as {inside[0]}" if inside else ""
