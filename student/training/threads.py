"""How many threads of the processor a training's steps are worth.

A small student's step is over before a second thread is awake, and on a machine that others use too the threads wait for each
other: torch's pool spins at every operation until its last thread has had its turn. Measured on two cores, one step of 64 rows:

| student | operations | parameters | 1 thread: ms, processor ms | 2 threads |
|---|---:|---:|---:|---:|
| mlp, 64 | 1.3 M | 4,810 | .58, .58 | .82, 1.49 |
| mlp, 256 x 2 | 30 M | 85,002 | 1.7, 1.7 | 1.8, 3.2 |
| cnn, width .25, 8 x 8 pixels | 297 M | 36,234 | 9.5, 9.5 | 9.3, 16.8 |
| mlp, 512 x 3 | 270 M | 793,098 | 6.3, 6.3 | 5.4, 9.7 |
| text, 8,192 x 150 | 9 M | 1,251,450 | 12.5, 11.7 | 9.9, 18.0 |
| mlp, 1,024 x 3 | 944 M | 2,634,762 | 21.0, 21.0 | 15.0, 27.1 |
| text, 32,768 x 128 | 1 M | 4,196,884 | 37.6, 37.5 | 32.8, 59.7 |
| cnn, width 1, 32 x 32 pixels | 15 G | 1,342,122 | 205, 194 | 124, 235 |

A parameter costs the optimizer a while that `PARAMETER` puts into operations.

On a machine with four times as much work as cores the example of digits took .9 minutes with one thread and more than 10 with two.
Language models have a limit of their own (`student.language.threads`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.batches import Sources

SMALL_STEP = 350_000_000
PASSES = 3  # forward, and backward to the inputs and to the weights
PARAMETER = 300


@contextmanager
def threads_of(operations: float, device: torch.device, small: float = SMALL_STEP) -> Iterator[None]:
    """Compute on one thread while the block runs, where an operation of it is too small for more; else on as many as torch has.

    The choice follows from what is computed alone, so that a training that goes on after a kill makes it again: the number of
    threads decides the order of sums, and so the last bits of the weights.

    Args:
      operations: floating-point operations of a step, or of whatever is done again and again.
      device: where it is done; on others than the CPU nothing changes.
      small: operations that are worth more than one thread.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or operations >= small or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_of_steps(module: nn.Module, sources: Sources, student: StudentConfig) -> AbstractContextManager[None]:
    """Choose the threads of a training's steps; see `threads_of`.

    Args:
      module: the student, on the device that it is trained on; it stays as it is.
      sources: the data of the training.
      student: the student's configuration.
    """
    device = sources.processes.device
    return threads_of(step_operations(module, sources, student) if device.type == "cpu" else 0.0, device)


def step_operations(module: nn.Module, sources: Sources, student: StudentConfig) -> float:
    """Estimate the floating-point operations of one step of this process: matrix products, convolutions, the optimizer.

    Args:
      module: the student, on the CPU; it stays as it is.
      sources: the data of the training.
      student: the student's configuration.

    Returns:
      The operations, a multiplication and an addition being two; infinity where a network of one's own cannot be asked about an
      input of zeros.
    """
    dtype = torch.int64 if student.input.gives_ids else torch.float32
    rows = sources.training.batch_size / sources.processes.size
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), FlopCounterMode(display=False) as counted:
            copy.deepcopy(module).eval()(torch.zeros(1, *sources.input_shape, dtype=dtype))
    except Exception:  # noqa: BLE001 - whatever a network of one's own raises, the first step says it in its own words
        return float("inf")
    parameters = sum(some.numel() for some in module.parameters())
    return float(counted.get_total_flops()) * rows * PASSES + parameters * PARAMETER
