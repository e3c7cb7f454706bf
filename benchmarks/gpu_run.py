"""Everything that a GPU has yet to decide, in one call of less than nine minutes.

    python benchmarks/gpu_run.py --out results      # on a machine with an H100 or H200
    python benchmarks/gpu_run.py --dry              # anywhere, in minutes: the same commands, each candidate once, interpreted

Each section is a command of its own with a limit of its own, shorter where less time is left, and is skipped when none is;
its figures, written shape by shape, and its output lie in `--out`. A section that failed, or that has no figure of a
candidate that it is there for, is named, and the next one begins. What they decide:

    tests     the Triton kernels pass on this GPU
    loss      `one_kernel` at .70 of the roofline or more at 4096 x 128,256: it becomes the form for 16-bit logits, else it
              goes; of dense labels where it beats `triton`. `two_kernels` where they beat `triton` at 1024 x 128,256 or
              4096 x 50,257. The last layer `in_place` at 18 ms or less at 4096 x 4096 x 128,256: it becomes the form for
              layers in 16 bits, and its fp8 logits are what `precision = "fp8"` means
    layer     what `linear_distillation/choice.py` should hold for a GPU
    layers    fp8 at 1.2 times bfloat16's speed or more at 16384 x 2048 x 2048: `low_precision/shapes.py` is filled, else the
              README says that it is not
    residual  LAuReL beside torch.compile, with a norm and 8-bit rows too
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "kernels"
GPU = ["--device", "cuda", "--dtype", "bfloat16"]
DRY = ["--grid", "dry", "--dtype", "bfloat16", "--repeats", "1"]
PYTEST = ["-m", "pytest", "-q", "-x"]
SLOW = ["distilbeam chunked", "distilbeam reference", "distilbeam bf16", "distilbeam int8", "distilbeam fp8", "TRL"]
COMPILED = [
    "torch.compile sparse",
    "Liger chunked",
    "cut-cross-entropy",
]  # for a processor, which says nothing of a GPU
DRY_LIMIT = 600.0  # seconds of a section; the interpreter is slow
LEAST_SECONDS = 30.0  # less is not enough to begin a section


class Section(NamedTuple):
    """A command and what it must have measured.

    Attributes:
      limit: seconds on a GPU.
      whole: arguments on a GPU.
      short: arguments of the dry run.
      candidates: of which there must be figures.
    """

    limit: float
    whole: list[str]
    short: list[str]
    candidates: tuple[str, ...] = ()


SECTIONS = {
    "tests": Section(
        120,
        [*PYTEST, "-m", "gpu", str(TESTS)],
        [*PYTEST, str(TESTS / "test_triton_prepared.py"), "-k", "anywhere and (9 or 45)"],
    ),
    "loss": Section(
        130,
        ["distill_loss.py", "--grid", "decide", *GPU, "--repeats", "7", "--without", *SLOW],
        ["distill_loss.py", *DRY, "--no-memory", "--without", *SLOW, *COMPILED],
        (
            "distilbeam triton",
            "distilbeam one kernel",
            "distilbeam two kernels",
            "distilbeam dense, one kernel",
            "distilbeam in place",
            "distilbeam in place, fp8",
        ),
    ),
    "layer": Section(
        90,
        ["last_layer.py", "--grid", "gpu", "--device", "cuda", "--precision", "bf16", "--repeats", "7"],
        ["last_layer.py", "--grid", "dry", "--precision", "bf16", "--repeats", "1", "--no-memory"],
    ),
    "layers": Section(
        130,
        ["low_precision.py", "--grid", "gpu", *GPU, "--repeats", "7"],
        ["low_precision.py", *DRY, "--without", "torch.compile", "torchao fp8, fp8 gradients, compiled"],
        ("distilbeam fp8", "distilbeam int8", "distilbeam fp8, fp8 gradients, laid out by Triton"),
    ),
    "residual": Section(
        60,
        ["laurel.py", "--grid", "gpu", *GPU, "--repeats", "7"],
        ["laurel.py", *DRY, "--no-memory", "--without", "torch.compile"],
        ("distilbeam triton", "distilbeam pipelined"),
    ),
}


def run(section: Section, name: str, out: Path, *, dry: bool, left: float) -> list[str]:
    """Run a section and say what went wrong.

    Args:
      section: what to run.
      name: of its files in `out`.
      out: an existing folder.
      dry: in the short form, interpreted, without a GPU.
      left: seconds until it must have ended.
    """
    arguments, limit = (section.short, DRY_LIMIT) if dry else (section.whole, min(section.limit, left))
    if limit < LEAST_SECONDS:
        return [f"skipped, {left:.0f} s are left"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else None
    figures = out / f"{name}.json"
    figures.unlink(missing_ok=True)  # of a run before
    if arguments[0].endswith(".py"):
        arguments = [str(HERE / arguments[0]), *arguments[1:], "--json", str(figures)]
    with (out / f"{name}.txt").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            faults = [f"exit {code}"] if (code := started.wait(limit)) else []
        except subprocess.TimeoutExpired:
            faults = [f"stopped after {limit:.0f} s"]
        finally:
            if started.poll() is None:  # with the compilers that it started
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    return faults + missing(section, figures)


def missing(section: Section, figures: Path) -> list[str]:
    """Name the candidates without a figure."""
    rows = json.loads(figures.read_text())["results"] if figures.exists() else []
    measured = {row.get("candidate") for row in rows if "ms" in row}
    reasons = {row["candidate"]: f": {row['left out']}" for row in rows if "left out" in row and "candidate" in row}
    return [f"no figure of {name!r}{reasons.get(name, '')}" for name in section.candidates if name not in measured]


def main() -> None:
    """Run the sections in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="short forms, interpreted on the processor")
    parser.add_argument("--quick", action="store_true", help="list the sections and run none")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=535, help="of all sections together, on a GPU")
    parser.add_argument("--out", type=Path, help="folder for figures and output; a temporary one without it")
    options = parser.parse_args()
    if options.quick:
        print("\n".join(f"{name}: {' '.join(SECTIONS[name].whole)}" for name in options.only))
        return
    out = options.out or Path(tempfile.mkdtemp(prefix="distilbeam-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), False
    for name in options.only:
        now = time.monotonic()
        faults = run(SECTIONS[name], name, out, dry=options.dry, left=options.seconds - (now - began))
        failed |= bool(faults)
        print(f"{name}: {'; '.join(faults) or 'complete'}, {time.monotonic() - now:.0f} s", flush=True)
    print(f"figures and output: {out}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
