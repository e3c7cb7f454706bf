"""Places in the file system and in object stores; fsspec's store in memory stands for the latter."""

from __future__ import annotations

import io
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import (
    StoreError,
    asking_store,
    identities,
    is_remote,
    joined,
    list_files,
    on_disk,
    read_ranges,
    read_texts,
    readable,
    remove_files,
    remove_folder,
    to_path,
)


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A new folder on the disk, and one in a store."""
    return tmp_path / "f" if request.param == "disk" else to_path(f"memory://{secrets.token_hex(8)}/f")


def write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text)
    return path


def test_what_is_remote() -> None:
    assert [is_remote(place) for place in ("gs://b/x", "s3://b", "/a/b", "a", r"c:\x")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert is_remote(to_path("memory://x"))
    assert not is_remote(Path("x"))
    assert isinstance(to_path("a/b"), Path)
    path = to_path("memory://b/x")
    assert to_path(path) is path
    given: Any = UPath("memory://b/x")
    assert str(to_path(given)) == "memory://b/x"
    assert cast("Any", to_path(given)).storage_options == {"use_listings_cache": False}, (
        "other processes write there too"
    )


def test_files_come_whole_and_go(folder: Path) -> None:
    assert list_files(folder) == []
    one, two = write(folder / "1.json", "one"), write(folder / "2.json", "zwei")
    write(folder / "deeper" / "3.json", "three")
    write(folder / "4.txt", "four")
    assert sorted(list_files(folder, "*.json"), key=str) == [one, two]
    assert read_texts([two, one]) == ["zwei", "one"]
    write(one, "uno")
    assert read_texts([one]) == ["uno"]
    with pytest.raises(FileNotFoundError):
        read_texts([one, folder / "none"])
    remove_files([one, folder / "none"])
    assert list_files(folder, "*.json") == [two]
    remove_folder(folder)
    remove_folder(folder)
    assert not folder.exists()


def test_an_error_in_the_block_leaves_what_was_there(folder: Path) -> None:
    def fail() -> None:
        with replacing(folder / "a") as temporary:
            temporary.write_text("half")
            raise KeyError

    write(folder / "a", "before")
    with pytest.raises(KeyError):
        fail()
    assert read_texts([folder / "a"]) == ["before"]
    assert [file.name for file in list_files(folder)] == ["a"]


def test_a_file_that_replaces_another_is_told_from_it(folder: Path) -> None:
    files = [write(folder / name, name) for name in ("a", "b")]
    before = identities([*files, folder / "none"])
    assert set(before) == set(files)
    write(files[0], "something else")
    after = identities(files)
    assert after[files[0]] != before[files[0]]
    assert after[files[1]] == before[files[1]]


def test_parquet_is_read_in_place(folder: Path) -> None:
    table = pa.table({"a": list(range(1000)), "b": [str(i) for i in range(1000)]})
    path = folder / "x.parquet"
    with replacing(path) as temporary:
        pq.write_table(table, temporary, row_group_size=100)
    assert pq.read_table(readable(path)).equals(table)
    with pq.ParquetFile(readable(path), pre_buffer=True) as file:
        assert file.read_row_group(3, columns=["b"])["b"].to_pylist() == [str(i) for i in range(300, 400)]
    with on_disk(path) as copy:
        assert isinstance(copy, Path)
        assert pq.read_table(copy).equals(table)
    assert copy.exists() == (not is_remote(path)), "a copy is gone afterwards, a file is not"


def test_an_object_as_a_file() -> None:
    path = write(to_path(f"memory://{secrets.token_hex(8)}/digits"), "0123456789")
    file = readable(path)
    assert (file.read(3), file.tell(), file.read(), file.read(1)) == (b"012", 3, b"3456789", b"")
    assert (file.seek(-4, io.SEEK_END), file.read(2), file.seek(1, io.SEEK_CUR), file.read(9)) == (6, b"67", 9, b"9")
    assert read_ranges([path, path], [(2, 5), (8, None)]) == [b"234", b"89"]
    write(path, "01")
    file.seek(0)
    with pytest.raises(StoreError, match=r"digits changed while it was read: 4 bytes wanted, 2 given"):
        file.read(4)


def test_a_store_knows_no_parent_folder(tmp_path: Path) -> None:
    assert str(joined(to_path("memory://b/x/y"), "../z/a.parquet")) == "memory://b/x/z/a.parquet"
    assert joined(tmp_path, "../z") == tmp_path / "../z"


@pytest.mark.parametrize(("url", "extra"), [("s3://b/x", "s3"), ("gs://b/x", "gcp"), ("gcs://b/x", "gcp")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    import fsspec

    def missing(_: str) -> None:
        raise ImportError("Install it", name="storefs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        ValueError,
        match=rf"{url} needs packages that are not installed \(storefs\): pip install 'distilbeam\[{extra}\]'",
    ):
        to_path(url)


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"nowhere://b/x names no object store that fsspec knows; take s3:// or gs://, or a path"
    ):
        to_path("nowhere://b/x")


def fail(error: Exception) -> Callable[[], None]:
    def call() -> None:
        with asking_store("s3://b/x could not be read"):
            raise error

    return call


def test_a_stores_errors_become_ours() -> None:
    with pytest.raises(StoreError, match=r"^s3://b/x could not be read: no route$") as raised:
        fail(RuntimeError("no route\nsecond line"))()
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(StoreError, match=r"could not be read: TimeoutError$"):
        fail(TimeoutError())()
    for kept in (FileNotFoundError("x"), FileExistsError("x"), StoreError("x")):
        with pytest.raises(type(kept), match=r"^x$"):
            fail(kept)()


def test_nothing_of_a_store_is_loaded_for_a_path() -> None:
    code = (
        "import sys; from distilbeam.teacher.softlabels import committed, compact_manifest; from pathlib import Path;"
        "from distilbeam.storage.paths import list_files, readable, to_path;"
        "committed('.'); list_files(to_path('.')); readable(to_path('x'));"
        "print([m for m in ('upath', 's3fs', 'gcsfs', 'botocore') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
