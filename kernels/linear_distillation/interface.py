"""The student's last layer and the distillation loss together: `linear_distill_loss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from distilbeam.kernels.compiling import not_narrowed
from distilbeam.kernels.distillation.interface import MOST_KEPT
from distilbeam.kernels.distillation.targets import ALPHA, BETA, Mixing, Objective
from distilbeam.kernels.distillation.terms import Options, Reduction, Term, as_labels, make_terms
from distilbeam.kernels.labels import HardLabels, Labels
from distilbeam.kernels.linear_distillation import chunked, reference
from distilbeam.kernels.linear_distillation.operands import Layer, Operands
from distilbeam.kernels.linear_distillation.precision import Precision, autocast, checked, narrowed
from distilbeam.kernels.quantize.formats import FORMAT_OF, QuantizedRows
from distilbeam.kernels.quantize.interface import triton_refusals
from distilbeam.kernels.resolve import Reasons, never, pallas_reasons, resolve, triton_reasons


def linear_distill_loss(
    hidden: Tensor | QuantizedRows,
    weight: Tensor | QuantizedRows,
    bias: Tensor | None,
    labels: Labels | Tensor,
    *,
    example_weight: Tensor | None = None,
    accuracy: Tensor | float | None = None,
    candidates: Tensor | int | None = None,
    temperature: float = 1.0,
    objective: Objective = "kl",
    beta: float = BETA,
    alpha: float = ALPHA,
    mixing: Mixing = "normalised",
    hard: Tensor | None = None,
    hard_share: float = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    precision: Precision | Literal["table"] | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute the distillation loss of a linear layer's outputs without holding them.

    The result is `distill_loss(hidden @ weight.T + bias, labels, ...)`, with float32 accumulation whatever the dtypes. Under
    autocast, inputs and weight are rounded to its dtype first, as a linear layer's would be, and their gradients come in
    their own.

    Args:
      hidden: inputs of the student's last layer, floating [B, H], or their rows in 8 bits.
      weight: its weight, floating [C, H], or its rows in 8 bits, quantised once for several calls.
      bias: its bias, floating [C], -inf for classes that do not exist; None for 0.
      labels: as for `distill_loss`. Memory is independent of C for all but dense labels, which have C columns already.
      example_weight: factor of each row's loss, floating [B]; `weight` of `distill_loss`.
      accuracy: as for `distill_loss`.
      candidates: as for `distill_loss`.
      temperature: as for `distill_loss`.
      objective: as for `distill_loss`.
      beta: as for `distill_loss`.
      alpha: as for `distill_loss`.
      mixing: as for `distill_loss`.
      hard: as for `distill_loss`.
      hard_share: as for `distill_loss`.
      mask: as for `distill_loss`; hidden states of rows that do not count may be NaN.
      ignore_index: as for `distill_loss`.
      reduction: as for `distill_loss`.
      normalizer: as for `distill_loss`.
      precision: what inputs and weight are rounded to, row by row, before they are multiplied: `bf16`, or `int8` or
        `fp8` (e4m3) with a scale per row; the rounding is taken for the identity in the gradients, and
        `linear_distillation/precision.py` bounds what it does to the loss. None leaves them in their own precision;
        `table` rounds where that is known to pay, which `loss_precision` says and nobody else: print it.
      implementation: `reference`, `chunked`, and for sparse labels `triton` (CUDA), `pallas` (TPU; holds the logits) and
        `in_place` (CUDA; the logits of a layer in 16 bits or fp8, never measured); None chooses by device. All but
        `reference` are differentiable once.

    Returns:
      A scalar, or [B] for reduction `none`; differentiable in hidden, weight and bias.

    Raises:
      ValueError: sizes disagree, an argument is out of range, the objective cannot use these labels, or rows are given in
        another precision.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import HardLabels, linear_distill_loss
      >>> loss = linear_distill_loss(torch.zeros(2, 3), torch.zeros(4, 3), None, HardLabels(torch.tensor([0, 3])))
      >>> round(float(loss), 4)  # log 4
      1.3863

    References:
      Hsu et al., arXiv:2410.10989 (gradients made chunk by chunk in the forward pass, "chunked" by rows);
      Wijmans et al., arXiv:2411.09009 (recomputed tiles of classes).
    """
    layer = Layer(hidden, weight, bias)
    _check(layer.operands)
    rounded = checked(layer, precision)
    if rounded is None:
        layer, rounded = autocast(layer)
    options = Options(
        weight=example_weight,
        accuracy=accuracy,
        candidates=candidates,
        temperature=temperature,
        objective=objective,
        beta=beta,
        alpha=alpha,
        mixing=mixing,
        hard=hard,
        hard_share=hard_share,
        mask=mask,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
    )
    with not_narrowed(layer.operands.hidden.device.type):
        return _loss(layer, rounded, as_labels(labels, ignore_index), options, implementation)


def _loss(
    layer: Layer, rounded: Precision | None, labels: Labels, options: Options, implementation: str | None
) -> Tensor:
    operands, reduced = layer.operands, options.reduction != "none"
    (count, device), classes = (len(operands.hidden), operands.hidden.device), len(operands.weight)
    compute = torch.float64 if operands.hidden.dtype == torch.float64 else torch.float32
    terms = make_terms(labels, count, classes, compute, device, options)
    valid = _rows_that_count(terms)
    # hidden states of rows that do not count must not meet a gradient of zero; which they are, a GPU is not asked
    index = valid.nonzero()[:, 0] if valid is not None and valid.is_cpu else None
    if valid is not None and index is None:
        layer = layer.without(~valid)
    if index is not None:
        layer = layer.rows(index)
        terms = [
            Term(t.targets.rows(index), t.scale[index], None if t.valid is None else t.valid[index]) for t in terms
        ]
    if rounded is not None:
        layer = narrowed(layer, rounded)
    name = resolve("linear_distill_loss", implementation, _backends(layer.operands, terms))
    value = _implementation(name)(layer, terms, reduced)
    if index is None or reduced:
        return value
    return value.new_zeros(count).index_put((index,), value)


def chosen(device: torch.device) -> str:
    """Name the implementation that computes the loss of sparse labels and a float32 layer where nobody asks for one."""
    nobody = HardLabels(torch.empty(0, dtype=torch.int64, device=device))
    operands = Operands(torch.empty(0, 1, device=device), torch.empty(2, 1, device=device), None)
    terms = make_terms(nobody, 0, 2, torch.float32, device, Options())
    return resolve("linear_distill_loss", None, _backends(operands, terms))


def _implementation(name: str) -> Callable[[Layer, Sequence[Term], bool], Tensor]:
    if name == "triton":
        from distilbeam.kernels.linear_distillation import triton_backend

        return triton_backend.total
    if name == "in_place":
        from distilbeam.kernels.linear_distillation import triton_in_place

        return triton_in_place.total
    if name == "pallas":
        from distilbeam.kernels.distillation import pallas_backend

        return partial(reference.total, of_logits=pallas_backend.total)
    return {"reference": reference.total, "chunked": chunked.total}[name]


def _backends(operands: Operands, terms: list[Term]) -> dict[str, Reasons]:
    """Order the backends for a call: those with kernels on their devices, else buffers of logits.

    Rows in fp8, whose products come in bfloat16, have one place where that is what the loss reads.
    """
    sparse = partial(_sparse_reasons, *operands[:2], terms)
    triton: dict[str, Reasons] = {
        "triton": lambda: _triton_reasons(operands) + sparse(),
        "in_place": lambda: _in_place_reasons(operands, terms) + sparse(),
    }
    pallas: dict[str, Reasons] = {"pallas": lambda: pallas_reasons(*operands[:3]) + sparse()}
    if operands.hidden.device.type == "tpu":
        return {**pallas, "reference": never, "chunked": never, **triton}
    if operands.hidden.is_cuda:
        return {**triton, "chunked": never, "reference": never, **pallas}
    return {"chunked": never, "reference": never, **triton, **pallas}


def _triton_reasons(operands: Operands) -> list[str]:
    hidden, weight, bias, *_ = operands
    reasons = triton_reasons(hidden, weight, bias)
    if hidden.dtype in FORMAT_OF and hidden.dtype != torch.int8:
        reasons.append("its logits are float32, and products of fp8 rows come in bfloat16")
    return reasons


def _in_place_reasons(operands: Operands, terms: list[Term]) -> list[str]:
    hidden, weight, bias, *_ = operands
    if hidden.dtype == torch.float8_e4m3fn:
        reasons = triton_refusals(FORMAT_OF[hidden.dtype], hidden, weight)
    else:
        reasons = triton_reasons(hidden, weight, bias)
        if hidden.dtype not in (torch.bfloat16, torch.float16):
            kind = str(hidden.dtype).removeprefix("torch.")
            reasons.append(f"its logits have 16 bits, and those of {kind} hidden states have more")
    if len(terms) > 1 or any(t.targets.rest_temperature is None or t.targets.flip is not None for t in terms):
        reasons.append(
            "it takes sparse labels with a bucket of all other classes, without slam and without true classes"
        )
    if any(t.targets.logprobs.shape[1] > MOST_KEPT for t in terms):
        reasons.append(f"sparse labels keep fewer than {MOST_KEPT:,} classes there")
    return reasons


def _sparse_reasons(hidden: Tensor, weight: Tensor, terms: list[Term]) -> list[str]:
    reasons = []
    if hidden.dtype != weight.dtype or hidden.dtype == torch.float64:
        reasons.append(f"hidden and weight must have one dtype of at most 32 bits, got {hidden.dtype}, {weight.dtype}")
    if any(term.targets.classes is None for term in terms):
        reasons.append("dense labels hold a value for every class anyway")
    return reasons


def _rows_that_count(terms: list[Term]) -> Tensor | None:
    """Say which rows are of any term, bool [B], or None for all."""
    masks = [term.valid for term in terms if term.valid is not None]
    return torch.stack(masks).any(dim=0) if len(masks) == len(terms) else None


def _check(operands: Operands) -> None:
    hidden, weight, bias, *_ = operands
    if hidden.ndim != 2 or not (hidden.is_floating_point() or operands.hidden_scale is not None):
        raise ValueError(f"hidden must be floating [examples, features], got {hidden.dtype} {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [classes, {hidden.shape[1]}] to fit hidden, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one value per class, [{len(weight)}], got {list(bias.shape)}")
