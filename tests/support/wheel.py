"""The project's wheel, built from a copy of the sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("distilbeam", "kernels", "pipelines", "selection", "student", "teacher")


def build_wheel(directory: Path) -> Path:
    """Build the wheel into a directory; the tree itself is left as it is."""
    source = directory / "source"
    source.mkdir(parents=True)
    for name in PARTS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(directory),
    ]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(directory.glob("*.whl"))
