"""The network as a training calls it: its precision, compiled or not, shared by processes, its last layer left to the loss."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distilbeam.kernels.conversion.layers import LowPrecisionLinear
from distilbeam.kernels.distillation.interface import chosen as loss_backend
from distilbeam.kernels.linear_distillation.choice import why_apart
from distilbeam.kernels.linear_distillation.interface import chosen as layer_backend
from distilbeam.student.networks.config import HUGGINGFACE, StudentConfig
from distilbeam.student.networks.last_layer import LastLayerApart
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.teacher.softlabels import SoftLabelSpec

log = logging.getLogger(__name__)


class UpToLastLayer(nn.Module):
    """A student whose last layer is left to the loss: gives the features, and the layer's weight and bias.

    These go through the forward pass so that whoever wraps it, DistributedDataParallel for one, sees them used.
    """

    def __init__(self, module: LastLayerApart) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute features [B, H] of inputs [B, ...]; give them with weight [C, H] and bias [C]."""
        layer = self.module.last_layer()
        bias = None if layer.bias is None else layer.bias.view_as(layer.bias)
        return self.module.features(x), layer.weight.view_as(layer.weight), bias


def make_network(
    module: nn.Module,
    student: StudentConfig,
    training: TrainConfig,
    processes: Processes,
    spec: SoftLabelSpec | None = None,
) -> nn.Module:
    """Wrap a student for its training; parameters stay those of the module.

    Args:
      module: the student, on its device; with precision fp8 or int8 its linear layers are replaced in place.
      student: its configuration.
      training: its training's configuration.
      processes: who trains it; each begins with the weights of the first.
      spec: of the soft labels; None without them.

    Returns:
      What to call in a step: gives the logits, or what `UpToLastLayer` gives.
    """
    if training.precision in ("fp8", "int8"):
        _lower_precision(module, training, processes)
    together = last_layer_together(module, training, processes, spec)
    network: nn.Module = module
    if together:
        assert isinstance(module, LastLayerApart)
        network = UpToLastLayer(module)
    if processes.first:  # at the level that is shown by default where a precision was asked for
        level = logging.INFO if training.precision == "fp32" else logging.WARNING
        log.log(level, "precision %s: %s", training.precision, precisions(module, training, together=together))
    if processes.size > 1:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        if ids:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = DistributedDataParallel(network, ids, find_unused_parameters=_may_skip_parameters(student))
    # parameters may be of the first batch's shape or the last's: let the compiler see sizes that change
    return cast("nn.Module", torch.compile(network)) if training.compile else network


def precisions(module: nn.Module, training: TrainConfig, *, together: bool) -> str:
    """Say in a line what runs in which precision, and which implementation computes it.

    Args:
      module: the student, converted.
      training: its training's configuration.
      together: whether the last layer is computed by the loss.
    """
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    narrow = {name: layer for name, layer in module.named_modules() if isinstance(layer, LowPrecisionLinear)}
    products = " and ".join(sorted({layer.product for layer in narrow.values()}))
    eight = (
        f"{len(narrow)} of {len(linear)} linear layers in {training.precision} by {products} ({', '.join(narrow)}), "
    )
    other = "all other" if narrow else "all"
    if training.precision == "fp32":
        line = "everything in float32"
    else:
        rest = f"{other} matrix products in bfloat16, parameters, norms, residuals and losses in float32"
        line = eight + rest if narrow else rest
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if together:
        return f"{line}; the last layer and the loss in one operation by {layer_backend(device)}, without logits"
    return f"{line}; the loss by {loss_backend(device)}"


def last_layer_together(
    module: nn.Module, training: TrainConfig, processes: Processes, spec: SoftLabelSpec | None
) -> bool:
    """Whether the last layer is taken together with the loss."""
    smoothed = training.augment.label_smoothing > 0
    layer = module.last_layer() if isinstance(module, LastLayerApart) else None
    if training.last_layer == "apart" or type(layer) is not nn.Linear or smoothed:
        if training.last_layer == "together":
            why = "label smoothing needs the logits" if smoothed else "the student has no linear last layer of its own"
            raise ValueError(f"training.last_layer cannot be 'together': {why}; leave it out")
        return False
    if training.last_layer == "together":
        return True
    rows = -(-training.batch_size // processes.size)
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16
    sparse = spec is None or spec.kind != "dense"
    return why_apart(rows, layer.out_features, processes.device, dtype, sparse=sparse) is None


def _lower_precision(module: nn.Module, training: TrainConfig, processes: Processes) -> None:
    from distilbeam.kernels.conversion.interface import to_low_precision
    from distilbeam.kernels.conversion.policy import LowPrecisionPolicy

    rows = -(-training.batch_size // processes.size)
    policy = LowPrecisionPolicy(dtype=training.precision, gate=training.precision_gate, rows=rows)
    report = to_low_precision(module, policy).under_autocast("bfloat16")
    if processes.first:  # at the level that is shown by default: nobody is to believe in 8 bits where there are none
        log.warning("precision %s: %s", training.precision, report)


def _may_skip_parameters(student: StudentConfig) -> bool:
    """Whether a step may leave parameters without a gradient, which DistributedDataParallel must be told."""
    return "pa" in student.residual or ":" in student.kind or student.kind == HUGGINGFACE
