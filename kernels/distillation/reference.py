"""The definition of the distillation losses, in plain torch; gradients by autograd.

With v the logits of the n buckets of targets.py, f = softmax(v / T) and y the target:

    kl, ce    T^2 sum_j y_j (log y_j - log f_j)   and   -T^2 sum_j y_j log f_j; other divergences are in divergences.py
    slam      -T^2 sum_j y_j log mix_j,   mix = a f + flip (R - f),   R = 1, or the candidates' own mass ("forward")

SLaM: arXiv:2302.03806. Outside the candidates mix is a f, whose logarithm is taken as log a + log f: where the paper
clamps mix at 1e-7, this clamps a, so that a = 1 is plain distillation also for a student that is confidently wrong.
Cost: a few passes over [B, C] tensors, which autograd keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distilbeam.kernels.distillation.divergences import FORWARD, summands
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term


def total(logits_BC: Tensor, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss.

    Args:
      logits_BC: the student's logits, floating [B, C].
      terms: from `make_terms`.
      reduced: whether to add the rows up.

    Returns:
      A scalar, or the rows' losses [B]; differentiable in the logits to any order.
    """
    wide_BC = _from_largest(logits_BC.to(terms[0].scale.dtype))
    rows_B = sum(_scaled(wide_BC, term) for term in terms)
    assert isinstance(rows_B, Tensor)
    return rows_B.sum() if reduced else rows_B


def _from_largest(logits_BC: Tensor) -> Tensor:
    """Count logits from their row's largest, on which no loss depends: a common offset takes no digits from them."""
    if not logits_BC.shape[1]:
        return logits_BC
    largest_B1 = logits_BC.detach().amax(dim=1, keepdim=True)
    return logits_BC - largest_B1.masked_fill(torch.isneginf(largest_B1), 0)


def _scaled(logits_BC: Tensor, term: Term) -> Tensor:
    if term.valid is None:
        return term.scale * row_losses(logits_BC, term.targets)
    index = term.valid.nonzero()[:, 0]  # rows that do not count are never touched, so they cannot spread a NaN
    losses = term.scale[index] * row_losses(logits_BC[index], term.targets.rows(index))
    return torch.zeros_like(term.scale).index_put((index,), losses)


def row_losses(logits_BC: Tensor, targets: Targets) -> Tensor:
    """Compute the loss of every row.

    Args:
      logits_BC: the student's logits, float32 or float64 [B, C].
      targets: of the same rows.

    Returns:
      The losses, [B], differentiable in the logits to any order.
    """
    return bucket_losses(bucket_logits(logits_BC, targets), targets)


def bucket_logits(logits_BC: Tensor, targets: Targets) -> Tensor:
    """Gather the logits of the buckets; an empty rest bucket has the logit -inf.

    Args:
      logits_BC: the student's logits, [B, C].
      targets: of the same rows.

    Returns:
      The buckets' logits, [B, n].
    """
    if targets.classes is None:
        return logits_BC
    kept_BK = logits_BC.gather(1, targets.classes)
    if targets.padding is not None:
        kept_BK = kept_BK.masked_fill(targets.padding, -torch.inf)
    if targets.rest_temperature is None:
        return kept_BK
    others_BC = logits_BC.scatter(1, targets.classes, -torch.inf)
    empty_B1 = torch.isneginf(others_BC).all(dim=1, keepdim=True)  # logsumexp of nothing has the gradient NaN
    tau = targets.rest_temperature
    rest_B1 = tau * torch.logsumexp(others_BC.masked_fill(empty_B1, 0) / tau, dim=1, keepdim=True)
    return torch.cat([kept_BK, rest_B1.masked_fill(empty_B1, -torch.inf)], dim=1)


def bucket_losses(v_BN: Tensor, targets: Targets) -> Tensor:
    """Compute every row's loss from its buckets' logits.

    Args:
      v_BN: the buckets' logits, [B, n].
      targets: of the same rows.

    Returns:
      The losses, [B].
    """
    absent_BN = torch.isneginf(v_BN)
    v_BN = v_BN.masked_fill(absent_BN.all(dim=1, keepdim=True), 0)  # where nothing exists, the loss is 0
    logf_BN = torch.log_softmax(v_BN / targets.temperature, dim=1)
    if targets.divergence != FORWARD:
        d_BN = summands(targets.logprobs, logf_BN, absent_BN, targets.divergence)
        return targets.temperature**2 * d_BN.sum(dim=1)
    y_BN = targets.logprobs.exp()
    absent_BN = absent_BN | (y_BN == 0)  # 0 log 0 = 0, and a bucket without classes takes no target
    logmix_BN = logf_BN if targets.flip is None else log_mix(logf_BN, targets)
    loss_B = -(y_BN * logmix_BN.masked_fill(absent_BN, 0)).sum(dim=1)
    if targets.entropy:
        loss_B = loss_B + (y_BN * targets.logprobs.masked_fill(absent_BN, 0)).sum(dim=1)
    return targets.temperature**2 * loss_B


def log_mix(logf_BN: Tensor, targets: Targets) -> Tensor:
    """Mix the student's distribution with the candidates' share of the teacher's errors.

    Args:
      logf_BN: the student's log-probabilities of the buckets.
      targets: with `accuracy` and `flip`.

    Returns:
      log(mix), [B, n]; finite wherever `logf_BN` is.
    """
    assert targets.flip is not None
    assert targets.accuracy is not None
    candidate_BN = targets.flip > 0
    logf_BN = logf_BN.clamp(min=torch.finfo(logf_BN.dtype).min)
    shift_B1 = reach_shift(logf_BN, targets)
    f_BN = (logf_BN - shift_B1).masked_fill(~candidate_BN, 0).exp()
    reach_B1 = (f_BN * candidate_BN).sum(dim=1, keepdim=True) if targets.forward else torch.ones_like(shift_B1)
    mixed_BN = targets.accuracy * f_BN + targets.flip * (reach_B1 - f_BN)
    return torch.where(
        candidate_BN, shift_B1 + mixed_BN.masked_fill(~candidate_BN, 1).log(), targets.accuracy.log() + logf_BN
    )


def reach_shift(logf_BN: Tensor, targets: Targets) -> Tensor:
    """Give the exponent taken out of the candidates' probabilities, so that "forward" never takes log 0, [B, 1]."""
    assert targets.flip is not None
    if not targets.forward:
        return torch.zeros_like(logf_BN[:, :1])
    largest_B1 = logf_BN.detach().masked_fill(targets.flip <= 0, -torch.inf).amax(dim=1, keepdim=True)
    return largest_B1.masked_fill(torch.isneginf(largest_B1), 0)
