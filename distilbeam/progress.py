"""Progress of work under way, told to whoever watches: things done of how many, and epochs with their figures."""

from __future__ import annotations

from collections.abc import Mapping


class Progress:
    """Told of work under way; this one lets it pass, a subclass overrides what it wants to know.

    What a method raises ends the work as an error of its own would.
    """

    def step(self, done: int, total: int, note: str = "") -> None:
        """Take note of things that were done.

        Args:
          done: how many: rows of a phase, steps of a training, trials of a search.
          total: how many there are.
          note: a few words about the latest.
        """

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        """Take note of an epoch of a training that ended; those before a training went on are told again, first.

        Args:
          number: its number, from 1.
          figures: `train_loss` and, where there is a validation set, `validation_nll`, `validation_accuracy`, ...
        """
