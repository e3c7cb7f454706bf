"""Structured pruning: whole channels are taken away, so that what is left is a smaller dense network.

Channels that must go together (a layer's outputs, the next layer's inputs, the norm between, both sides of a residual
sum) are found by torch-pruning, which removes the groups of least magnitude. A pruned student is a student like any
other: its configuration names the factory below, which builds the network it came from and cuts it to the sizes that
are left. Loading one needs no torch-pruning.

References:
  Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilbeam.student.checkpoint import Student, load_student, save_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.laurel import LaurelResidual

FACTORY = f"{__name__}:pruned_network"
LEAST_ROWS = 2


def prune_student(student: str | Path, ratio: float, directory: str | Path) -> Path:
    """Take a share of the channels of every layer away; the result needs a short training to recover.

    Args:
      student: directory of a trained student; it may be pruned already.
      ratio: share of each layer's channels to remove, between 0 and 1; the logits stay.
      directory: where the pruned student appears; `training` with `init` set to it fine-tunes it.

    Returns:
      The directory.

    Raises:
      ValueError: the ratio is out of range, torch-pruning is not installed, or the network cannot be pruned.
      FileExistsError: the directory already holds something.

    References:
      Fang et al., arXiv:2301.12900.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be a share of the channels between 0 and 1, got {ratio}")
    former = load_student(student)
    require_prunable(former.module)
    module = former.module.requires_grad_()
    shapes = _shapes(module)
    _prune(module, former.zeros(LEAST_ROWS), ratio)
    if _shapes(module) == shapes:
        raise ValueError(
            f"{student} has no hidden channels that could be taken away at ratio {ratio}; prune a network with "
            "hidden layers, or take a larger ratio"
        )
    extra = {**former.extra, "pruned": {"ratio": ratio, "from": former.fingerprint()}}
    return save_student(directory, module, _config(former, module), former.classes, former.input_shape, extra)


def require_prunable(module: nn.Module) -> None:
    """Check that the channels of a network can be followed from layer to layer.

    Args:
      module: the network.

    Raises:
      ValueError: it has learned residuals, RMS norms, attention or embeddings.
    """
    for part in module.modules():
        if isinstance(part, LaurelResidual) and part.variant != "plain":
            raise ValueError(
                "pruning can follow channels through residual 'none' and 'plain' but not through learned residuals; "
                f"got 'laurel-{part.variant}'"
            )
        if isinstance(part, nn.RMSNorm):
            raise ValueError("pruning cannot follow channels through norm 'rms'; choose norm 'own', or a smaller width")
        if isinstance(part, nn.MultiheadAttention | nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"pruning takes linear, convolutional and norm layers, got {type(part).__name__}; make the network "
                "narrower in its configuration instead"
            )


def pruned_network(
    input_shape: tuple[int, ...], num_classes: int, network: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Build a network and cut it to size; the factory of pruned students.

    Args:
      input_shape: shape of one example's input.
      num_classes: number of classes C.
      network: configuration of the student before pruning.
      shapes: sizes of the parameters and buffers that were cut, by name.

    Returns:
      The network with the weights of the first channels of each layer; loading a student puts its own in.

    Raises:
      ValueError: a name or a size does not suit the network.
    """
    module = build_student(StudentConfig.model_validate(network), input_shape, num_classes)
    tensors = dict(module.state_dict())
    for name, shape in shapes.items():
        if name not in tensors or any(a > b for a, b in zip(shape, tensors[name].shape, strict=True)):
            raise ValueError(f"shapes must make tensors of the network smaller, got {name} {list(shape)}")
        _cut(module, name, shape)
    for part in module.modules():
        _describe(part)
    return module


def _prune(module: nn.Module, example: torch.Tensor, ratio: float) -> None:
    try:
        import torch_pruning
    except ImportError as e:
        raise ValueError("pruning needs torch-pruning; install distilbeam[compress]") from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        pruner = torch_pruning.pruner.BasePruner(
            module,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[_last_layer(module)],
        )
        pruner.step()
    logits = module(example)
    assert logits.shape[0] == LEAST_ROWS


def _last_layer(module: nn.Module) -> nn.Module:
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return layers[-1]


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def _config(former: Student, module: nn.Module) -> StudentConfig:
    """Describe the pruned network by the one that it was cut from first."""
    config = former.config
    network = config.options["network"] if config.kind == FACTORY else config.model_dump(mode="json")
    with torch.random.fork_rng(devices=[]):
        whole = build_student(StudentConfig.model_validate(network), former.input_shape, len(former.classes))
    full = _shapes(whole)
    shapes = {name: shape for name, shape in _shapes(module).items() if shape != full[name]}
    return StudentConfig(kind=FACTORY, options={"network": network, "shapes": shapes}, input=config.input)


def _cut(module: nn.Module, name: str, shape: Sequence[int]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    new = old.detach()[tuple(slice(size) for size in shape)].clone()
    setattr(owner, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def _describe(part: nn.Module) -> None:
    """Bring a layer's own record of its sizes in line with its tensors."""
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, nn.Conv2d):
        depthwise = part.groups > 1 and part.groups == part.in_channels
        part.out_channels, inputs = part.weight.shape[:2]
        part.groups = part.out_channels if depthwise else part.groups
        part.in_channels = inputs * part.groups
    elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
        part.num_features = math.prod(part.weight.shape)
    elif isinstance(part, nn.LayerNorm):
        part.normalized_shape = tuple(part.weight.shape)
