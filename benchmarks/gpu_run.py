"""Everything that a GPU has yet to decide, in one call of less than nine minutes.

    python benchmarks/gpu_run.py --out results      # on a machine with an H100 or H200
    python benchmarks/gpu_run.py --dry              # anywhere: the same commands in their short form, on the processor

Each section is a command of its own with a limit of its own, and is skipped when the time is up; its figures and its
output lie in `--out`. What they decide:

    tests     the Triton kernels pass on this GPU
    loss      `one_kernel` at .70 of the roofline or more at 4096 x 128,256: it becomes the form for 16-bit logits, else it goes
    layer     what `linear_distillation/choice.py` should hold for a GPU, and by which order a layer below 512 features runs
    layers    fp8 at 1.2 times bfloat16's speed or more at 16384 x 2048 x 2048: `low_precision/shapes.py` is filled, else the
              README says that it is not
    residual  LAuReL beside torch.compile, with a norm and 8-bit rows too
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
GPU = ["--device", "cuda", "--dtype", "bfloat16"]
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-x", str(HERE.parent / "tests" / "kernels")]
SECTIONS: dict[str, tuple[int, list[str], list[str]]] = {
    "tests": (120, PYTEST, ["-m", "pytest", "-q", "--collect-only", *PYTEST[4:]]),
    "loss": (130, ["distill_loss.py", "--grid", "language", *GPU, "--repeats", "9"], ["distill_loss.py", "--quick"]),
    "layer": (
        90,
        ["last_layer.py", "--grid", "gpu", "--device", "cuda", "--precision", "bf16", "--repeats", "7"],
        ["last_layer.py", "--quick"],
    ),
    "layers": (130, ["low_precision.py", "--grid", "gpu", *GPU, "--repeats", "7"], ["low_precision.py", "--quick"]),
    "residual": (60, ["laurel.py", "--grid", "gpu", *GPU, "--repeats", "7"], ["laurel.py", "--quick"]),
}


def run(name: str, limit: float, arguments: list[str], out: Path) -> str:
    """Run a section and say how it ended."""
    if arguments[0] != "-m":
        arguments = [str(HERE / arguments[0]), *arguments[1:], "--json", str(out / f"{name}.json")]
    with (out / f"{name}.txt").open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return f"exit {done.returncode}"


def main() -> None:
    """Run the sections in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="short forms on the processor")
    parser.add_argument("--quick", action="store_true", help="list the sections and run none")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=530, help="begin no section that may end later")
    parser.add_argument("--out", type=Path, help="folder for figures and output; a temporary one without it")
    options = parser.parse_args()
    if options.quick:
        print("\n".join(f"{name}: {' '.join(SECTIONS[name][1])}" for name in options.only))
        return
    out = options.out or Path(tempfile.mkdtemp(prefix="distilbeam-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in options.only:
        limit, whole, short = SECTIONS[name]
        left = options.seconds - (time.monotonic() - began)
        if left < limit and not options.dry:
            print(f"{name}: skipped, {left:.0f} s are left", flush=True)
            continue
        print(f"{name}: {run(name, limit, short if options.dry else whole, out)}", flush=True)
    print(f"figures and output: {out}")


if __name__ == "__main__":
    main()
