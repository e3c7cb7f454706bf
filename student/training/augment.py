"""Random changes of a batch: flips and shifts of images, dropped words of texts, and mixtures of examples with their labels.

What happens to an example depends on the seed, the epoch and the example's position in it alone, not on the batch, the
worker or the rank; which examples are mixed depends on the seed, the step and the rank. A training that was stopped and
goes on therefore sees what it would have seen.

References:
  Zhang et al., mixup: Beyond Empirical Risk Minimization, arXiv:1710.09412, equation 1.
  Iyyer et al., Deep Unordered Composition Rivals Syntactic Methods for Text Classification, ACL 2015 (word dropout).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distilbeam.student.training.config import AugmentConfig

Words = npt.NDArray[np.uint64]


def augment_images(
    images: Tensor, positions: Tensor, config: AugmentConfig, seed: int, epoch: int, source: int
) -> Tensor:
    """Flip and shift images.

    Args:
      images: floating [B, channels, height, width].
      positions: int64 [B], of each example in the epoch; any number that is the example's own will do.
      config: what is done.
      seed: the training's; with epoch, source and position it decides every draw.
      epoch: number of the epoch.
      source: number of the source, so that positions of two sources differ.

    Returns:
      Changed images of the same shape; the input itself where nothing is to be done.

    Raises:
      ValueError: the inputs are no images, or too small for the shift.
    """
    if not (config.flip or config.crop):
        return images
    if images.ndim != 4:
        raise ValueError(
            f"augment.flip and augment.crop need images [channels, height, width], got {list(images.shape[1:])}"
        )
    words = random_words(positions, seed, epoch, source)
    if config.flip:
        mirrored = torch.from_numpy((words & np.uint64(1)).astype(bool))
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return _shifted(images, words, config.crop) if config.crop else images


def drop_words(
    inputs: Tensor, positions: Tensor, config: AugmentConfig, seed: int, epoch: int, source: int, padding: int | None
) -> Tensor:
    """Leave words of texts out, each with the probability `word_dropout`.

    Args:
      inputs: int64 ids [B, L], whose dropped places become padding; or float32 n-gram numbers [B, buckets], which become 0.
      positions: int64 [B], of each example in the epoch.
      config: what is done.
      seed: the training's; with epoch, source, position and place it decides every draw.
      epoch: number of the epoch.
      source: number of the source.
      padding: id that fills rows of ids; None for numbers.

    Returns:
      Changed inputs of the same shape; the input itself without `word_dropout`. Nothing is scaled up in turn: a bag of words
      averages over those that are left.
    """
    if not config.word_dropout:
        return inputs
    length = inputs.shape[1]
    places = (positions[:, None] * length + torch.arange(length)).flatten()
    words = random_words(places, seed, epoch, source) >> np.uint64(11)  # 53 bits, what a double holds
    dropped = torch.from_numpy(words.astype(np.float64) < config.word_dropout * 2.0**53).view(-1, length)
    return inputs.masked_fill(dropped, 0 if padding is None else padding)


@dataclass(frozen=True)
class Mixture:
    """How the examples of a batch are mixed: share x_i + (1 - share) x_partner(i).

    Attributes:
      share: in [0, 1].
      partner: int64 [B], a permutation.
    """

    share: float
    partner: Tensor

    @classmethod
    def draw(cls, size: int, config: AugmentConfig, seed: int, step: int, rank: int) -> Mixture | None:
        """Draw a step's mixture; None without mixup."""
        if not config.mixup or size < 2:
            return None
        rng = np.random.default_rng([seed, step, rank, size])
        return cls(float(rng.beta(config.mixup, config.mixup)), torch.from_numpy(rng.permutation(size)))

    def inputs(self, inputs: Tensor) -> Tensor:
        """Mix inputs.

        Raises:
          ValueError: they are not numbers that can be mixed.
        """
        if not inputs.is_floating_point():
            raise ValueError(f"augment.mixup needs inputs of real numbers, got {inputs.dtype}; set it to 0")
        return torch.lerp(inputs[self.partner], inputs, self.share)

    def losses(self, logits: Tensor) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
        """Give the two shares of the loss with the logits that each of them compares to the labels in their order."""
        return (self.share, logits), (1 - self.share, logits[torch.argsort(self.partner)])


def random_words(positions: Tensor, seed: int, epoch: int, source: int) -> Words:
    """Compute a random word of 64 bits for each position, as a hash of everything that it depends on.

    Args:
      positions: int64 [B].
      seed: the training's; with epoch, source and position it decides every draw.
      epoch: number of the epoch.
      source: number of the source.

    Returns:
      uint64 [B].

    References:
      Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014 (the finaliser of SplitMix64).
    """
    key = np.random.SeedSequence([seed, epoch, source]).generate_state(1, np.uint64)
    words = positions.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)))


def _shifted(images_BCHW: Tensor, words: Words, pixels: int) -> Tensor:
    height, width = images_BCHW.shape[2:]
    if pixels >= min(height, width):
        raise ValueError(f"augment.crop must be less than the images' {min(height, width)} pixels, got {pixels}")
    padded = torch.nn.functional.pad(images_BCHW, (pixels,) * 4, mode="reflect")
    steps = np.uint64(2 * pixels + 1)
    down = torch.from_numpy(((words >> np.uint64(1)) % steps).astype(np.int64))
    right = torch.from_numpy(((words >> np.uint64(33)) % steps).astype(np.int64))
    y_BH, x_BW = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    example_B11 = torch.arange(len(images_BCHW))[:, None, None]
    # indices around the channel dimension put it last
    return padded[example_B11, :, y_BH[:, :, None], x_BW[:, None, :]].permute(0, 3, 1, 2).contiguous()
