"""What a language model is unsure of: a gain for each block, and a vector by which blocks are compared.

    gain of a block    mean over its labelled positions j of g(q_j), q_j the student's distribution over the token at j + 1
    g                  entropy, margin or least_confidence, as `selection.gains` defines them
    its vector         mean over the same positions of the hidden state that the last layer is given

Logits exist for some positions at a time: a block of 512 tokens would have 100 MB of them at 49,152 ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distilbeam.inputs.blocks import COMPLETION_MASK, INPUT_IDS, SEGMENT_IDS, has_label
from distilbeam.student.language.network import CausalLm
from distilbeam.student.language.threads import forward_operations, threads_for

LOGIT_BYTES = 2**26  # of float32 logits that exist at a time
TOKENS = 8192  # in a forward pass, a block at least


@dataclass(frozen=True)
class BlockScores:
    """What a student says of some blocks.

    Attributes:
      gains: float32 [n]; NaN for a block without a labelled position, or where the student's answer is not finite.
      embeddings: float32 [n, H], likewise.
    """

    gains: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32]


@torch.inference_mode()
def score_blocks(
    network: CausalLm, blocks: Mapping[str, npt.NDArray[Any]], gain: str, num_classes: int, device: torch.device
) -> BlockScores:
    """Score blocks with a language model.

    Args:
      network: on its device, in evaluation mode.
      blocks: `input_ids`, `segment_ids` and `completion_mask`, integers [n, L]; ids below `num_classes`.
      gain: name of the gain, a key of `UNCERTAINTIES`.
      num_classes: ids that the labels know; a last layer with more outputs is cut there.
      device: where the network is.

    Returns:
      Gains and embeddings, each block's the same whatever others are scored with it, to rounding.
    """
    ids, segments = blocks[INPUT_IDS], blocks[SEGMENT_IDS]
    labelled = has_label(segments, blocks[COMPLETION_MASK])
    at_once = max(1, TOKENS // max(ids.shape[1], 1))
    operations = forward_operations(network, num_classes, min(at_once, len(ids)) * ids.shape[1])
    with threads_for(operations, device):
        parts = [
            _score(network, ids[rows], segments[rows], labelled[rows], gain, num_classes, device)
            for rows in (slice(start, start + at_once) for start in range(0, len(ids), at_once))
        ]
    if not parts:
        return BlockScores(np.empty(0, np.float32), np.empty((0, 1), np.float32))
    gains, embeddings = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    bad = ~np.isfinite(gains) | ~np.isfinite(embeddings).all(axis=1)
    gains[bad], embeddings[bad] = np.nan, np.nan
    return BlockScores(gains, embeddings)


def _score(
    network: CausalLm,
    ids: npt.NDArray[Any],
    segments: npt.NDArray[Any],
    labelled: npt.NDArray[np.bool_],
    gain: str,
    num_classes: int,
    device: torch.device,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    given = [torch.from_numpy(part.astype(np.int64)).to(device) for part in (ids, segments)]
    hidden_bLH = network.hidden(*given)
    there_bL = torch.from_numpy(labelled).to(device)
    hidden_NH = hidden_bLH[there_bL]
    block_N = torch.nonzero(there_bL)[:, 0]
    step = max(1, LOGIT_BYTES // (4 * num_classes))
    gains_N = [
        UNCERTAINTIES[gain](network.logits(part_nH)[:, :num_classes].float()) for part_nH in hidden_NH.split(step)
    ]
    counts_b = there_bL.sum(1).double()
    gain_b = torch.zeros_like(counts_b)
    if gains_N:
        gain_b.index_add_(0, block_N, torch.cat(gains_N).double())
    # summed where they stand, not with index_add_: padding has hidden states too, which may be no numbers
    vector_bH = torch.where(there_bL[..., None], hidden_bLH.float(), 0.0).sum(1, dtype=torch.float64)
    gain_b, vector_bH = gain_b / counts_b, vector_bH / counts_b[:, None]  # 0 / 0 of a block without a label is NaN
    return gain_b.float().cpu().numpy(), vector_bH.float().cpu().numpy()


def _margin(logits_NC: Tensor) -> Tensor:
    two_N2 = logits_NC.topk(2, dim=1).values.sub(logits_NC.logsumexp(1, keepdim=True)).exp()
    return 1 - two_N2[:, 0] + two_N2[:, 1]


def _entropy(logits_NC: Tensor) -> Tensor:
    logprobs_NC = logits_NC.log_softmax(1)
    return -(logprobs_NC.exp() * logprobs_NC.clamp(min=torch.finfo(logprobs_NC.dtype).min)).sum(1)


def _least_confidence(logits_NC: Tensor) -> Tensor:
    return 1 - (logits_NC.max(1).values - logits_NC.logsumexp(1)).exp()


UNCERTAINTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": _margin,
    "entropy": _entropy,
    "least_confidence": _least_confidence,
}
