"""A file system and an object store give the same answers by their own means."""

from __future__ import annotations

import secrets
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, write_json, write_parquet
from distilbeam.storage.paths import list_files, to_path
from distilbeam.storage.stores import store_of


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "f" if request.param == "disk" else to_path(f"memory://{secrets.token_hex(8)}/f")


def test_an_identity_tells_a_file_from_the_next_of_its_name(folder: Path) -> None:
    store, file = store_of(folder), folder / "a.json"
    with pytest.raises(FileNotFoundError):
        store.identity(file)
    before: tuple[object, ...] = ()
    for text in ("one", "three", "three!"):
        with replacing(file) as temporary:
            temporary.write_text(text)
        now = store.identity(file)
        assert now[0] == len(text)
        assert now == store.identity(file)
        assert now != before


def test_parquet_is_opened_and_read(folder: Path) -> None:
    table = pa.table({"x": [1, 2, 3], "y": ["a", "b", None]})
    write_parquet(folder / "t.parquet", table)
    for mapped in (False, True):
        with store_of(folder).open_parquet(folder / "t.parquet", mapped=mapped) as file:
            assert isinstance(file, pq.ParquetFile)
            assert file.read().equals(table)


def test_a_folder_moves_with_all_that_is_in_it(folder: Path) -> None:
    store = store_of(folder)
    store.make_folder(folder)
    for name in ("a.json", "b.json"):
        write_json(folder / "labels" / name, name)
    store.move_folder(folder / "labels", folder / "superseded" / "x", folder)
    assert sorted(path.name for path in list_files(folder / "superseded" / "x")) == ["a.json", "b.json"]
    assert read_json(folder / "superseded" / "x" / "b.json") == "b.json"
    assert list_files(folder / "labels") == []
    store.finish_move(folder)  # nothing is left to finish
    assert [path.name for path in list_files(folder, "*.json")] == []


def test_who_comes_second_is_told_who_holds_a_folder(folder: Path) -> None:
    def hold() -> AbstractContextManager[None]:
        return store_of(folder).hold(folder, "--out", "--out")

    refused = pytest.raises(ValueError, match=r"is being worked on by process \d+ on .*; wait for it to end or choose")
    with hold(), refused, hold():
        pass
    with hold():
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ValueError, match=r"^--out: .*file/f cannot be written \(Not a directory\); choose another with OUT"
        ),
        store_of(tmp_path).hold(tmp_path / "file" / "f", "--out", "OUT"),
    ):
        pass
