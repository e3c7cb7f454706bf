"""Labelling on real Prism, Beam's portable runner: the same shards as on the local one. Skipped where Prism is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from engines import environment, require_prism
from problem import CLASSES, asked, write_problem

from distilbeam.teacher.softlabels import read_manifest


@pytest.mark.local_runner(reason="it is compared with Prism")
@pytest.mark.slow
def test_label_gives_the_same_shards_on_prism(tmp_path: Path) -> None:
    prism = require_prism()
    write_problem(tmp_path)
    shards = {}
    for name, flags in (
        ("local", []),
        ("prism", ["--runner=PrismRunner", f"--prism_location={prism}", "--environment_type=LOOPBACK"]),
    ):
        teacher = {
            "kind": "torch",
            "model": "logging_teacher:LoggingTeacher",
            "arguments": {"log": str(tmp_path / "asked.log")},
            "input": {"columns": ["x"]},
        }
        job = {
            "run": {"directory": name},
            "data": {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": CLASSES},
            "teacher": teacher,
            "engine": {"unit_rows": 40, "shard_rows": 8},
        }
        config = tmp_path / f"{name}.toml"
        config.write_text(tomli_w.dumps(job))
        command = [sys.executable, "-m", "distilbeam", "label", str(config), "--", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 0, done.stderr
        shards[name] = {entry.path: entry.checksum for entry in read_manifest(tmp_path / name / "labels").entries}
    assert shards["prism"] == shards["local"]
    assert len(asked(tmp_path)) == 2 * 240
