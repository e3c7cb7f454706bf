"""A small student trained in each precision: after 200 steps its loss differs from float32's by less than the seeds do.

A residual network of three blocks, each a learned augmented residual with its norm, quantised in the same pass, and a
linear layer; it learns the soft labels of a random teacher. For every seed the precisions share initial weights and
batches, so that the difference of their losses on 2,048 fresh points has little of the seed's own noise. With s the
standard deviation of float32's loss over seeds, the 99 % t-interval of the mean difference must lie within [-s, s]: less
than what another seed would change. The same network with ternary layers shows that the bound can be broken.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from distilbeam.kernels import distill_loss, fp8_linear, int8_linear, laurel_residual
from distilbeam.kernels.quantize import formats

INPUTS, WIDTH, CLASSES, BLOCKS, RANK = 16, 32, 10, 3, 4
STEPS, BATCH, FRESH = 200, 64, 2_048
SEEDS = range(5)


class Block(nn.Module):
    """x' = alpha f + beta (x + (x A) B); the next f = relu(W norm(x') + b)."""

    def __init__(self):
        super().__init__()
        self.alpha, self.beta, self.norm = (nn.Parameter(torch.ones(shape)) for shape in ((), (), (WIDTH,)))
        self.down, self.up = nn.Parameter(torch.randn(WIDTH, RANK) / WIDTH**0.5), nn.Parameter(torch.zeros(RANK, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, update, residual, form, gradients):
        parts = {"alpha": self.alpha, "beta": self.beta, "down": self.down, "up": self.up, "norm_weight": self.norm}
        if form is None:
            total, normed = laurel_residual(update, residual, **parts)
            return torch.relu(self.linear(normed)), total
        total, rows = laurel_residual(update, residual, **parts, quantize=form)
        if form == "int8":
            return torch.relu(int8_linear(rows, self.linear.weight, self.linear.bias)), total
        return torch.relu(fp8_linear(rows, self.linear.weight, self.linear.bias, gradients=gradients)), total


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x, form, gradients):
        update, residual = torch.zeros(len(x), WIDTH), self.first(x)
        for block in self.blocks:
            update, residual = block(update, residual, form, gradients)
        return self.head(update + residual)


def final_loss(seed, form=None, gradients="bf16", autocast=False, steps=STEPS):
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(INPUTS, 64), nn.Tanh(), nn.Linear(64, CLASSES)).requires_grad_(False)
    student, scale = Student(), 6.0

    def loss_of(x):
        labels = (scale * teacher(x)).log_softmax(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = student(x, form, gradients)
        return distill_loss(logits.float(), labels)

    batches, fresh = torch.randn(STEPS, BATCH, INPUTS), torch.randn(FRESH, INPUTS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3, fused=True)
    for x in batches[:steps]:
        optimizer.zero_grad()
        loss_of(x).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(fresh))


@pytest.fixture(scope="module")
def in_float32():
    return torch.tensor([final_loss(seed) for seed in SEEDS])


def interval(differences):
    """99 % t-interval of the mean."""
    mean, error = float(differences.mean()), float(differences.std()) / len(differences) ** 0.5
    half = stats.t.ppf(0.995, len(differences) - 1) * error
    return mean - half, mean + half


PRECISIONS = {
    "bf16": {"autocast": True},
    "fp8, gradients bf16": {"form": "fp8"},
    "fp8, gradients fp8": {"form": "fp8", "gradients": "fp8"},
    "int8": {"form": "int8"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("bf16", marks=pytest.mark.exhaustive),
        pytest.param("fp8, gradients bf16", marks=pytest.mark.exhaustive),
        "fp8, gradients fp8",
        "int8",
    ],
)
def test_the_loss_is_within_the_seeds_noise(precision, in_float32):
    differences = torch.tensor([final_loss(seed, **PRECISIONS[precision]) for seed in SEEDS]) - in_float32
    assert differences.abs().max() > 0
    least, most = interval(differences)
    noise = float(in_float32.std())
    assert -noise < least < most < noise, (least, most, noise)


@pytest.mark.slow
def test_ternary_layers_would_be_seen(in_float32, monkeypatch):
    coarse = formats.Format(torch.int8, 1.0, 1.0)
    monkeypatch.setitem(formats.FORMATS, "int8", coarse)
    monkeypatch.setitem(formats.FORMAT_OF, torch.int8, coarse)
    differences = torch.tensor([final_loss(seed, form="int8") for seed in SEEDS]) - in_float32
    assert interval(differences)[0] > float(in_float32.std())


@pytest.mark.slow
def test_the_student_has_learned(in_float32):
    assert in_float32.max() < 0.1 * min(final_loss(seed, steps=0) for seed in SEEDS)
