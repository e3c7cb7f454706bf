"""Train one language model in several processes; a program of its own.

    python language_processes.py DIRECTORY '[{"name": "two", "processes": 2, "changes": {...}, ...}, ...]'

Children are forked once everything is imported and meet through a file. A job with `kill_at` is killed in that step and begun again
with `then` processes. Prints a line of JSON for each training: the statuses of its processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import small_language_trainings as small
import torch
import torch._dynamo  # an optimizer imports it, which takes seconds: before the children are forked
import torch.distributed as dist
import transformers
from on_step import OnStep

from distilbeam.student.language.train import train_language_model

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.LlamaForCausalLM  # noqa: B018 - imported when named


def in_child(rank: int, size: int, directory: Path, job: dict[str, Any], attempt: int) -> None:
    """Train, and end the process."""

    def step(done: int, _total: int, _note: str) -> None:
        if attempt == 0 and done == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if size > 1:
            meeting = f"file://{directory}/{job['name']}-{attempt}.meeting"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
        changes = {**job.get("changes", {}), **(job.get("then_changes", {}) if attempt else {})}
        configs = small.settings(directory / "tokenizer", job.get("config"), **changes)
        data = {
            "soft_labels": [directory / "labels"],
            "validation": job.get("validation") and directory / job["validation"],
        }
        train_language_model(*configs, **data, directory=directory / job["name"], seed=7, progress=OnStep(step))
    except BaseException:  # noqa: BLE001 - the child ends here, whatever it was
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(directory: Path, jobs: list[dict[str, Any]]) -> None:
    """Do the jobs one after another."""
    for job in jobs:
        statuses = []
        for attempt in range(2 if "kill_at" in job else 1):
            size = job.get("then", job["processes"]) if attempt else job["processes"]
            children = []
            for rank in range(size):
                if (pid := os.fork()) == 0:
                    in_child(rank, size, directory, job, attempt)
                children.append(pid)
            statuses.append([os.waitpid(pid, 0)[1] for pid in children])
        print(json.dumps({"name": job["name"], "statuses": statuses}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
