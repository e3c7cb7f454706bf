"""LaurelResidual: parameter counts, the plain residual at the start, what each variant adds, and what decays."""

from __future__ import annotations

import math

import pytest
import torch

from distilbeam.student.networks.build import count_parameters
from distilbeam.student.networks.laurel import LaurelResidual, without_decay

VARIANTS = ["plain", "rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]
DIM, RANK, PREVIOUS = 12, 4, 3


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, DIM, generator=generator) for _ in range(2 + PREVIOUS)]


@pytest.mark.parametrize(
    ("variant", "history", "expected"),
    [
        ("plain", "identity", 0),
        ("rw", "identity", 2),
        ("lr", "identity", 2 * RANK * DIM),
        ("pa", "identity", PREVIOUS),
        ("pa", "low-rank", PREVIOUS + 2 * RANK * PREVIOUS * DIM),
        ("rw+lr+pa", "identity", 2 + 2 * RANK * DIM + PREVIOUS),
    ],
)
def test_parameters_per_layer(variant, history, expected):
    layer = LaurelResidual(DIM, variant, rank=RANK, previous=PREVIOUS, history=history)
    assert count_parameters(layer) == expected


def test_the_papers_example_has_160_040_parameters():
    layers = torch.nn.ModuleList(LaurelResidual(1000, "rw+lr", rank=4) for _ in range(20))
    assert count_parameters(layers) == 160_040


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", ["xavier", "tiled"])
def test_every_variant_starts_as_the_plain_residual(variant, init, inputs):
    update, residual, *previous = inputs
    layer = LaurelResidual(DIM, variant, rank=RANK, previous=PREVIOUS, init=init)
    torch.testing.assert_close(layer(update, residual, previous), update + residual, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("history", ["identity", "low-rank"])
def test_every_parameter_learns_within_two_steps(variant, history, inputs):
    """In the first step A has no gradient because B is zero, and a history map none because gamma is zero."""
    update, residual, *previous = inputs
    layer = LaurelResidual(DIM, variant, rank=RANK, previous=PREVIOUS, history=history)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        layer(update, residual, previous).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in layer.named_parameters())


def test_trained_parts_add_what_the_paper_says(inputs):
    update, residual, *previous = inputs
    layer = LaurelResidual(DIM, "rw+lr+pa", rank=RANK, previous=PREVIOUS)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    alpha, beta = 2 * torch.softmax(layer.balance, 0)
    expected = alpha * update + beta * (residual + residual @ layer.down @ layer.up)
    expected = expected + sum(g * p for g, p in zip(layer.gamma, previous, strict=True))
    torch.testing.assert_close(layer(update, residual, previous), expected)
    assert float((alpha + beta).detach()) == pytest.approx(2)


def test_fewer_earlier_residuals_near_the_input(inputs):
    update, residual, first, *_ = inputs
    layer = LaurelResidual(DIM, "pa", previous=PREVIOUS)
    with torch.no_grad():
        layer.gamma.copy_(torch.tensor([1.0, 10.0, 100.0]))
    torch.testing.assert_close(layer(update, residual), update + residual)
    torch.testing.assert_close(layer(update, residual, [first]), update + residual + first)


def test_the_tiled_start_of_the_low_rank_map():
    layer = LaurelResidual(6, "lr", rank=2, init="tiled")
    value = 1 / math.sqrt(2 * 6)
    expected = torch.tensor([[value, 0.0], [0.0, value]] * 3)
    torch.testing.assert_close(layer.down.detach(), expected)
    assert layer.up.abs().max() == 0


def test_learned_residuals_biases_and_norms_do_not_decay():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), LaurelResidual(4, "rw+lr", rank=2), torch.nn.BatchNorm1d(4))
    exempt = without_decay(network)
    decayed = [name for name, p in network.named_parameters() if p not in exempt]
    assert decayed == ["0.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"variant": "rw+xx"},
            r"variant must be 'plain' or distinct parts out of rw, lr, pa joined by '\+', got 'rw\+xx'",
        ),
        ({"variant": "rw+rw"}, "distinct parts"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"previous": 0}, "previous must be at least 1, got 0"),
        ({"init": "zeros"}, "init must be 'xavier' or 'tiled', got 'zeros'"),
        ({"history": "all"}, "history must be 'identity' or 'low-rank', got 'all'"),
    ],
)
def test_each_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LaurelResidual(4, **arguments)
