"""Checks a runner: the digits' pool is labelled on this machine and by the runner; the shards must be the same, byte for byte.

    python deploy/check_runner.py /shared/check -- --runner=FlinkRunner --flink_master=flink:8081 --environment_type=...

The directory must be one that this machine and the workers see under the same name; it is made, and may be removed afterwards.
What follows `--` is as for `distilbeam label`. Exit status 0: the same; 1: not, or the runner failed, with its words.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import tomli_w

from distilbeam.teacher.softlabels import read_manifest

SHARD_ROWS = 100  # so that there are a dozen shards, and every worker has some


def label(directory: Path, name: str, flags: list[str]) -> dict[str, str]:
    """Label the pool in a job of its own; return the checksums of its shards by their files."""
    example = tomllib.loads((directory / "distilbeam.toml").read_text())
    data = {key: example["data"][key] for key in ("pool", "id", "carry", "classes") if key in example["data"]}
    data |= {} if "classes" in data else {"num_classes": 10}
    job = {
        "run": {"directory": name},
        "data": data,
        "teacher": example["teacher"],
        "engine": {"unit_rows": SHARD_ROWS, "shard_rows": SHARD_ROWS},
    }
    config = directory / f"{name}.toml"
    config.write_text(tomli_w.dumps(job))
    done = subprocess.run([sys.executable, "-m", "distilbeam", "label", str(config), "--", *flags], check=False)
    if done.returncode:
        sys.exit(1)
    return {entry.path: entry.checksum for entry in read_manifest(directory / name / "labels").entries}


def main() -> None:
    """Make the example, label it twice, compare."""
    words = sys.argv[1:]
    if words[1:2] != ["--"] or words[0].startswith("-"):
        sys.exit(f"usage: python {sys.argv[0]} DIRECTORY -- BEAM OPTIONS")
    directory, flags = Path(words[0]).resolve(), words[2:]
    subprocess.run(
        [sys.executable, "-m", "distilbeam", "init", str(directory), "--example", "digits"],
        check=True,
        stdout=sys.stderr,
    )
    here, there = label(directory, "here", []), label(directory, "there", flags)
    different = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    if different:
        sys.exit(f"{len(different)} of {len(here)} shards differ, the first: {different[0]}; see {directory}")
    print(f"The same {len(here)} shards, byte for byte.")


if __name__ == "__main__":
    main()
