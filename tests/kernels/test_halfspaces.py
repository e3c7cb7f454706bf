"""Student-label mixing learns halfspaces with a margin from a noisy teacher, where plain distillation falls short.

Points on the unit sphere in 20 dimensions at least 0.05 from the true hyperplane; the teacher's hard label is right
with probability a(x), which is known; a linear student, 100 steps of Adam on 4,000 points; accuracy against the truth
on 20,000 fresh points. Published accuracies, plain -> mixed: a = 0.7: .988 -> .996; a = 0.6: .922 -> .954; 0.55 where
x_0 > 0.1, else
0.95: .985 -> 1.000; 0.95 near the boundary, 0.55 far away: .955 -> 1.000 (Kontonis et al., arXiv:2302.03806).

The thresholds are the mean over 20 other seeds less four standard errors of the mean over four seeds (for the gain,
over the four kinds of noise as well), so that a correct implementation passes with any seeds; these are fixed all the
same.
"""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import DenseLabels, distill_loss

DIMENSIONS, TRAINING, TEST, MARGIN = 20, 4_000, 20_000, 0.05
SEEDS = range(4)

ACCURACY = {
    "a = 0.7": lambda x, _: torch.full((len(x),), 0.7, dtype=torch.float64),
    "a = 0.6": lambda x, _: torch.full((len(x),), 0.6, dtype=torch.float64),
    "by a feature": lambda x, _: torch.where(x[:, 0] > 0.1, 0.55, 0.95).double(),
    "by the margin": lambda _, margin: torch.where(margin.abs() < 0.2, 0.95, 0.55).double(),
}


def points(count, normal, generator):
    found = torch.empty(0, DIMENSIONS, dtype=torch.float64)
    while len(found) < count:
        x = torch.randn(2 * count, DIMENSIONS, generator=generator, dtype=torch.float64)
        x = torch.nn.functional.normalize(x, dim=1)
        found = torch.cat([found, x[(x @ normal).abs() >= MARGIN]])
    return found[:count]


def learned(x, labels, accuracy, objective):
    weight = torch.zeros(DIMENSIONS, 2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.1)
    for _ in range(100):
        adam.zero_grad()
        distill_loss(x @ weight, labels, objective=objective, accuracy=accuracy, candidates=2).backward()
        adam.step()
    return (weight[:, 1] - weight[:, 0]).detach()


def one_run(noise, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.nn.functional.normalize(torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64), dim=0)
    x, fresh = points(TRAINING, normal, generator), points(TEST, normal, generator)
    accuracy = ACCURACY[noise](x, x @ normal)
    right = torch.rand(TRAINING, generator=generator, dtype=torch.float64) < accuracy
    said = torch.where(right, x @ normal > 0, x @ normal <= 0).long()
    labels = DenseLabels(torch.nn.functional.one_hot(said, 2).double().log())
    found = [learned(x, labels, accuracy, objective) for objective in ("ce", "slam")]
    return [float(((fresh @ w > 0) == (fresh @ normal > 0)).double().mean()) for w in found]


@pytest.fixture(scope="module")
def accuracies():
    return {noise: torch.tensor([one_run(noise, seed) for seed in SEEDS]) for noise in ACCURACY}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "least"), [("a = 0.7", 0.9898), ("a = 0.6", 0.9144), ("by a feature", 0.9996), ("by the margin", 0.9999)]
)
def test_mixing_learns_the_halfspace(accuracies, noise, least):
    assert accuracies[noise][:, 1].mean() >= least


@pytest.mark.slow
def test_mixing_beats_plain_distillation(accuracies):
    gain = torch.stack([found[:, 1] - found[:, 0] for found in accuracies.values()])
    assert gain.mean() >= 0.0028
