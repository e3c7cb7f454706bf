"""Logits of positions as labels: against an oracle in float64, at the edges, and draws by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.softlabels.codec import TAIL_FLOOR
from distilbeam.teacher.tokens.encoding import encode_positions, positions_at_once

CLASSES, ROWS = 391, 40  # no multiple of a block of classes


def spec_of(kind: Any, k: int, classes: int = CLASSES, temperature: float = 1.0) -> SoftLabelSpec:
    return SoftLabelSpec(
        classes, kind, k, temperature=temperature, unit="token", sequence_length=8, tokenizer="ab", teacher="t"
    )


def logits_of(seed: int, rows: int = ROWS, classes: int = CLASSES, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 7, CLASSES])
def test_top_k_is_the_softmax_in_float64(k: int, temperature: float) -> None:
    logits, tokens = logits_of(0), torch.arange(ROWS) * 9
    classes, logprobs, tail, token_logprob = encode_positions(
        logits, tokens, spec_of("top_k", k, temperature=temperature)
    )
    expected = log_softmax(logits.double().numpy() / temperature, axis=1)
    order = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_array_equal(classes, order[:, :k])
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, order[:, :k], 1), rtol=0, atol=4e-6)
    np.testing.assert_allclose(token_logprob, expected[np.arange(ROWS), tokens], rtol=0, atol=4e-6)
    assert tail is not None
    left = np.exp(np.take_along_axis(expected, order[:, k:], 1)).sum(axis=1)
    if k == CLASSES:
        assert (tail == TAIL_FLOOR).all()
    else:
        np.testing.assert_allclose(np.exp(tail), left, rtol=2e-5)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_padding_of_the_head_changes_nothing(kind: str) -> None:
    logits, tokens = logits_of(1), torch.arange(ROWS)
    padded = torch.cat([logits, torch.full((ROWS, 128), 50.0)], dim=1)  # more probable than all real classes
    uniforms = np.random.default_rng(0).random((ROWS, 6))
    spec = spec_of(kind, 6)
    for one, two in zip(
        encode_positions(logits, tokens, spec, uniforms), encode_positions(padded, tokens, spec, uniforms), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_equal_logits_of_half_precision_stand_in_the_order_of_classes() -> None:
    logits = torch.zeros(2, CLASSES, dtype=torch.bfloat16)
    logits[:, [300, 12, 77]] = 4.0
    classes, logprobs, _, _ = encode_positions(logits, torch.zeros(2, dtype=torch.int64), spec_of("top_k", 3))
    assert classes.tolist() == [[12, 77, 300]] * 2
    assert (logprobs == logprobs[:, :1]).all()


def test_draws_invert_the_distribution_function() -> None:
    logits = logits_of(2)
    logits[:, 100:300] = -torch.inf  # whole blocks of classes that cannot be drawn
    uniforms = np.random.default_rng(1).random((ROWS, 50))
    classes, logprobs, tail, _ = encode_positions(
        logits, torch.zeros(ROWS, dtype=torch.int64), spec_of("sampled", 50), uniforms
    )
    assert tail is None
    probabilities = np.exp(log_softmax(logits.double().numpy(), axis=1))
    cumulative = np.cumsum(probabilities, axis=1)
    for row in range(ROWS):
        there = classes[row] >= 0
        drawn = np.repeat(classes[row][there], np.rint(np.exp(logprobs[row][there]) * 50).astype(int))
        ordered = np.sort(uniforms[row])
        assert len(drawn) == 50
        expected = np.searchsorted(cumulative[row], ordered, side="right")
        edge = np.abs(cumulative[row][expected] - ordered) < 2e-6
        edge |= np.abs(cumulative[row][expected - 1] - ordered) < 2e-6
        assert (edge | (drawn == expected)).all()
        assert not ((drawn >= 100) & (drawn < 300)).any()
        assert (logprobs[row][~there] == -np.inf).all()


def test_between_two_sums_of_a_block_lies_no_class_without_a_mass() -> None:
    """The sum of a block in float32 may be above that in float64; what is drawn between them is a class that can be."""
    for seed in range(20):
        logits = logits_of(seed, rows=1)
        logits[0, 100:128] = -torch.inf  # the end of the first block of classes
        probabilities = np.exp(log_softmax(logits.double().numpy(), axis=1))[0]
        uniforms = probabilities[:100].sum() + np.linspace(-3e-7, 3e-7, 200)[None]
        classes, _, _, _ = encode_positions(
            logits, torch.zeros(1, dtype=torch.int64), spec_of("sampled", 200), uniforms
        )
        drawn = classes[0][classes[0] >= 0]
        assert set(drawn.tolist()) <= {*range(100), 128}


def test_expected_frequencies_are_the_probabilities() -> None:
    draws = 2048
    logits = logits_of(3, rows=1, scale=1.0)
    counts = np.zeros(CLASSES)
    for part in range(32):  # the midpoints of 65,536 equal parts of [0, 1)
        uniforms = (part * draws + np.arange(draws) + 0.5)[None] / (32 * draws)
        classes, logprobs, _, _ = encode_positions(
            logits, torch.zeros(1, dtype=torch.int64), spec_of("sampled", draws), uniforms
        )
        there = classes[0] >= 0
        counts[classes[0][there]] += np.exp(logprobs[0][there].astype(np.float64)) * draws
    expected = np.exp(log_softmax(logits.double().numpy(), axis=1))[0]
    np.testing.assert_allclose(counts / counts.sum(), expected, rtol=0, atol=1.5 / (32 * draws))


def test_the_ends_of_the_unit_interval_are_classes_that_have_a_mass() -> None:
    logits = torch.full((1, CLASSES), -torch.inf)
    logits[0, [5, 6, 130]] = torch.tensor([1.0, 2.0, 3.0])
    uniforms = np.array([[0.0, 1 - 2.0**-53, 0.5]])
    classes, _, _, _ = encode_positions(logits, torch.tensor([6]), spec_of("sampled", 3), uniforms)
    assert classes[0].tolist() == [5, 130, -1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_what_is_no_number_spoils_its_position_alone(kind: str, wrong: float | None) -> None:
    logits = logits_of(4, rows=3)
    if wrong is None:
        logits[1] = -torch.inf
    else:
        logits[1, 7] = wrong
    uniforms = np.random.default_rng(2).random((3, 4))
    tokens = torch.tensor([1, 2, 3])
    _, logprobs, tail, token_logprob = encode_positions(logits, tokens, spec_of(kind, 4), uniforms)
    for values in (logprobs.max(axis=1), token_logprob, tail if tail is not None else token_logprob):
        assert np.isnan(values).tolist() == [False, True, False]


def test_what_is_encoded_at_a_time_is_bounded() -> None:
    assert positions_at_once(spec_of("top_k", 64)) == 128
    assert positions_at_once(spec_of("sampled", 32)) == 128
    assert positions_at_once(spec_of("sampled", 2048)) == 8
