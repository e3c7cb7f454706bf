"""Documentation of settings, read off the classes that declare them: name, type, default, allowed values and a sentence.

    for setting in described(RunConfig):
        print(setting.name, setting.type, setting.default, setting.sentence)

The command `distilbeam settings` and the manual print what stands here; nothing is written down a second time.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "any value"}


@dataclass(frozen=True)
class Setting:
    """One setting of a TOML file.

    Attributes:
      section: dotted section; a part in capitals stands for a name of the user's, as in `tune.space.NAME`.
      kind: the section's `kind` that has this setting; empty where all have it.
      name: its key in the section.
      type: what it holds, in words.
      default: its default as TOML, "unset", or empty for one that must be given.
      required: whether it must be given.
      allowed: the values that it may have, in words; empty where its type says all.
      sentence: what it means.
      files: the files that have it: "run", "labelling job", "training", "ingest".
    """

    section: str
    kind: str
    name: str
    type: str
    default: str
    required: bool
    allowed: str
    sentence: str
    files: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """The name that `--set` takes."""
        return f"{self.section}.{self.name}" if self.section else self.name


def described(model: type[BaseModel], section: str = "") -> Iterator[Setting]:
    """Describe the settings of a class, section by section, those of inner sections behind their own.

    Args:
      model: the class of a file's settings, or of a section's.
      section: dotted name of the section; empty for a whole file.

    Yields:
      The settings. Sections themselves are settings only inside of another section.
    """
    inner: list[tuple[type[BaseModel], str]] = []
    members: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        place = f"{section}.{name}" if section else name
        members.append((place, field))
        if section:
            yield _setting(model, section, name, field)
    for place, field in members:
        inner += [(found, f"{place}{suffix}") for found, suffix in _sections(field.annotation)]
    seen: set[Setting] = set()
    for found, place in inner:
        for setting in described(found, place):
            # the input of every kind of teacher is the same
            if (plain := replace(setting, kind="" if setting.section != place else setting.kind)) not in seen:
                seen.add(plain)
                yield plain


def sections_of(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, str, str]]:
    """Give each section of a file, its kind and what its class says of it, in the order of `described`.

    Args:
      model: the class of a file's settings, or of a section's.
      section: dotted name of the section; empty for a whole file.

    Yields:
      Section, kind (or an empty text) and the docstring as one paragraph.
    """
    if section:
        yield section, _kind(model), " ".join(inspect.cleandoc(model.__doc__ or "").split())
    for name, field in model.model_fields.items():
        place = f"{section}.{name}" if section else name
        for found, suffix in _sections(field.annotation):
            yield from sections_of(found, place + suffix)


def together(files: Mapping[str, type[BaseModel]]) -> list[Setting]:
    """Describe the settings of several files, each that they share once.

    Args:
      files: what a file is called -> the class of its settings.

    Returns:
      The settings in the order of the files, with the `files` that have them.
    """
    found: dict[Setting, tuple[str, ...]] = {}
    for name, model in files.items():
        for setting in described(model):
            found[setting] = (*found.get(setting, ()), name)
    return [replace(setting, files=names) for setting, names in found.items()]


def _setting(model: type[BaseModel], section: str, name: str, field: FieldInfo) -> Setting:
    required = field.is_required()
    return Setting(
        section=section,
        kind=_kind(model),
        name=name,
        type=_type(field.annotation),
        default="" if required else _toml(field.get_default(call_default_factory=True)),
        required=required,
        allowed=_allowed(field),
        sentence=" ".join((field.description or "").split()),
    )


def _kind(model: type[BaseModel]) -> str:
    field = model.model_fields.get("kind")
    values = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return str(values[0]) if len(values) == 1 else ""


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Give the classes of settings in an annotation, with what follows the name of the field in theirs."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            yield member, ""
        elif get_origin(member) is dict:
            yield from ((found, ".NAME") for found, _ in _sections(get_args(member)[1]))


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _type(annotation: Any) -> str:
    words: list[str] = []
    for member in _members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if member is type(None):
            continue
        if origin is Literal:
            words.append("text")
        elif origin in (tuple, list):
            of_what = _type(arguments[0])
            plural = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "any value": "values"}
            many = plural.get(of_what, of_what)
            words.append(f"list of {many}" if arguments[-1] is Ellipsis else f"{len(arguments)} {many}")
        else:
            words.append(_WORDS.get(member, "table"))
    return " or ".join(dict.fromkeys(words))


def _allowed(field: FieldInfo) -> str:
    said = [json.dumps(value) for member in _members(field.annotation) for value in _literals(member)]
    bounds = _bounds(field.metadata)
    if field.examples:
        said += [json.dumps(value) for value in field.examples]
        bounds += ["or module:name of your own"] * ("module:" in (field.description or ""))
    return "; ".join(filter(None, [", ".join(said), *bounds]))


def _literals(member: Any) -> tuple[Any, ...]:
    if get_origin(member) is Literal:
        return get_args(member)
    if get_origin(member) in (tuple, list):
        return tuple(value for inner in get_args(member) for value in _literals(inner))
    return ()


def _bounds(metadata: list[Any]) -> list[str]:
    said = []
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=bound):
                said.append(f"{_number(bound)} or more")
            case annotated_types.Gt(gt=bound):
                said.append(f"above {_number(bound)}")
            case annotated_types.Le(le=bound):
                said.append(f"at most {_number(bound)}")
            case annotated_types.Lt(lt=bound):
                said.append(f"below {_number(bound)}")
            case annotated_types.MinLen(min_length=least) if least > 1:
                said.append(f"{least} at least")
            case annotated_types.MinLen():
                said.append("not empty")
    return said


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _toml(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "unset"
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(part) for part in value)}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
