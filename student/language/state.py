"""The state of a language model's training: weights, optimizer, average, position, generators; whole, however it is shared out.

With FSDP each process holds a part of every weight. What is kept has whole tensors, which every process takes its part of again: a
training that was killed goes on with any number of processes, with FSDP or without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distilbeam.student.data.token_labels import TokenLabelDataset
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.rng import generator_state, set_generator_state
from distilbeam.student.training.state import Tensors


class WeightAverage:
    """The exponential moving average of weights, each as it is shared out.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the initial weights are soon forgotten.

    Args:
      module: whose weights.
      decay: the largest decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present weights in."""
        self.updates += 1
        share = 1 - min(self._decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.named_parameters():
            self.weights[name].lerp_(value.detach(), share)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights and the average; a second time puts both back."""
        for name, value in module.named_parameters():
            own = value.detach().clone()
            value.copy_(self.weights[name])
            self.weights[name] = own


@dataclass
class TokenState:
    """A training under way.

    Attributes:
      module: the student, shared out or not.
      optimizer: with its moments.
      average: moving average of the weights, or None.
      blocks: the labelled blocks, which know their position.
      done: steps done.
      loss_sum: sum of the losses of the present epoch's steps.
      seconds: time spent before this process began.
      tokens: labelled positions seen.
      history: figures of every epoch that is over.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    blocks: TokenLabelDataset
    done: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def capture(self, processes: Processes) -> tuple[Tensors, dict[str, Any]]:
        """Return the state as whole tensors and plain data; every process must ask for it."""
        own = processes.gather(generator_state(processes.device))
        found = {f"model/{name}": whole(value) for name, value in self.module.named_parameters()}
        found |= {f"buffers/{name}": value for name, value in _kept_buffers(self.module)}
        if self.average is not None:
            found |= {f"average/{name}": whole(value) for name, value in self.average.weights.items()}
        for name, weight in self.module.named_parameters():
            for moment, tensor in self.optimizer.state[weight].items():
                if tensor is not None:  # a momentum not begun
                    found[f"optimizer/{moment}/{name}"] = whole(torch.as_tensor(tensor))
        for rank, state in enumerate(own):
            found |= {f"generators{rank}/{name}": value for name, value in state.items()}
        plain = {
            "done": self.done,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "updates": 0 if self.average is None else self.average.updates,
            "processes": processes.size,
            "history": self.history,
            "loader": self.blocks.state_dict(),
        }
        return found, plain

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], processes: Processes) -> None:
        """Put the state back; with another number of processes their generators begin anew.

        Raises:
          ValueError: the labels are others than those of the state.
        """
        for name, value in self.module.named_parameters():
            value.copy_(shared_out(tensors[f"model/{name}"], value))
            state = self.optimizer.state[value]
            for key in (key for key in tensors if key.startswith("optimizer/") and key.endswith(f"/{name}")):
                moment = key.split("/")[1]
                if key == f"optimizer/{moment}/{name}":
                    kept = tensors[key]
                    state[moment] = kept.clone() if kept.shape != value.shape else shared_out(kept, value)
            if self.average is not None:
                self.average.weights[name].copy_(shared_out(tensors[f"average/{name}"], value))
        for name, buffer in _kept_buffers(self.module):
            buffer.copy_(tensors[f"buffers/{name}"])
        if self.average is not None:
            self.average.updates = plain["updates"]
        self.blocks.load_state_dict(plain["loader"])
        self.done, self.loss_sum, self.seconds = plain["done"], plain["loss_sum"], plain["seconds"]
        self.tokens, self.history = plain["tokens"], [dict(figures) for figures in plain["history"]]
        if plain["processes"] == processes.size:
            prefix = f"generators{processes.rank}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            set_generator_state(own, processes.device)
        else:
            torch.manual_seed(torch.initial_seed() + self.done)


def whole(value: Tensor) -> Tensor:
    """Give a tensor that is shared out to processes whole; every process must ask for it."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def shared_out(value: Tensor, like: Tensor) -> Tensor:
    """Share a whole tensor out to processes as another one is; a copy on its device where that one is whole."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device, copy=True)


def whole_weights(module: nn.Module) -> Tensors:
    """Give a module's weights and kept buffers whole, on the CPU; every process must ask for them."""
    found = {name: whole(value).cpu() for name, value in module.named_parameters()}
    return found | {name: value.detach().cpu() for name, value in _kept_buffers(module)}


def _kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the buffers that belong to the state; a tied weight's second name is none."""
    kept = module.state_dict(keep_vars=True)
    for name, value in module.named_buffers():
        if name in kept:
            yield name, value
