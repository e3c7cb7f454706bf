"""Settling in a thread: in order, together when there is much, with an error that is raised at the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from square_work import Squares

from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.commit_queue import AT_ONCE, Settler
from distilbeam.pipelines.engine.phase import PhaseError, run_phase


def test_everything_is_settled_in_order_while_others_are_handed_over() -> None:
    settled: list[list[int]] = []
    settler = Settler(lambda ends: settled.append(list(ends)))
    for end in range(100):
        settler.add(end)
    settler.finish()
    assert [end for ends in settled for end in ends] == list(range(100))
    assert max(map(len, settled)) <= AT_ONCE


def test_what_waits_is_settled_together_and_is_bounded() -> None:
    settled: list[list[int]] = []
    begin = threading.Event()

    def settle(ends: Sequence[int]) -> None:
        begin.wait()
        settled.append(list(ends))

    settler = Settler(settle)
    for end in range(AT_ONCE + 1):  # one is being settled, the others wait
        settler.add(end)
    late = threading.Thread(target=settler.add, args=(AT_ONCE + 1,))
    late.start()
    begin.set()
    late.join()
    settler.finish()
    assert len(settled) <= 4
    assert [end for ends in settled for end in ends] == list(range(AT_ONCE + 2))


def test_an_error_is_raised_at_the_end_and_nothing_is_settled_after_it() -> None:
    settled: list[int] = []

    def settle(ends: Sequence[int]) -> None:
        if 3 in ends:
            raise OSError("no space left")
        settled.extend(ends)

    settler = Settler(settle)
    for end in range(50):
        settler.add(end)
    with pytest.raises(OSError, match="no space left"):
        settler.finish()
    assert settled == list(range(len(settled)))
    assert len(settled) <= 3
    settler.add(4)
    settler.finish()
    assert settled[-1] == 4, "it can be used again"


def test_nothing_to_settle_starts_no_thread() -> None:
    before = threading.active_count()
    settler = Settler(lambda _: None)
    assert threading.active_count() == before
    settler.finish()


@dataclass(frozen=True)
class Later(Squares):
    """Commits its squares when they are settled; a number in `unsettled` cannot be."""

    unsettled: tuple[int, ...] = ()

    def __call__(self, item: int) -> list[int]:  # type: ignore[override]
        return [item]

    def settle(self, ends: Sequence[int]) -> None:  # type: ignore[override]
        for item in ends:
            if item in self.unsettled:
                raise OSError(f"{item} cannot be flushed")
            super().__call__(item)


def test_a_phase_ends_when_everything_is_settled(tmp_path: Path) -> None:
    work = Later(str(tmp_path))
    done = run_phase("square", work, list(range(30)), errors=tmp_path / "errors", options=pipeline_options())
    assert done.retried == 0
    assert all(work.done(item) for item in range(30))


def test_what_cannot_be_settled_ends_the_phase_with_its_reason(tmp_path: Path) -> None:
    work = Later(str(tmp_path), unsettled=(3,))
    with pytest.raises(
        PhaseError, match=r"the first of those that were being flushed to the disk: OSError: 3 cannot be flushed"
    ):
        run_phase("square", work, list(range(6)), errors=tmp_path / "errors", options=pipeline_options())
