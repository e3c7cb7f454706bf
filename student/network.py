"""How a student's forward pass is carried out: in which precision, compiled or not, in how many processes."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distilbeam.student.config import StudentConfig
from distilbeam.student.processes import Processes
from distilbeam.student.train_config import TrainConfig

log = logging.getLogger(__name__)


def make_network(module: nn.Module, student: StudentConfig, training: TrainConfig, processes: Processes) -> nn.Module:
    """Wrap a student for its training; parameters stay those of the module.

    Args:
      module: the student, on its device; with precision fp8 or int8 its linear layers are replaced in place.
      student: its configuration.
      training: its training's configuration.
      processes: who trains it; each begins with the weights of the first.

    Returns:
      What to call in a step.
    """
    if training.precision in ("fp8", "int8"):
        _lower_precision(module, training, processes)
    network = module
    if processes.size > 1:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        if ids:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = DistributedDataParallel(network, ids, find_unused_parameters=_may_skip_parameters(student))
    # parameters may be of the first batch's shape or the last's: let the compiler see sizes that change
    return cast("nn.Module", torch.compile(network)) if training.compile else network


def _lower_precision(module: nn.Module, training: TrainConfig, processes: Processes) -> None:
    from distilbeam.kernels.conversion.interface import to_low_precision
    from distilbeam.kernels.conversion.policy import LowPrecisionPolicy

    rows = -(-training.batch_size // processes.size)
    policy = LowPrecisionPolicy(dtype=training.precision, gate=training.precision_gate, rows=rows)
    report = to_low_precision(module, policy)
    if processes.first:  # at the level that is shown by default: nobody is to believe in 8 bits where there are none
        log.warning("precision %s: %s", training.precision, report)


def _may_skip_parameters(student: StudentConfig) -> bool:
    """Whether a step may leave parameters without a gradient, which DistributedDataParallel must be told."""
    return "pa" in student.residual or ":" in student.kind
