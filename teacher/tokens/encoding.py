"""Logits of tokens become labels where the logits are: top-k with a tail, or draws, some hundred positions at a time.

    z = x / T,  m = exp(z - max z),  log p_c = z_c - max z - log sum m,  tail = log(sum of m not kept / sum m)

Draws invert the distribution function in two steps. The sums of blocks of 128 classes are added up in float64 and searched for
each uniform number; then the classes of the blocks that were found are. That reads the 49,152 masses of a position once,
where one running sum in float64 takes six times as long. A class's expected frequency is its probability within
2^-20 of it, what float32 sums of 128 leave. The log-probability of the token that is there costs nothing more.

A position with NaN, +inf or nothing but -inf has NaN in every number.

References: Anshumann et al., Sparse Logit Sampling, arXiv:2503.16870 (draws of the teacher's distribution as labels).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distilbeam.teacher.softlabels.codec import TAIL_FLOOR
from distilbeam.teacher.softlabels.selecting import tally
from distilbeam.teacher.softlabels.spec import SoftLabelSpec

_AT_ONCE = 128  # positions: 25 MB of logits at 49k classes; twice as many are given back to the system and cleared every time anew
_DRAWS_AT_ONCE = 2**14  # for each of which the masses of a block are copied in float64, 17 MB in all
_BLOCK = 128  # classes; of 64, 128, 192, 256 and 512 this and 64 drew fastest on a CPU
Array = npt.NDArray[np.float32]
PositionLabels = tuple[npt.NDArray[np.int32], Array, Array | None, Array]


def positions_at_once(spec: SoftLabelSpec) -> int:
    """Return how many positions to encode at a time, so that what they take is bounded."""
    return _AT_ONCE if spec.kind == "top_k" else max(1, min(_AT_ONCE, _DRAWS_AT_ONCE // (spec.k or 1)))


@torch.no_grad()
def encode_positions(
    logits: Tensor, tokens: Tensor, spec: SoftLabelSpec, uniforms: npt.NDArray[np.float64] | None = None
) -> PositionLabels:
    """Encode the logits of positions.

    Args:
      logits: floating [n, >= C], on any device; columns beyond the C classes are padding of the model's head.
      tokens: int64 [n], the token that stands at the next position, below C.
      spec: the form of the labels.
      uniforms: float64 [n, k] in [0, 1), where labels are drawn.

    Returns:
      Classes int32 [n, k], log-probabilities float32 [n, k], tails float32 [n] or None, and the log-probability of the next
      token float32 [n]. Kept classes descend in probability, ties by class; drawn ones ascend.
    """
    z = logits[:, : spec.num_classes].float()
    if spec.temperature != 1:
        z = z / spec.temperature
    rows, count = z.shape
    top = z.amax(dim=1, keepdim=True)
    mass = torch.zeros(rows, -(-count // _BLOCK) * _BLOCK, device=z.device)
    torch.sub(z, top, out=mass[:, :count]).exp_()
    blocks = mass.view(rows, -1, _BLOCK).sum(dim=2)
    total = blocks.sum(dim=1, dtype=torch.float64)
    logtotal = top[:, 0].double() + total.log()
    token_logprob = (z.gather(1, tokens[:, None])[:, 0].double() - logtotal).float()
    good = torch.isfinite(logtotal)
    if spec.kind == "top_k":
        classes, kept = _largest(z, spec.k or 0)
        logprobs = (kept.double() - logtotal[:, None]).float()
        mass.scatter_(1, classes, 0.0)
        rest = (mass.sum(dim=1).double() / total).log().float().clamp(min=float(TAIL_FLOOR))
        tail = _numpy(torch.where(good, rest, torch.nan))
        found = classes.int().cpu().numpy()
    else:
        assert uniforms is not None
        drawn = _draws(mass, blocks, torch.from_numpy(np.sort(uniforms, axis=1)).to(z.device))
        found, counts = tally(drawn.cpu().numpy())
        with np.errstate(divide="ignore"):
            logprobs = torch.from_numpy(np.log(counts / np.float32(spec.k))).to(z.device)
        tail = None
    logprobs = torch.where(good[:, None], logprobs, torch.nan)
    token_logprob = torch.where(good, token_logprob, torch.nan)
    return found, _numpy(logprobs), tail, _numpy(token_logprob)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest values of each row, descending, ties by class: logits of half precision have many."""
    kept, classes = torch.topk(values, k, dim=1)
    classes, order = classes.sort(dim=1)
    kept, order = kept.gather(1, order).sort(dim=1, descending=True, stable=True)
    return classes.gather(1, order), kept


def _draws(mass: Tensor, blocks: Tensor, uniforms: Tensor) -> Tensor:
    """Draw classes in proportion to their mass: int64 [n, k], ascending where the uniforms are."""
    ends = blocks.cumsum(dim=1, dtype=torch.float64)
    total = ends[:, -1:].contiguous()
    below = torch.nextafter(total, torch.zeros_like(total))
    wanted = torch.minimum(uniforms * total, below)
    block = torch.searchsorted(ends, wanted, right=True).clamp_(max=blocks.shape[1] - 1)
    rest = wanted - (ends - blocks).gather(1, block)
    inside = mass.view(len(mass), -1, _BLOCK).gather(1, block[:, :, None].expand(-1, -1, _BLOCK))
    within = inside.double().cumsum(dim=2)
    last = within[:, :, -1:]
    # a sum in float32 may be above that in float64: what lies between them is the last class that has a mass
    rest = torch.minimum(rest[:, :, None].clamp(min=0), torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(within, rest, right=True)[:, :, 0].clamp_(max=_BLOCK - 1)
    return block * _BLOCK + place


def _numpy(values: Tensor) -> Array:
    array: Array = values.float().cpu().numpy()
    return array
