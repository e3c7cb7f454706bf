"""Turn a block of logits into the gradient of its loss, in place.

For sparse labels the classes are visited in a handful of passes over a block that fits the cache: the kept logits are
taken out, the rest is summed up as exponentials, the small problem over the buckets is solved in closed form, and the
same exponentials, times one factor per row, are the gradient of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distilbeam.kernels.distillation.closed_form import bucket_losses_and_gradient
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term

LEAST_MASS = 1e-30  # of a bucket, in a softmax over all classes: what underflows is then too small to matter


def replace_by_gradient(z_BC: Tensor, terms: Sequence[Term]) -> Tensor:
    """Compute the scaled losses of a block and overwrite its logits by their gradient.

    Args:
      z_BC: logits, contiguous float32 or float64 [B, C]; on return the gradient of the sum of the result.
      terms: of the same rows.

    Returns:
      The scaled losses, [B].
    """
    copies = [z_BC.clone() for _ in terms[1:]]
    loss_B = _one_term(z_BC, terms[0])
    for copy_BC, term in zip(copies, terms[1:], strict=True):
        loss_B += _one_term(copy_BC, term)
        z_BC += copy_BC
    return loss_B


def _one_term(z_BC: Tensor, term: Term) -> Tensor:
    targets = term.targets
    if targets.classes is None:
        loss_B, _ = bucket_losses_and_gradient(z_BC, targets, out=z_BC)
        z_BC *= term.scale[:, None]
    else:
        loss_B = _sparse(z_BC, targets, targets.classes, term.scale)
    if term.valid is None:
        return loss_B * term.scale
    z_BC.masked_fill_(~term.valid[:, None], 0)
    return (loss_B * term.scale).masked_fill(~term.valid, 0)


def _sparse(z_BC: Tensor, targets: Targets, classes_BK: Tensor, scale_B: Tensor) -> Tensor:
    kept_BK = _kept_logits(z_BC, targets, classes_BK)
    if targets.rest_temperature is None:
        loss_B, gradient_BN = bucket_losses_and_gradient(kept_BK, targets)
        z_BC.zero_()
    else:
        rest_B1, mass_B1 = replace_by_shares(z_BC, classes_BK, targets.rest_temperature)
        loss_B, gradient_BN = bucket_losses_and_gradient(torch.cat([kept_BK, rest_B1], dim=1), targets)
        z_BC *= gradient_BN[:, -1:] * scale_B[:, None] / mass_B1
    z_BC.scatter_(1, classes_BK, kept_gradient(gradient_BN, targets, scale_B))
    return loss_B


def write_gradient(logits_BC: Tensor, term: Term, gradient_BC: Tensor) -> Tensor | None:
    """Compute the scaled losses of one term and write the logits' gradient, in fewer operations than in place.

    The student's distribution comes from one softmax over all classes, whose smallest numbers must not be lost.

    Args:
      logits_BC: float32 or float64 [B, C], of any strides, on a CPU.
      term: of the same rows.
      gradient_BC: contiguous, of the same shape and dtype; written.

    Returns:
      The scaled losses, [B]; None, with nothing of use in `gradient_BC`, where rows do not count, the logits are on an
      accelerator, which would have to be waited for, or a bucket's probability is below LEAST_MASS.
    """
    targets, scale_B1 = term.targets, term.scale[:, None]
    if term.valid is not None or not logits_BC.is_cpu:
        return None
    if targets.classes is None:
        loss_B, _ = bucket_losses_and_gradient(logits_BC, targets, out=gradient_BC)
        gradient_BC *= scale_B1
        return loss_B.mul_(term.scale)
    if targets.rest_temperature is None:
        loss_B, slope_BN = bucket_losses_and_gradient(_kept_logits(logits_BC, targets, targets.classes), targets)
        gradient_BC.zero_()
    else:
        tau = targets.rest_temperature
        torch.softmax(logits_BC if tau == 1 else logits_BC / tau, dim=1, out=gradient_BC)
        kept_BK = gradient_BC.gather(1, targets.classes)
        rest_B1 = gradient_BC.scatter_(1, targets.classes, 0).sum(dim=1, keepdim=True)
        f_BN = torch.cat([kept_BK, rest_B1], dim=1)
        if not float(f_BN.amin() if len(f_BN) else 1) > LEAST_MASS:
            return None
        v_BN = f_BN.log_() if tau == 1 else f_BN.log_().mul_(tau)
        if targets.padding is not None:
            v_BN[:, :-1].masked_fill_(targets.padding, -torch.inf)
        loss_B, slope_BN = bucket_losses_and_gradient(v_BN, targets)
        gradient_BC *= slope_BN[:, -1:] * scale_B1 / rest_B1
    gradient_BC.scatter_(1, targets.classes, kept_gradient(slope_BN, targets, term.scale))
    return loss_B.mul_(term.scale)


def _kept_logits(z_BC: Tensor, targets: Targets, classes_BK: Tensor) -> Tensor:
    kept_BK = z_BC.gather(1, classes_BK)
    return kept_BK if targets.padding is None else kept_BK.masked_fill_(targets.padding, -torch.inf)


def kept_gradient(gradient_BN: Tensor, targets: Targets, scale_B: Tensor) -> Tensor:
    """Give the scaled gradient of the kept classes, padding repeating the row's first class, [B, k]."""
    assert targets.classes is not None
    kept_BK = gradient_BN[:, : targets.classes.shape[1]] * scale_B[:, None]
    return kept_BK if targets.padding is None else torch.where(targets.padding, kept_BK[:, :1], kept_BK)


def replace_by_shares(z_BC: Tensor, classes_BK: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Overwrite logits by exp(z / tau) over a sum, by one softmax, which reads a row from memory once.

    In the place of its first kept class a row is given the largest logit of the rest, so that the softmax also says how
    large the rest's sum is: between 1 and C - 1 times that logit's exponential. Nothing is subtracted from nearly itself.

    Args:
      z_BC: contiguous logits, overwritten; what is left where a class is kept means nothing.
      classes_BK: the kept classes, of which a row has one at least.
      tau: temperature of the rest bucket.

    Returns:
      The rest bucket's logit [B, 1], -inf where it is empty, and the sum of the rest's shares [B, 1], never zero.
    """
    z_BC.scatter_(1, classes_BK, -torch.inf)
    top_B1 = z_BC.amax(dim=1, keepdim=True)
    empty_B1 = torch.isneginf(top_B1)
    top_B1 = top_B1.masked_fill_(empty_B1, 0)
    z_BC.scatter_(1, classes_BK[:, :1], top_B1)
    if tau != 1.0:
        z_BC /= tau
    torch.softmax(z_BC, dim=1, out=z_BC)
    share_B1 = z_BC.gather(1, classes_BK[:, :1])
    mass_B1 = 1 - share_B1
    rest_B1 = top_B1 + tau * (mass_B1 / share_B1).log()
    return rest_B1.masked_fill_(empty_B1, -torch.inf), mass_B1.masked_fill_(empty_B1, 1)
