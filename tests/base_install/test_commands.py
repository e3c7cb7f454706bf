"""The commands in an environment with the base dependencies alone: `make test-base`, which needs no pytest.

A machine that has everything hides a package that nobody declared. So this runs where nothing is installed but what
`pip install .` brings; elsewhere it is skipped.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import distilbeam

# packages of extras and of development: one that is here means that this is no base installation
NOT_BASE = ("pandas", "onnx", "onnxruntime", "optuna", "transformers", "jax", "pytest")
# what a kernel's backend is imported for, and a word of the names of the modules that import it; torch brings triton on Linux
BACKENDS = {"triton": "triton", "jax": "pallas", "jaxlib": "pallas"}
DEMO = Path(__file__).resolve().parents[2] / "demo/run/report/metrics.json"
FOUND = [name for name in NOT_BASE if importlib.util.find_spec(name)]
REQUIRED = os.environ.get("DISTILBEAM_BASE_ONLY") == "1"  # `make test-base`: to skip would be to pass unseen


@unittest.skipUnless(DEMO.is_file(), "make demo has not run here")
class TestDemo(unittest.TestCase):
    """What `make demo` has left in this clone."""

    def test_its_student_has_learned(self) -> None:
        metrics = json.loads(DEMO.read_text())
        first, last = metrics["students"][0], metrics["students"][-1]
        # the seed is fixed: .637, .980 and the teacher's .988 with the pinned versions; others may move each by a few of 400 examples
        self.assertGreater(last["accuracy"], first["accuracy"] + 0.1)
        self.assertGreater(last["accuracy"], metrics["teacher"]["accuracy"] - 0.03)
        self.assertLess(last["parameters"], 0.25 * metrics["teacher"]["parameters"])
        self.assertEqual([student["labels"] for student in metrics["students"]], [0, 80, 160, 240])


@unittest.skipIf(bool(FOUND) and not REQUIRED, "needs an environment with the base dependencies alone: make test-base")
class TestBaseInstallation(unittest.TestCase):
    """Every base command once, on the digits example; each test takes up the directory that the ones before left."""

    directory: tempfile.TemporaryDirectory[str]
    root: Path

    @classmethod
    def setUpClass(cls) -> None:
        assert not FOUND, f"{', '.join(FOUND)} must not be installed here; call make test-base in a fresh clone"
        cls.directory = tempfile.TemporaryDirectory()
        cls.root = Path(cls.directory.name)
        run("init", str(cls.root / "digits"), "--example", "digits")
        (cls.root / "digits/label.toml").write_text(LABELLING)
        (cls.root / "digits/served.toml").write_text(SERVED)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.directory.cleanup()

    def test_1_every_module_is_imported(self) -> None:
        for module in all_modules():
            with self.subTest(module):
                try:
                    importlib.import_module(module)
                except ModuleNotFoundError as e:
                    self.assertIn(BACKENDS.get(str(e.name), "no module"), module, str(e))

    def test_2_a_run(self) -> None:
        config = str(self.root / "digits/distilbeam.toml")
        short = ("--set", "run.rounds=1", "--set", "training.epochs=5")
        self.assertIn("837", run("plan", config, *short))
        self.assertIn("student, round 1", run("run", config, *short))
        self.assertTrue((self.root / "digits/run/report/report.html").read_text().startswith("<!"))
        student = str(self.root / "digits/run/students/round=001")
        self.assertIn("accuracy", run("evaluate", student, "--data", self.data("test.parquet"), "--label", "digit"))
        run("export", student, "--format", "pt2", "--data", self.data("test.parquet"), "--label", "digit")
        self.assertTrue(list((self.root / "digits/run/students").rglob("*.pt2")))

    def test_3_a_labelling_job(self) -> None:
        config = self.data("label.toml")
        self.assertIn("837 are not", run("plan", config))
        run("label", config)
        labels = self.data("labelling/labels")
        self.assertIn("837", run("inspect", labels))
        run("verify", labels, "--teacher", config)
        self.assertIn("837 are labelled", run("plan", config))

    def test_4_a_served_teacher(self) -> None:
        command = [sys.executable, "-m", "distilbeam", "serve-teacher", self.data("label.toml"), "--port", "0"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as server:
            try:
                assert server.stdout is not None
                found = re.search(r":(\d+)\b", server.stdout.readline())
                assert found is not None
                run("label", self.data("served.toml"), "--set", f"teacher.address=localhost:{found[1]}")
            finally:
                server.send_signal(signal.SIGINT)
                _out, complaints = server.communicate(timeout=60)
        self.assertEqual(complaints, "")
        for name in ("labelling", "served"):
            self.assertIn("837", run("inspect", self.data(f"{name}/labels")))

    def test_5_ingest(self) -> None:
        with (self.root / "rows.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], ["a", "one, two"], ["b", "three\nfour"], ["a", "one, two"]])
        run("ingest", str(self.root / "rows.csv"), "--out", str(self.root / "csv"), "--format", "csv", "--id", "id")
        (self.root / "rows.jsonl").write_text("".join(json.dumps({"id": i, "x": [i, 2]}) + "\n" for i in range(3)))
        run(
            "ingest",
            str(self.root / "rows.jsonl"),
            "--out",
            str(self.root / "jsonl"),
            "--format",
            "jsonl",
            "--id",
            "id",
        )
        self.assertEqual([rows_in(self.root / name) for name in ("csv", "jsonl")], [2, 3])

    def test_6_what_an_extra_is_needed_for_is_said_before_any_work(self) -> None:
        config, student = self.data("distilbeam.toml"), str(self.root / "digits/run/students/round=001")
        for extra, arguments in {
            "onnx": ("export", student, "--format", "pt2", "--format", "onnx", "--output", str(self.root / "exports")),
            "compress": ("export", config, "--format", "pruned", "--set", "run.rounds=1", "--set", "training.epochs=5"),
            "tune": ("tune", config, "--set", "run.rounds=1", "--set", "training.epochs=5"),
        }.items():
            with self.subTest(extra):
                done = start(*arguments)
                self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
                self.assertIn(f"pip install 'distilbeam[{extra}]'", done.stderr)
        self.assertFalse((self.root / "exports").exists())

    def data(self, name: str) -> str:
        return str(self.root / "digits" / name)


TEACHER = """
[teacher]
kind = "torch"
model = "teacher.pt2"
input = { columns = ["pixels"], shape = [1, 8, 8], scale = 0.0625 }
"""
DATA = """
[data]
pool = "pool"
id = "id"
carry = ["pixels"]
num_classes = 10
"""
LABELLING = '[run]\ndirectory = "labelling"\n' + DATA + TEACHER
SERVED = (
    '[run]\ndirectory = "served"\n'
    + DATA
    + """
[teacher]
kind = "tfserving"
address = "localhost:1"
model = "teacher"
input = { columns = ["pixels"], shape = [1, 8, 8], scale = 0.0625 }
"""
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distilbeam", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def run(*arguments: str) -> str:
    """Run a command that must succeed without a word on standard error; return what it prints."""
    done = start(*arguments)
    if done.returncode or done.stderr:
        raise AssertionError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def all_modules() -> list[str]:
    """List the modules of the five parts, by their files."""
    found = []
    for part in distilbeam.PARTS:
        package: Any = importlib.import_module(f"distilbeam.{part}")
        found += [module.name for module in pkgutil.walk_packages(package.__path__, f"distilbeam.{part}.")]
    return found


def rows_in(pool: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in pool.rglob("*.parquet") if "dead" not in str(path))


if __name__ == "__main__":
    unittest.main()
