"""Where in a run a batch stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Place:
    """Where in a run a batch stands: what the randomness of a transform may depend on.

    Attributes:
      seed: of the order.
      epoch: number of the epoch.
      position: of the batch's first row in the epoch.
    """

    seed: int
    epoch: int
    position: int

    def generator(self) -> torch.Generator:
        """Make a generator that is the same whenever the run comes here."""
        word = np.random.SeedSequence([self.seed, self.epoch, self.position]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word) % 2**63)
