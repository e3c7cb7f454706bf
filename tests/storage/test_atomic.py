"""A folder appears whole or not at all: flushed before it has its name, and killed at any moment without a half one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from flushes import flushes_of, killed_at_flush

from distilbeam.storage.atomic import committed_directory
from distilbeam.storage.files import sweep

CONTENT = {"a.bin": b"a" * 5000, "b.json": b"{}", "inside/c.bin": b"c"}


def fill(target: Path) -> Callable[[], None]:
    def write() -> None:
        with committed_directory(target) as temporary:
            (temporary / "inside").mkdir()
            for name, content in CONTENT.items():
                (temporary / name).write_bytes(content)
            assert not target.exists() or not any(target.iterdir())

    return write


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_everything_is_flushed_before_the_rename_and_the_name_after(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "deep" / "folder"
    if there:
        target.mkdir(parents=True)
    before, after = flushes_of(fill(target), target)
    assert content_of(target) == CONTENT
    assert before == {"", "inside", *CONTENT}
    assert after == [target.parent]


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with committed_directory(tmp_path / "folder") as temporary:
            (temporary / "a").write_text("a")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_at_any_flush_leaves_no_half_folder(tmp_path: Path) -> None:
    whole = 0
    for number in range(1, 100):
        target = tmp_path / f"killed-{number}" / "folder"
        target.parent.mkdir()
        status = killed_at_flush(fill(target), number)
        left = [path.name for path in target.parent.iterdir()]
        assert all(name == "folder" or (name.startswith(".folder.") and name.endswith(".tmp")) for name in left)
        sweep(target.parent)
        assert list(target.parent.iterdir()) == ([target] if target.exists() else [])
        if target.exists():
            assert content_of(target) == CONTENT
            whole += 1
        if os.WIFEXITED(status):  # there were fewer flushes
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert (
        number == len(CONTENT) + 1 + 1 + 1 + 1
    )  # files, the folder inside, the folder, the one around it; none killed
    assert whole == 2  # killed at the last flush, after the rename; and not killed
