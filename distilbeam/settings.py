"""Settings: TOML files, overrides `section.key=value` over them, and their validation; each mistake is one sentence.

    data = read_settings(path, overrides)          # plain data: the file, then each override over it
    config = validated(Config, data)               # frozen, or a ValueError with a line for each mistake
    config = config.relative_to(folder_of(path))   # its paths made absolute, once and here

Whatever is wrong with a setting is said as `section.key: rule, got value`, or `section.key is not a setting; did you mean
section.other?`, a line for each, so that the command line, the launcher, the streaming job and ingest speak alike.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from distilbeam.storage.paths import is_remote

_Model = TypeVar("_Model", bound=BaseModel)

SET_METAVAR = "SECTION.KEY=VALUE"
SET_HELP = "Override a setting; @FILE: all those of a TOML file. May be repeated."


class Section(BaseModel):
    """Settings that belong together: frozen, and without any that are not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths, or collections of paths."""
        return ()

    def relative_to(self, folder: Path) -> Self:
        """Return the settings with relative paths made absolute; places in an object store stay as they are.

        Args:
          folder: where relative paths start.
        """
        return self.with_paths(lambda _, text: text if is_remote(text) else str(folder / text))

    def with_paths(self, change: Callable[[str, str], str], prefix: str = "") -> Self:
        """Return the settings with every path changed, those of inner sections too.

        Args:
          change: from the dotted name of a setting and its text to its new text.
          prefix: put before the names.
        """
        changed = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            new = _changed(value, change, prefix + name, is_path=name in self.paths())
            if new is not value:
                changed[name] = new
        return self.model_copy(update=changed) if changed else self


def _changed(value: Any, change: Callable[[str, str], str], name: str, *, is_path: bool) -> Any:
    if isinstance(value, Section):
        return value.with_paths(change, f"{name}.")
    if is_path and isinstance(value, str):
        return change(name, value)
    if is_path and isinstance(value, tuple):
        return tuple(change(f"{name}.{place}", text) for place, text in enumerate(value))
    if isinstance(value, dict) and any(isinstance(inner, Section) for inner in value.values()):
        return {key: _changed(inner, change, f"{name}.{key}", is_path=is_path) for key, inner in value.items()}
    return value


class Configuration(Section):
    """All settings of a file. Its paths are absolute once it knows its folder, and are stored as they were written.

    What is stored is compared with what is given: a directory that has moved with its configuration has not changed.
    """

    _written: dict[str, tuple[str, str]] = PrivateAttr(default_factory=dict)  # name -> absolute, as it was written
    _folder: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path | None:
        """Where its relative paths started; None while it is not known."""
        return self._folder

    def relative_to(self, folder: Path) -> Self:
        """Return the settings with relative paths made absolute; see `Section.relative_to`."""
        written = dict(self._written)

        def change(name: str, text: str) -> str:
            absolute = text if is_remote(text) else str(folder / text)
            if absolute != text:
                written[name] = (absolute, text)
            return absolute

        resolved = self.with_paths(change).model_copy()
        resolved._written, resolved._folder = written, self._folder or folder
        return resolved

    def dump(self) -> dict[str, Any]:
        """Return the settings as plain data, without those that are unset, paths as they were written."""

        def change(name: str, text: str) -> str:
            absolute, as_written = self._written.get(name, (None, text))
            return as_written if text == absolute else text  # another one since: settings were copied with changes

        data: dict[str, Any] = self.with_paths(change).model_dump(mode="json", exclude_none=True)
        return data


def folder_of(path: Path) -> Path:
    """Return the folder that relative paths in a file of settings start at."""
    return path.parent.resolve()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, whatever an editor made of it: with a byte order mark or without, with any end of line.

    Args:
      path: the file, in UTF-8.

    Raises:
      ValueError: nothing is there, it is a directory, it is not valid TOML, or not UTF-8.
      OSError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
    except FileNotFoundError as e:
        raise ValueError(
            f"no configuration file at {path}; name one that is there, or let 'distilbeam init DIRECTORY' write one"
        ) from e
    except IsADirectoryError as e:
        raise ValueError(f"{path} is a directory; name the configuration file in it") from e
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: {e}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: it must be stored in UTF-8; {e}") from e


def read_settings(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and put overrides over it; see `read_toml` and `override`."""
    data = read_toml(path)
    for text in overrides:
        override(data, text)
    return data


def override(data: dict[str, Any], text: str) -> None:
    """Put one override over plain data, in place.

    Args:
      data: settings; sections that are not there are made.
      text: `section.key=value`, to any depth, with a value in TOML or, where it is not TOML, a string; or `@FILE`, all
        settings of another TOML file, section by section.

    Raises:
      ValueError: it has neither form, its section is a value, or the file cannot be read.
    """
    if text.startswith("@"):
        _merge(data, read_toml(Path(text[1:])))
        return
    name, equals, value_text = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set takes section.key=value, got '{text}'")
    try:
        value = tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        value = value_text
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ValueError(f"--set {text}: '{key}' is a value, not a section")
    data[keys[-1]] = value


def _merge(data: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def validated(model: type[_Model], data: Mapping[str, Any]) -> _Model:
    """Make settings out of plain data.

    Args:
      model: the class of the settings.
      data: as a TOML file has it.

    Raises:
      ValueError: settings that are not valid; a line for each.
    """
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise ValueError("\n".join(dict.fromkeys(_sentence(error, model) for error in e.errors()))) from e


def _sentence(error: Any, root: type[BaseModel]) -> str:
    names, types_ = _resolve(error["loc"], root)
    name, models = ".".join(names), [type_ for type_ in types_ if _is_model(type_)]
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
    first = message[: re.match(r"\w*", message).end()]  # type: ignore[union-attr]  # it always matches
    if names and first == names[-1]:
        return ".".join([*names[:-1], message])
    if not names or any(first in model.model_fields for model in models):
        return ".".join([*names, message])
    return f"{'.'.join(names)}: {message}"


def _suggestion(location: Sequence[str | int], root: type[BaseModel]) -> str:
    names, types_ = _resolve(location[:-1], root)
    valid = sorted({name for type_ in types_ if _is_model(type_) for name in type_.model_fields})
    near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    # the same name in another section; a setting of another member of a union has this very name and helps nobody
    asked = ".".join([*names, str(location[-1])])
    elsewhere = [n for n in _all_settings(root) if n.rsplit(".", 1)[-1] == location[-1] and n != asked]
    likely = elsewhere if elsewhere and not names else [".".join([*names, *near])] if near else elsewhere
    return f"; did you mean {likely[0]}?" if likely else f"; the valid ones are {', '.join(valid)}"


def _resolve(location: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], list[Any]]:
    """Follow a validation error's location: the settings it names, without the tags of unions, and the types it ends in."""
    names: list[str] = []
    types_: list[Any] = [root]
    for part in location:
        # pydantic puts the tag of a chosen member of a union between the names of settings
        tagged = [type_ for type_ in types_ if _is_model(type_) and _tag(type_) == part]
        if tagged and not any(part in model.model_fields for model in tagged):
            types_ = tagged
            continue
        names.append(str(part))
        types_ = [inner for type_ in types_ for inner in _inside(type_, str(part))]
    return names, types_


def _inside(type_: Any, part: str) -> Iterator[Any]:
    """Give the types that a field of a model, or an item of a collection, may have."""
    if _is_model(type_):
        if part in type_.model_fields:
            yield from _members(type_.model_fields[part].annotation)
    elif get_origin(type_) in (dict, tuple, list):
        arguments = [argument for argument in get_args(type_) if argument is not Ellipsis]
        yield from _members(arguments[-1])


def _members(annotation: Any) -> Iterator[Any]:
    """Give the types of a union, or the one type that it is."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _is_model(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, BaseModel)


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    values = get_args(kind.annotation) if kind is not None else ()
    return str(values[0]) if len(values) == 1 else None


def _all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _members(field.annotation):
            if _is_model(inner):
                yield from _all_settings(inner, f"{prefix}{name}.")
