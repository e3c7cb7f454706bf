"""The distillation loss of stored teacher labels: `distill_loss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from distilbeam.kernels.compiling import not_narrowed
from distilbeam.kernels.distillation import chunked, reference
from distilbeam.kernels.distillation.given import Given, given
from distilbeam.kernels.distillation.given import reasons as given_reasons
from distilbeam.kernels.distillation.targets import ALPHA, BETA, Mixing, Objective
from distilbeam.kernels.distillation.terms import Options, Reduction, Term, as_labels, make_terms
from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels, SampledLabels, TopKLabels
from distilbeam.kernels.resolve import Reasons, never, pallas_reasons, resolve, triton_reasons

MOST_MIXED_CLASSES = 4_096  # the kernel keeps a dense row in registers where SLaM mixes it
MOST_KEPT = 1_024  # and the kept classes of a sparse one
PREPARING = ("one_kernel", "two_kernels")  # implementations that prepare the label themselves


def distill_loss(
    logits: Tensor,
    labels: Labels | Tensor,
    *,
    weight: Tensor | None = None,
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
    implementation: str | None = None,
) -> Tensor:
    """Compute the distillation loss of a student's logits.

    With f = softmax(logits / T), y the teacher's distribution at temperature T and l_i the loss of row i, the result is
    sum_i weight_i l_i / (number of rows that count); T^2 multiplies value and gradient.

    Args:
      logits: the student's, floating [B, C] of any strides; classes that do not exist are -inf. Computed in float32
        (float64 for float64 logits), whatever the dtype.
      labels: DenseLabels, TopKLabels, SampledLabels or HardLabels; a floating tensor [B, C] is taken as the teacher's
        log-probabilities, an integer tensor [B] as true classes.
      weight: factor of each row's loss, floating [B], a constant; None for 1.
      accuracy: `slam`: probability in [0, 1] that the teacher is right, [B] or a number.
      candidates: `slam`: how many of the teacher's top classes hold the truth, integer [B] or a number; None for 2.
      temperature: T, between 1e-4 and 1e4. True classes are always compared at temperature 1.
      objective: `kl`: KL(y || f), of dense and sampled labels, and of top-k labels that keep every class. `tail`: KL over
        the kept classes and one bucket of all others, bucketed at temperature 1. Over the same buckets, or over the classes
        of dense labels: `reverse_kl`: KL(f || y); `jsd`: beta KL(y || m) + (1 - beta) KL(f || m), m = beta y + (1 - beta) f;
        `skew_kl`: KL(y || alpha y + (1 - alpha) f); `skew_reverse_kl`: KL(f || (1 - alpha) y + alpha f); `tv`: half the sum
        of |y - f|. `truncated_kl`: KL over the kept classes alone, unnormalised, which pulls the student towards
        y / sum y there; `ce`: the same without the teacher's entropy. `renormalised`: KL with both sides normalised on the
        kept ones. `sampled`: KL to the sampled frequencies, whose gradient at T = 1 is unbiased. `slam`: cross-entropy to
        the student mixed with the teacher's errors. At k = C `tail`, `truncated_kl`, `renormalised` and `sampled` equal the
        dense `kl`, and the others their own dense form.
      beta: `jsd`: in [0, 1]; at 0 the loss is forward KL, at 1 reverse KL, as in TRL.
      alpha: `skew_kl`, `skew_reverse_kl`: in [0, 1); at 0 they are forward and reverse KL.
      mixing: `slam`: `plain`, `normalised` or `forward`.
      hard: true classes to mix in, integer [B]; `ignore_index` where unknown.
      hard_share: share of the true class in the loss of a row that has one.
      mask: rows that count, bool [B]; the others, NaN or not, add nothing to value and gradient.
      ignore_index: the class of a row without a true class.
      reduction: `mean`, `sum` or `none` (weighted losses [B]).
      normalizer: replaces the number of rows that count in `mean`, more than 0. Where gradients are averaged over
        processes, as DistributedDataParallel does: the count over all of them, divided by their number.
      implementation: `reference`, `chunked`, `triton` (CUDA), `pallas` (TPU, sparse labels); None chooses by device.
        Other forms for CUDA, which prepare the label themselves and were never measured: `one_kernel`, value and
        gradient together, of 16-bit logits or dense labels; `two_kernels`, sparse labels in three launches a step.
        All but `reference` are differentiable once.

    Returns:
      A scalar, or [B] for `none`; 0 when no row counts.

    Raises:
      ValueError: an argument is out of range, or the objective cannot use these labels.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import distill_loss
      >>> logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
      >>> teacher = torch.tensor([[0.1, 0.6, 0.25, 0.05]]).log()
      >>> round(float(distill_loss(logits, teacher, objective="slam", accuracy=0.7)), 6)
      1.060392

    References:
      Hinton et al., arXiv:1503.02531 (T^2); Kontonis et al., arXiv:2302.03806 (SLaM, Remark B.1 for `plain`);
      Anshumann et al., arXiv:2503.16870 (sampled labels); for the other divergences `divergences.py`.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [examples, classes], got {logits.dtype} {list(logits.shape)}")
    options = Options(
        weight=weight,
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
    call = _Call(logits, as_labels(labels, ignore_index), options)
    name = resolve("distill_loss", implementation, _backends(call))
    with not_narrowed(logits.device.type):
        if name in PREPARING:
            return _preparing(name)(
                logits, given(call.labels, len(logits), logits.shape[1], options), reduction != "none"
            )
        return _implementation(name)(logits, call.terms, reduction != "none")


def chosen(device: torch.device) -> str:
    """Name the implementation that computes the loss of sparse labels and float32 logits where nobody asks for one."""
    nobody = HardLabels(torch.empty(0, dtype=torch.int64, device=device))
    return resolve("distill_loss", None, _backends(_Call(torch.empty(0, 2, device=device), nobody, Options())))


class _Call:
    """A call's arguments, and its terms once somebody asks for them."""

    def __init__(self, logits: Tensor, labels: Labels, options: Options) -> None:
        self.logits, self.labels, self.options = logits, labels, options

    @cached_property
    def terms(self) -> list[Term]:
        """The terms, in the dtype of the computation."""
        logits = self.logits
        compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return make_terms(self.labels, len(logits), logits.shape[1], compute, logits.device, self.options)


def _implementation(name: str) -> Callable[[Tensor, Sequence[Term], bool], Tensor]:
    if name == "triton":
        from distilbeam.kernels.distillation import triton_backend

        return triton_backend.total
    if name == "pallas":
        from distilbeam.kernels.distillation import pallas_backend

        return pallas_backend.total
    return {"reference": reference.total, "chunked": chunked.total}[name]


def _preparing(name: str) -> Callable[[Tensor, Given, bool], Tensor]:
    from distilbeam.kernels.distillation import triton_given_backend as backend

    return backend.one_kernel if name == "one_kernel" else backend.two_kernels


def _backends(call: _Call) -> dict[str, Reasons]:
    """Order the backends for a call: the fused kernel where it can run, then one sweep, which beat autograd wherever measured."""
    logits = call.logits
    triton = {
        "triton": lambda: _triton_reasons(logits, call.terms),
        "one_kernel": lambda: _one_kernel_reasons(call),
        "two_kernels": lambda: _two_kernels_reasons(call),
    }
    pallas = {"pallas": lambda: _pallas_reasons(logits, call.terms)}
    if logits.device.type == "tpu":
        return {**pallas, "reference": never, "chunked": never, **triton}
    if logits.is_cuda:  # blocks that fit a processor's cache leave a GPU idle
        return {"triton": triton.pop("triton"), "reference": never, "chunked": never, **triton, **pallas}
    return {"chunked": never, "reference": never, **triton, **pallas}


def _pallas_reasons(logits: Tensor, terms: list[Term]) -> list[str]:
    reasons = pallas_reasons(logits)
    if logits.dtype == torch.float64:
        reasons.append("it computes in float32, the logits are float64")
    if any(term.targets.classes is None for term in terms):
        reasons.append("dense labels need no kernel there: XLA fuses plain torch")
    return reasons


def _one_kernel_reasons(call: _Call) -> list[str]:
    reasons = _preparing_reasons(call)
    if call.logits.dtype not in (torch.bfloat16, torch.float16) and not isinstance(call.labels, DenseLabels):
        reasons.append(f"it holds logits of 16 bits, got {str(call.logits.dtype).removeprefix('torch.')}")
    return reasons


def _two_kernels_reasons(call: _Call) -> list[str]:
    reasons = _preparing_reasons(call)
    if isinstance(call.labels, DenseLabels):
        reasons.append("it takes sparse labels")
    return reasons


def _preparing_reasons(call: _Call) -> list[str]:
    reasons = triton_reasons(call.logits) + given_reasons(call.labels, call.options)
    if call.logits.dtype == torch.float64:
        reasons.append("it computes in float32, the logits are float64")
    if isinstance(call.labels, (TopKLabels, SampledLabels)) and call.labels.classes.shape[1] > MOST_KEPT:
        reasons.append(f"sparse labels keep at most {MOST_KEPT:,} classes there")
    return reasons


def _triton_reasons(logits: Tensor, terms: list[Term]) -> list[str]:
    reasons = triton_reasons(logits)
    if logits.dtype == torch.float64:
        reasons.append("it computes in float32, the logits are float64")
    mixed = any(term.targets.classes is None and term.targets.flip is not None for term in terms)
    if mixed and logits.shape[1] > MOST_MIXED_CLASSES:
        reasons.append(
            f"dense labels of slam have at most {MOST_MIXED_CLASSES:,} classes there, got {logits.shape[1]:,}"
        )
    if any(term.targets.classes is not None and term.targets.classes.shape[1] > MOST_KEPT for term in terms):
        reasons.append(f"sparse labels keep at most {MOST_KEPT:,} classes there")
    return reasons
