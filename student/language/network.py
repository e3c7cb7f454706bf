"""A causal language model as its training calls it: hidden states of packed blocks, and the last layer apart.

A block holds several texts one after another (`segment_ids`, 0 for padding), and no token may attend to another text. Models of
transformers see to it by themselves where they get position ids that begin anew with each text, no mask and no cache; with a mask of
ones, or the cache, texts see each other without a word. So the model is tried when it is built: two texts in one block against
the two alone. One that leaks gets a mask [B, 1, L, L]; one that leaks even then is refused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distilbeam.inputs.tokenizer import TokenizerFolder
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.networks.huggingface import described, first_line, quiet_transformers

Packing = Literal["positions", "mask"]
TOLERANCE = 1e-4  # of the largest hidden state: rounding is a tenth of it, a leak a hundred times as much
_PROBE = (5, 7)  # tokens of the texts that a model is tried with


class CausalLm(nn.Module):
    """A language model whose last layer is left to the loss.

    Args:
      model: of transformers, or a module with a `backbone`, from `input_ids`, `position_ids` and `attention_mask` to hidden states
        [B, L, H], and a `head`, a linear layer.
      packing: how texts in a block are kept apart; found out by `tried`.
    """

    def __init__(self, model: nn.Module, packing: Packing = "positions") -> None:
        super().__init__()
        self.model = model
        self.packing: Packing = packing

    @property
    def of_transformers(self) -> bool:
        """Whether the model has the methods of transformers' own."""
        return hasattr(self.model, "get_output_embeddings")

    @property
    def head(self) -> nn.Module:
        """The last layer, with `weight` [V, H] and perhaps `bias`."""
        model: Any = self.model
        layer: nn.Module = model.get_output_embeddings() if self.of_transformers else model.head
        return layer

    @property
    def backbone(self) -> Callable[..., Any]:
        """What gives the hidden states."""
        model: Any = self.model
        found: Callable[..., Any] = _inner(model).base_model if self.of_transformers else model.backbone
        return found

    def hidden(self, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Compute hidden states [B, L, H], what the last layer is given, of packed blocks [B, L]."""
        ids, segments = input_ids.long(), segment_ids.long()
        mask = None if self.packing == "positions" else _block_mask(segments)
        options: dict[str, Any] = {"use_cache": False} if self.of_transformers else {}
        found = self.backbone(input_ids=ids, position_ids=positions(segments), attention_mask=mask, **options)
        states: Tensor = found if isinstance(found, Tensor) else found[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states."""
        found: Tensor = self.head(hidden)
        return found

    def forward(self, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Compute hidden states; see `hidden`."""
        return self.hidden(input_ids, segment_ids)

    @torch.no_grad()
    def tried(self, what: str) -> CausalLm:
        """Find out how the model keeps texts apart, and that its logits are its last layer's.

        Args:
          what: names the model, for the message.

        Returns:
          The network itself.

        Raises:
          ValueError: texts see each other whatever is done, or something follows the last layer.
        """
        training = self.model.training
        self.model.eval()
        try:
            if self.of_transformers:
                self._require_linear_head(what)
            if not self._leaks():
                return self
            self.packing = "mask"
            try:
                if not self._leaks():
                    return self
                found = "with a mask too"
            except Exception as e:  # noqa: BLE001 - of a recurrent model anything: its masks are of padding alone
                found = f"and takes no mask ({first_line(e)})"
        finally:
            self.model.train(training)
        raise ValueError(
            f"{what} lets texts of a block see each other with position ids, {found}, while labels are of texts apart; choose a "
            "student whose attention can be masked"
        )

    def _leaks(self) -> bool:
        ids = torch.arange(1, 1 + sum(_PROBE))[None]
        segments = torch.cat([torch.full((length,), place + 1) for place, length in enumerate(_PROBE)])[None]
        together = self.hidden(ids, segments)
        alone = torch.cat(
            [
                self.hidden(ids[segments == i][None], torch.ones(1, n, dtype=torch.long))
                for i, n in enumerate(_PROBE, 1)
            ],
            1,
        )
        return not float((together - alone).abs().max()) <= TOLERANCE * float(alone.abs().max())

    def _require_linear_head(self, what: str) -> None:
        model: Any = self.model
        ids = torch.arange(1, 1 + _PROBE[0])[None]
        given = self.logits(self.hidden(ids, torch.ones_like(ids)))
        found = model(input_ids=ids, use_cache=False).logits
        if not float((given - found).abs().max()) <= TOLERANCE * float(found.abs().max()):
            raise ValueError(
                f"{what} changes the logits behind its last layer (a soft cap or a scale), which the loss would pass over; choose a "
                "model whose logits are those of its last layer"
            )


def build_language_model(config: LanguageModelConfig, tokenizer: TokenizerFolder) -> CausalLm:
    """Build a student; initial weights that come from nowhere else are drawn from torch's global generator.

    Args:
      config: the student's configuration.
      tokenizer: its tokenizer.

    Raises:
      ValueError: the folder or factory gives no language model, or one that cannot be trained from labels of packed blocks.
    """
    if config.factory is not None:
        network = CausalLm(_from_factory(config, tokenizer))
        return network.tried(f"student.model = '{config.factory}'")
    transformers = quiet_transformers("student.kind = 'causal_lm'")
    if config.model is not None:
        return CausalLm(_from_folder(transformers, config.model)).tried(f"the model in {config.model}")
    tokens = tokenizer.tokenizer
    special = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    told = described(transformers, {"vocab_size": tokenizer.num_classes, **special, **(config.config or {})})
    try:
        model = transformers.AutoModelForCausalLM.from_config(told)
    except Exception as e:  # no such head for it, or sizes that do not fit together
        raise ValueError(
            f"student.config: transformers makes no language model of a {told.model_type}: {first_line(e)}"
        ) from e
    return CausalLm(model).tried(f"student.config of a {told.model_type}")


def require_suits(network: CausalLm, num_classes: int, length: int) -> None:
    """Refuse a model whose last layer or positions are fewer than the labels'.

    Args:
      network: the student.
      num_classes: ids that the labels know.
      length: tokens of a block.

    Raises:
      ValueError: they are.
    """
    head: Any = network.head
    rows = int(head.weight.shape[0])
    if rows < num_classes:
        raise ValueError(
            f"the student's last layer has {rows:,} outputs, fewer than the {num_classes:,} ids of the labels: give it the "
            "vocabulary of the tokenizer that the labels were made with"
        )
    places = getattr(getattr(network.model, "config", None), "max_position_embeddings", None)
    if isinstance(places, int) and places < length:
        raise ValueError(
            f"the labels' blocks of {length:,} tokens are longer than the {places:,} positions of the student; label shorter "
            "blocks, or set student.config.max_position_embeddings"
        )


def positions(segments_BL: Tensor) -> Tensor:
    """Count the tokens of each text in its block from 0, int64 [B, L]."""
    places_BL = torch.arange(segments_BL.shape[1], device=segments_BL.device).expand_as(segments_BL)
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    return places_BL - torch.where(begins_BL, places_BL, 0).cummax(1).values


def _block_mask(segments_BL: Tensor) -> Tensor:
    """Say who may see whom as what is added to the scores, float32 [B, 1, L, L]: 0, or the least number there is."""
    length = segments_BL.shape[1]
    seen_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    seen_BLL = seen_BLL & torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    return torch.where(seen_BLL, 0.0, torch.finfo(torch.float32).min)[:, None]


def _inner(model: Any) -> Any:
    """Take the wrapper of an adapter (PEFT) off: its adapters are in the layers of the model inside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _from_folder(transformers: Any, folder: str) -> nn.Module:
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"student.model: {folder} must be a folder with config.json and safetensors on this disk")
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,  # whatever they are stored in: the training's precision is a setting of its own
            output_loading_info=True,
        )
    except Exception as e:  # of a damaged folder anything
        raise ValueError(f"student.model: {folder} holds no language model with safetensors: {first_line(e)}") from e
    if report["missing_keys"]:
        raise ValueError(
            f"student.model: {folder} holds no weights for {', '.join(sorted(report['missing_keys'])[:3])}: they would be drawn at "
            "random; name the folder of a trained language model"
        )
    found: nn.Module = model
    return found


def _from_factory(config: LanguageModelConfig, tokenizer: TokenizerFolder) -> nn.Module:
    assert config.factory is not None
    name, _, attribute = config.factory.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"student.model = '{config.factory}' cannot be found: {e}") from e
    named = inspect.signature(factory).parameters
    given = {"num_classes": tokenizer.num_classes} if "num_classes" in named else {}
    module = factory(**given, **config.options)
    whole = isinstance(module, nn.Module) and (
        hasattr(module, "get_output_embeddings")
        or (hasattr(module, "backbone") and isinstance(getattr(module, "head", None), nn.Linear))
    )
    if not whole:
        raise ValueError(
            f"student.model = '{config.factory}' must return a torch module with a backbone and a linear head, or a model of "
            f"transformers, got {type(module).__name__}"
        )
    found: nn.Module = module
    return found
