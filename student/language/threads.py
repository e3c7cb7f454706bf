"""How much a language model computes, by which its threads are chosen as those of other trainings are (`training.threads`).

    forward pass    2 operations for each token and weight that multiplies its hidden state, those of the last layer included;
                    attention between tokens is left out (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)
    training step   three of them, and the optimizer

An embedding is looked up, not multiplied; where its weights are the last layer's too, they count as those.

Its products are many and small, and after each of them a second thread is waited for. Measured on two cores that nobody else used (Llamas
of 1,024 ids, 8 blocks; medians of three times five steps):

| width x layers, tokens of a block | operations | 1 thread: ms, processor ms | 2 threads |
|---|---:|---:|---:|
| 32 x 2, 64 | 184 M | 15, 14 | 15, 29 |
| 32 x 2, 128 | 351 M | 25, 26 | 18, 38 |
| 48 x 2, 128 | 645 M | 27, 28 | 20, 41 |
| 64 x 2, 128 | 998 M | 34, 34 | 21, 43 |
| 128 x 3, 128, 16 blocks | 8,506 M | 166, 168 | 93, 191 |

On the same cores, full of other work, the first of these took 114 ms with one thread and 5,526 with two. The limit is a choice:
below it a second thread saves hardly more than a quarter of the time, and costs half as much again of the processors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from distilbeam.student.language.network import CausalLm
from distilbeam.student.training.threads import PARAMETER, PASSES, threads_of

SMALL = 700_000_000


def threads_for(operations: float, device: torch.device) -> AbstractContextManager[None]:
    """Choose the threads of a language model's steps or forward passes; see `training.threads.threads_of`.

    Args:
      operations: those of one of them.
      device: where the model is.
    """
    return threads_of(operations, device, SMALL)


def forward_operations(network: CausalLm, num_classes: int, tokens: int) -> float:
    """Estimate the floating-point operations of a forward pass.

    Args:
      network: the language model.
      num_classes: ids that the labels know; a last layer with more outputs is cut there.
      tokens: in the pass.
    """
    head: Any = network.head
    looked_up = [module.weight for module in network.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(weight) for weight in (*looked_up, head.weight)}
    weights = sum(weight.numel() for weight in network.parameters() if id(weight) not in left_out)
    rows, width = head.weight.shape
    return float(2 * tokens * (weights + min(num_classes, rows) * width))


def step_operations(network: CausalLm, num_classes: int, tokens: int) -> float:
    """Estimate the floating-point operations of a training step.

    Args:
      network: the language model, not yet shared out to processes.
      num_classes: ids that the labels know.
      tokens: of one process in a step.
    """
    parameters = sum(weight.numel() for weight in network.parameters())
    return PASSES * forward_operations(network, num_classes, tokens) + PARAMETER * parameters
