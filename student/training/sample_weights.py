"""Debiasing weights of the soft-labelled rows: those of the labelling, or estimated again from the current student.

Weights depend on the student (arXiv:2210.06711): where it has learned to agree with the truth, a wrong label weighs
less. Estimating them again every few epochs follows it; `selection/trust/debias.py` has the estimate itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distilbeam.selection.trust.debias import DebiasEstimator, rescale
from distilbeam.student.data.labelled import Examples
from distilbeam.student.data.loader import Batch, SoftLabelDataset
from distilbeam.student.training.distributed import Processes
from distilbeam.teacher.softlabels import SoftLabels, SoftLabelSpec

ROWS = 1024  # of a forward pass

Floats = npt.NDArray[np.float32]


class RowWeights:
    """The weights of soft-labelled rows, with mean 1 over the dataset.

    Args:
      soft: the dataset, or None where no weights are used.

    Attributes:
      estimated: float32 [rows of the dataset] once they were estimated here, else None.
    """

    def __init__(self, soft: SoftLabelDataset | None) -> None:
        self._scale = None if soft is None or "weight" not in soft.scalar_columns else 1.0 / soft.mean("weight")
        self._used = soft is not None
        self.estimated: Tensor | None = None

    def of(self, batch: Batch | None) -> Tensor | None:
        """Give the weights of a batch's rows, float32 [b]; None for 1."""
        if batch is None or not self._used:
            return None
        if self.estimated is not None:
            return self.estimated[batch["row"]]
        return None if self._scale is None else batch["weight"] * self._scale


@dataclass(frozen=True)
class Reestimation:
    """What weights are estimated from, and how often.

    Attributes:
      soft: the dataset, in any order, without augmentation.
      held_out: the validation set.
      teacher_logprobs: the teacher's for it, float32 [n, C], NaN in rows that it had no answer for.
      epochs: how many pass between estimates.
    """

    soft: SoftLabelDataset
    held_out: Examples
    teacher_logprobs: Floats
    epochs: int

    def due(self, epoch: int) -> bool:
        """Whether weights are estimated before an epoch; never before the first, whose student has learned nothing."""
        return epoch > 0 and epoch % self.epochs == 0

    def weights(self, module: nn.Module, device: torch.device, processes: Processes) -> Tensor:
        """Estimate the weights of every row.

        Args:
          module: the current student.
          device: where it is.
          processes: who shares the work.

        Returns:
          float32 [rows], with mean 1.
        """
        answered = ~np.isnan(self.teacher_logprobs).any(axis=1)
        logits = forward(module, self.held_out.inputs.split(ROWS), device)
        truth = self.held_out.classes.numpy()
        # soft: the loss is taken to the teacher's probabilities, not to its most probable class
        teacher = self.teacher_logprobs[answered]
        estimator = DebiasEstimator.fit(logits[answered], teacher, truth[answered], soft=True)
        found = [self._part(batch, module, device, estimator) for batch in self.soft if len(batch["row"])]
        weights = np.zeros(self.soft.rows)
        for rows, values in [pair for part in processes.gather(found) for pair in part]:
            weights[rows] = values
        return torch.from_numpy(rescale(weights).astype(np.float32))

    def _part(
        self, batch: Batch, module: nn.Module, device: torch.device, estimator: DebiasEstimator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        logits = forward(module, [batch["inputs"]], device)
        return batch["row"].numpy(), estimator.weights(logits, _dense_logprobs(batch, self.soft.spec))


def forward(module: nn.Module, parts: Iterable[Tensor], device: torch.device) -> Floats:
    """Compute the logits of inputs in evaluation mode, float32 [n, C]."""
    module.eval()
    with torch.inference_mode():
        logits_BC = torch.cat([module(part.to(device)).float().cpu() for part in parts])
    return logits_BC.numpy()


def _dense_logprobs(batch: Batch, spec: SoftLabelSpec) -> Floats:
    classes, tail = (batch.get(f"teacher_{name}") for name in ("classes", "tail_logmass"))
    labels = SoftLabels(
        batch["teacher_logprobs"].numpy(),
        None if classes is None else classes.int().numpy(),
        None if tail is None else tail.numpy(),
    )
    return labels.dense(spec.num_classes)
