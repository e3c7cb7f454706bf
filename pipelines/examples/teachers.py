"""Teachers of the examples: a network is trained on rows that nobody else sees, and exported as a user's would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from distilbeam.pipelines.engine.phase import threads
from distilbeam.progress import Progress


def write_teacher(
    make: Callable[[], nn.Module],
    x: torch.Tensor,
    y: torch.Tensor,
    path: Path,
    seed: int,
    progress: Progress,
    epochs: int = 30,
    batch: int = 64,
) -> nn.Module:
    """Train a network and write it as a `torch.export` program that takes 1 to 4,096 rows.

    Args:
      make: makes the network, from inputs to logits.
      x: inputs [n, ...], float32.
      y: classes [n], int64.
      path: where to write.
      seed: of the network's weights and of the order of the rows.
      progress: told the epochs.
      epochs: how often the rows are seen.
      batch: rows of a step.

    Returns:
      The network, in evaluation mode.
    """
    with threads(1), torch.random.fork_rng():  # so small a network gains nothing from more
        torch.manual_seed(seed)
        network = make()
        optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
        steps = epochs * -(-len(x) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for epoch in range(epochs):
            for index in torch.randperm(len(x)).split(batch):
                loss = nn.functional.cross_entropy(network(x[index]), y[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            progress.step(epoch + 1, epochs)
        rows = torch.export.Dim("batch", min=1, max=4096)
        program = torch.export.export(network.eval(), (torch.zeros(2, *x.shape[1:]),), dynamic_shapes=({0: rows},))
        torch.export.save(program, path)
    return network
