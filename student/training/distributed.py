"""The processes that train one student together, and the device that each of them uses.

Under torchrun every process joins a group of torch.distributed: NCCL between GPUs, Gloo between CPUs. Elsewhere a
training is one process, and what follows costs nothing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them.

    Attributes:
      device: where this process computes.
      rank: its number.
      size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Add up a number over the processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def from_first(self, value: Any) -> Any:
        """Give every process what the first one has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give every process what all of them have, in the order of their numbers."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def align(self, *modules: nn.Module) -> None:
        """Give every process the first one's statistics, which each gathers from its own rows within a step."""
        if self.size > 1:
            for buffer in (buffer for module in modules for buffer in module.buffers()):
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one.

    Args:
      device: `cpu`, `cuda`, `cuda:1`, `tpu`, any other device of torch, or `auto`: the accelerator if there is one.

    Yields:
      The processes. A group that was not there before is left at the end.

    Raises:
      ValueError: there is no such device here.
    """
    mine = not dist.is_initialized() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    together = mine or dist.is_initialized()
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if together else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if mine:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(chosen, dist.get_rank(), dist.get_world_size()) if together else Processes(chosen)
    finally:
        if mine:
            dist.destroy_process_group()


def end_step(device: torch.device) -> None:
    """Have a lazy device (XLA) carry out the step that was recorded."""
    if device.type == "xla":
        importlib.import_module("torch_xla").sync()


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "tpu":
        return _tpu()
    if name == "auto":
        found = torch.accelerator.current_accelerator()
        name = "cpu" if found is None else found.type
    if name == "cuda":
        name = f"cuda:{local_rank or 0}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"device must be one that is here, such as cpu, got {name!r}: {reason}") from e
    return device


def _tpu() -> torch.device:
    try:
        xla: Any = importlib.import_module("torch_xla")
    except ImportError as e:
        raise ValueError("device 'tpu' needs the package torch_xla, which is not installed; choose cpu or cuda") from e
    device: torch.device = xla.device()
    return device
