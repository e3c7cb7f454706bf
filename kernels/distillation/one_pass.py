"""Loss and gradient of rows that hold nothing unusual, in as few operations as torch has for them; on a CPU.

A small batch's time is the number of operations, a large one's the number of passes over [B, C]. With s the scale of a
row, f the student's distribution and y the target, every forward KL here is

    loss = sum pull (log f - log y) T,     gradient = pull - f sum pull,     pull = -s T y

where the entropy's log y may be left out, and the gradient is that of log_softmax, which torch computes in one pass. What
these few operations cannot compute (logits of -inf, masses that underflow) shows in a loss that is not finite, which every path
looks at, or in a bucket too small: then nothing is given, and `sweep.py` does the work with masks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distilbeam.kernels.distillation.closed_form import bucket_losses_and_gradient, over
from distilbeam.kernels.distillation.divergences import FORWARD
from distilbeam.kernels.distillation.sweep import kept_gradient, kept_logits
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term

LEAST_MASS = 1e-30  # of a bucket, in a softmax over all classes: what underflows is then too small to matter
Made = tuple[Tensor, Tensor | None]


class Wish(NamedTuple):
    """What is asked for.

    Attributes:
      reduced: the sum of the rows' losses instead of [B].
      wanted: the gradient too.
      out: contiguous room for it, [B, C]; None makes some.
    """

    reduced: bool
    wanted: bool
    out: Tensor | None


def loss_and_gradient(
    logits_BC: Tensor, term: Term, reduced: bool, out: Tensor | None = None, *, wanted: bool = True
) -> Made | None:
    """Compute the scaled loss of one term and the logits' gradient.

    Args:
      logits_BC: float32 or float64 [B, C], of any strides, in the dtype of the term.
      term: of the same rows.
      reduced: whether to add the rows up.
      out: contiguous room for the gradient, [B, C]; None makes some.
      wanted: whether the gradient is wanted.

    Returns:
      The loss, a scalar or [B], and the gradient, or None in its place where it is not wanted. None, with nothing of use in
      `out`, where the logits are on an accelerator, which would have to be waited for, or hold something unusual.
    """
    targets, scale_B, wish = term.targets, term.scale, Wish(reduced, wanted, out)
    if not logits_BC.is_cpu or not len(logits_BC):
        return None
    if term.valid is not None:  # what such a row holds is unusual or multiplied by 0
        scale_B = scale_B.masked_fill(~term.valid, 0)
    if targets.classes is not None:
        sparse = _true_class if targets.certain else _kept if targets.rest_temperature is None else _kept_and_rest
        made = sparse(logits_BC, targets, targets.classes, scale_B, wish)
    elif _forward(targets):
        made = _every_class(logits_BC, targets, scale_B, wish)
    else:
        made = _scaled(bucket_losses_and_gradient(logits_BC, targets, out), scale_B, reduced)
    if made is None or not math.isfinite(made[0] if reduced else made[0].sum()):
        return None
    if term.valid is not None and made[1] is not None:  # 0 times what is not finite is no 0
        made[1].index_fill_(0, (~term.valid).nonzero()[:, 0], 0)
    return made


def _forward(targets: Targets) -> bool:
    return targets.flip is None and targets.divergence == FORWARD


def _every_class(v_BN: Tensor, targets: Targets, scale_B: Tensor, wish: Wish) -> Made | None:
    T = targets.temperature
    logf_BN = torch.log_softmax(over(v_BN, T), dim=1)
    pull_BN = targets.logprobs.exp().mul_((scale_B * -T)[:, None])
    value_BN = logf_BN - targets.logprobs if targets.entropy else logf_BN.clone()
    if targets.entropy and targets.classes is None:  # a dense label's probability of 0: 0 * inf is no 0
        value_BN.clamp_(max=torch.finfo(value_BN.dtype).max)
    loss = _added(value_BN, pull_BN, T, wish.reduced)
    if not math.isfinite(loss if wish.reduced else loss.sum()):
        return None
    if not wish.wanted:
        return loss, None
    return loss, torch._log_softmax_backward_data(pull_BN, logf_BN, 1, logf_BN.dtype, out=wish.out)


def _kept(logits_BC: Tensor, targets: Targets, classes_BK: Tensor, scale_B: Tensor, wish: Wish) -> Made | None:
    v_BK = kept_logits(logits_BC, targets, classes_BK)
    plain = _forward(targets) and targets.padding is None
    made = _every_class(v_BK, targets, scale_B, wish._replace(out=None)) if plain else None
    if made is None:
        made = _scaled(bucket_losses_and_gradient(v_BK, targets), scale_B, wish.reduced)
    if not wish.wanted or made[1] is None:
        return made[0], None
    gradient_BC = torch.empty_like(logits_BC, memory_format=torch.contiguous_format) if wish.out is None else wish.out
    return made[0], gradient_BC.zero_().scatter_add_(1, classes_BK, kept_gradient(made[1], targets))


def _kept_and_rest(logits_BC: Tensor, targets: Targets, classes_BK: Tensor, scale_B: Tensor, wish: Wish) -> Made | None:
    tau, T = targets.rest_temperature, targets.temperature
    assert tau is not None
    gradient_BC = torch.softmax(over(logits_BC, tau), dim=1, out=wish.out)
    kept_BK = gradient_BC.gather(1, classes_BK)
    rest_B1 = gradient_BC.scatter_(1, classes_BK, 0).sum(dim=1, keepdim=True)
    f_BN = torch.cat([kept_BK, rest_B1], dim=1)
    if not float(f_BN.amin()) > LEAST_MASS:
        return None
    if tau == T and _forward(targets) and targets.padding is None:  # the buckets' softmax is there already
        f_BN /= f_BN.sum(dim=1, keepdim=True)  # 1, but where a class is named twice
        pull_BN = targets.logprobs.exp().mul_((scale_B * -T)[:, None])
        logf_BN = f_BN.log()
        loss = _added(logf_BN.sub_(targets.logprobs) if targets.entropy else logf_BN, pull_BN, T, wish.reduced)
        slope_BN = torch.addcmul(pull_BN, f_BN, pull_BN.sum(dim=1, keepdim=True), value=-1)
    else:
        v_BN = f_BN.log_() if tau == 1 else f_BN.log_().mul_(tau)
        if targets.padding is not None:
            v_BN[:, :-1].masked_fill_(targets.padding, -torch.inf)
        loss, slope_BN = _scaled(bucket_losses_and_gradient(v_BN, targets), scale_B, wish.reduced)
    if not wish.wanted:
        return loss, None
    gradient_BC *= slope_BN[:, -1:] / rest_B1
    return loss, gradient_BC.scatter_add_(1, classes_BK, kept_gradient(slope_BN, targets))


def _true_class(logits_BC: Tensor, _: Targets, classes_B1: Tensor, scale_B: Tensor, wish: Wish) -> Made | None:
    """Compute the cross-entropy of true classes, whose gradient is minus the mass of all others."""
    gradient_BC, scale_B1 = torch.softmax(logits_BC, dim=1, out=wish.out), scale_B[:, None]
    kept_B1 = gradient_BC.gather(1, classes_B1)
    if not float(kept_B1.amin()) > LEAST_MASS:
        return None
    loss = _added(kept_B1.log_(), -scale_B1, 1.0, wish.reduced)
    if not wish.wanted:
        return loss, None
    rest_B1 = gradient_BC.scatter_(1, classes_B1, 0).sum(dim=1, keepdim=True)
    return loss, gradient_BC.mul_(scale_B1).scatter_(1, classes_B1, rest_B1.mul_(-scale_B1))


def _added(value_BN: Tensor, pull_BN: Tensor, temperature: float, reduced: bool) -> Tensor:
    """Add up pull * value, overwriting the values."""
    loss = value_BN.mul_(pull_BN).sum() if reduced else value_BN.mul_(pull_BN).sum(dim=1)
    return loss if temperature == 1 else loss.mul_(temperature)


def _scaled(solved: tuple[Tensor, Tensor], scale_B: Tensor, reduced: bool) -> tuple[Tensor, Tensor]:
    """Bring rows' losses and gradients, which may be overwritten, to what was asked for."""
    loss_B, gradient_BN = solved
    loss_B = loss_B * scale_B
    return loss_B.sum() if reduced else loss_B, gradient_BN.mul_(scale_B[:, None])
