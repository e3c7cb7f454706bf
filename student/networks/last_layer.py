"""Networks whose logits are one linear layer of their features, which a training may take together with its loss."""

from __future__ import annotations

from torch import Tensor, nn


class LastLayerApart(nn.Module):
    """A network that can be asked for its features and its last layer, one by one.

    A network of one's own that inherits from it has its last layer and its loss taken together where that pays, like the
    built-in ones.
    """

    def features(self, x: Tensor) -> Tensor:
        """Compute what the last layer is given, [B, H], of inputs [B, ...]."""
        raise NotImplementedError

    def last_layer(self) -> nn.Linear:
        """Give the layer from the features to the logits."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, C] of inputs [B, ...]."""
        logits: Tensor = self.last_layer()(self.features(x))
        return logits


class Linear(LastLayerApart, nn.Sequential):
    """One linear layer of the flattened input."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        nn.Sequential.__init__(self, nn.Flatten(), nn.Linear(inputs, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """Flatten inputs [B, ...]."""
        return x.flatten(1)

    def last_layer(self) -> nn.Linear:
        """Give the layer."""
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        return layer
