from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from distilbeam.pipelines.engine.beam_options import pipeline_options, spares_processor
from distilbeam.pipelines.engine.prefetch import read_ahead, read_from, sparing


def makers() -> Iterator[str]:
    """Yield the names of the threads that make the items."""
    while True:
        yield threading.current_thread().name


@pytest.mark.parametrize(
    ("path", "spare", "apart"),
    [("pool/a.parquet", False, False), ("pool/a.parquet", True, True), ("s3://bucket/a.parquet", False, True)],
)
def test_items_are_made_in_a_thread_of_their_own_from_stores_and_where_a_processor_is_to_spare(
    path: str, spare: bool, apart: bool
) -> None:
    with sparing(spare):
        read = read_from(path, makers())
    names = {next(read)[0] for _ in range(3)}
    assert names == {"read-ahead_0"} if apart else names == {threading.current_thread().name}


def test_the_next_item_is_made_while_the_one_before_is_worked_on_and_no_further() -> None:
    made, second, third = [], threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        for number, event in ((1, None), (2, second), (3, third)):
            made.append(number)
            if event is not None:
                event.set()
            yield number

    read = read_ahead(items())
    assert next(read)[0] == 1
    assert second.wait(10)
    assert made == [1, 2]
    assert not third.is_set()
    assert [value for value, _ in read] == [2, 3]


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("damaged")

    read = read_ahead(items())
    assert next(read)[0] == 1
    with pytest.raises(OSError, match="damaged"):
        next(read)


@pytest.mark.local_runner(reason="its options decide")
@pytest.mark.parametrize(
    ("flags", "processors", "spare"),
    [
        ([], 2, True),
        ([], 1, False),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=2"], 2, False),
        (["--direct_running_mode=multi_threading", "--direct_num_workers=2"], 4, True),
        (["--direct_running_mode=multi_processing", "--direct_num_workers=0"], 4, False),
        (["--direct_num_workers=8"], 4, True),  # in one process there is one worker, whatever the number
        (["--runner=DataflowRunner"], 4, False),
    ],
)
def test_a_processor_is_to_spare_where_local_workers_are_fewer(
    flags: list[str], processors: int, spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    assert spares_processor(pipeline_options(flags)) is spare
