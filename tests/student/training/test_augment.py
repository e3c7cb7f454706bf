"""Augmentation: each change against its definition, drawn from the seed, the epoch and the position alone."""

from __future__ import annotations

import numpy as np
import pytest
import small_trainings
import torch

from distilbeam.kernels.distillation.interface import distill_loss
from distilbeam.kernels.labels import DenseLabels
from distilbeam.student.training.augment import Mixture, augment_images, random_words
from distilbeam.student.training.batches import open_soft_labels
from distilbeam.student.training.config import AugmentConfig, TrainConfig
from distilbeam.student.training.distributed import Processes

POSITIONS = torch.arange(400)


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(400, 2, 5, 6)).astype(np.float32))


def test_nothing_is_done_by_default(images):
    assert augment_images(images, POSITIONS, AugmentConfig(), 0, 0, 0) is images
    assert Mixture.draw(8, AugmentConfig(), 0, 0, 0) is None


def test_every_other_image_is_mirrored(images):
    changed = augment_images(images, POSITIONS, AugmentConfig(flip=True), 0, 0, 0)
    mirrored = (changed == images.flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (changed == images).flatten(1).all(1)).all())
    # 400 fair coins are within 5 standard deviations (10 each) of 200 with probability 1 - 6e-7
    assert abs(int(mirrored.sum()) - 200) <= 50


def test_images_are_shifted_with_their_border_mirrored(images):
    changed = augment_images(images, POSITIONS, AugmentConfig(crop=2), 3, 1, 0)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    shifts = []
    for image, found in zip(padded, changed.numpy(), strict=True):
        windows = {(y, x): image[:, y : y + 5, x : x + 6] for y in range(5) for x in range(5)}
        shifts.append([shift for shift, window in windows.items() if np.array_equal(window, found)])
    assert all(len(shift) == 1 for shift in shifts)
    # 25 shifts, 16 of each expected: chi-square with 24 degrees of freedom is below 60 with probability 1 - 6e-5
    counts = np.bincount([5 * y + x for [(y, x)] in shifts], minlength=25)
    assert float(((counts - 16) ** 2 / 16).sum()) < 60


def test_a_change_depends_on_seed_epoch_source_and_position_alone(images):
    config = AugmentConfig(flip=True, crop=1)
    whole = augment_images(images, POSITIONS, config, 5, 2, 1)
    order = torch.from_numpy(np.random.default_rng(1).permutation(400))
    for part in order.split(33):  # any batch, any order
        assert torch.equal(augment_images(images[part], part, config, 5, 2, 1), whole[part])
    for other in ((6, 2, 1), (5, 3, 1), (5, 2, 0)):
        assert not torch.equal(augment_images(images, POSITIONS, config, *other), whole)


def test_words_have_no_pattern():
    words = random_words(torch.arange(4096), 0, 0, 0)
    bits = np.unpackbits(words.view(np.uint8).reshape(4096, 8), axis=1).astype(float)
    # shares of ones, and of equal bits in neighbouring positions: standard deviation 1/128, bound of 5 on 128 numbers
    assert np.abs(bits.mean(0) - 0.5).max() < 5 / 128
    assert np.abs((bits[1:] == bits[:-1]).mean(0) - 0.5).max() < 5 / 128


def test_a_mixture_is_that_of_the_formula():
    config = AugmentConfig(mixup=0.4)
    mixture = Mixture.draw(6, config, 1, 2, 3)
    inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    expected = mixture.share * inputs + (1 - mixture.share) * inputs[mixture.partner]
    torch.testing.assert_close(mixture.inputs(inputs), expected)
    assert sorted(mixture.partner.tolist()) == [*range(6)]
    assert 0 <= mixture.share <= 1
    again = Mixture.draw(6, config, 1, 2, 3)
    assert (again.share, again.partner.tolist()) == (mixture.share, mixture.partner.tolist())
    others = [Mixture.draw(6, config, *changed) for changed in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert all(other.share != mixture.share for other in others)


def test_mixed_losses_are_those_to_mixed_labels():
    """Cross-entropy is linear in the labels: the two parts sum to the loss against share y_i + (1 - share) y_partner."""
    rng = np.random.default_rng(0)
    logits, teacher = (torch.from_numpy(rng.normal(size=(6, 4))) for _ in range(2))
    mixture = Mixture.draw(6, AugmentConfig(mixup=1.0), 0, 0, 0)
    labels = DenseLabels(teacher.log_softmax(1))
    parts = [share * distill_loss(z, labels, objective="ce", reduction="sum") for share, z in mixture.losses(logits)]
    y = teacher.softmax(1)
    mixed = mixture.share * y + (1 - mixture.share) * y[mixture.partner]
    assert float(sum(parts)) == pytest.approx(float(-(mixed * logits.log_softmax(1)).sum()), rel=1e-6)


def test_shares_follow_the_beta_distribution():
    shares = [Mixture.draw(2, AugmentConfig(mixup=0.5), 0, step, 0).share for step in range(2000)]
    # Beta(1/2, 1/2): mean 1/2, standard deviation 1/sqrt(8); five standard errors of 2,000 draws
    assert abs(np.mean(shares) - 0.5) < 5 / np.sqrt(8 * 2000)
    # it is below x with probability 2/pi asin(sqrt(x)): 1/3 at x = 1/4
    assert abs(np.mean(np.array(shares) < 0.25) - 1 / 3) < 5 * np.sqrt(2 / 9 / 2000)


def test_what_cannot_be_augmented_is_refused(images):
    with pytest.raises(
        ValueError, match=r"augment.flip and augment.crop need images \[channels, height, width\], got \[7\]"
    ):
        augment_images(torch.zeros(2, 7), POSITIONS[:2], AugmentConfig(flip=True), 0, 0, 0)
    with pytest.raises(ValueError, match=r"augment.crop must be less than the images' 5 pixels, got 5"):
        augment_images(images, POSITIONS, AugmentConfig(crop=5), 0, 0, 0)
    mixture = Mixture.draw(2, AugmentConfig(mixup=1.0), 0, 0, 0)
    with pytest.raises(ValueError, match=r"augment.mixup needs inputs of real numbers, got torch.int64; set it to 0"):
        mixture.inputs(torch.zeros(2, 3, dtype=torch.int64))


def test_ranks_see_the_images_that_one_process_sees(tmp_path):
    data = small_trainings.write_images(tmp_path / "labels")
    student, training = small_trainings.settings("images")
    seen = []
    for size in (1, 2, 3):
        images = {}
        for rank in range(size):
            processes = Processes(torch.device("cpu"), rank, size)
            soft = open_soft_labels(data["soft_labels"], student, training, data["classes"], None, 5, processes)
            for batch in soft:
                images |= dict(zip(batch["row"].tolist(), batch["inputs"], strict=True))
        seen.append(images)
    plain = open_soft_labels(
        data["soft_labels"], student, TrainConfig(), data["classes"], None, 5, Processes(torch.device("cpu"))
    )
    unchanged = {
        row: image for batch in plain for row, image in zip(batch["row"].tolist(), batch["inputs"], strict=True)
    }
    assert sorted(seen[0]) == [*range(60)]
    assert all(torch.equal(seen[0][row], other[row]) for other in seen[1:] for row in range(60))
    assert sum(torch.equal(seen[0][row], unchanged[row]) for row in range(60)) < 10  # 1 of 50 on average stays as it is
