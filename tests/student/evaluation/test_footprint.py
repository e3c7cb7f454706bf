"""measure: a fresh process, and figures computed by hand where there are any."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from distilbeam.student.checkpoint import save_student
from distilbeam.student.evaluation.footprint import WARM_UP, latency_ms, measure, peak_memory_bytes
from distilbeam.student.networks.build import build_student


def test_the_median_and_the_late_calls_by_hand(monkeypatch):
    durations_ms = [999] * WARM_UP + [1, 2, 3, 4, 30]
    clock = np.repeat(np.cumsum([0, *durations_ms]), 2)[1:-1] / 1e3
    monkeypatch.setattr("time.perf_counter", iter(clock).__next__)
    median, late = latency_ms(lambda: None, 5)
    assert median == pytest.approx(3)
    assert late == pytest.approx(4 + 0.8 * 26)  # the 95th percentile lies 0.8 of the way between the last two


@pytest.mark.slow
def test_a_student_in_a_process_of_its_own(tmp_path, student_config):
    ballast = np.ones(2**26)  # 512 MB here that the fresh process must not report
    directory = save_student(tmp_path / "s", build_student(student_config, (2,), 3), student_config, "abc", (2,))
    found = measure(directory, repeats=5)
    for rows in (1, 64):
        assert 0 < found[f"latency_ms_batch{rows}"] <= found[f"latency_ms_batch{rows}_p95"] < 1000
    assert 0 < found["memory_bytes"] < found["peak_memory_bytes"] < ballast.nbytes + 100 * 2**20
    assert peak_memory_bytes() > ballast.nbytes + 100 * 2**20


@pytest.mark.slow
def test_why_nothing_could_be_measured(tmp_path, student_config):
    directory = save_student(tmp_path / "s", build_student(student_config, (2,), 3), student_config, "abc", (2,))
    shutil.move(directory / "student.json", directory / "other.json")
    with pytest.raises(RuntimeError, match=r"could not be measured: ValueError: .* holds no student: student\.json"):
        measure(directory)
    (directory / "export.json").write_text(
        json.dumps({"file": "model.exe", "input_shape": [2], "input_dtype": "float32"})
    )
    with pytest.raises(RuntimeError, match=r"an exported model must be a file of kind \.onnx or \.pt2, got"):
        measure(directory)
