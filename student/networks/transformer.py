"""A small transformer encoder over token ids.

Embeddings of tokens and learned positions, blocks of attention and of a GELU network, each with a layer norm in front
and joined to its input, a last layer norm, the mean over the tokens, and the logits. Padding is neither attended to nor
averaged. With V ids, L positions, width d, feed-forward f = feedforward d and n blocks there are
(V + L) d + n (4 d^2 + 2 d f + 9 d + f) + 2 d + (d + 1) C parameters, and those of the residuals. With `norm` rms the norms
are RMS norms, which have no biases, each computed in one pass with the residual in front of it.
References: Vaswani et al., Attention Is All You Need, arXiv:1706.03762; Xiong et al., On Layer Normalization in the
Transformer Architecture, arXiv:2002.04745 (norm in front); Zhang and Sennrich, Root Mean Square Layer Normalization,
arXiv:1910.07467.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distilbeam.inputs.config import padding_id, vocabulary_size
from distilbeam.kernels.laurel.operands import EPSILON
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.last_layer import LastLayerApart
from distilbeam.student.networks.residual import Normed, join_and_norm, make_residual, scaled

EMBEDDING_STD = 0.02


class Transformer(LastLayerApart):
    """The encoder of a configuration's `dim`, `layers`, `heads`, `feedforward`, `width` and `residual`."""

    def __init__(self, input_shape: tuple[int, ...], config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        # the width scales each head, so that heads divide the model's width whatever it is
        dim = config.heads * scaled(config.dim // config.heads, config.width)
        self.pad_id = padding_id(config.input)
        self.tokens = nn.Embedding(vocabulary_size(config.input), dim)
        self.positions = nn.Parameter(torch.empty(input_shape[0], dim))
        for weight in (self.tokens.weight, self.positions):
            nn.init.normal_(weight, std=EMBEDDING_STD)
        sublayers: list[nn.Module] = []
        for _ in range(config.layers):
            sublayers += [_Attention(dim, config), _FeedForward(dim, config)]
        self.sublayers = nn.ModuleList(sublayers)
        self.rms = config.norm == "rms"
        make_norm = partial(nn.RMSNorm, eps=EPSILON) if self.rms else nn.LayerNorm
        self.norms = nn.ModuleList(make_norm(dim) for _ in sublayers)
        self.residuals = nn.ModuleList(make_residual(config, dim, i, "tiled") for i in range(len(sublayers)))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = make_norm(dim)
        self.head = nn.Linear(dim, num_classes)

    def features(self, ids: Tensor) -> Tensor:
        """Compute the mean over the tokens, [B, H], of ids int64 [B, L]."""
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        there_BL = (ids != self.pad_id) | first  # a text without a token is its first position: no softmax over nothing
        h_BLD = self.dropout(self.tokens(ids) + self.positions)
        normed_BLD = self._sublayers_by_rms(h_BLD, there_BL) if self.rms else self._sublayers(h_BLD, there_BL)
        weight_BL1 = there_BL.unsqueeze(2).to(normed_BLD.dtype)
        mean_BD: Tensor = (normed_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return mean_BD

    def _sublayers(self, h_BLD: Tensor, there_BL: Tensor) -> Tensor:
        earlier: list[Tensor] = []
        for sublayer, norm, residual in zip(self.sublayers, self.norms, self.residuals, strict=True):
            update = self.dropout(sublayer(norm(h_BLD), there_BL))
            earlier, h_BLD = [h_BLD, *earlier], residual(update, h_BLD, earlier)
        normed: Tensor = self.norm(h_BLD)
        return normed

    def _sublayers_by_rms(self, h_BLD: Tensor, there_BL: Tensor) -> Tensor:
        """The same with RMS norms, each computed with the residual in front of it."""
        earlier: list[Tensor] = []
        normed: Normed = self.norms[0](h_BLD)
        readers = [sublayer.reader for sublayer in self.sublayers[1:]]
        for sublayer, residual, norm, reader in zip(
            self.sublayers, self.residuals, [*self.norms[1:], self.norm], [*readers, None], strict=True
        ):
            update = self.dropout(sublayer(normed, there_BL))
            joined = join_and_norm(residual, update, h_BLD, earlier, norm, reader)
            earlier, (h_BLD, normed) = [h_BLD, *earlier], joined
        assert isinstance(normed, Tensor)
        return normed

    def last_layer(self) -> nn.Linear:
        """Give the layer from the mean to the logits."""
        return self.head


class _Attention(nn.Module):
    def __init__(self, dim: int, config: StudentConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.queries_keys_values, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    @property
    def reader(self) -> nn.Module:
        """The layer that reads the input."""
        return self.queries_keys_values

    def forward(self, x_BLD: Normed, there_BL: Tensor) -> Tensor:
        split = self.queries_keys_values(x_BLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = there_BL[:, None, None, :]
        mixed_BHLE = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask)
        out: Tensor = self.out(mixed_BHLE.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, dim: int, config: StudentConfig) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, config.feedforward * dim), nn.Linear(config.feedforward * dim, dim)

    @property
    def reader(self) -> nn.Module:
        """The layer that reads the input."""
        return self.up

    def forward(self, x_BLD: Normed, there_BL: Tensor) -> Tensor:  # noqa: ARG002 - the signature of a sublayer
        out: Tensor = self.down(nn.functional.gelu(self.up(x_BLD)))
        return out
