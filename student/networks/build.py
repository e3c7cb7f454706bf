"""Students by configuration: linear, mlp, cnn, resnet, text, transformer, huggingface, or the user's own factory.

A network takes inputs [B, *input_shape], float32 or int64 ids, and returns logits [B, C].
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from distilbeam.student.networks.bag import text_network
from distilbeam.student.networks.cnn import SurveyCnn
from distilbeam.student.networks.config import HUGGINGFACE, StudentConfig
from distilbeam.student.networks.huggingface import huggingface_network
from distilbeam.student.networks.last_layer import Linear
from distilbeam.student.networks.mlp import Mlp
from distilbeam.student.networks.resnet import ResNet
from distilbeam.student.networks.transformer import Transformer


def build_student(config: StudentConfig, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build an untrained student; its initial weights come from torch's global generator.

    Args:
      config: the student's configuration.
      input_shape: shape of one example's input.
      num_classes: number of classes C.

    Returns:
      A module from inputs [B, *input_shape], float32 or int64 ids as `config.input` makes them, to logits [B, C].

    Raises:
      ValueError: the input does not suit the network, or the factory cannot be found or returns no module.

    Example:
      >>> from distilbeam.student.networks.config import StudentConfig
      >>> config = StudentConfig(kind="linear", input={"columns": ["image"]})
      >>> count_parameters(build_student(config, (8, 8), 10))
      650
    """
    if config.kind == "linear":
        return Linear(math.prod(input_shape), num_classes)
    if config.kind == "mlp":
        return Mlp(math.prod(input_shape), config, num_classes)
    if config.kind == "cnn":
        return SurveyCnn(input_shape, config, num_classes)
    if config.kind == "resnet":
        return ResNet(input_shape, config, num_classes)
    if config.kind == "text":
        return text_network(input_shape, config, num_classes)
    if config.kind == "transformer":
        return Transformer(input_shape, config, num_classes)
    if config.kind == HUGGINGFACE:
        return huggingface_network(config, input_shape, num_classes)
    return _from_factory(config, input_shape, num_classes)


def count_parameters(module: nn.Module) -> int:
    """Count the numbers that training adjusts."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _from_factory(config: StudentConfig, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    name, _, attribute = config.kind.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"student kind {config.kind!r} cannot be found: {e}") from e
    module = factory(input_shape=input_shape, num_classes=num_classes, **config.options)
    if not isinstance(module, nn.Module):
        raise ValueError(f"student factory {config.kind!r} must return a torch module, got {type(module).__name__}")
    return module
