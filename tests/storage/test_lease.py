"""Leases in a real S3 server: one of any number of processes holds a folder, and a dead one does not hold it for ever."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from object_store import DENIED, ObjectStore, object_store

from distilbeam.storage import lease
from distilbeam.storage.files import read_json
from distilbeam.storage.lease import LeaseLostError, leased
from distilbeam.storage.paths import list_files, to_path

BUSY = r"is being worked on by process \d+ on "


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def folder(store: ObjectStore) -> Path:
    return store.bucket(f"b{secrets.token_hex(8)}") / "job"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are renewed every 0.3 s and end after 2 s: the server's clock has whole seconds."""
    monkeypatch.setattr(lease, "RENEW_S", 0.3)
    monkeypatch.setattr(lease, "EXPIRES_S", 2.0)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, whatever a command of another test has made of it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def take(folder: Path) -> None:
    with leased(folder, "run.directory", "--set run.directory=..."):
        pass


def holder(**changes: object) -> lease._Holder:
    one = lease._Holder("token", "another machine", "far", 17, 1.0)
    return replace(one, **changes)  # type: ignore[arg-type]


def test_a_lease_that_is_given_back_is_free_at_once(folder: Path) -> None:
    for number in (1, 2, 3):
        with leased(folder, "run.directory", "x"):
            assert len(list_files(folder / ".lease")) == number
            with pytest.raises(ValueError, match=BUSY):
                take(folder)
        assert read_json(folder / ".lease" / f"{number:08d}.json")["released"] is True


def test_one_of_many_that_start_at_once_gets_it(folder: Path) -> None:
    outcomes: list[str] = []
    begin, end = threading.Barrier(8), threading.Event()

    def work() -> None:
        begin.wait()
        try:
            with leased(folder, "run.directory", "x"):
                outcomes.append("held")
                end.wait(30)
        except ValueError as e:
            outcomes.append(str(e))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert outcomes.count("held") == 1
    assert sum("is being worked on by" in outcome for outcome in outcomes) == 7


def test_the_lease_of_a_process_that_is_gone_is_free_on_its_machine(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    for number, process in enumerate((int(ended.stdout), os.getpid()), 1):  # a number that another process has now
        gone = holder(machine=lease._machine(), process=process, started=1.0)
        lease._put(folder / ".lease" / f"{2 * number:08d}.json", gone)
        take(folder)


@pytest.mark.usefixtures("quick")
def test_the_lease_of_another_machine_ends_by_the_stores_clock(folder: Path) -> None:
    lease._put(folder / ".lease" / "00000007.json", holder())
    with pytest.raises(ValueError, match=r"is being worked on by process 17 on far; .* its lease ends after 2 s"):
        take(folder)
    time.sleep(3.1)
    take(folder)
    assert read_json(folder / ".lease" / "00000008.json")["released"] is True
    assert [file.name for file in list_files(folder / ".lease", "*.probe")] == []


@pytest.mark.usefixtures("quick")
def test_a_lease_is_renewed_while_it_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with leased(folder, "run.directory", "x"):
        time.sleep(3.1)
        monkeypatch.setattr(lease, "_machine", lambda: "another machine")
        with pytest.raises(ValueError, match=BUSY):
            take(folder)


@pytest.mark.usefixtures("quick")
def test_who_was_taken_over_stops(folder: Path) -> None:
    def work() -> None:
        with leased(folder, "run.directory", "x"):
            lease._put(folder / ".lease" / "00000002.json", holder())
            time.sleep(30)

    start = time.monotonic()
    with pytest.raises(LeaseLostError, match=r"job was taken over by process 17 on far; start again when it has ended"):
        work()
    assert time.monotonic() - start < 10
    assert read_json(folder / ".lease" / "00000001.json")["released"] is False


@pytest.mark.usefixtures("quick")
def test_who_cannot_renew_stops_before_another_may_start(folder: Path, store: ObjectStore) -> None:
    def work() -> None:
        with leased(folder, "run.directory", "x"), store.refusing(lambda _: DENIED):
            time.sleep(30)

    start = time.monotonic()
    with pytest.raises(LeaseLostError, match=r"could not be renewed for 2 s"):
        work()
    assert 1.5 <= time.monotonic() - start < 10


def test_former_numbers_are_removed_but_not_the_last_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_KEPT", 3)
    for _ in range(6):
        take(folder)
    assert sorted(file.stem for file in list_files(folder / ".lease")) == ["00000004", "00000005", "00000006"]


def test_a_store_that_cannot_be_written_is_said(store: ObjectStore, folder: Path) -> None:
    with (
        store.refusing(lambda r: DENIED if r.method == "PUT" else None),
        pytest.raises(
            ValueError,
            match=r"run.directory: s3://\S+ cannot be written \(.*not today.*\); choose another with --set run.directory=",
        ),
    ):
        take(folder)
    with pytest.raises(ValueError, match=r"s3://nobody-made-it/job cannot be written"):
        take(to_path("s3://nobody-made-it/job"))
