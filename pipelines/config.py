"""The configuration of a run or of a labelling job: one TOML file, typed, frozen, validated.

A file without the sections of a student ([selection], [student], [training]) describes a labelling job: every row of a
pool is labelled, and the pool may grow. Relative paths are relative to the configuration file. Every rule that does not
need the data is checked here; each violation is one sentence that names the setting, the value and, for an unknown name,
the nearest valid one.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.search.space import ParetoConfig, TuneConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.teacher.config import TeacherConfig
from distilbeam.toml_files import read_toml

_Config = TypeVar("_Config", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(_Section):
    """Where the run lives and how long it goes on."""

    directory: str = Field("run", description="the run directory")
    rounds: int = Field(3, ge=1, le=10_000, description="rounds of select, label, train")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    accept_weak_teacher: bool = Field(
        False, description="buy labels of a teacher that is no better than student 0 on the validation set"
    )


class PoolSection(_Section):
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


class LabelDataSection(PoolSection):
    """The data of a labelling job."""

    num_classes: int | None = Field(None, ge=2, description="number of classes, where they have no names")

    @model_validator(mode="after")
    def _classes_are_given_once(self) -> Self:
        if bool(self.classes) == (self.num_classes is not None):
            raise ValueError("classes must be given by their names, or num_classes by their number, and not both")
        return self


class _LabelForm(_Section):
    kind: Literal["dense", "top_k", "sampled"] = Field(
        "dense", description="all classes, the k largest with the mass of the rest, or k draws (RS-KD)"
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


class SelectionSection(_Section):
    """Which examples to buy labels for."""

    method: Literal["herding", "greedy", "rad", "uniform"] = Field(
        "herding",
        description="what covers best what the student is unsure of (`gain`), the largest gains, the game against the "
        "teacher's mistakes, or chance",
    )
    gain: Literal["margin", "entropy", "least_confidence"] = Field(
        "margin", description="what the student would learn from an example's label"
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


class EngineSection(_Section):
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


class PricesSection(_Section):
    """What work costs, for `distilbeam plan`."""

    currency: str = Field("USD", description="what the prices are in")
    per_1000_calls: float = Field(0.0, ge=0, description="of 1,000 rows asked of the teacher")
    per_worker_hour: float = Field(0.0, ge=0, description="of one worker for an hour")
    per_gb_month: float = Field(0.0, ge=0, description="of storing 10^9 bytes of labels for a month")


class RunConfig(_Section):
    """Everything that a run depends on."""

    run: RunSection = RunSection()
    data: DataSection
    teacher: TeacherConfig
    labels: RunLabelsSection = RunLabelsSection()
    selection: SelectionSection
    student: StudentConfig
    training: TrainConfig = TrainConfig()
    engine: EngineSection = EngineSection()
    prices: PricesSection = PricesSection()
    tune: TuneConfig = TuneConfig()
    pareto: ParetoConfig = ParetoConfig()

    @model_validator(mode="after")
    def _can_pool(self) -> Self:
        if self.labels.pooled is True:
            for name, needed, given in (
                ("labels.kind", "dense", self.labels.kind),
                ("training.objective", "distill", self.training.objective),
            ):
                if given != needed:
                    raise ValueError(f"{name} must be {needed!r} with labels.pooled, got {given!r}")
            if self.training.finetune is not None:
                raise ValueError("training.finetune must be left out with labels.pooled: no student chose its examples")
        return self

    @model_validator(mode="after")
    def _something_is_left_to_measure_on(self) -> Self:
        if self.training.final_training == "all" and self.data.test is None:
            raise ValueError(
                "training.final_training = 'all' needs data.test: nothing would be left to measure the student on; give a test "
                "set, or leave it out"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """Return the configuration as plain data, without the settings that are unset."""
        return _dumped(self)


class WatchSection(_Section):
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
    gain: Literal["margin", "entropy", "least_confidence"] = Field(
        "margin", description="with a budget: what the student would learn from an example's label"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="with a budget: seed of the choice")

    @model_validator(mode="after")
    def _choice_is_whole(self) -> Self:
        given = [value is not None for value in (self.budget, self.student, self.wrong_share)]
        if any(given) and not all(given):
            raise ValueError("budget, student and wrong_share must be given together: a choice needs all three")
        return self


class JobSection(_Section):
    """Where a labelling job lives."""

    directory: str = Field("labelling", description="the job's directory; the dataset is its folder labels")


class LabelConfig(_Section):
    """Everything that a labelling job depends on."""

    run: JobSection = JobSection()
    data: LabelDataSection
    teacher: TeacherConfig
    labels: LabelsSection = LabelsSection()
    engine: EngineSection = EngineSection()
    prices: PricesSection = PricesSection()
    watch: WatchSection = WatchSection()

    def dump(self) -> dict[str, Any]:
        """Return the configuration as plain data, without the settings that are unset."""
        return _dumped(self)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate the configuration file of a run.

    Args:
      path: the TOML file.
      overrides: words `section.key=value`; the value is TOML, or a string where it is not. `@FILE` takes all settings
        of another TOML file, such as the one that `distilbeam tune` writes.

    Returns:
      The configuration.

    Raises:
      ValueError: no such file, not TOML, an override that is not one, or settings that are not valid; one sentence each,
        a line per setting.
    """
    data = _read_toml(path, overrides)
    if data and describes_labelling(data):
        raise ValueError(
            f"{path} describes a labelling job, it has no [selection] and no [student]: 'distilbeam label' does it; a run "
            "needs these sections, and labelled and validation in [data]"
        )
    return parse_config(data)


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | LabelConfig:
    """Read and validate the configuration file of a run or of a labelling job; see `load_config`."""
    data = _read_toml(path, overrides)
    return parse_label_config(data) if describes_labelling(data) else parse_config(data)


def describes_labelling(data: Mapping[str, Any]) -> bool:
    """Tell whether plain data has only the sections of a labelling job."""
    return set(data) <= set(LabelConfig.model_fields) and not {"labelled", "validation"} & set(data.get("data", {}))


def _read_toml(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        data = read_toml(path)
    except FileNotFoundError as e:
        raise ValueError(
            f"no configuration file at {path}; 'distilbeam init DIRECTORY' writes one to start from"
        ) from e
    except IsADirectoryError as e:
        raise ValueError(f"{path} is a directory; name the configuration file in it") from e
    for override in overrides:
        _apply(data, override)
    return data


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """Validate the configuration of a run given as plain data; see `load_config`."""
    return _validated(RunConfig, data)


def parse_label_config(data: Mapping[str, Any]) -> LabelConfig:
    """Validate the configuration of a labelling job given as plain data; see `load_config`."""
    return _validated(LabelConfig, data)


def _validated(model: type[_Config], data: Mapping[str, Any]) -> _Config:
    try:
        return model.model_validate(data)
    except ValidationError as e:
        sentences = [_sentence(error, model) for error in e.errors()]
        raise ValueError("\n".join(dict.fromkeys(sentences))) from e


def _dumped(config: BaseModel) -> dict[str, Any]:
    data: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return data


def write_config(path: Path, config: RunConfig | LabelConfig) -> None:
    """Write the resolved configuration as TOML."""
    path.write_text(tomli_w.dumps(config.dump()))


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted settings in which two configurations differ, with both values."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({_shown(a)} there, {_shown(b)} now)")
    return found


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)


def _apply(data: dict[str, Any], override: str) -> None:
    if override.startswith("@"):
        _merge(data, _read_toml(Path(override[1:]), ()))
        return
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set takes section.key=value, got '{override}'")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ValueError(f"--set {override}: '{key}' is a value, not a section")
    data[keys[-1]] = value


def _merge(data: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put settings over others, section by section."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def _sentence(error: Any, root: type[BaseModel]) -> str:
    names, models = _resolve(error["loc"], root)
    name = ".".join(names)
    match error["type"]:
        case "extra_forbidden":
            return f"{name} is not a setting{_suggestion(error['loc'], root)}"
        case "missing":
            return f"{name} must be given"
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = [tag for model in models if (tag := _tag(model)) is not None]
            return f"{name}.kind must be one of {', '.join(kinds)}, got {error['ctx'].get('tag', 'nothing')!r}"
        case "value_error":
            return _placed(str(error["ctx"]["error"]), names, models)
        case _:
            rule = re.sub(r", (unable|got) .*", "", error["msg"].removeprefix("Input ").replace("should", "must", 1))
            return f"{name}: {rule}, got {error['input']!r}"


def _placed(message: str, names: list[str], models: list[type[BaseModel]]) -> str:
    """Put the section before a validator's sentence that begins with the name of a field."""
    first = message.split(" ", 1)[0]
    if names and first == names[-1]:
        return ".".join([*names[:-1], message])
    if not names or any(first in model.model_fields for model in models):
        return ".".join([*names, message])
    return f"{'.'.join(names)}: {message}"


def _suggestion(location: Sequence[str | int], root: type[BaseModel]) -> str:
    names, models = _resolve(location[:-1], root)
    valid = sorted({name for model in models for name in model.model_fields})
    near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    elsewhere = [name for name in _all_settings(root) if name.rsplit(".", 1)[-1] == location[-1]]
    likely = elsewhere if elsewhere and not names else [".".join([*names, *near])] if near else elsewhere
    return f"; did you mean {likely[0]}?" if likely else f"; the valid ones are {', '.join(valid)}"


def _resolve(location: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """Follow a validation error's location: the settings it names, without the tags of unions, and the models it ends in."""
    names: list[str] = []
    models: list[type[BaseModel]] = [root]
    for part in location:
        tagged = [model for model in models if _tag(model) == part and part not in model.model_fields]
        if tagged:
            models = tagged
            continue
        names.append(str(part))
        models = [
            m
            for model in models
            if part in model.model_fields
            for m in _models_in(model.model_fields[str(part)].annotation)
        ]
    return names, models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    values = get_args(kind.annotation) if kind is not None else ()
    return str(values[0]) if len(values) == 1 else None


def _all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _all_settings(inner, f"{prefix}{name}.")
