"""Programs run where the packages of this environment can be imported, but not distilbeam."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def without_distilbeam(tmp_path: Path) -> dict[str, str]:
    """An environment whose packages are those of this one but distilbeam: nothing of it is on the path."""
    packages = tmp_path / "packages"
    packages.mkdir(exist_ok=True)
    places = [Path(np.__file__).parent.parent, Path(sysconfig.get_path("purelib"))]
    for entry in (entry for place in places for entry in place.iterdir()):
        if "distilbeam" not in entry.name and entry.suffix != ".pth" and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONPATH": str(packages), "PYTHONSAFEPATH": "1"}


def lines_of(program: Path, arguments: Iterable[object], lines: Iterable[object], tmp_path: Path) -> list[Any]:
    """Run a program where distilbeam cannot be imported; return the objects that it prints."""
    found = without_distilbeam(tmp_path)
    check = subprocess.run(
        [sys.executable, "-S", "-c", "import distilbeam"], env=found, capture_output=True, check=False
    )
    assert b"No module named 'distilbeam'" in check.stderr
    words = [sys.executable, "-S", str(program), *map(str, arguments)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(words, env=found, input=text, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
