"""A whole student's linear layers to 8 bits: `to_low_precision`."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from distilbeam.kernels.conversion import torchao_backend
from distilbeam.kernels.conversion.layers import LowPrecisionLinear
from distilbeam.kernels.conversion.policy import LowPrecisionPolicy
from distilbeam.kernels.conversion.report import LayerPrecision, LowPrecisionReport
from distilbeam.kernels.low_precision.shapes import why_not


def to_low_precision(module: nn.Module, policy: LowPrecisionPolicy) -> LowPrecisionReport:
    """Let a student's linear layers run in 8 bits, in place.

    Parameters stay what and where they are: float, under the same names, known to an optimizer made before or after.
    The layers run in 8 bits in training and in evaluation alike.

    Args:
      module: the student; changed in place, on its device already.
      policy: which layers, in what.

    Returns:
      What became of every linear layer and why; print it.

    Raises:
      ValueError: the module is itself a linear layer, was converted before, a name to skip is no layer's, or the policy
        contradicts itself.
      NotImplementedError: torchao was asked for and cannot do it here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import LowPrecisionPolicy, to_low_precision
      >>> student = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
      >>> print(to_low_precision(student, LowPrecisionPolicy(dtype="fp8", gate="sizes")))
      1 of 2 linear layers run in 8 bits
      layer  shape            runs in  why
      0      Linear 64 -> 32  fp8      converted by distilbeam
      2      Linear 32 -> 10  float32  it gives the logits
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    _check(module, linear, policy)
    last = next(reversed(linear), None)
    reasons = {name: _why_not(name, layer, name == last, policy) for name, layer in linear.items()}
    chosen = [name for name, reason in reasons.items() if not reason]
    layers = tuple(_entry(name, layer, reasons[name], policy.dtype) for name, layer in linear.items())
    gradients = policy.gradients or ("fp8" if policy.dtype == "fp8" else "bf16")
    if policy.backend == "torchao":
        torchao_backend.convert(module, chosen, policy)
    else:
        for name in chosen:
            module.set_submodule(name, LowPrecisionLinear(linear[name], policy.dtype, gradients))
    return LowPrecisionReport(policy.backend, layers)


def _why_not(name: str, layer: nn.Linear, is_last: bool, policy: LowPrecisionPolicy) -> str:
    """Say why a layer stays as it is; empty when it does not."""
    inputs, outputs, multiple = layer.in_features, layer.out_features, policy.multiple_of
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} may compute something else than torch's Linear"
    if any(fnmatchcase(name, pattern) for pattern in policy.skip):
        return "the policy skips it"
    if is_last and policy.keep_last:
        return "it gives the logits"
    if inputs < policy.min_inputs or outputs < policy.min_outputs:
        return f"smaller than {policy.min_inputs:,} -> {policy.min_outputs:,}"
    if inputs % multiple or outputs % multiple:
        return f"inputs and outputs are not multiples of {multiple}"
    if policy.gate == "table":
        assert policy.rows is not None
        return why_not(policy.dtype, policy.rows, inputs, outputs, layer.weight.device) or ""
    return ""


def _entry(name: str, layer: nn.Linear, reason: str, dtype: str) -> LayerPrecision:
    kept = str(layer.weight.dtype).removeprefix("torch.")
    return LayerPrecision(
        name, type(layer).__name__, layer.in_features, layer.out_features, kept if reason else dtype, reason
    )


def _check(module: nn.Module, linear: dict[str, nn.Linear], policy: LowPrecisionPolicy) -> None:
    if isinstance(module, nn.Linear):
        raise ValueError("module must contain linear layers, it is one itself: put it into torch.nn.Sequential")
    done = [name for name, layer in linear.items() if isinstance(layer, LowPrecisionLinear)]
    if done:
        raise ValueError(f"module must not have been converted before, {done[0]} was; convert a fresh copy")
    if policy.gate == "table" and policy.rows is None:
        raise ValueError("gate 'table' needs rows, the rows of a training step, to judge a layer's shape")
    if policy.gradients == "fp8" and policy.dtype != "fp8":
        raise ValueError(f"gradients 'fp8' need dtype 'fp8', got {policy.dtype!r}")
    for pattern in policy.skip:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"skip must name linear layers out of {', '.join(linear)}, got {pattern!r}")
