"""Temporary folders that others cannot read or replace, and those of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from distilbeam.storage.private_folders import claim, is_private, own_folder, private_folder, remove_left


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_closed_to_others_and_goes(temporary: Path) -> None:
    with private_folder("errors") as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
        assert is_private(folder)
        assert remove_left() == 0, "its process runs"
    assert not folder.exists()


def test_folders_of_processes_that_are_gone_are_removed(temporary: Path) -> None:
    code = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from distilbeam.storage.private_folders import private_folder\n"
        "with private_folder('errors') as folder: print(folder, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(temporary)], capture_output=True, text=True, check=False)
    left = Path(ended.stdout.strip())
    assert left.exists()
    (temporary / "distilbeam-of-somebody").mkdir(mode=0o700)
    assert remove_left() == 1
    assert not left.exists()
    assert (temporary / "distilbeam-of-somebody").exists(), "nothing says whose it is"


def test_a_process_number_that_was_given_again_is_another_process(temporary: Path) -> None:
    folder = temporary / "distilbeam-errors-x"
    folder.mkdir(mode=0o700)
    claim(folder)
    (folder / ".process").write_text(f"{os.getpid()} 1.0")
    assert remove_left() == 1


def test_links_and_folders_of_others_are_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    name = temporary / f"distilbeam-spill-{os.getuid()}"
    name.symlink_to(elsewhere)
    assert own_folder("spill", make=True) is None
    name.unlink()
    name.mkdir(mode=0o755)
    assert own_folder("spill", make=True) is None, "others may read it"
    name.rmdir()
    assert own_folder("spill", make=False) is None
    assert own_folder("spill", make=True) == name
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not is_private(name)
