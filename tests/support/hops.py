"""The way of a batch from the pool to a soft label: the functions of ours that have it in their hands, in order.

    python tests/support/hops.py

A small labelling job runs in this process. While a worker is at an item (`DoItems` of the engine's module), in whatever thread,
every function of ours is counted that is called with rows or gives rows back: an Arrow batch or table, an array, a tensor, an
object that holds one, or a list of such.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import runpy
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import labelling
import numpy as np
import pyarrow as pa
import torch

ROWS = (pa.RecordBatch, pa.Table, np.ndarray, torch.Tensor)
WORKER = ("DoItems.process", "DoItems.finish_bundle")
seen: dict[tuple[str, str], None] = {}
at_work = 0


def has_rows(value: Any, deep: int = 2) -> bool:
    """Tell whether a value is rows, or holds some."""
    if isinstance(value, ROWS):
        return bool(len(getattr(value, "shape", ())))
    if not deep:
        return False
    if isinstance(value, list | tuple):
        return any(has_rows(one, deep - 1) for one in value[:3])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(has_rows(getattr(value, field.name, None), 0) for field in dataclasses.fields(value))
    return False


def look(frame: FrameType, event: str, returned: Any) -> None:
    """Take note of a function of ours that has rows."""
    module = frame.f_globals.get("__name__", "")
    if not module.startswith("distilbeam.") or event not in ("call", "return"):
        return
    name = frame.f_code.co_qualname
    if name in WORKER:
        global at_work
        at_work += 1 if event == "call" else -1
    if not at_work or name.endswith((">", "__create_fn__.<locals>.__init__")) or (module, name) in seen:
        return
    values = list(frame.f_locals.values()) if event == "call" else [returned]
    if any(map(has_rows, values)):
        seen[module, name] = None


def main() -> None:
    """Label, and list the functions."""
    with tempfile.TemporaryDirectory() as folder:
        labelling.write_job(Path(folder), 240)
        os.chdir(folder)
        sys.argv = ["distilbeam", "label", "label.toml"]
        threading.setprofile(look)
        sys.setprofile(look)
        with contextlib.suppress(SystemExit):  # with which commands end
            runpy.run_module("distilbeam", run_name="__main__")
        sys.setprofile(None)
        os.chdir("/")
    modules = list(dict.fromkeys(module for module, _ in seen))
    for module in modules:
        print(f"{module.removeprefix('distilbeam.')}: {', '.join(name for there, name in seen if there == module)}")
    print(f"{len(seen)} functions in {len(modules)} files")


if __name__ == "__main__":
    main()
