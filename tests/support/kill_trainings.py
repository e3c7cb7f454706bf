"""Kill a training again and again, and let it go on, until it is through; a program of its own.

    python kill_trainings.py DIRECTORY vectors|images FIRST_SEED LAST_SEED

Children are forked once everything is imported, so that a restart takes milliseconds. Each of them reports the step it
begins with; its parent sends SIGKILL after a random time, or the child sends it to itself at a marked place of the
writing of a checkpoint. Prints a line of JSON for an undisturbed training, and one for each seed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import small_trainings
import torch
import torch._dynamo  # an optimizer imports it, which takes seconds: before the children are forked
from on_step import OnStep

from distilbeam.student.training import checkpoints
from distilbeam.student.training.train import train

torch.set_num_threads(1)
warnings.simplefilter("error")
PLACES = ("half written", "before the rename", "after the rename", "after the student")
STEP_S = 0.004


def kill_at(place: str, number: int) -> None:
    """Arrange for this process to kill itself when it comes to a place of its checkpoint `number`."""
    count = 0
    save_file, remove = checkpoints.save_file, checkpoints.TrainingDirectory.remove
    replace = Path.replace

    def arrived(here: str) -> bool:
        return place == here and count >= number

    def saving(tensors, path, metadata):
        nonlocal count
        count += 1
        save_file(tensors, path, metadata)
        if arrived("half written"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def replacing(source, target):
        checkpoint = Path(target).name.startswith("step-")
        if checkpoint and arrived("before the rename"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if checkpoint and arrived("after the rename"):
            os.kill(os.getpid(), signal.SIGKILL)
        return target

    def removing(directory):
        if place == "after the student":
            os.kill(os.getpid(), signal.SIGKILL)
        remove(directory)

    checkpoints.save_file = saving
    Path.replace = replacing
    checkpoints.TrainingDirectory.remove = removing


def attempt(arguments, configs, target: Path, place: str | None, number: int, delay_s: float | None) -> tuple[int, int]:
    """Train in a child, which may be killed; return its exit status and the step that it began with (0: none)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        if place is not None:
            kill_at(place, number)

        def step(done: int, _total: int, _note: str) -> None:
            os.write(writer, f"{done}\n".encode())
            time.sleep(STEP_S)

        try:
            train(*configs, **arguments, directory=target, seed=7, progress=OnStep(step))
        except BaseException:  # noqa: BLE001 - the child ends here, whatever it was
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as steps:
        first = steps.readline()
        if delay_s is not None and first:
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        steps.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(first or 0)


def until_done(arguments, configs, target: Path, seed: int | None) -> dict[str, Any]:
    """Train, killed at the moments that a seed gives, at most six times; without a seed never."""
    rng = np.random.default_rng(seed)
    began: list[int] = []
    killed: list[str] = []
    while not target.exists():
        place = delay_s = None
        if seed is not None and len(killed) < 6:
            place = str(rng.choice(PLACES)) if rng.random() < 0.5 else None
            delay_s = None if place else float(rng.uniform(0, 20 * STEP_S))
        status, step = attempt(arguments, configs, target, place, int(rng.integers(1, 6)), delay_s)
        began.append(step)
        if status == -signal.SIGKILL:
            killed.append(place or "between")
        elif status:
            sys.exit(f"the training ended with status {status}")
    lines = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": small_trainings.weights(target),
        "began": began,
        "killed": killed,
        "left": sorted(path.name for path in target.parent.glob(f"*{target.name}.*")),
        "history": [{k: v for k, v in line.items() if k not in ("seconds", "examples_per_s")} for line in lines],
    }


def main(directory: Path, kind: str, first_seed: int, last_seed: int) -> None:
    write = {"vectors": small_trainings.write_vectors, "images": small_trainings.write_images}[kind]
    arguments, configs = write(directory / "labels"), small_trainings.settings(kind)
    for seed in (None, *range(first_seed, last_seed + 1)):
        print(json.dumps(until_done(arguments, configs, directory / f"student-{seed}", seed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
