"""A language model in two halves: the layers up to the last hidden states, and what makes logits of them.

The second half is the model's own forward pass with its layers replaced by hidden states that are given, so that what it does
to logits (a cap, a scale, a bias) is done, whatever the architecture. With it the logits of some hundred positions exist
at a time, instead of those of a whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLACES = 8


class Halves:
    """A causal language model of transformers, run in two halves where that gives what the whole gives.

    Args:
      model: the model; its layers are taken out of it where it can be halved.
      vocabulary: ids to try it with are below this.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self._model = model
        name = model.base_model_prefix
        self._layers = getattr(model, name, None)
        if not isinstance(self._layers, nn.Module) or self._layers is model:
            self._layers = None
            return
        ids = torch.arange(_PLACES, device=model.device)[None] % vocabulary
        with torch.inference_mode():
            expected = self._whole(ids, None, None)
            setattr(model, name, _Given())
            try:
                halved = self.logits(self.hidden(ids, None, None)[0])
                same = halved.shape == expected[0].shape and torch.allclose(halved, expected[0], rtol=1e-2, atol=1e-3)
            except (RuntimeError, TypeError, AttributeError, KeyError):
                same = False
        if not same:
            setattr(model, name, self._layers)
            self._layers = None

    @property
    def are_two(self) -> bool:
        """Whether there are two; else `hidden` gives logits, and `logits` gives back what it is given."""
        return self._layers is not None

    def hidden(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the last hidden states, [n, L, d], or the logits where the model cannot be halved."""
        if self._layers is None:
            return self._whole(ids, positions, mask)
        found: Tensor = self._layers(**_arguments(ids, positions, mask, self._model.dtype))[0]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states: [m, C] of [m, d]."""
        if self._layers is None:
            return hidden
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        given = getattr(self._model, self._model.base_model_prefix)
        given.states = hidden[None]
        try:
            found: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        finally:
            given.states = None
        return found

    def _whole(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        found: Tensor = self._model(**_arguments(ids, positions, mask, self._model.dtype)).logits
        return found


class _Given(nn.Module):
    """Stands for a model's layers and returns the hidden states that it was given."""

    states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.states)


def _arguments(ids: Tensor, positions: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    # without a cache: with one, transformers forgets that positions restart
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if positions is not None:
        arguments["position_ids"] = positions
    if mask is not None:
        arguments["attention_mask"] = mask.to(dtype)
    return arguments
