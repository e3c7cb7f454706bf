"""The random generator of a batch, a function of the batch's place in its run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Place:
    """The place of a batch in a run, which is all that the randomness of a transform may depend on.

    Attributes:
      seed: the one that the order of the rows is drawn with.
      epoch: number of the epoch.
      position: the place of the batch's first row in the order of the epoch.
    """

    seed: int
    epoch: int
    position: int

    def generator(self) -> torch.Generator:
        """Make a generator that is the same whenever the run comes here."""
        word = np.random.SeedSequence([self.seed, self.epoch, self.position]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word) % 2**63)
