"""The files that decide what user code answers: its modules, and files that it is told of.

A factory's answers depend on the module that is named, on the one that defines it, on the modules beside them that these
import, and on the files that its arguments name.
"""

from __future__ import annotations

import ast
import inspect
import logging
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from distilbeam.inputs.config import load_object

_log = logging.getLogger(__name__)

_MOST_FILES = 10_000


def source_files(name: str, setting: str) -> list[str]:
    """List the Python files that decide what a factory or function does.

    Args:
      name: `module:name`.
      setting: the setting that holds it, for messages.

    Returns:
      The file of the module that is named first, then that of the module that defines the object, then those that they
      import from their own folder, sorted. Of installed packages only the first two.

    Raises:
      ValueError: see `load_object`.
    """
    found = load_object(name, setting)
    module = sys.modules[name.partition(":")[0]]
    defining = sys.modules.get(getattr(inspect.unwrap(found) if callable(found) else found, "__module__", None) or "")
    files = [file for file in map(_file, (module, defining)) if file is not None]
    first = list(dict.fromkeys(files))
    imported: set[Path] = set()
    for one, file in zip((module, defining), map(_file, (module, defining)), strict=True):
        if one is not None and file is not None:
            imported |= set(_imported(one.__name__, file))
    return [str(file) for file in (*first, *sorted(imported - set(first)))]


def argument_files(arguments: Mapping[str, Any]) -> list[str]:
    """List the files and folders that a factory's arguments name and that it reads, as the factory finds them.

    A factory may be told of files that it writes, too, whose content decides nothing: what ends like weights, settings,
    tables or vocabularies counts, and text that is named like a prompt or a vocabulary, but nothing that is named like a log.

    Args:
      arguments: what the factory is called with, as plain data.

    Returns:
      Those that exist, in the order of the arguments' names; of a folder the files in it.
    """
    found: list[str] = []
    for key, text in _texts(arguments, ""):
        path = Path(text)
        try:
            if path.is_file():
                found += [text] if _is_read(path, key) else []
            elif path.is_dir() and path.resolve() != Path.cwd():
                found += _inside(path, key)
        except OSError:  # a text that cannot be a path: too long
            continue
    return list(dict.fromkeys(found))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if value.strip() and "\0" not in value:
            yield key, value
    elif isinstance(value, Mapping):
        for name, part in sorted(value.items()):
            yield from _texts(part, str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, key)


def _is_read(path: Path, key: str) -> bool:
    said = f"{key} {path.stem}".lower()
    if any(word in said for word in _WRITTEN):
        return False
    if path.suffix.lower() in (".txt", "", ".md", ".j2"):
        return any(word in said for word in _TEXTS)
    return path.suffix.lower() in _READ


def _inside(folder: Path, key: str) -> list[str]:
    files = list(islice((path for path in folder.rglob("*") if path.is_file()), _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        _log.warning(
            "teacher.arguments names the folder %s of more than %d files, which the fingerprint leaves out; name the files "
            "that decide the answers",
            folder,
            _MOST_FILES,
        )
        return []
    return sorted(str(file) for file in files if _is_read(file, key))


_WRITTEN = ("log", "asked", "cache", "output", "trace", "count", "history", "calls")
_TEXTS = ("prompt", "vocab", "label", "class", "merges", "template", "instruction", "system", "word", "token")
_READ = frozenset(
    f".{suffix}"
    for suffix in (
        *(
            "pt",
            "pth",
            "pt2",
            "ckpt",
            "bin",
            "safetensors",
            "onnx",
            "data",
            "gguf",
            "pb",
            "tflite",
            "keras",
            "h5",
            "hdf5",
        ),
        *("npy", "npz", "pkl", "pickle", "joblib", "model", "msgpack", "ubj", "cbm", "xml", "pmml"),
        *(
            "json",
            "yaml",
            "yml",
            "toml",
            "ini",
            "csv",
            "tsv",
            "parquet",
            "arrow",
            "feather",
            "vocab",
            "zip",
            "tar",
            "gz",
        ),
    )
)


def _file(module: Any) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name) if name else None


def _imported(module: str, file: Path) -> Iterator[Path]:
    """List what a module imports from its own folder, and what that does, without importing anything."""
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    if _is_installed(root):
        return
    seen: set[Path] = set()
    waiting = [(module, file)]
    while waiting:
        name, path = waiting.pop()
        if path in seen or path.suffix != ".py":
            continue
        seen.add(path)
        for target in _targets(name, path):
            waiting += _modules(root, target)
    yield from seen


def _is_installed(root: Path) -> bool:
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return any(root.is_relative_to(place) for place in places if place) or root.name in (
        "site-packages",
        "dist-packages",
    )


def _targets(module: str, path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _modules(root: Path, name: str) -> Iterable[tuple[str, Path]]:
    """Find the files of a dotted name under a folder: the module's and those of the packages that hold it."""
    parts = [part for part in name.split(".") if part]
    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield ".".join(parts[:depth]), file
