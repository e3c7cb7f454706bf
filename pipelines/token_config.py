"""The configuration of a run of a language model: blocks are chosen, labelled token by token, and learned.

A run's file describes one where its teacher labels tokens. Text needs no human label, so that there is no labelled set; whatever
of a run rests on one true class of an example (Robust Active Distillation, SLaM, pooled labels, ...) is refused, each in a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from distilbeam.pipelines.sections import EngineSection, GainName, LabelsSection, PricesSection, check_token_labels
from distilbeam.selection.gains import GAINS
from distilbeam.selection.strategies.registry import gain_read, names, strategy_class
from distilbeam.selection.strategies.selectors import Selector
from distilbeam.settings import Configuration, Section
from distilbeam.student.language.config import CAUSAL_LM, LanguageModelConfig, TokenTrainConfig, objective_of
from distilbeam.teacher.config import BeamConfig, CausalLMConfig, OpenAIConfig

TokenTeacherConfig = Annotated[CausalLMConfig | OpenAIConfig | BeamConfig, Field(discriminator="kind")]
_KNOWN_OF_BLOCKS = ("gains", "embeddings")
_BY_TRUTH = ("rad", "rad-loss", "rad-capped", "correct-gain")

_ONE_CLASS = "rests on one true class of an example, a block has a token at each position"
_NO_HUMANS = "is of labels by humans, the text itself is what a language model is measured by"
# settings of runs with classifiers that a run of a language model has no use for -> why
NOT_OF_BLOCKS = {
    "run.accept_weak_teacher": _ONE_CLASS,
    "data.labelled": _NO_HUMANS,
    "data.label": _NO_HUMANS,
    "data.integers": _NO_HUMANS,
    "data.check_classes": _NO_HUMANS,
    "data.classes": "is that of the tokenizer: its ids",
    "data.id": "is example_id, which ingest writes",
    "data.carry": "is the block, and nothing else",
    "labels.pooled": _ONE_CLASS,
    "selection.floor": f"is of weights and of SLaM, which {_ONE_CLASS}",
    "selection.coverage": f"is of SLaM, which {_ONE_CLASS}",
    "student.input": "is always the block",
    "student.init": "is student.model, whose weights it starts from",
    "student.encoder": "is student.model, whose weights it starts from",
    "training.finetune": _NO_HUMANS,
    "training.hard_weight": "is training.hard_share, the share of the text's own token",
    "training.mixing": f"is of SLaM, which {_ONE_CLASS}",
    "training.reestimate_epochs": f"is of weights, which {_ONE_CLASS}",
    "training.self_training": "is for classes: a student's own draws would teach it its own mistakes",
    "training.ensemble": "is of self-training, which language models have not",
    "training.pseudo_rows": "is of self-training, which language models have not",
    "training.final_training": "is of the validation set's labels by humans, which language models have not",
    "training.augment": "changes images and words, and the labels are of the tokens that are there",
    "tune": "is for classifiers",
    "pareto": "is for classifiers",
}


class TokenRunSection(Section):
    """Where the run of a language model lives and how long it goes on."""

    directory: str = Field("run", description="the run directory")
    rounds: int = Field(3, ge=1, le=10_000, description="rounds of select, label, train")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    compare_plain: bool = Field(
        True, description="also train the student on the text alone of the blocks that were bought; asks nobody"
    )

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("directory",)


class TokenDataSection(Section):
    """The blocks of a run of a language model, as `distilbeam ingest --format lm` and `chat` write them."""

    pool: str = Field(description="blocks to choose from: a Parquet file, a directory of them or a glob pattern")
    validation: str = Field(
        description="blocks that no student learns, measured after each epoch; the teacher is asked"
    )
    test: str | None = Field(
        None, description="blocks for the final table; without them those of validation serve, and the report says so"
    )

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("pool", "validation", "test")


class TokenLabelsSection(LabelsSection):
    """The form in which a run stores the teacher's answers to tokens."""

    held_out_k: int = Field(
        20,
        ge=1,
        description="classes kept of each token of validation and test, by which students are compared with the teacher",
    )


class BlockSelectionSection(Section):
    """Which blocks to buy labels for."""

    method: str = Field(
        "herding",
        examples=[name for name in names() if name not in _BY_TRUTH],
        description="herding: what covers best what the student is unsure of (`gain`); greedy: the largest gains; uniform: "
        "chance; another strategy of `distilbeam.selection` that reads gains and embeddings alone; or module:Class",
    )
    gain: GainName = Field(
        "entropy",
        examples=[*GAINS],
        description="what the student would learn from a block's labels: the mean over its labelled positions",
    )
    budget: int | None = Field(None, ge=1, description="blocks to buy in each round")
    budget_tokens: int | None = Field(
        None, ge=1, description="instead of budget, tokens to buy in each round: as many whole blocks as they are"
    )
    compare_uniform: bool = Field(
        True,
        description="also train on as many uniformly chosen blocks, for the report; asks the teacher for those not bought already",
    )

    @field_validator("method")
    @classmethod
    def _known_to_a_run(cls, method: str) -> str:
        if ":" not in method and method.replace("_", "-") not in names():
            allowed = [name for name in names() if name not in _BY_TRUTH and _reads_blocks_alone(strategy_class(name))]
            raise ValueError(f"method must be one of {', '.join(allowed)}, or module:Class, got {method}")
        made = strategy_class(method, "method")
        if method.replace("_", "-") in _BY_TRUTH or "errors" in made.reads:
            raise ValueError(f"method must not be {method}: a game against the teacher's mistakes {_ONE_CLASS}")
        if unknown := [name for name in made.reads if name not in _KNOWN_OF_BLOCKS]:
            raise ValueError(
                f"method must be a strategy that reads {' and '.join(_KNOWN_OF_BLOCKS)} alone, {method} reads {unknown[0]}, "
                "which a block has for each of its tokens"
            )
        return method if ":" in method else method.replace("_", "-")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.budget is None) == (self.budget_tokens is None):
            raise ValueError("budget, in blocks, or budget_tokens must be given, one of them")
        return self

    @property
    def scored(self) -> str | None:
        """Name of the gain that the pool is scored by; None where the strategy reads nothing of the blocks."""
        return gain_read(self.method, self.gain)


class BlockEngineSection(EngineSection):
    """How the work of a run of a language model is cut; nothing here changes what a label means."""

    unit_rows: int = Field(2_048, ge=1, description="blocks of a unit of work, rounded up to whole row groups")
    shard_rows: int = Field(4_096, ge=1, description="most blocks of a shard of labels")


class TokenRunConfig(Configuration):
    """Everything that a run of a language model depends on."""

    run: TokenRunSection = TokenRunSection()
    data: TokenDataSection
    teacher: TokenTeacherConfig
    labels: TokenLabelsSection
    selection: BlockSelectionSection
    student: LanguageModelConfig
    training: TokenTrainConfig = TokenTrainConfig()
    engine: BlockEngineSection = BlockEngineSection()
    prices: PricesSection = PricesSection()

    @model_validator(mode="before")
    @classmethod
    def _has_nothing_of_classes(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            kind = _given(data, "student.kind")
            if kind not in (None, CAUSAL_LM):
                raise ValueError(
                    f"student.kind must be '{CAUSAL_LM}' with teacher.kind = {_given(data, 'teacher.kind')!r}, which labels the tokens "
                    f"of blocks, got {kind!r}"
                )
            for name, why in NOT_OF_BLOCKS.items():
                if _given(data, name) is not None:
                    raise ValueError(f"{name} must be left out with a language model: it {why}")
        return data

    @model_validator(mode="after")
    def _suits_itself(self) -> Self:
        check_token_labels(self.teacher.kind, self.labels)
        objective_of(self.training, self.labels.kind)
        needs_student = self.selection.scored is not None
        if needs_student and self.student.config is not None and self.run.rounds == 1:
            raise ValueError(
                f"run.rounds must be at least 2 with selection.method = {self.selection.method!r} and a student of random weights, "
                "which know nothing of the blocks: its first round is chosen by chance; or set selection.method = 'uniform'"
            )
        return self

    @property
    def scores_at_first(self) -> bool:
        """Whether the student knows something before the first round: its weights are of a folder, or a factory's."""
        return self.student.model is not None


def describes_tokens(data: Mapping[str, Any]) -> bool:
    """Tell whether plain data of a run names a teacher of tokens: a handler of Beam's is one where it has a tokenizer."""
    kind = _given(data, "teacher.kind")
    return kind in ("causal_lm", "openai") or (kind == "beam" and _given(data, "teacher.tokenizer") is not None)


def _reads_blocks_alone(made: type[Selector]) -> bool:
    return all(name in _KNOWN_OF_BLOCKS for name in made.reads)


def _given(data: Mapping[str, Any], name: str) -> Any:
    found: Any = data
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
