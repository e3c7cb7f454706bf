"""The one command for a GPU: each section by itself, whatever became of the one before, and nothing beyond its time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu_run.py"


@pytest.fixture
def gpu_run(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_run", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)  # its classes look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.5)
    return module


def run_all(gpu_run, monkeypatch, sections, *arguments):
    monkeypatch.setattr(gpu_run, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_run.main()
    return ended.value.code


def test_a_section_that_fails_or_hangs_costs_no_other(gpu_run, monkeypatch, tmp_path, capsys):
    (tmp_path / "hangs.json").write_text('{"results": [{"candidate": "a", "ms": 1}]}')  # of a run before
    one = {"results": [{"candidate": "a", "ms": 1.0}, {"candidate": "b", "left out": "no such device"}]}
    writes = f"import pathlib; pathlib.Path({str(tmp_path / 'writes.json')!r}).write_text({json.dumps(one)!r})"
    sections = {
        "fails": gpu_run.Section(60, ["-c", "print('so far'); raise SystemExit(3)"], []),
        "hangs": gpu_run.Section(1, ["-c", "import time; time.sleep(600)"], [], ("a",)),
        "writes": gpu_run.Section(60, ["-c", writes], [], ("a", "b", "c")),
    }
    assert run_all(gpu_run, monkeypatch, sections, "--out", str(tmp_path), "--only", *sections) == 1
    said = capsys.readouterr().out
    assert "fails: exit 3, " in said
    assert "hangs: stopped after 1 s; no figure of 'a', " in said
    assert "writes: no figure of 'b': no such device; no figure of 'c', " in said
    assert (tmp_path / "fails.txt").read_text() == "so far\n"


def test_a_section_gets_what_is_left(gpu_run, tmp_path):
    section = gpu_run.Section(60, ["-c", "import time; time.sleep(600)"], [])
    assert gpu_run.run(section, "late", tmp_path, dry=False, left=1.0) == ["stopped after 1 s"]
    assert gpu_run.run(section, "later", tmp_path, dry=False, left=0.4) == ["skipped, 0 s are left"]


def test_what_is_complete_ends_well(gpu_run, monkeypatch, tmp_path):
    look = "import os; assert os.environ['TRITON_INTERPRET'] == '1' and os.environ['CUDA_VISIBLE_DEVICES'] == ''"
    sections = {"dry": gpu_run.Section(60, ["-c", "raise SystemExit(1)"], ["-c", look])}
    arguments = ("--dry", "--out", str(tmp_path), "--only", "dry")
    assert run_all(gpu_run, monkeypatch, sections, *arguments) == 0


def test_all_sections_fit_nine_minutes(gpu_run):
    assert sum(section.limit for section in gpu_run.SECTIONS.values()) <= 535
