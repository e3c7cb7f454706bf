"""Train one student in several processes; a program of its own.

    python several_processes.py DIRECTORY '[{"name": "two", "processes": 2, "kind": "vectors", ...}, ...]'

Children are forked once everything is imported and meet through a file. Prints a line of JSON for each training: the
digest of the weights that every process had after every epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import small_trainings
import torch
import torch._dynamo  # an optimizer imports it, which takes seconds: before the children are forked
import torch.distributed as dist
from on_step import OnStep

from distilbeam.student.training import state
from distilbeam.student.training.train import train

torch.set_num_threads(1)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of one channel: only slower


def in_child(rank: int, directory: Path, data: dict[str, Any], job: dict[str, Any], attempt: int) -> None:
    """Train, note the weights after every epoch, and end the process."""
    size, notes = size_of(job, attempt), (directory / f"{job['name']}-{rank}.notes").open("a")
    end_epoch = state.TrainingState.end_epoch

    def noted(state, figures):
        end_epoch(state, figures)
        digest = hashlib.blake2b(digest_size=8)
        for name, value in state.module.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        notes.write(f"{digest.hexdigest()}\n")
        notes.flush()

    def step(done: int, _total: int, _note: str) -> None:
        if attempt == 0 and done == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    state.TrainingState.end_epoch = noted
    try:
        if size > 1:
            meeting = f"file://{directory}/{job['name']}-{attempt}.meeting"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
        configs = small_trainings.settings(job["kind"], **job.get("changes", {}))
        train(*configs, **data, directory=directory / job["name"], seed=7, progress=OnStep(step))
    except BaseException:  # noqa: BLE001 - the child ends here, whatever it was
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def size_of(job: dict[str, Any], attempt: int) -> int:
    """How many processes take part: after a kill it may be another number."""
    return job.get("then", job["processes"]) if attempt else job["processes"]


def main(directory: Path, jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        write = {"vectors": small_trainings.write_vectors, "images": small_trainings.write_images}[job["kind"]]
        data = write(directory / f"{job['name']}.labels", job["rows"]) | job.get("data", {})
        statuses = []
        for attempt in range(2 if "kill_at" in job else 1):
            children = []
            for rank in range(size_of(job, attempt)):
                children.append(os.fork())
                if children[-1] == 0:
                    in_child(rank, directory, data, job, attempt)
            statuses.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        notes = [(directory / f"{job['name']}-{rank}.notes").read_text().split() for rank in range(job["processes"])]
        print(json.dumps({"name": job["name"], "statuses": statuses, "epochs": notes}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
