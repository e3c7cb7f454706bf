"""distilbeam: a large teacher, a mountain of unlabelled data, a small student.

The five parts (`distilbeam.pipelines`, `.teacher`, `.student`, `.selection`, `.kernels`) are namespace packages: their
folders stand at the root of the repository without an `__init__.py`, because a regular top-level package named
`kernels` would shadow the package of that name which Hugging Face transformers imports. Each part lists its public names
in `__init__.pyi`, where type checkers and editors look. This module gives those names to the running program: the first
access imports the module that defines the name, and nothing is imported before.
"""

from __future__ import annotations

import ast
import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
      stub: an `__init__.pyi` whose statements are `from .module import name as name`.

    Returns:
      A mapping from each public name to the module that defines it, relative to the part, without the leading dot.
    """
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module for node in imports if node.module for alias in node.names}


def _publish(part: str) -> None:
    module = importlib.import_module(f"{__name__}.{part}")
    sources = public_names(next(Path(p) / "__init__.pyi" for p in module.__path__ if Path(p, "__init__.pyi").is_file()))

    def resolve(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"{module.__name__}.{sources[name]}"), name)
        setattr(module, name, value)
        return value

    vars(module).update(__getattr__=resolve, __dir__=lambda: sorted({*vars(module), *sources}), __all__=sorted(sources))


for _part in PARTS:
    if f"{__name__}.{_part}" not in sys.modules:
        _publish(_part)
