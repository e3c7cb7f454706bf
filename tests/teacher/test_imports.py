"""What an import of a part of teacher brings with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import distilbeam.teacher

HEAVY = ("apache_beam", "jax", "keras", "onnxruntime", "tensorflow", "torch", "transformers", "triton")
FOLDER = Path(distilbeam.teacher.__path__[0])
SHARED = tuple(
    f"distilbeam.{name}" for name in ("extras", "inputs", "quiet", "settings", "storage")
)  # what all parts stand on


@pytest.mark.parametrize(
    "module",
    [
        "predict",
        "config",
        "load",
        "protocol",
        "tfserving.serve",
        "softlabels",
        "softlabels.inspect",
        "softlabels.verify",
        "tfserving.client",
        "tfserving.service",
    ],
)
def test_frameworks_are_not_imported_before_a_teacher_needs_them(module: str) -> None:
    code = f"import sys, distilbeam.teacher.{module}; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_teacher_imports_no_other_part() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                if module.startswith("distilbeam."):
                    own = module.startswith(("distilbeam.teacher", *SHARED))
                    assert own, f"{path} imports {module}"


def test_public_names_resolve() -> None:
    for name in distilbeam.teacher.__all__:
        assert getattr(distilbeam.teacher, name).__name__ if name != "TeacherConfig" else True
    assert {"Teacher", "load_teacher", "inspect_labels", "verify_labels", "serve"} <= set(distilbeam.teacher.__all__)
