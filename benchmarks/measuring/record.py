"""Where, when and with what figures were measured, and the file that they are written to."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Describe the machine, the versions, the command and the hour.

    Args:
      packages: distributions whose versions matter here; one that is not installed is None.
      more: further facts, such as the GPU.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python", _as_typed(sys.argv[0]), *(shlex.quote(_anywhere(word)) for word in sys.argv[1:])]
        ),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in ("distilbeam", *packages)},
        **more,
    }


def cpu_model() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def version_of(package: str) -> str | None:
    """Give the version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path | None, about: Mapping[str, Any], results: Any) -> None:
    """Write figures beside what they were measured with; without a path, nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


def _as_typed(script: str) -> str:
    path = Path(script).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _anywhere(word: str) -> str:
    """Leave out of an absolute path what only this machine has: a file keeps its name, a folder becomes `DIR`."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.name if path.suffix else "DIR"
