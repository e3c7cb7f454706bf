"""The sections of a run's and of a labelling job's configuration: what they say of the data, the labels, the choice and the work.

[teacher], [student] and [training] are elsewhere, in the parts that they configure. Every rule of one section is checked here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from distilbeam.selection.gains import GAINS, gain_named
from distilbeam.selection.strategies.registry import gain_read, names, strategy_class
from distilbeam.settings import Section


def _known_gain(name: str) -> str:
    gain_named(name)
    return name.replace("-", "_")  # one spelling, in which runs that are there have stored it


GainName = Annotated[str, AfterValidator(_known_gain)]
_KNOWN_OF_POOL = ("gains", "logits", "embeddings")  # what a run can tell a strategy of each example
_READ_MORE = ("rad-capped", "correct-gain")  # named without importing them, which would bring scikit-learn


class RunSection(Section):
    """Where the run lives and how long it goes on."""

    directory: str = Field("run", description="the run directory")
    rounds: int = Field(3, ge=1, le=10_000, description="rounds of select, label, train")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    accept_weak_teacher: bool = Field(
        False, description="buy labels of a teacher that is no better than student 0 on the validation set"
    )

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("directory",)


class PoolSection(Section):
    """The pool: Parquet files and which of their columns mean what."""

    pool: str = Field(description="unlabelled examples: a Parquet file, a directory of them or a glob pattern")
    id: str | None = Field(
        None, description="column with a unique id; without it the BLAKE2b hash of the carried columns serves"
    )
    carry: tuple[str, ...] = Field(
        (), description="pool columns to copy beside the labels; the columns that the student reads are always copied"
    )
    classes: tuple[str, ...] = Field((), description="class names in the order of the teacher's outputs")

    @model_validator(mode="after")
    def _distinct_classes(self) -> Self:
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be at least two different names")
        return self

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("pool",)


class DataSection(PoolSection):
    """The data of a run; without `classes` they are the labels of the labelled sets, numerals by value, then text."""

    labelled: str = Field(description="labelled examples that student 0 is trained on")
    validation: str = Field(
        description="labelled examples, unseen by the teacher's training: they measure the teacher and choose checkpoints"
    )
    test: str | None = Field(
        None,
        description="labelled examples for the final table; without them the validation set serves, and the report says so",
    )
    label: str = Field("label", description="column with the true class, in labelled, validation and test")
    integers: Literal["names", "indices"] | None = Field(
        None,
        description="what whole numbers in that column are, where they could be names of classes and their indices too",
    )
    check_classes: bool = Field(
        True,
        description="stop where the teacher's answers for the validation set are no better than chance, or fit far better with "
        "its outputs in another order",
    )

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("pool", "labelled", "validation", "test")


class LabelDataSection(PoolSection):
    """The data of a labelling job."""

    num_classes: int | None = Field(None, ge=2, description="number of classes, where they have no names")


class _LabelForm(Section):
    kind: Literal["dense", "top_k", "sampled"] = Field(
        "dense",
        description="all classes, the k largest with the mass of the rest, or k draws by their probability (random sampling distillation)",
    )
    k: int | None = Field(None, ge=1, description="classes kept (top_k) or draws (sampled)")
    storage: Literal["float32", "float16"] = Field(
        "float32",
        description="float32 columns rounded to half precision, smaller on disk, or float16, half of the memory",
    )

    @model_validator(mode="after")
    def _k_fits_kind(self) -> Self:
        if (self.kind == "dense") != (self.k is None):
            raise ValueError("k must be given for top_k and sampled labels, and only for them")
        return self


class LabelsSection(_LabelForm):
    """The form in which the teacher's answers are stored."""

    temperature: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="what the teacher's logits are divided by; 1 keeps its own distribution",
    )


class RunLabelsSection(_LabelForm):
    """The form in which a run stores the teacher's answers."""

    temperature: float | Literal["calibrated"] = Field(
        "calibrated",
        description="what the teacher's logits are divided by: a number, or the one that fits the validation set best",
    )
    pooled: bool | Literal["auto"] = Field(
        "auto",
        description="learn the teacher's beliefs pooled with those of the student that chose the examples, each weighted "
        "as fits the validation set best; auto: where the teacher is less than ten points better than student 0 there",
    )

    @field_validator("temperature", mode="before")
    @classmethod
    def _a_number_or_the_word(cls, temperature: Any) -> Any:
        number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if temperature != "calibrated" and not (number and 0 < temperature < math.inf):
            raise ValueError(f"temperature must be a positive number or 'calibrated', got {temperature!r}")
        return temperature


class SelectionSection(Section):
    """Which examples to buy labels for."""

    method: str = Field(
        "herding",
        examples=[name for name in names() if name not in _READ_MORE],
        description="herding: what covers best what the student is unsure of (`gain`); greedy: the largest gains; rad: the "
        "game against the teacher's mistakes (Robust Active Distillation); uniform: chance; another strategy of "
        "`distilbeam.selection`; or module:Class, a strategy of your own",
    )
    gain: GainName = Field(
        "margin", examples=[*GAINS], description="what the student would learn from an example's label"
    )
    budget: int = Field(description="labels to buy in each round", ge=1)
    floor: float = Field(0.5, ge=0, le=1, description="lower bound of the teacher's estimated accuracy")
    coverage: float = Field(
        0.9, gt=0, lt=1, description="how often the truth must be among the teacher's candidate classes"
    )
    compare_uniform: bool = Field(
        True,
        description="also train on as many uniformly chosen labels, for the report; asks the teacher for those not bought already",
    )

    @field_validator("method")
    @classmethod
    def _known_to_a_run(cls, method: str) -> str:
        if unknown := [name for name in strategy_class(method, "method").reads if name not in _KNOWN_OF_POOL]:
            raise ValueError(
                f"method must be a strategy that reads {', '.join(_KNOWN_OF_POOL)} alone, {method} reads {unknown[0]}, which a "
                "run does not estimate"
            )
        return method if ":" in method else method.replace("_", "-")

    @property
    def scored(self) -> str | None:
        """Name of the gain that the pool is scored by; None where the strategy reads nothing of the examples."""
        return gain_read(self.method, self.gain)


class EngineSection(Section):
    """How the work is cut; nothing here changes what a label means."""

    unit_rows: int = Field(262_144, ge=1, description="rows of a unit of work, rounded up to whole row groups")
    shard_rows: int = Field(65_536, ge=1, description="most rows of a shard of soft labels")
    shard_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="most bytes that a shard's carried columns and labels take, by the pool's footers",
    )
    compare_rows: int = Field(
        1_000_000,
        ge=0,
        description="most rows without a label that are read beforehand, so that identical ones are asked once and ids "
        "that come twice are found; more only where labelled rows have left the pool, whose answers they may have",
    )
    batch_rows: int = Field(
        65_536, ge=1, description="most rows read and scored at a time; fewer where rows are large or classes many"
    )
    teacher_batch: int = Field(256, ge=1, description="most rows in one request to the teacher")
    threads: int | None = Field(None, ge=1, description="threads that training uses; torch's own choice without it")
    attempts: int = Field(2, ge=1, le=100, description="times that failed items are tried")
    max_failures: int | None = Field(
        None, ge=0, description="rows without an answer at which a step stops; without it they never do"
    )
    flush_s: float = Field(60.0, gt=0, description="seconds after which the answers to a part of a shard are kept")
    retry: bool = Field(True, description="whether rows without an answer are asked again by the next call")


class PricesSection(Section):
    """What work costs, for `distilbeam plan`."""

    currency: str = Field("USD", description="what the prices are in")
    per_1000_calls: float = Field(0.0, ge=0, description="of 1,000 rows asked of the teacher")
    per_worker_hour: float = Field(0.0, ge=0, description="of one worker for an hour")
    per_gb_month: float = Field(0.0, ge=0, description="of storing 10^9 bytes of labels for a month")


class WatchSection(Section):
    """How `distilbeam label --watch` gathers what arrives, chooses from it, and ends."""

    poll_s: float = Field(1.0, gt=0, description="seconds between two looks at the directory")
    settle_s: float = Field(2.0, ge=0, description="seconds that a file must stay as it is before it is taken")
    window_s: float = Field(10.0, ge=0, description="seconds that a window gathers files after its first")
    window_files: int = Field(1_000, ge=1, description="files at which a window closes earlier")
    windows: int | None = Field(None, ge=1, description="windows after which the job ends")
    idle_s: float | None = Field(None, gt=0, description="seconds without a new file after which the job ends")
    stop_file: str = Field("STOP", min_length=1, description="file in the directory that ends the job")
    budget: int | None = Field(None, ge=1, description="labels to buy in each window; every row is labelled without it")
    student: str | None = Field(
        None, description="with a budget: the student that scores, such as run/students/round=003"
    )
    wrong_share: float | None = Field(None, ge=0, le=1, description="with a budget: expected share of wrong labels")
    gain: GainName = Field(
        "margin", examples=[*GAINS], description="with a budget: what the student would learn from an example's label"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="with a budget: seed of the choice")

    @model_validator(mode="after")
    def _choice_is_whole(self) -> Self:
        given = [value is not None for value in (self.budget, self.student, self.wrong_share)]
        if any(given) and not all(given):
            raise ValueError("budget, student and wrong_share must be given together: a choice needs all three")
        return self

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("student",)


class JobSection(Section):
    """Where a labelling job lives."""

    directory: str = Field("labelling", description="the job's directory; the dataset is its folder labels")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("directory",)


def check_token_labels(teacher: str, labels: LabelsSection) -> None:
    """Refuse forms of labels that a teacher of tokens cannot give.

    Args:
      teacher: its kind.
      labels: the form.

    Raises:
      ValueError: labels are dense, or a server is to draw or to divide logits.
    """
    if labels.kind == "dense":
        raise ValueError("labels.kind must be 'top_k' or 'sampled' for tokens, with labels.k classes or draws")
    if teacher != "causal_lm" and (labels.kind, labels.temperature) != ("top_k", 1.0):
        raise ValueError(
            "labels.kind must be 'top_k' and labels.temperature 1 for a server, which knows its most probable tokens alone and "
            f"divides no logits of a prompt, got {labels.kind!r} and {labels.temperature:g}"
        )
