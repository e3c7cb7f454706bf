"""The state of a training under way: weights, optimizer, averages, position, generators, history; kept and put back.

The learning rate is a function of the steps done (`optimizer.py`) and needs no state of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.rng import generator_state, set_generator_state
from distilbeam.student.training.sample_weights import RowWeights

Tensors = dict[str, Tensor]


@dataclass
class TrainingState:
    """A training under way.

    Attributes:
      module: the student.
      optimizer: with its moments.
      average: moving average of the weights, or None.
      soft: the soft-labelled rows, which know their position; or None.
      weights: debiasing weights of their rows.
      done: steps done.
      loss_sum: sum of the losses of the present epoch's steps, in this process.
      seconds: time spent before this process began.
      history: figures of every epoch that is over.
      best: weights of the best epoch.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    soft: SoftLabelDataset | None
    weights: RowWeights
    done: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: Tensors = field(default_factory=dict)

    @property
    def shown(self) -> nn.Module:
        """What is validated and kept: the average where there is one."""
        return self.module if self.average is None else self.average.module

    @property
    def best_epoch(self) -> int:
        """Number of the epoch with the least validation loss, the first of equals; without validation the last."""
        if "validation_nll" not in self.history[-1]:
            return len(self.history)
        return 1 + min(range(len(self.history)), key=lambda epoch: self.history[epoch]["validation_nll"])

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Record an epoch and keep its weights if they are the best so far."""
        self.history.append(figures)
        self.loss_sum = 0.0
        if self.best_epoch == len(self.history):
            self.best = copy.deepcopy(self.shown.state_dict())

    def capture(self, processes: Processes) -> tuple[Tensors, dict[str, Any]]:
        """Return the state as tensors and plain data; every process must ask for it."""
        own = processes.gather((generator_state(processes.device), self.loss_sum))
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.module.state_dict(),
            "best": self.best,
            "average": {} if self.average is None else self.average.state_dict(),
            "optimizer": _flat(self.optimizer.state_dict()["state"]),
            "weights": {} if self.weights.estimated is None else {"rows": self.weights.estimated},
            **{f"generators{rank}": state for rank, (state, _) in enumerate(own)},
        }
        plain = {
            "done": self.done,
            "loss_sums": [loss_sum for _, loss_sum in own],
            "seconds": self.seconds,
            "history": self.history,
            "loader": None if self.soft is None else self.soft.state_dict(),
        }
        return _joined(parts), plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], processes: Processes) -> None:
        """Put the state back; with another number of processes their generators begin anew.

        Args:
          tensors: from `capture`.
          plain: from `capture`.
          processes: who trains now.

        Raises:
          ValueError: the soft labels are others than those of the state.
        """
        self.module.load_state_dict(_part(tensors, "model"))
        self.best = _part(tensors, "best")
        if self.average is not None:
            self.average.load_state_dict(_part(tensors, "average"))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": _nested(_part(tensors, "optimizer")), "param_groups": groups})
        self.weights.estimated = _part(tensors, "weights").get("rows")
        if self.soft is not None:
            self.soft.load_state_dict(plain["loader"])
        self.done, self.seconds = plain["done"], plain["seconds"]
        self.history = [dict(figures) for figures in plain["history"]]
        sums = plain["loss_sums"]
        if len(sums) == processes.size:
            self.loss_sum = sums[processes.rank]
            set_generator_state(_part(tensors, f"generators{processes.rank}"), processes.device)
        else:  # the mean over the processes is what counts
            self.loss_sum = sum(sums) / len(sums)
            torch.manual_seed(torch.initial_seed() + self.done)


def _flat(state: Mapping[int, Mapping[str, Any]]) -> Tensors:
    """Give every tensor of the optimizer's state one name; what is None (a momentum not begun) is left out."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def _nested(flat: Mapping[str, Tensor]) -> dict[int, Tensors]:
    nested: dict[int, Tensors] = {}
    for key, value in flat.items():
        number, _, name = key.partition(".")
        nested.setdefault(int(number), {})[name] = value
    return nested


def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def _part(tensors: Mapping[str, Tensor], part: str) -> Tensors:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
