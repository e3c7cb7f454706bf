"""How a language model keeps the texts of a block apart, found out when it is loaded.

Texts packed into one row leak silently: with a mask of ones, or with a cache, transformers lets each see those before it,
and logits are off by tenths. Three ways keep them apart: positions that restart, from which newer releases make the
mask; a mask of four dimensions; one text in each row. The first that passes a probe is taken. The probe changes the
first of two texts, which must change no logit of the second, and compares the second with the same text alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distilbeam.inputs.blocks import position_ids

Run = Callable[..., Tensor]  # ids, positions and a mask to [n, L, ...]
_PROBE = 12  # tokens of a text
_LEAK = 1e-4  # of the spread of the logits: what is masked adds exact zeros
_APART = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Way:
    """How segments are kept apart: `positions`, `mask` or `rows`."""

    name: str

    def __call__(self, run: Run, ids: npt.NDArray[Any], segments: npt.NDArray[Any], device: torch.device) -> Tensor:
        """Run a model over blocks.

        Args:
          run: called with input_ids, position_ids and attention_mask; gives [n, L, ...].
          ids: integers [n, L].
          segments: integers [n, L].
          device: where the model is.

        Returns:
          What the model gives for each token, [n, L, ...], as if each segment stood alone.
        """
        if self.name == "rows":
            return _in_rows(run, ids, segments, device)
        tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
        places = torch.from_numpy(position_ids(segments)).to(device)
        mask = _mask(segments, device) if self.name == "mask" else None
        return run(tokens, places, mask)


WAYS = (Way("positions"), Way("mask"), Way("rows"))


def way_of(run: Run, vocabulary: int, device: torch.device, dtype: torch.dtype, whose: str) -> Way:
    """Find a way in which a model keeps segments apart.

    Args:
      run: the model, from ids to logits [n, L, C].
      vocabulary: ids to probe it with are below this.
      device: where it is.
      dtype: what it computes in.
      whose: the model, for the message.

    Raises:
      ValueError: none does: a token changes what is predicted before it.
    """
    for way in WAYS:
        if _passes(way, run, vocabulary, device, dtype):
            return way
    raise ValueError(
        f"{whose} lets a text see others, or what follows: in a block of two texts, alone in its row too, a token changes "
        "predictions that do not follow it; name a causal language model"
    )


def _passes(way: Way, run: Run, vocabulary: int, device: torch.device, dtype: torch.dtype) -> bool:
    rng = np.random.default_rng(0)
    ids = rng.integers(vocabulary, size=(1, 2 * _PROBE))
    changed = ids.copy()
    changed[0, :_PROBE] = (ids[0, :_PROBE] + rng.integers(1, vocabulary, _PROBE)) % vocabulary
    later = ids.copy()
    later[0, -1] = (ids[0, -1] + 1) % vocabulary
    segments = np.repeat([[1, 2]], _PROBE, axis=1)
    try:
        given, other, last = (way(run, one, segments, device)[0].float() for one in (ids, changed, later))
        alone = way(run, ids[:, _PROBE:], segments[:, _PROBE:], device)[0].float()
    except (RuntimeError, ValueError, TypeError):  # a model that takes no such mask, or no positions
        return False
    spread = float(given.std()) + 1e-12
    leaks = float((given[_PROBE:] - other[_PROBE:]).abs().max()) / spread
    foresees = float((given[:-1] - last[:-1]).abs().max()) / spread
    apart = float((given[_PROBE:] - alone).abs().max()) / spread
    return leaks <= _LEAK and foresees <= _LEAK and apart <= _APART[dtype]


def _mask(segments: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Make an additive mask [n, 1, L, L]: each token sees its own segment up to itself."""
    ids = torch.from_numpy(segments.astype(np.int64)).to(device)
    length = ids.shape[1]
    seen = (ids[:, :, None] == ids[:, None, :]) & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float16).min)[:, None]


def _in_rows(run: Run, ids: npt.NDArray[Any], segments: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Give each segment a row of its own, filled behind, where a causal model does not look."""
    pieces = [
        (row, start, stop) for row, line in enumerate(segments) for start, stop in _runs(line) if line[start] != 0
    ]
    longest = max((stop - start for _, start, stop in pieces), default=1)
    tokens = np.zeros((max(1, len(pieces)), longest), np.int64)
    for number, (row, start, stop) in enumerate(pieces):
        tokens[number, : stop - start] = ids[row, start:stop]
    places = torch.arange(longest, device=device).expand(len(tokens), -1)
    found = run(torch.from_numpy(tokens).to(device), places, None)
    whole = found.new_zeros(*ids.shape, *found.shape[2:])
    for number, (row, start, stop) in enumerate(pieces):
        whole[row, start:stop] = found[number, : stop - start]
    return whole


def _runs(line: npt.NDArray[Any]) -> list[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
    return list(itertools.pairwise(edges))
