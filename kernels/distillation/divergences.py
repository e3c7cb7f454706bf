"""Divergences between teacher and student over buckets: the summand of each and its slope, for every backend in torch.

With p the teacher's distribution over the buckets, q = softmax(u) the student's, and m = w p + (1 - w) q their mixture,

    D = sum_i d_i,     d = a p log(p / m) + b q log(q / m)     or     |p - q| / 2
    dD/du_i = s_i - q_i sum_j s_j,     s = q dd/dq = q (b log(q / m) - (1 - w) (a p + b q) / m)     or     q sign(q - p) / 2

where s may differ by a multiple of q, which the derivative drops: the b that d's own q leaves is left out.

    kind        a   b       w            objective (source)
    forward     1   0       0            kl, tail, ... (arXiv:1503.02531); also the limit 0 of jsd and of skew_kl
    student     0   1       1            reverse_kl (MiniLLM, arXiv:2306.08543); also the limits of jsd at 1, of skew_reverse_kl at 0
    both        w   1 - w   beta         jsd (GKD, arXiv:2306.13649, whose ends are set to the two KL's, as TRL does)
    teacher     1   0       alpha        skew_kl (DistiLLM, arXiv:2402.03898)
    student     0   1       1 - alpha    skew_reverse_kl (DistiLLM)
    absolute                             tv (arXiv:2307.15190)

Bounds, at temperature 1 and for distributions of mass one: jsd <= -beta log beta - (1 - beta) log(1 - beta), both skews
<= -log alpha, tv <= 1. Nothing is clamped at 0: rounding may take a divergence of equal distributions below it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["forward", "teacher", "student", "both", "absolute"]
KINDS: tuple[Kind, ...] = ("forward", "teacher", "student", "both", "absolute")  # by their numbers in Triton's kernels
# A teacher's probability of 0 counts as the least of float32 with all its digits where q log(q / p) would be infinite: the
# student is pushed away from the class by 87 nats, and a training goes on.
LEAST_LOGPROB = math.log(torch.finfo(torch.float32).tiny)
LEAST_MASS = torch.finfo(torch.float32).tiny  # of a target, over the buckets that the student has; below there is none


class Divergence(NamedTuple):
    """Which divergence a loss is.

    Attributes:
      kind: forward: KL(p || q), with or without p's entropy; the others as above.
      mixture: w, the teacher's share of m; without a meaning for `forward` and `absolute`.
    """

    kind: Kind = "forward"
    mixture: float = 0.0

    @property
    def parts(self) -> tuple[float, float]:
        """a and b, the shares of the two KL's."""
        if self.kind == "both":
            return self.mixture, 1 - self.mixture
        return float(self.kind == "teacher"), float(self.kind == "student")


FORWARD = Divergence()


def divergence_of(objective: str, beta: float, alpha: float) -> Divergence:
    """Give the divergence of an objective.

    Args:
      objective: of `targets.OBJECTIVES`.
      beta: of `jsd`, in [0, 1].
      alpha: of both skews, in [0, 1).

    Returns:
      The divergence; at its limits that of the KL which it becomes.
    """
    if objective == "tv":
        return Divergence("absolute")
    if objective == "reverse_kl":
        return Divergence("student", 1.0)
    if objective == "skew_reverse_kl":
        return Divergence("student", 1.0 - alpha)
    if objective == "jsd" and beta > 0:
        return Divergence("both", beta) if beta < 1 else Divergence("student", 1.0)
    if objective == "skew_kl" and alpha > 0:
        return Divergence("teacher", alpha)
    return FORWARD


def summands(logp_BN: Tensor, logq_BN: Tensor, absent_BN: Tensor, divergence: Divergence) -> Tensor:
    """Compute every bucket's d; for all kinds but `forward`.

    Args:
      logp_BN: log of the target, [B, n].
      logq_BN: log of the student's distribution, [B, n].
      absent_BN: buckets that the student does not have, bool [B, n].
      divergence: of the loss.

    Returns:
      The summands, [B, n], differentiable in `logq_BN` to any order; 0 for absent buckets and rows without a target.
    """
    return _summands(*_present(logp_BN, logq_BN, absent_BN), divergence)[0]


def summands_and_slopes(
    logp_BN: Tensor, logq_BN: Tensor, absent_BN: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Compute every bucket's d and s; see `summands`."""
    logp_BN, logq_BN, left_out_BN = _present(logp_BN, logq_BN, absent_BN)
    d_BN, (p_BN, q_BN), (above_p_BN, above_q_BN) = _summands(logp_BN, logq_BN, left_out_BN, divergence)
    if divergence.kind == "absolute":
        s_BN = (q_BN - p_BN).sign_().mul_(q_BN).div_(2)
    else:
        a, b = divergence.parts
        ratios_BN = a * above_p_BN.exp() if a else 0.0
        ratios_BN = ratios_BN + b * above_q_BN.exp() if b else ratios_BN
        s_BN = q_BN * (b * above_q_BN - (1 - divergence.mixture) * ratios_BN)
    return d_BN, s_BN.masked_fill_(left_out_BN, 0)


def _present(logp_BN: Tensor, logq_BN: Tensor, absent_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring both logarithms to finite numbers, and say which buckets are left out."""
    without_B1 = logp_BN.masked_fill(absent_BN, -torch.inf).exp().sum(dim=1, keepdim=True) < LEAST_MASS
    left_out_BN = absent_BN | without_B1  # no target: 0, as of forward KL, and not the distance to nothing
    return logp_BN.clamp(min=LEAST_LOGPROB), logq_BN.masked_fill(left_out_BN, 0), left_out_BN


def _summands(
    logp_BN: Tensor, logq_BN: Tensor, left_out_BN: Tensor, divergence: Divergence
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Give d, then p and q, then log(p / m) and log(q / m)."""
    p_BN, q_BN = logp_BN.exp(), logq_BN.exp()
    if divergence.kind == "absolute":
        return ((p_BN - q_BN).abs() / 2).masked_fill(left_out_BN, 0), (p_BN, q_BN), (p_BN, q_BN)
    w, (a, b) = divergence.mixture, divergence.parts
    logm_BN = logp_BN if w == 1 else torch.logaddexp(logp_BN + math.log(w), logq_BN + math.log1p(-w))
    above_p_BN, above_q_BN = logp_BN - logm_BN, logq_BN - logm_BN
    of_p_BN = a * p_BN * above_p_BN if a else 0.0
    d_BN = of_p_BN + b * q_BN * above_q_BN if b else of_p_BN
    assert isinstance(d_BN, Tensor)
    return d_BN.masked_fill(left_out_BN, 0), (p_BN, q_BN), (above_p_BN, above_q_BN)
