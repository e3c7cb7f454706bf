"""Loss and gradient of rows that hold nothing unusual, in as few operations as torch has for them; on a CPU.

A small batch's time is the number of operations, a large one's the number of passes over [B, C]. With s the scale of a
row, f the student's distribution and y the target, every loss here is

    loss = sum pull (log f - log y) T,     gradient = pull - f sum pull,     pull = -s T y

where the entropy's log y may be left out, and the gradient is that of log_softmax, which torch computes in one pass. What
these few operations cannot compute (logits of -inf, masses that underflow) shows in a result that is not finite or in a
bucket too small: then nothing is given, and `sweep.py` does the work with masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distilbeam.kernels.distillation.closed_form import bucket_losses_and_gradient
from distilbeam.kernels.distillation.sweep import kept_gradient, kept_logits
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term

LEAST_MASS = 1e-30  # of a bucket, in a softmax over all classes: what underflows is then too small to matter
Made = tuple[Tensor, Tensor]


def loss_and_gradient(logits_BC: Tensor, term: Term, reduced: bool, out: Tensor | None = None) -> Made | None:
    """Compute the scaled loss of one term and the logits' gradient.

    Args:
      logits_BC: float32 or float64 [B, C], of any strides, in the dtype of the term.
      term: of the same rows.
      reduced: whether to add the rows up.
      out: contiguous room for the gradient, [B, C]; None makes some.

    Returns:
      The loss, a scalar or [B], and the gradient; None, with nothing of use in `out`, where the logits are on an
      accelerator, which would have to be waited for, or hold something unusual.
    """
    targets, scale_B = term.targets, term.scale
    if not logits_BC.is_cpu or not len(logits_BC):
        return None
    if term.valid is not None:  # what such a row holds is unusual or multiplied by 0
        scale_B = scale_B.masked_fill(~term.valid, 0)
    if targets.classes is not None:
        sparse = _true_class if targets.certain else _kept if targets.rest_temperature is None else _kept_and_rest
        return sparse(logits_BC, targets, targets.classes, scale_B, reduced, out)
    if targets.flip is None:
        return _every_class(logits_BC, targets, scale_B, reduced, out)
    return _scaled(bucket_losses_and_gradient(logits_BC, targets, out), scale_B, reduced)


def _every_class(v_BN: Tensor, targets: Targets, scale_B: Tensor, reduced: bool, out: Tensor | None) -> Made | None:
    T = targets.temperature
    logf_BN = torch.log_softmax(v_BN if T == 1 else v_BN / T, dim=1)
    pull_BN = targets.logprobs.exp().mul_((scale_B * -T)[:, None])
    loss = _added(logf_BN - targets.logprobs if targets.entropy else logf_BN.clone(), pull_BN, T, reduced)
    if not math.isfinite(loss if reduced else loss.sum()):
        return None
    return loss, torch._log_softmax_backward_data(pull_BN, logf_BN, 1, logf_BN.dtype, out=out)


def _kept(
    logits_BC: Tensor, targets: Targets, classes_BK: Tensor, scale_B: Tensor, reduced: bool, out: Tensor | None
) -> Made | None:
    v_BK = kept_logits(logits_BC, targets, classes_BK)
    plain = targets.flip is None and targets.padding is None
    made = _every_class(v_BK, targets, scale_B, reduced, None) if plain else None
    if made is None:
        made = _scaled(bucket_losses_and_gradient(v_BK, targets), scale_B, reduced)
    if made is None:
        return None
    gradient_BC = torch.empty_like(logits_BC, memory_format=torch.contiguous_format) if out is None else out
    return made[0], gradient_BC.zero_().scatter_(1, classes_BK, kept_gradient(made[1], targets))


def _kept_and_rest(
    logits_BC: Tensor, targets: Targets, classes_BK: Tensor, scale_B: Tensor, reduced: bool, out: Tensor | None
) -> Made | None:
    tau, T = targets.rest_temperature, targets.temperature
    assert tau is not None
    gradient_BC = torch.softmax(logits_BC if tau == 1 else logits_BC / tau, dim=1, out=out)
    kept_BK = gradient_BC.gather(1, classes_BK)
    rest_B1 = gradient_BC.scatter_(1, classes_BK, 0).sum(dim=1, keepdim=True)
    f_BN = torch.cat([kept_BK, rest_B1], dim=1)
    if not float(f_BN.amin()) > LEAST_MASS:
        return None
    if tau == T and targets.flip is None and targets.padding is None:  # the buckets' softmax is there already
        pull_BN = targets.logprobs.exp().mul_((scale_B * -T)[:, None])
        logf_BN = f_BN.log()
        loss = _added(logf_BN.sub_(targets.logprobs) if targets.entropy else logf_BN, pull_BN, T, reduced)
        slope_BN = torch.addcmul(pull_BN, f_BN, pull_BN.sum(dim=1, keepdim=True), value=-1)
    else:
        v_BN = f_BN.log_() if tau == 1 else f_BN.log_().mul_(tau)
        if targets.padding is not None:
            v_BN[:, :-1].masked_fill_(targets.padding, -torch.inf)
        made = _scaled(bucket_losses_and_gradient(v_BN, targets), scale_B, reduced)
        if made is None:
            return None
        loss, slope_BN = made
    gradient_BC *= slope_BN[:, -1:] / rest_B1
    return loss, gradient_BC.scatter_(1, classes_BK, kept_gradient(slope_BN, targets))


def _true_class(
    logits_BC: Tensor, _: Targets, classes_B1: Tensor, scale_B: Tensor, reduced: bool, out: Tensor | None
) -> Made | None:
    """Compute the cross-entropy of true classes, whose gradient is minus the mass of all others."""
    gradient_BC, scale_B1 = torch.softmax(logits_BC, dim=1, out=out), scale_B[:, None]
    kept_B1 = gradient_BC.gather(1, classes_B1)
    if not float(kept_B1.amin()) > LEAST_MASS:
        return None
    rest_B1 = gradient_BC.scatter_(1, classes_B1, 0).sum(dim=1, keepdim=True)
    loss = _added(kept_B1.log_(), -scale_B1, 1.0, reduced)
    return loss, gradient_BC.mul_(scale_B1).scatter_(1, classes_B1, rest_B1.mul_(-scale_B1))


def _added(value_BN: Tensor, pull_BN: Tensor, temperature: float, reduced: bool) -> Tensor:
    """Add up pull * value, overwriting the values."""
    loss = value_BN.mul_(pull_BN).sum() if reduced else value_BN.mul_(pull_BN).sum(dim=1)
    return loss if temperature == 1 else loss.mul_(temperature)


def _scaled(solved: Made, scale_B: Tensor, reduced: bool) -> Made | None:
    """Bring rows' losses and gradients, which may be overwritten, to what was asked for."""
    loss_B, gradient_BN = solved
    loss_B = loss_B * scale_B
    loss = loss_B.sum()
    if not math.isfinite(loss):
        return None
    return loss if reduced else loss_B, gradient_BN.mul_(scale_B[:, None])
