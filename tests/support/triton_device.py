"""Where the tests of Triton kernels run: on a CUDA GPU, else in Triton's interpreter, which a process of its own starts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_FP8 = INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="the GPU has no float8_e4m3fn")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
MARKS = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="neither a CUDA device nor the interpreter"
    ),
    # -inf - -inf, and products with infinities, in lanes that are masked
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def correct_the_interpreter() -> None:
    """Make the interpreter, where it runs, convert numbers as a GPU does."""
    if INTERPRETED:
        import triton_interpreter

        triton_interpreter.correct()


def run_interpreted(tests: Path) -> None:
    """Run a file of tests in the interpreter: a process that interprets cannot compile."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not exhaustive", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tests.parents[2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
