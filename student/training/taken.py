"""Steps that were taken and whose losses are still to be looked at, which on a GPU means to wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distilbeam.student.training.batches import StepRows


class TakenStep(NamedTuple):
    """What is known of a step when it was issued.

    Attributes:
      number: steps done before it.
      loss: a scalar on the student's device.
      norm: of the gradient, likewise; None where nobody measured it.
      rows: what the step was about.
      lr: learning rate.
    """

    number: int
    loss: Tensor
    norm: Tensor | None
    rows: StepRows
    lr: float


class TakenSteps:
    """Looks at the loss of a step when the next one has been issued, so that a GPU has work while it is waited for.

    On a CPU, where looking costs nothing, every step is looked at at once. A loss that is no number is found a step late, when
    the weights are lost anyway; nothing is saved before every step was looked at (`finish`).
    """

    def __init__(self, device: torch.device, look: Callable[[TakenStep, float, float | None], None]) -> None:
        """Begin.

        Args:
          device: where the student is.
          look: told every step in its turn, with its loss and the gradient's norm.
        """
        self._most = lateness(device)
        self._look = look
        self._waiting: deque[TakenStep] = deque()

    def add(self, step: TakenStep) -> None:
        """Take in a step that was issued, and look at those before it."""
        self._waiting.append(step)
        self._until(self._most)

    def finish(self) -> None:
        """Look at all that is left."""
        self._until(0)

    def _until(self, left: int) -> None:
        while len(self._waiting) > left:
            step = self._waiting.popleft()
            self._look(step, float(step.loss), None if step.norm is None else float(step.norm))


def lateness(device: torch.device) -> int:
    """Say how many steps may be issued before one is looked at."""
    return 0 if device.type == "cpu" else 1
