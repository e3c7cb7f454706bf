"""The configuration of a run or of a labelling job: one TOML file, typed, frozen, validated.

A run whose teacher labels tokens is one of a language model (`token_config`).
A file without the sections of a student ([selection], [student], [training]) describes a labelling job: every row of a
pool is labelled, and the pool may grow. Relative paths are relative to the configuration file and absolute once it is read. Every rule that does not
need the data is checked here; `distilbeam.settings` says each violation as one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import model_validator

from distilbeam.pipelines.sections import (
    DataSection,
    EngineSection,
    JobSection,
    LabelDataSection,
    LabelsSection,
    PricesSection,
    RunLabelsSection,
    RunSection,
    SelectionSection,
    WatchSection,
    check_token_labels,
)
from distilbeam.pipelines.token_config import TokenRunConfig as TokenRunConfig
from distilbeam.pipelines.token_config import describes_tokens
from distilbeam.settings import Configuration, folder_of, read_settings, validated
from distilbeam.student.language.config import CAUSAL_LM
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.search.space import ParetoConfig, TuneConfig
from distilbeam.student.training.config import TrainConfig, check_kind
from distilbeam.teacher.config import TeacherConfig, labels_tokens


class RunConfig(Configuration):
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

    @model_validator(mode="before")
    @classmethod
    def _teaches_classes(cls, data: Any) -> Any:
        student = data.get("student") if isinstance(data, Mapping) else None
        if isinstance(student, Mapping) and student.get("kind") == CAUSAL_LM:
            raise ValueError(
                f"student.kind must be that of a classifier with a teacher of classes, whose labels are of rows, got '{CAUSAL_LM}', "
                f"which learns labels of tokens: name a teacher of tokens, such as causal_lm, or another student"
            )
        return data

    @model_validator(mode="after")
    def _labels_suit_the_objective(self) -> Self:
        check_kind(self.training.objective, self.labels.kind)
        return self

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


class LabelConfig(Configuration):
    """Everything that a labelling job depends on."""

    run: JobSection = JobSection()
    data: LabelDataSection
    teacher: TeacherConfig
    labels: LabelsSection = LabelsSection()
    engine: EngineSection = EngineSection()
    prices: PricesSection = PricesSection()
    watch: WatchSection = WatchSection()

    @model_validator(mode="after")
    def _classes_are_given_once(self) -> Self:
        named, counted = bool(self.data.classes), self.data.num_classes is not None
        if self.labels_tokens:
            if named or counted:
                raise ValueError(
                    "data: classes and num_classes must be left out: the classes of tokens are the ids of the tokenizer"
                )
            check_token_labels(self.teacher.kind, self.labels)
            if self.data.carry:
                raise ValueError("data.carry must be left out: blocks of tokens are always copied, and nothing else")
        elif named == counted:
            raise ValueError("data: classes must be given by their names, or num_classes by their number, and not both")
        return self

    @property
    def labels_tokens(self) -> bool:
        """Whether the teacher labels the tokens of blocks."""
        return labels_tokens(self.teacher)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate the configuration file of a run with a classifier.

    Args:
      path: the TOML file.
      overrides: words `section.key=value`; the value is TOML, or a string where it is not. `@FILE` takes all settings
        of another TOML file, such as the one that `distilbeam tune` writes.

    Returns:
      The configuration, with absolute paths.

    Raises:
      ValueError: no such file, not TOML, an override that is not one, or settings that are not valid; one sentence each,
        a line per setting.
    """
    config = load_run_config(path, overrides)
    if isinstance(config, TokenRunConfig):
        raise ValueError(
            f"{path} describes a run of a language model, and this is for classifiers; a student of it is a folder of Hugging Face's, "
            "below students/ in its run directory, which 'distilbeam evaluate' measures"
        )
    return config


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | TokenRunConfig:
    """Read and validate the configuration file of a run, of a classifier or of a language model; see `load_config`."""
    data = read_settings(path, overrides)
    if data and describes_labelling(data):
        raise ValueError(
            f"{path} describes a labelling job, it has no [selection] and no [student]: 'distilbeam label' does it; a run "
            "needs these sections, and labelled and validation in [data]"
        )
    return parse_run_config(data).relative_to(folder_of(path))


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | TokenRunConfig | LabelConfig:
    """Read and validate the configuration file of a run or of a labelling job; see `load_config`."""
    data = read_settings(path, overrides)
    config = parse_label_config(data) if describes_labelling(data) else parse_run_config(data)
    return config.relative_to(folder_of(path))


def describes_labelling(data: Mapping[str, Any]) -> bool:
    """Tell whether plain data describes a labelling job: it has nothing that only a run has."""
    of_runs = set(RunConfig.model_fields) - set(LabelConfig.model_fields)
    section = data.get("data")
    return not of_runs & set(data) and not (isinstance(section, Mapping) and {"labelled", "validation"} & set(section))


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """Validate the configuration of a run given as plain data; see `load_config`."""
    return validated(RunConfig, data)


def parse_run_config(data: Mapping[str, Any]) -> RunConfig | TokenRunConfig:
    """Validate the configuration of a run of either kind given as plain data; see `load_config`."""
    return validated(TokenRunConfig, data) if describes_tokens(data) else validated(RunConfig, data)


def parse_label_config(data: Mapping[str, Any]) -> LabelConfig:
    """Validate the configuration of a labelling job given as plain data; see `load_config`."""
    return validated(LabelConfig, data)


def write_config(path: Path, config: RunConfig | TokenRunConfig | LabelConfig) -> None:
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
