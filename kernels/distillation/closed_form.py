"""The losses of reference.py together with their gradient by the buckets' logits, without autograd.

With f = softmax(v / T), y the target and S = sum y:

    kl, ce    dL/dv = T (S f - y)
    others    dL/dv = T (s - f sum s),   s of divergences.py
    slam      the same with              s_j = -(y_j f_j / mix_j) (a - flip_j)
              and, for "forward", - f_j sum_i y_i flip_i / mix_i for the candidates j

and a rest bucket hands its gradient to its classes in proportion to exp((z_j - rest) / tau).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distilbeam.kernels.distillation.divergences import FORWARD, summands_and_slopes
from distilbeam.kernels.distillation.reference import log_mix, reach_shift
from distilbeam.kernels.distillation.targets import Targets


def bucket_losses_and_gradient(v_BN: Tensor, targets: Targets, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute every row's loss and its gradient.

    Args:
      v_BN: the buckets' logits, [B, n].
      targets: of the same rows.
      out: contiguous tensor [B, n] for the gradient, which may be `v_BN`; None makes a new one.

    Returns:
      The losses [B] and their derivatives by the logits [B, n].
    """
    forward = targets.divergence == FORWARD
    if v_BN.is_cpu and forward and targets.flip is None and targets.padding is None:
        easy = _where_every_bucket_exists(v_BN, targets, out)
        if easy is not None:
            return easy
    absent_BN = torch.isneginf(v_BN)
    logf_BN = _log_softmax(v_BN.masked_fill(absent_BN.all(dim=1, keepdim=True), 0), targets.temperature)
    if not forward:
        d_BN, s_BN = summands_and_slopes(targets.logprobs, logf_BN, absent_BN, targets.divergence)
        return _pulled(d_BN.sum(dim=1), s_BN, logf_BN, targets, out)
    y_BN = targets.logprobs.exp().masked_fill_(absent_BN, 0)
    absent_BN |= y_BN == 0
    logmix_BN = logf_BN if targets.flip is None else log_mix(logf_BN, targets)
    value_BN = logmix_BN if not targets.entropy else logmix_BN - targets.logprobs
    loss_B = -(y_BN * value_BN.masked_fill(absent_BN, 0)).sum(dim=1)
    if targets.flip is None:
        return _finished(loss_B, torch.exp(logf_BN, out=logf_BN if out is None else out), y_BN, targets)
    return _pulled(loss_B, _slam_pull(y_BN, logf_BN, logmix_BN, targets), logf_BN, targets, out)


def _where_every_bucket_exists(v_BN: Tensor, targets: Targets, out: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Leave out the masks, a third of a small batch's time; None where a loss then is not finite.

    A bucket of logit -inf makes a loss NaN or infinite here, whatever its target; looking at the losses costs less than
    looking at the logits, but would wait for an accelerator.
    """
    logf_BN = _log_softmax(v_BN, targets.temperature)
    y_BN = targets.logprobs.exp()
    value_BN = logf_BN - targets.logprobs if targets.entropy else logf_BN
    loss_B = torch.linalg.vecdot(y_BN, value_BN).neg_()
    if not math.isfinite(loss_B.sum()):
        return None
    return _finished(loss_B, torch.exp(logf_BN, out=logf_BN if out is None else out), y_BN, targets)


def _finished(loss_B: Tensor, f_BN: Tensor, y_BN: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Overwrite f by S f - y and apply the temperature; S is below one where a part of the target has no bucket."""
    f_BN *= y_BN.sum(dim=1, keepdim=True)
    f_BN -= y_BN
    if targets.temperature == 1:
        return loss_B, f_BN
    return loss_B.mul_(targets.temperature**2), f_BN.mul_(targets.temperature)


def _pulled(
    loss_B: Tensor, s_BN: Tensor, logf_BN: Tensor, targets: Targets, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bring a loss and its slopes s to the temperature; `logf_BN` is overwritten."""
    gradient_BN = s_BN - logf_BN.exp_() * s_BN.sum(dim=1, keepdim=True)
    return targets.temperature**2 * loss_B, torch.mul(gradient_BN, targets.temperature, out=out)


def _log_softmax(v_BN: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(over(v_BN, temperature), dim=1)


def over(v_BN: Tensor, temperature: float) -> Tensor:
    """Divide by a temperature, counted from a row's largest: what all have in common takes no digits from the quotients."""
    if temperature == 1:
        return v_BN
    return (v_BN - v_BN.amax(dim=1, keepdim=True)).div_(temperature)


def _slam_pull(y_BN: Tensor, logf_BN: Tensor, logmix_BN: Tensor, targets: Targets) -> Tensor:
    """Give f dL/df of every bucket; the ratio f / mix is taken in logarithms, where it stays finite."""
    assert targets.flip is not None
    assert targets.accuracy is not None
    ratio_BN = (logf_BN - logmix_BN).masked_fill(y_BN == 0, 0).exp()
    pull_BN = -y_BN * ratio_BN * (targets.accuracy - targets.flip)
    if targets.forward:
        shift_B1 = reach_shift(logf_BN, targets)
        outside_BN = targets.flip <= 0
        shared_BN = y_BN * targets.flip * (shift_B1 - logmix_BN).masked_fill(outside_BN | (y_BN == 0), 0).exp()
        candidate_f_BN = (logf_BN - shift_B1).masked_fill(outside_BN, -torch.inf).exp()
        pull_BN = pull_BN - candidate_f_BN * shared_BN.sum(dim=1, keepdim=True)
    return pull_BN
