"""The losses of reference.py together with their gradient by the buckets' logits, without autograd.

With f = softmax(v / T), y the target and S = sum y:

    kl, ce    dL/dv = T (S f - y)
    slam      dL/dv = T (s - f sum s),   s_j = -(y_j f_j / mix_j) (a - flip_j)
              and, for "forward", - f_j sum_i y_i flip_i / mix_i for the candidates j

and a rest bucket hands its gradient to its classes in proportion to exp((z_j - rest) / tau).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distilbeam.kernels.distillation.reference import log_mix, reach_shift
from distilbeam.kernels.distillation.targets import Targets


def bucket_losses_and_gradient(v_BN: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Compute every row's loss and its gradient.

    Args:
      v_BN: the buckets' logits, [B, n].
      targets: of the same rows.

    Returns:
      The losses [B] and their derivatives by the logits [B, n].
    """
    logf_BN = torch.log_softmax(v_BN / targets.temperature, dim=1)
    absent_BN = torch.isneginf(v_BN)
    y_BN = targets.logprobs.exp().masked_fill_(absent_BN, 0)
    absent_BN |= y_BN == 0
    logmix_BN = logf_BN if targets.flip is None else log_mix(logf_BN, targets)
    value_BN = logmix_BN if not targets.entropy else logmix_BN - targets.logprobs
    loss_B = -(y_BN * value_BN.masked_fill(absent_BN, 0)).sum(dim=1)
    f_BN = logf_BN.exp()
    if targets.flip is None:
        gradient_BN = f_BN.mul_(y_BN.sum(dim=1, keepdim=True)).sub_(y_BN)
    else:
        s_BN = _slam_pull(y_BN, logf_BN, logmix_BN, targets)
        gradient_BN = s_BN - f_BN * s_BN.sum(dim=1, keepdim=True)
    return targets.temperature**2 * loss_B, gradient_BN.mul_(targets.temperature)


def _slam_pull(y_BN: Tensor, logf_BN: Tensor, logmix_BN: Tensor, targets: Targets) -> Tensor:
    """Give f dL/df of every bucket; the ratio f / mix is taken in logarithms, where it stays finite."""
    assert targets.flip is not None
    assert targets.accuracy is not None
    ratio_BN = (logf_BN - logmix_BN).masked_fill(y_BN == 0, 0).exp()
    pull_BN = -y_BN * ratio_BN * (targets.accuracy - targets.flip)
    if targets.forward:
        shift_B1 = reach_shift(logf_BN, targets)
        outside_BN = targets.flip <= 0
        shared_BN = y_BN * targets.flip * (shift_B1 - logmix_BN).masked_fill(outside_BN, 0).exp()
        candidate_f_BN = (logf_BN - shift_B1).masked_fill(outside_BN, -torch.inf).exp()
        pull_BN = pull_BN - candidate_f_BN * shared_BN.sum(dim=1, keepdim=True)
    return pull_BN
