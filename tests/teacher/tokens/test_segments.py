"""How a model keeps texts apart: toy models that leak in each way, and the way that is found for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distilbeam.teacher.tokens.segments import WAYS, Run, way_of

CPU, VOCABULARY, CLASSES = torch.device("cpu"), 50, 30
TABLE = torch.randn(VOCABULARY, CLASSES, generator=torch.Generator().manual_seed(0))


def attend(seen_NLL: Tensor, ids: Tensor) -> Tensor:
    """The mean of the embeddings of what each token sees."""
    weights = seen_NLL.float() / seen_NLL.float().sum(dim=2, keepdim=True)
    return weights @ TABLE[ids]


def causal(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), -1, -1)


def by_positions(ids: Tensor, places: Tensor, _mask: Tensor | None) -> Tensor:
    """Makes its mask from positions that restart, as transformers does."""
    segments = (places[:, 1:] != places[:, :-1] + 1).cumsum(dim=1)
    segments = torch.cat([torch.zeros(len(ids), 1, dtype=torch.int64), segments], dim=1)
    return attend(causal(ids) & (segments[:, :, None] == segments[:, None, :]), ids)


def by_mask(ids: Tensor, _places: Tensor, mask: Tensor | None) -> Tensor:
    """Looks at a mask alone: packed texts leak without one."""
    return attend(causal(ids) if mask is None else mask[:, 0] == 0, ids)


def by_rows(ids: Tensor, _places: Tensor, _mask: Tensor | None) -> Tensor:
    """Sees everything before, whatever it is told."""
    return attend(causal(ids), ids)


def refuses_masks(ids: Tensor, _places: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        raise ValueError("a mask must have two dimensions")
    return attend(causal(ids), ids)


def sees_the_future(ids: Tensor, _places: Tensor, _mask: Tensor | None) -> Tensor:
    return attend(torch.ones(len(ids), ids.shape[1], ids.shape[1]), ids)


@pytest.mark.parametrize(
    ("run", "name"), [(by_positions, "positions"), (by_mask, "mask"), (by_rows, "rows"), (refuses_masks, "rows")]
)
def test_the_first_way_that_does_not_leak_is_taken(run: Run, name: str) -> None:
    way = way_of(run, VOCABULARY, CPU, torch.float32, "teacher.model: toy")
    assert way.name == name
    rng = np.random.default_rng(1)
    ids = rng.integers(VOCABULARY, size=(3, 9))
    segments = np.array([[1, 1, 1, 2, 2, 2, 3, 0, 0], [1] * 9, [1, 2, 2, 2, 2, 3, 3, 3, 3]])
    found = way(run, ids, segments, CPU)
    for row, line in enumerate(segments):
        for segment in set(line.tolist()) - {0}:
            at = np.flatnonzero(line == segment)
            alone = attend(causal(torch.zeros(1, len(at))), torch.from_numpy(ids[row, at])[None])
            torch.testing.assert_close(found[row, at], alone[0])


def test_a_leak_below_the_noise_of_half_precision_is_found() -> None:
    def weakly(ids: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        clean = by_positions(ids, places, None) if mask is None else by_mask(ids, places, mask)
        return clean + 0.01 * by_rows(ids, places, None) if mask is None else clean

    assert way_of(weakly, VOCABULARY, CPU, torch.bfloat16, "teacher.model: toy").name == "mask"


def test_a_model_that_sees_what_follows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^teacher.model: toy lets a text see others, or what follows: .* name a causal"
    ):
        way_of(sees_the_future, VOCABULARY, CPU, torch.float32, "teacher.model: toy")


def test_leaking_ways_leak_in_this_test_too() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 2]])
    ids = np.array([[1, 2, 3, 4, 5, 6]])
    changed = np.array([[7, 8, 9, 4, 5, 6]])
    positions, mask, rows = WAYS
    for way, run, leaks in (
        (positions, by_mask, True),
        (mask, by_mask, False),
        (mask, by_rows, True),
        (rows, by_rows, False),
    ):
        one, two = (way(run, given, segments, CPU)[0, 3:] for given in (ids, changed))
        assert torch.equal(one, two) != leaks
