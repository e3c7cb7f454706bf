"""A labelling job that is killed with SIGKILL at random moments, with one process and with worker processes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from labelling import calls_by_row, dataset, finish, labelled_ids, pool_ids, shards, start, write_job

pytestmark = pytest.mark.slow

SHARD_ROWS = 8
TWO = ["--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
MODES = [  # kills, workers, Beam's options
    pytest.param(3, 1, [], id="one process"),
    pytest.param(3, 2, TWO, id="two processes", marks=pytest.mark.exhaustive),
    pytest.param(12, 1, [], id="one process, more kills", marks=pytest.mark.exhaustive),
    pytest.param(10, 2, TWO, id="two processes, more kills", marks=pytest.mark.exhaustive),
]


def write(directory: Path) -> None:
    """Two calls of 50 ms for a shard, so that a kill meets shards in every state."""
    teacher = {"arguments": {"log": "asked.log", "delay_s": 0.05}}
    engine = {"shard_rows": SHARD_ROWS, "batch_rows": 4, "teacher_batch": 4}
    write_job(directory, pool_rows=480, teacher=teacher, engine=engine)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    directory = tmp_path_factory.mktemp("undisturbed") / "d"
    write(directory)
    finish(directory)
    return shards(directory)


def kill_at_random(directory: Path, rng: random.Random, flags: list[str]) -> bool:
    """Start the job; kill it and its workers soon after it has committed a few more shards; return False if it ended before."""
    manifest = dataset(directory) / "_manifest"
    enough = len(list(manifest.glob("*.json"))) + rng.randrange(5)
    delay_s = rng.uniform(0, 0.15)
    process = start(directory, *flags)
    while process.poll() is None:
        if len(list(manifest.glob("*.json"))) >= enough and (directory / "job" / "config.toml").exists():
            time.sleep(delay_s)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    process.communicate()
    return False


@pytest.mark.parametrize(("wanted_kills", "workers", "flags"), MODES)
def test_killed_at_random_moments_it_pays_once(
    tmp_path: Path, undisturbed: list[Any], wanted_kills: int, workers: int, flags: list[str]
) -> None:
    rng = random.Random(100 * wanted_kills + workers)
    directory = tmp_path / "d"
    write(directory)
    kills = sum(kill_at_random(directory, rng, flags) for _ in range(wanted_kills))
    assert kills == wanted_kills, "the job is long enough for all of them"
    paid_before = calls_by_row(directory)
    committed = set(labelled_ids(directory)) if shards(directory) else set()
    finish(directory, *flags)
    assert shards(directory) == undisturbed
    ids = labelled_ids(directory)
    assert len(ids) == len(set(ids)), "no row twice"
    assert sorted(ids) == sorted(pool_ids(directory)), "no row lost"
    calls = calls_by_row(directory)
    assert sum(calls.values()) <= len(ids) + kills * workers * SHARD_ROWS, "a kill costs a shard per worker at most"
    assert all(calls[key] == paid_before[key] for key in committed), "what is committed is never asked again"
    assert not list((directory / "job").rglob(".*.tmp"))
    assert not list((directory / "job").rglob("*.placed"))
