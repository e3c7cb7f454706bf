"""Distilling language models: what the parts of it cost beside their peers, each in one run.

    python benchmarks/language_models.py                        every part
    python benchmarks/language_models.py --parts step           last layer and loss of a training's step: time and peak memory
    python benchmarks/language_models.py --parts labelling decoding     a teacher's labels: made, drawn, read
    python benchmarks/language_models.py --quick                small shapes, few rounds
    python benchmarks/language_models.py --json results         writes results/language_models-PART.json

step: 512 and 2,048 tokens, 576 features and 49,152 classes (the head of SmolLM2-135M), top 64 and the tail; the fused loss against whole
logits in plain torch, Liger's fused Jensen-Shannon loss and TRL's chunked divergence, with forward KL and with JSD. The peers
have no form for stored labels: they are given the teacher's hidden states and head, and compute its logits, too. Peers that
are not installed are listed with the reason (`pip install liger-kernel trl accelerate`).
labelling: the label phase beside a loop of forward pass, top-k and write, with a model of SmolLM2-135M's shape or that of `--model`,
and draws beside the forward pass. decoding: Parquet to tensors beside `datasets`, streaming, in the forms that it is read in, and
beside DistillKit's rows and decoder (its repository, installed without what it needs). Both in processor time. fidelity: bytes of a
token's label and what is left of the teacher in it, with a real model (`--model`) on Python's documentation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import token_decoding, token_fidelity, token_labelling, token_steps
from measuring.record import machine, write

Part = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]


def step(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the last layer and the loss of a step."""
    shape = token_steps.QUICK if arguments.quick else token_steps.FULL
    for objective in arguments.objectives:
        yield from token_steps.measure(shape, objective, arguments.threads, 3 if arguments.quick else arguments.repeats)
    if not arguments.quick:
        yield from token_steps.measure(
            token_steps.LONG,
            arguments.objectives[0],
            arguments.threads,
            min(3, arguments.repeats),
            token_steps.IN_LONG_STEPS,
        )


def labelling(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure labelling with a language model."""
    layers, repeats = (4, 1) if arguments.quick else (30, min(3, arguments.repeats))
    with tempfile.TemporaryDirectory() as folder:
        yield token_labelling.labelling(
            Path(folder), blocks=4, length=512, k=20, layers=layers, repetitions=repeats, model=arguments.model
        )


def decoding(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure reading labels of tokens."""
    blocks, slow, repeats = (64, 8, 1) if arguments.quick else (512, 64, min(3, arguments.repeats))
    with tempfile.TemporaryDirectory() as folder:
        yield token_decoding.decoding(
            Path(folder), blocks=blocks, length=512, k=64, repetitions=repeats, slow_blocks=slow
        )


def fidelity(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure bytes and fidelity of a token's label."""
    if arguments.model is None:
        yield {"left out": "a fresh model's distributions are of no text; give --model DIR, such as SmolLM2-135M"}
        return
    blocks, length = (1, 64) if arguments.quick else (2, 256)
    with tempfile.TemporaryDirectory() as folder:
        yield from token_fidelity.fidelity(arguments.model, Path(folder), blocks=blocks, length=length)


PARTS: dict[str, Part] = {"step": step, "labelling": labelling, "decoding": decoding, "fidelity": fidelity}
PACKAGES = {  # whose versions matter
    "step": ("torch", "liger-kernel", "trl"),
    "labelling": ("torch", "transformers", "pyarrow"),
    "decoding": ("torch", "pyarrow", "datasets", "distillkit"),
    "fidelity": ("torch", "transformers", "pyarrow", "distillkit"),
}


def main() -> None:
    """Parse the command line, measure, print the rows and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--objectives", nargs="+", choices=list(token_steps.BETAS), default=["tail", "jsd"], help="step: of"
    )
    parser.add_argument("--model", type=Path, help="folder of a model; labelling: instead of a fresh one")
    parser.add_argument("--json", type=Path, help="folder for a file of figures for each part")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    for name in arguments.parts:
        about = machine(PACKAGES[name], threads=arguments.threads)
        print("\n".join(f"{key}: {value}" for key, value in about.items()))
        rows: list[dict[str, Any]] = []
        for row in PARTS[name](arguments):
            rows.append(row)
            print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write(arguments.json and arguments.json / f"language_models-{name}.json", about, rows)


if __name__ == "__main__":
    main()
