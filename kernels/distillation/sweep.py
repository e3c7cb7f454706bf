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
    kept_BK = kept_logits(z_BC, targets, classes_BK)
    if targets.rest_temperature is None:
        loss_B, gradient_BN = bucket_losses_and_gradient(kept_BK, targets)
        z_BC.zero_()
    else:
        v_BN, mass_B1 = _buckets_and_shares(z_BC, kept_BK, classes_BK, targets.rest_temperature)
        loss_B, gradient_BN = bucket_losses_and_gradient(v_BN, targets)
        z_BC *= gradient_BN[:, -1:] * scale_B[:, None] / mass_B1
    z_BC.scatter_(1, classes_BK, 0).scatter_add_(1, classes_BK, kept_gradient(gradient_BN, targets) * scale_B[:, None])
    return loss_B


def kept_logits(z_BC: Tensor, targets: Targets, classes_BK: Tensor) -> Tensor:
    """Gather the logits of the kept classes, -inf where an entry is padding, [B, k]."""
    kept_BK = z_BC.gather(1, classes_BK)
    return kept_BK if targets.padding is None else kept_BK.masked_fill_(targets.padding, -torch.inf)


def kept_gradient(gradient_BN: Tensor, targets: Targets) -> Tensor:
    """Give the gradient of the kept classes' logits, to be added up by class, 0 for padding, [B, k]."""
    assert targets.classes is not None
    kept_BK = gradient_BN[:, : targets.classes.shape[1]]
    return kept_BK if targets.padding is None else kept_BK.masked_fill(targets.padding, 0)


def _buckets_and_shares(z_BC: Tensor, kept_BK: Tensor, classes_BK: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Overwrite logits by exp(z / tau) over a sum, by one softmax, which reads a row from memory once.

    In the place of its first kept class a row is given the largest logit of the rest, so that the softmax also says how
    large the rest's sum is: between 1 and C - 1 times that logit's exponential. Nothing is subtracted from nearly itself.

    Args:
      z_BC: contiguous logits, overwritten; what is left where a class is kept means nothing.
      kept_BK: the kept classes' logits.
      classes_BK: the kept classes, of which a row has one at least.
      tau: temperature of the rest bucket.

    Returns:
      The buckets' logits [B, k + 1], counted from the largest, the rest's -inf where it is empty; and the sum of the
      rest's shares [B, 1], never zero.
    """
    z_BC.scatter_(1, classes_BK, -torch.inf)
    top_B1 = z_BC.amax(dim=1, keepdim=True)
    largest_B1 = torch.maximum(top_B1, kept_BK.amax(dim=1, keepdim=True))
    largest_B1.masked_fill_(torch.isneginf(largest_B1), 0)
    empty_B1 = torch.isneginf(top_B1)
    top_B1 = top_B1.masked_fill_(empty_B1, 0)
    z_BC.scatter_(1, classes_BK[:, :1], top_B1)
    if tau != 1.0:
        z_BC.sub_(top_B1).div_(tau)
    torch.softmax(z_BC, dim=1, out=z_BC)
    share_B1 = z_BC.gather(1, classes_BK[:, :1])
    mass_B1 = 1 - share_B1
    rest_B1 = top_B1 - largest_B1 + tau * (mass_B1 / share_B1).log()
    v_BN = torch.cat([kept_BK - largest_B1, rest_B1.masked_fill_(empty_B1, -torch.inf)], dim=1)
    return v_BN, mass_B1.masked_fill_(empty_B1, 1)
