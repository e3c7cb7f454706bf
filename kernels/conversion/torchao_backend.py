"""The same conversion by torchao; imported when it is asked for.

fp8: rowwise e4m3, the backward products in the input's own dtype or (`gradients` fp8) in e4m3 as well. int8: rowwise, the
backward products in the input's own dtype. torchao multiplies on a CPU too, by torch's emulation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from distilbeam.kernels.conversion.policy import LowPrecisionPolicy


def convert(module: nn.Module, chosen: Sequence[str], policy: LowPrecisionPolicy) -> None:
    """Let torchao replace layers, in place.

    Args:
      module: the student.
      chosen: names of its linear layers to replace.
      policy: dtype and gradients.

    Raises:
      NotImplementedError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise NotImplementedError("backend 'torchao' needs the package torchao, which is not installed")
    names = frozenset(chosen)
    replace = _to_float8 if policy.dtype == "fp8" else _to_int8
    replace(module, lambda _, name: name in names, policy)


def _to_float8(module: nn.Module, wanted: Callable[[Any, str], bool], policy: LowPrecisionPolicy) -> None:
    from torchao.float8 import CastConfig, Float8LinearConfig, ScalingType, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("rowwise")
    if policy.gradients == "bf16":
        wide = CastConfig(scaling_type=ScalingType.DISABLED)
        config = Float8LinearConfig(
            cast_config_input=config.cast_config_input,
            cast_config_weight=config.cast_config_weight,
            cast_config_grad_output=wide,
            cast_config_weight_for_grad_input=wide,
            cast_config_input_for_grad_weight=wide,
            cast_config_grad_output_for_grad_weight=wide,
            round_scales_to_power_of_2=True,
        )
    convert_to_float8_training(module, config=config, module_filter_fn=wanted)


def _to_int8(module: nn.Module, wanted: Callable[[Any, str], bool], _: LowPrecisionPolicy) -> None:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    # with module_swap False, torchao 0.18 leaves the forward product in full precision under torch 2.13
    config = Int8MixedPrecisionTrainingConfig(grad_input=False, grad_weight=False, module_swap=True)
    quantize_(module, config, filter_fn=wanted)
