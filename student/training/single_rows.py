"""Steps of a single row, which batch norms cannot take: one value per channel has no variance."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.batches import Sources, fewest_rows


def require_room_for_norms(module: nn.Module, sources: Sources, student: StudentConfig) -> None:
    """Check, before the first step, that every step has the rows that the network's batch norms need.

    Only a training with steps of one row is looked at: `sampler.py` makes none but where `batch_size` or the data have no
    room for another, and channels of several pixels have a variance even then.

    Args:
      module: the student, on the CPU; it stays as it is.
      sources: the data of the training.
      student: the student's configuration.

    Raises:
      ValueError: a step would have a single row and the network refuses it.
    """
    if not any(isinstance(part, _BatchNorm) for part in module.modules()) or fewest_rows(sources) > 1:
        return
    dtype = torch.int64 if student.input.gives_ids else torch.float32
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copy.deepcopy(module).train()(torch.zeros(1, *sources.input_shape, dtype=dtype))
    except ValueError as e:
        rows = sum(len(some) for some in (sources.hard,) if some is not None)
        rows += 0 if sources.soft is None else sources.soft.rows
        raise ValueError(
            f"training.batch_size must leave every process at least two rows in each step, for the network's batch norms; got "
            f"{sources.training.batch_size} for {rows:,} rows and {sources.processes.size} process(es)"
        ) from e
