"""Several processes train one language model: copies or parts of its weights, micro-batches, and a kill between two numbers of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_language_trainings as small
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
pytestmark = pytest.mark.slow

SUPPORT = Path(small.__file__).parent
# sgd: it does not blow up rounding as AdamW does; 41 blocks in steps of 8 leave one for the last, which is masked or one process's alone
SGD = {"optimizer": "sgd", "lr": 0.3}
FSDP = {**SGD, "shard": "fsdp"}
JOBS = [
    {"name": "one", "processes": 1, "changes": SGD, "validation": "held"},
    {"name": "two", "processes": 2, "changes": SGD, "validation": "held"},
    {"name": "accumulated", "processes": 2, "changes": {**SGD, "accumulate": 2}},
    {"name": "parts", "processes": 2, "changes": {**FSDP, "accumulate": 3}, "validation": "held"},
    {"name": "average", "processes": 1, "changes": {"ema": 0.9}},
    {"name": "fewer", "processes": 2, "kill_at": 7, "then": 1, "changes": {"ema": 0.9}},
    {
        "name": "more",
        "processes": 1,
        "kill_at": 7,
        "then": 2,
        "changes": {"ema": 0.9},
        "then_changes": {"shard": "fsdp"},
    },
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train by all jobs; give the directory and what each printed."""
    directory = tmp_path_factory.mktemp("processes")
    small.write_blocks(directory / "labels", directory / "tokenizer", rows=41)
    small.write_blocks(directory / "held", directory / "tokenizer", rows=8, seed=3)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, SUPPORT / "language_processes.py", directory, json.dumps(JOBS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert all(set(line["statuses"][-1]) == {0} for line in found.values()), done.stderr
    return directory, found


def differs(directory, one, other):
    a, b = (load_file(directory / name / "model.safetensors") for name in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", ["two", "accumulated", "parts"])
def test_one_process_two_and_micro_batches_give_the_same_weights(trained, name):
    directory, _ = trained
    assert differs(directory, "one", name) < 2e-6
    figures = [json.loads((directory / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("one", name)]
    assert figures[0]["train_loss"] == pytest.approx(figures[1]["train_loss"], rel=1e-5)
    if "validation_kl" in figures[1]:
        assert figures[0]["validation_kl"] == pytest.approx(figures[1]["validation_kl"], rel=1e-4)


@pytest.mark.parametrize("name", ["fewer", "more"])
def test_a_killed_training_goes_on_with_another_number_of_processes(trained, name):
    directory, found = trained
    assert set(found[name]["statuses"][0]) == {9}
    assert differs(directory, "average", name) < 2e-5
