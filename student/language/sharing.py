"""How the processes of a language model's training share its weights and gradients, and how activations are saved or not.

DistributedDataParallel copies the weights and averages gradients; FSDP2 (`fully_shard`) gives each process a part of every weight, and
gathers a layer's when its turn comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distilbeam.student.language.config import TokenTrainConfig
from distilbeam.student.language.network import CausalLm
from distilbeam.student.language.step import TokenStep
from distilbeam.student.training.distributed import Processes


def share_out(step: TokenStep, training: TokenTrainConfig, processes: Processes) -> nn.Module:
    """Share a step's module out to the processes: copies whose gradients are averaged, or a part of each weight.

    Args:
      step: with the student, on its device; with FSDP its weights become parts.
      training: the training's configuration.
      processes: who trains.
    """
    if processes.size == 1:
        return step
    if training.shard == "none":
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        # a module of one's own may have weights that no loss reads
        return DistributedDataParallel(step, ids, find_unused_parameters=not step.network.of_transformers)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for block in _repeated_blocks(step.network):
        fully_shard(block, mesh=mesh)
    fully_shard(step, mesh=mesh)  # in place
    return step


def _repeated_blocks(network: CausalLm) -> list[nn.Module]:
    """Give the layers of the backbone: the longest list of modules in it."""
    lists = [list(part) for part in network.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=[])


@contextlib.contextmanager
def gradients_shared(step: nn.Module, *, now: bool) -> Iterator[None]:
    """Share gradients among the processes in a backward pass, or leave them where they are until the last micro-batch.

    Args:
      step: what `share_out` returned.
      now: whether this is the last micro-batch.
    """
    whole: Any = step
    if isinstance(step, DistributedDataParallel) and not now:
        with whole.no_sync():
            yield
        return
    if hasattr(step, "set_requires_gradient_sync"):
        whole.set_requires_gradient_sync(now)
    yield


def recompute_activations(network: CausalLm) -> None:
    """Compute activations again in the backward pass instead of keeping them.

    Raises:
      ValueError: the model is not of transformers.
    """
    model: Any = network.model
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"training.checkpointing is for models of transformers, got {type(model).__name__}; recompute in the module itself"
        )
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # the older name in transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
