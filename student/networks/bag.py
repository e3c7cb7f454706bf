"""Text as a bag of embeddings (Joulin et al., Bag of Tricks for Efficient Text Classification, arXiv:1607.01759)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distilbeam.inputs.config import padding_id, vocabulary_size
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.last_layer import LastLayerApart
from distilbeam.student.networks.mlp import Mlp
from distilbeam.student.networks.residual import scaled


class EmbeddingBag(LastLayerApart):
    """The mean embedding of a text's ids, then fully connected layers.

    V ids of `dim` (times `width`) numbers have V dim parameters, the layers those of an `Mlp`. A text without an id has
    the embedding 0.
    """

    def __init__(self, config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        dim = scaled(config.dim, config.width)
        self.pad_id = padding_id(config.input)
        self.embedding = nn.Embedding(vocabulary_size(config.input), dim, padding_idx=self.pad_id)
        self.layers = Mlp(dim, config, num_classes, init="tiled")

    def features(self, ids: Tensor) -> Tensor:
        """Compute what the last layer is given, [B, H], of ids int64 [B, L]."""
        count = (ids != self.pad_id).sum(1, keepdim=True).clamp(min=1)
        # the embedding of the padding is zero and has no gradient, so that the sum needs no mask
        return self.layers.features(self.embedding(ids).sum(1) / count)

    def last_layer(self) -> nn.Linear:
        """Give the layer to the logits."""
        return self.layers.last_layer()


class VectorBag(LastLayerApart):
    """The embeddings of hashed n-grams that come as a vector [buckets], summed with its numbers as weights."""

    def __init__(self, buckets: int, config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        dim = scaled(config.dim, config.width)
        self.embedding = nn.Linear(buckets, dim, bias=False)
        self.layers = Mlp(dim, config, num_classes, init="tiled")

    def features(self, x: Tensor) -> Tensor:
        """Compute what the last layer is given, [B, H], of vectors [B, buckets]."""
        return self.layers.features(self.embedding(x))

    def last_layer(self) -> nn.Linear:
        """Give the layer to the logits."""
        return self.layers.last_layer()


def text_network(input_shape: tuple[int, ...], config: StudentConfig, num_classes: int) -> nn.Module:
    """Choose the bag that suits the input."""
    if config.input.gives_ids:
        return EmbeddingBag(config, num_classes)
    if len(input_shape) != 1:
        raise ValueError(
            f"a text network needs ids or vectors of one dimension, got inputs of shape {list(input_shape)}"
        )
    return VectorBag(input_shape[0], config, num_classes)


def start_from_table(module: nn.Module, table: npt.NDArray[np.floating]) -> None:
    """Give a text network's embeddings the values of a table, whose numbers count in standard deviations of the random ones.

    Args:
      module: an untrained `EmbeddingBag` or `VectorBag`.
      table: [V, dim]; see `encoder_table.scaled`.

    Raises:
      ValueError: the network has no such table, or one of another size.
    """
    if not isinstance(module, EmbeddingBag | VectorBag):
        raise ValueError(
            f"an embedding table is for students of kind 'text', got {type(module).__name__}; leave student.init out"
        )
    weights = torch.from_numpy(np.ascontiguousarray(table, np.float32))
    own = module.embedding.weight
    if isinstance(module, VectorBag):  # drawn between -1 and 1 over the root of the buckets
        weights = weights.T / (3 * own.shape[1]) ** 0.5
    if weights.shape != own.shape:
        raise ValueError(f"the embedding table must be of {list(own.shape)}, got {list(weights.shape)}")
    with torch.no_grad():
        own.copy_(weights)
        if isinstance(module, EmbeddingBag):
            own[module.pad_id] = 0
