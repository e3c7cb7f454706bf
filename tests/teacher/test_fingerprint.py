"""Files hashed once and watched afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.protocol import TeacherChanged


def tree(folder: Path) -> Path:
    (folder / "variables").mkdir(parents=True)
    (folder / "model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"weights")
    return folder


def test_hash_depends_on_content_names_and_settings_but_not_on_the_place(tmp_path: Path) -> None:
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    base = Artefact([a], "s").digest()
    assert Artefact([b], "s").digest() == base
    assert len(base) == 16
    changed = [Artefact([b], "t").digest()]
    (b / "variables" / "data").write_bytes(b"Weights")
    changed.append(Artefact([b], "s").digest())
    (b / "variables" / "data").write_bytes(b"weights")
    (b / "model.pb").rename(b / "graph.pb")
    changed.append(Artefact([b], "s").digest())
    (b / "graph.pb").rename(b / "model.pb")
    (b / "extra").write_bytes(b"")
    changed.append(Artefact([b], "s").digest())
    assert len({base, *changed}) == 5


def test_bytes_that_move_between_files_change_the_hash(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"ab")
    two.write_bytes(b"c")
    first = Artefact([one, two], "").digest()
    one.write_bytes(b"a")
    two.write_bytes(b"bc")
    assert Artefact([one, two], "").digest() != first


@pytest.mark.parametrize("change", ["content", "added", "replaced", "removed"])
def test_changes_are_noticed(tmp_path: Path, change: str) -> None:
    folder = tree(tmp_path / "a")
    artefact = Artefact([folder], "")
    artefact.digest()
    data = folder / "variables" / "data"
    if change == "content":
        data.write_bytes(b"WEIGHTS")
    elif change == "added":
        (folder / "assets").write_bytes(b"x")
    elif change == "removed":
        data.unlink()
    else:  # of the same size and time, as a copy that keeps times makes it
        stat = data.stat()
        (folder / "new").write_bytes(b"WEIGHTS")
        os.utime(folder / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (folder / "new").replace(data)
    with pytest.raises(
        TeacherChanged, match=r"the teacher changed while it was being asked: .*/a had the hash [0-9a-f]{16}, now "
    ):
        artefact.digest()


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = Artefact([tree(tmp_path / "a")], "")
    reads: list[Path] = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: reads.append(self) or opened(self, *a, **k))  # type: ignore[func-returns-value]
    first = artefact.digest()
    assert reads == []
    (tmp_path / "a" / "model.pb").touch()
    assert artefact.digest() == first
    assert len(reads) == 2
    artefact.digest()
    assert len(reads) == 2


def test_missing_files_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the teacher's file .*no does not exist; relative paths start at the configuration"
    ):
        Artefact([tmp_path / "no"], "")
