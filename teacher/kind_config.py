"""What the configurations of all kinds of teachers share: paths, arguments, headers, and how a model's numbers are meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from distilbeam.settings import Section
from distilbeam.teacher.answers import AnswerKind


class KindSection(Section):
    """A section of a kind of teacher."""

    model_config = ConfigDict(protected_namespaces=())  # settings may begin with model_


def _as_plain(value: Any) -> Any:
    """Require what JSON can hold, since a configuration travels to workers as text."""
    if isinstance(value, Mapping):
        return {key: _as_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"arguments must be finite numbers, got {value}; let the factory put in what is not")
    if value is not None and not isinstance(value, str | bool | int | float):
        raise ValueError(
            f"arguments must be text, numbers, true or false, lists and tables of them, got the {type(value).__name__} "
            f"{value}; put it in quotes and let the factory read it"
        )
    return value


def _as_path(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError(f"a path or a name must be given, got {value!r}")
    if any(len(part.encode()) > 255 for part in value.split("/")) or len(value.encode()) > 4000:
        raise ValueError(f"a path or a name must be shorter, got {value[:40]}...")
    return value


PathText = Annotated[str, AfterValidator(_as_path)]
Arguments = Annotated[dict[str, Any], AfterValidator(_as_plain)]


class RowTeacherConfig(KindSection):
    """What every kind of teacher of rows is told."""

    answers: AnswerKind = Field(
        "logits", description="what the model's numbers are: logits, log-probabilities or probabilities"
    )
    classes: tuple[str, ...] = Field(
        (),
        description="names of the model's outputs in their order; needed when they stand in another order than data.classes",
    )

    @model_validator(mode="after")
    def _distinct_classes(self) -> Self:
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be at least two different names, got {', '.join(self.classes)}")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what says nothing new, so that runs and fingerprints from before these settings stay as they are."""
        data: dict[str, Any] = handler(self)
        silent = {"answers": "logits", "classes": (), "trust": False}
        return {
            name: value for name, value in data.items() if name not in silent or getattr(self, name) != silent[name]
        }

    def meaning(self) -> str:
        """Return what of the answers' form decides the labels, for the fingerprint; nothing for plain logits."""
        return "" if self.answers == "logits" else f"answers={self.answers}"


class HeaderConfig(KindSection):
    """A header of each request. Its value comes from the environment or a file, never from the configuration."""

    env: str | None = Field(None, description="environment variable with the value")
    file: str | None = Field(None, description="file with the value; read anew for each request")
    prefix: str = Field("", description="text before the value, such as 'Bearer '")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("a header must have either env or file")
        return self

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("file",)
