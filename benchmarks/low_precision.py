"""Time of 8-bit linear layers and of rowwise quantisation beside torch, torchao and Transformer Engine, in one run.

    python benchmarks/low_precision.py                               on this machine's processor, where nothing is gained
    python benchmarks/low_precision.py --device cuda --dtype bfloat16 --grid gpu --json benchmarks/results/low_precision-h100.json
    python benchmarks/low_precision.py --what quantize --device cuda --dtype bfloat16 --grid gpu

A step of a layer is forward and backward, the weight's quantisation included once. `of roofline` is the time that the
three products would take at the speed of a large one in the step's own dtype, over the time taken: an 8-bit layer can be
above 1. For quantisation it is the time of reading the rows and writing the values at the speed of a large copy. The
last lines say from which shapes 8 bits were faster than the dtype itself: what `kernels/low_precision/shapes.py` should
hold. Peers that are not installed or cannot run are listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measuring.record import machine, write
from measuring.steps import Step, copy_speed, host_seconds, medians, product_speed
from torch import nn

from distilbeam.kernels import LowPrecisionPolicy, WeightCache, fp8_linear, quantize_rowwise, to_low_precision
from distilbeam.kernels.low_precision import shapes
from distilbeam.kernels.low_precision.bench import Problem, step
from distilbeam.kernels.low_precision.shapes import Shape

GRIDS = {"dry": shapes.DRY, "quick": shapes.QUICK, "cpu": shapes.CPU, "gpu": shapes.GPU, "gpu-all": shapes.GPU_ALL}


def converted(
    dtype: str, backend: str, gradients: str | None = "bf16", compiled: bool = False
) -> Callable[..., nn.Module]:
    """Convert the layer to 8 bits."""
    policy = LowPrecisionPolicy(
        dtype=dtype, backend=backend, gradients=gradients, gate="sizes", keep_last=False, multiple_of=1
    )

    def build(layer: nn.Sequential) -> nn.Module:
        if to_low_precision(layer, policy).converted != 1:
            raise NotImplementedError("the layer was not converted")
        return torch.compile(layer, dynamic=False) if compiled else layer

    return build


def transformer_engine(layer: nn.Sequential) -> nn.Module:
    """Transformer Engine's linear layer under its own fp8 scaling."""
    import transformer_engine.pytorch as te

    given = layer[0]
    theirs = te.Linear(given.in_features, given.out_features, params_dtype=given.weight.dtype)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = theirs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with te.fp8_autocast(enabled=True):
                return self.inner(x)

    return Scaled()


class LaidOutByTriton(nn.Module):
    """A layer all in fp8 whose operands Triton lays out for torch's product."""

    def __init__(self, layer: nn.Sequential) -> None:
        super().__init__()
        self.layer, self.cache = layer, WeightCache()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = self.layer[0]
        return fp8_linear(x, linear.weight, linear.bias, cache=self.cache, implementation="triton")


PLAIN = "torch"
LAYERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    PLAIN: lambda layer: layer,
    "torch.compile": lambda layer: torch.compile(layer, dynamic=False),
    "distilbeam fp8": converted("fp8", "distilbeam"),
    "distilbeam fp8, fp8 gradients": converted("fp8", "distilbeam", "fp8"),
    "distilbeam fp8, fp8 gradients, laid out by Triton": LaidOutByTriton,
    "distilbeam int8": converted("int8", "distilbeam"),
    "torchao fp8": converted("fp8", "torchao"),
    "torchao fp8, fp8 gradients": converted("fp8", "torchao", "fp8"),
    "torchao fp8, fp8 gradients, compiled": converted("fp8", "torchao", "fp8", compiled=True),
    "torchao int8": converted("int8", "torchao"),
    "Transformer Engine fp8": transformer_engine,
}


def quantised_by_torch(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows as one would write it."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    scale = x.abs().amax(dim=1, keepdim=True).float() / largest
    scaled = (x.float() / scale).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def quantisers(x: torch.Tensor) -> dict[str, Step]:
    """Name the ways to quantise rows."""
    compiled = torch.compile(quantised_by_torch, dynamic=False)
    found: dict[str, Step] = {}
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        found[f"distilbeam {name}"] = lambda dtype=dtype: quantize_rowwise(x, dtype)
        found[f"torch eager {name}"] = lambda dtype=dtype: quantised_by_torch(x, dtype)
        found[f"torch.compile {name}"] = lambda dtype=dtype: compiled(x, dtype)
    return found


def runnable(builders: dict[str, Callable[[], Step]], shape: str) -> tuple[dict[str, Step], list[dict[str, object]]]:
    """Run each candidate once; give those that can, and the reasons of the others."""
    steps: dict[str, Step] = {}
    left_out: list[dict[str, object]] = []
    for name, build in builders.items():
        try:
            take = build()
            take()
        except Exception as e:  # noqa: BLE001 - a peer's or a compiler's fault costs its own figures alone
            reason = (str(e) or type(e).__name__).splitlines()[0][:110]
            left_out.append({"shape": shape, "candidate": name, "left out": reason})
        else:
            steps[name] = take
    return steps, left_out


def measure(
    shape: Shape, arguments: argparse.Namespace, bandwidth: float, operations: float
) -> list[dict[str, object]]:
    """Run all candidates on a shape."""
    torch.compiler.reset()  # many recompilations would end in eager execution
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    rows, inputs, _ = shape
    if arguments.what == "quantize":
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        name = f"{rows}x{inputs}"
        bound = rows * inputs * (x.element_size() + 1) / bandwidth
        builders: dict[str, Callable[[], Step]] = {key: lambda step=step: step for key, step in quantisers(x).items()}
    else:
        name, problem = str(shape), Problem(shape, device, dtype)
        bound = problem.operations / operations
        builders = {
            key: lambda build=build: step(problem, build(copy.deepcopy(problem.layer)))
            for key, build in LAYERS.items()
            if key not in arguments.without
        }
    steps, left_out = runnable(builders, name)
    times = medians(steps, device, arguments.repeats)
    base = times.get(PLAIN)
    found: list[dict[str, object]] = []
    for key, taken in times.items():
        row: dict[str, object] = {"shape": name, "candidate": key, "ms": round(1e3 * taken, 3)}
        row["of roofline"] = round(bound / taken, 3)
        if device == "cuda":
            row["host ms"] = round(1e3 * host_seconds(steps[key]), 3)
        if base is not None:
            row["times torch's speed"] = round(base / taken, 2)
        found.append(row)
    return found + left_out


def gains(rows: list[dict[str, object]]) -> list[str]:
    """Say on which shapes 8 bits were faster than the dtype itself."""
    lines = []
    for name in LAYERS:
        won = [str(row["shape"]) for row in rows if row["candidate"] == name and row.get("times torch's speed", 0) > 1]
        if name.startswith("distilbeam"):
            lines.append(f"{name}: faster than torch's {'nowhere' if not won else 'at ' + ', '.join(won)}")
    return lines


def main() -> None:
    """Parse the command line, measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["linear", "quantize"], default="linear")
    parser.add_argument("--grid", choices=sorted(GRIDS), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--without", nargs="+", default=[], choices=LAYERS, metavar="NAME", help="leave these layers out"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.grid, arguments.repeats = "quick", 3
    bandwidth = copy_speed(arguments.device)
    operations = product_speed(arguments.device, getattr(torch, arguments.dtype))
    about = machine(
        ("torch", "triton", "torchao", "transformer-engine"),
        threads=arguments.threads,
        copy_GB_s=round(bandwidth / 1e9, 1),
        product_Gop_s=round(operations / 1e9, 1),
        gpu=torch.cuda.get_device_name() if arguments.device == "cuda" else None,
    )
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    rows = []
    for shape in GRIDS[arguments.grid]:
        for row in measure(shape, arguments, bandwidth, operations):
            print(" | ".join(str(v) if k in ("shape", "candidate") else f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
        write(arguments.json, about, rows)
    if arguments.what == "linear":
        print("\n".join(gains(rows)))


if __name__ == "__main__":
    main()
