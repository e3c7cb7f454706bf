"""A progress that calls a function with every step: the steps done, the steps in all, a note."""

from __future__ import annotations

from collections.abc import Callable

from distilbeam.progress import Progress


class OnStep(Progress):
    def __init__(self, function: Callable[[int, int, str], object]) -> None:
        self._function = function

    def step(self, done: int, total: int, note: str = "") -> None:
        self._function(done, total, note)
