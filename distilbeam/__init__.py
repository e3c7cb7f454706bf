"""distilbeam: a large teacher, a mountain of unlabelled data, a small student.

The five parts (`distilbeam.pipelines`, `.teacher`, `.student`, `.selection`, `.kernels`) are namespace packages: their
folders stand at the root of the repository without an `__init__.py`, because a regular top-level package named
`kernels` would shadow the package of that name which Hugging Face transformers imports. Each part lists its public names
in `__init__.pyi`, where type checkers and editors look. This module gives those names to the running program: the first
access imports the module that defines the name, and nothing is imported before.

What all parts stand on lies in this folder, and uses none of them: settings, setting_docs, inputs, storage, progress, extras, quiet.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distilbeam.quiet import drop_beam_import_line

PARTS = ("kernels", "pipelines", "selection", "student", "teacher")

try:
    __version__ = version("distilbeam")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

_ROOT = Path(__file__).resolve().parent.parent
if all((_ROOT / part / "__init__.pyi").is_file() for part in PARTS) and not (_ROOT / "distilbeam/kernels").exists():
    __path__.append(str(_ROOT))  # in a source tree the parts stand beside this folder, not in it


def public_names(stub: Path) -> dict[str, str]:
    """Read a part's public names from its stub.

    Args:
      stub: an `__init__.pyi` whose statements are `from .module import name as name`, or of another part.

    Returns:
      A mapping from each public name to the module that defines it, relative to the part with a leading dot, else absolute.
    """
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {node: f"{'.' * node.level}{node.module}" for node in imports}
    return {alias.asname or alias.name: names[node] for node in imports for alias in node.names}


def _publish(part: str) -> None:
    module = importlib.import_module(f"{__name__}.{part}")
    sources = public_names(next(Path(p) / "__init__.pyi" for p in module.__path__ if Path(p, "__init__.pyi").is_file()))

    def resolve(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")
        value = getattr(importlib.import_module(sources[name], module.__name__), name)
        setattr(module, name, value)
        return value

    vars(module).update(__getattr__=resolve, __dir__=lambda: sorted({*vars(module), *sources}), __all__=sorted(sources))


# Documented import paths of version 0.1 and what they name now; `python -m` finds them, too.
FORMER = {
    "pipelines.content_ids": "pipelines.pool.content_ids",
    "pipelines.message_rows": "pipelines.transforms.messages",
    "pipelines.stream_job": "pipelines.streaming.stream_job",
    "pipelines.transforms.stream_job": "pipelines.streaming.stream_job",
    "selection.calibration": "selection.trust.calibration",
    "student.compress": "student.export",  # pruned students of version 0.1 name it
    "student.compress.prune": "student.export.prune",
    "selection.debias": "selection.trust.debias",
    "selection.noise": "selection.trust.noise",
    "selection.pooling": "selection.trust.pooling",
    "selection.rad": "selection.games.rad",
    "student.config": "student.networks.config",
    "student.laurel": "student.networks.laurel",
    "student.launch": "student.training.launch",
    "student.models": "student.networks.build",
    "teacher.preprocess": "inputs.config",
}


class _FormerPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a module under its former path: the same module object under two names."""

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> importlib.machinery.ModuleSpec | None:
        former = FORMER.get(fullname.removeprefix(f"{__name__}."))
        return None if former is None else importlib.machinery.ModuleSpec(fullname, self, origin=f"{__name__}.{former}")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(str(spec.origin))
        self._own = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._own  # which the import system has just replaced by the former path's

    def get_code(self, fullname: str) -> types.CodeType | None:
        """Return the code that `python -m` runs."""
        spec = importlib.util.find_spec(str(self.find_spec(fullname, None).origin))  # type: ignore[union-attr]
        code: types.CodeType | None = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
        return code


sys.meta_path.insert(0, _FormerPaths())
drop_beam_import_line()

for _part in PARTS:
    if f"{__name__}.{_part}" not in sys.modules:
        _publish(_part)
