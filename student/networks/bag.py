"""Text as a bag of embeddings (Joulin et al., Bag of Tricks for Efficient Text Classification, arXiv:1607.01759)."""

from __future__ import annotations

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
