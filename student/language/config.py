"""Configuration of a student that is a language model, and of its training: typed, frozen, validated at construction."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from distilbeam.settings import Section
from distilbeam.student.training.config import LoopConfig

CAUSAL_LM: Literal["causal_lm"] = "causal_lm"
Objective = Literal["tail", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv", "truncated_kl", "sampled"]


class LanguageModelConfig(Section):
    """What the student is: a causal language model of transformers, or a module of one's own."""

    kind: Literal["causal_lm"] = Field(CAUSAL_LM, description="causal_lm, which the token labels of blocks are for")
    model: str | None = Field(
        None,
        description="local folder of a Hugging Face model whose weights the student starts from, or module:factory for a module "
        "with a `backbone` and a `head`, or whatever else has the methods of a model of transformers",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="instead of a model, settings of transformers for random weights: model_type (llama, qwen3, gpt2, ...) and "
        "what differs from its defaults; the vocabulary and its special tokens are filled in",
    )
    options: dict[str, Any] = Field({}, description="module:factory: further keyword arguments of the factory")
    tokenizer: str | None = Field(
        None, description="folder of the tokenizer, which must be that of the labels; the model's folder unless given"
    )

    @property
    def factory(self) -> str | None:
        """The factory that `model` names; None where it is a folder."""
        module, colon, name = (self.model or "").partition(":")
        named = colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
        return self.model if named else None

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("tokenizer",) if self.factory else ("model", "tokenizer")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError(f"a student of kind '{CAUSAL_LM}' must have model or config, one of them")
        if self.options and self.factory is None:
            raise ValueError("options are arguments of a module:factory; a folder and config take none")
        if self.tokenizer is None and (self.model is None or self.factory):
            raise ValueError("tokenizer must be given, a folder, unless model is a folder that holds one")
        return self


class TokenTrainConfig(LoopConfig):
    """How a language model is trained from token labels; the seed is an argument of the training itself."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: int = Field(1, ge=1, le=1_000_000, description="passes over the blocks")
    batch_size: int = Field(16, ge=1, description="blocks per step, over all processes and micro-batches together")
    lr: float = Field(1e-3, gt=0, description="largest learning rate; 1e-5 to 1e-4 for trained weights")
    objective: Objective | None = Field(
        None,
        description="tail: KL to the teacher over its k classes and a bucket of all others, the default for top_k labels; "
        "reverse_kl, jsd, skew_kl, skew_reverse_kl, tv over the same; truncated_kl: the k classes alone; sampled: the default "
        "for sampled labels, and the only one",
    )
    beta: float | None = Field(None, ge=0, le=1, description="jsd: 0 is forward KL, 1 reverse KL")
    alpha: float | None = Field(None, ge=0, lt=1, description="skew_kl, skew_reverse_kl: share that is mixed in")
    hard_share: float = Field(
        0.25,  # study 8: of 0, a quarter and a half the one that loses least, whether the teacher is good or weak
        ge=0,
        le=1,
        description="share of the cross-entropy of the text's own token beside the distillation loss; 1 is plain training, which "
        "reads no label",
    )
    accumulate: int = Field(1, ge=1, description="micro-batches that a step's blocks are cut into in each process")
    checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them"
    )
    shard: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: share weights, gradients and optimizer out to the processes (FSDP2) instead of copying them",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of matrix products; weights and losses stay float32"
    )

    @model_validator(mode="after")
    def _parameters_belong_to_objectives(self) -> Self:
        for name, users in (("beta", ("jsd",)), ("alpha", ("skew_kl", "skew_reverse_kl"))):
            if getattr(self, name) is not None and self.objective not in users:
                raise ValueError(
                    f"{name} is for objective {' and '.join(users)}, got objective {self.objective or 'tail'!r}"
                )
        return self


class TokenDataConfig(Section):
    """What a language model is trained on, and where it goes."""

    soft_labels: tuple[str, ...] = Field(description="directories of token labels", min_length=1)
    mixing_weights: tuple[float, ...] | None = Field(None, description="share of each of them in an epoch")
    validation: str | None = Field(
        None, description="directory of token labels of other blocks, measured after each epoch"
    )
    directory: str = Field("student", description="where the student appears")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("soft_labels", "validation", "directory")


class TokenLaunchConfig(Section):
    """A training of a language model over token labels."""

    data: TokenDataConfig
    student: LanguageModelConfig
    training: TokenTrainConfig = TokenTrainConfig()


def objective_of(training: TokenTrainConfig, kind: str) -> str:
    """Return the objective of a training on labels of a kind.

    Args:
      training: its configuration.
      kind: `top_k` or `sampled`.

    Raises:
      ValueError: draws cannot be learned by it without bias.
    """
    chosen = training.objective or {"top_k": "tail", "sampled": "sampled"}[kind]
    if (kind == "sampled") != (chosen == "sampled"):
        raise ValueError(
            f"training.objective must be {'sampled' if kind == 'sampled' else 'one of top_k labels, such as tail,'} for "
            f"{kind} labels, got {chosen!r}: draws are unbiased for forward KL alone; leave it out"
        )
    return chosen
