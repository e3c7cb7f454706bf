from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from on_step import OnStep
from problem import SUPPORT
from square_work import Squares
from threadpoolctl import threadpool_info

from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.phase import PhaseError, PhaseReport, run_phase, threads


def run(work: Squares, items: list[int], tmp_path: Path, **options: object) -> int:
    return report(work, items, tmp_path, **options).items


def report(work: Squares, items: list[int], tmp_path: Path, **options: object) -> PhaseReport:
    return run_phase("square", work, items, errors=tmp_path / "errors", options=pipeline_options(), **options)  # type: ignore[arg-type]


def test_every_item_is_done_once_and_never_again(tmp_path: Path) -> None:
    work = Squares(str(tmp_path))
    seen: list[tuple[int, int]] = []
    assert (
        run(work, list(range(20)), tmp_path, progress=OnStep(lambda done, total, _: seen.append((done, total)))) == 20
    )
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(20)] == [str(i * i) for i in range(20)]
    assert seen[-1] == (20, 20)
    (tmp_path / "7.txt").unlink()
    assert run(work, list(range(20)), tmp_path) == 1
    assert run(work, list(range(20)), tmp_path) == 0
    assert [work.attempts(i) for i in (6, 7)] == [1, 2]


def test_a_failing_item_costs_its_neighbours_nothing_and_is_named(tmp_path: Path) -> None:
    work = Squares(str(tmp_path), broken=(3,))
    with pytest.raises(PhaseError, match=r"^square: 1 item\(s\) could not be done, the first number 3: 3 is broken$"):
        run(work, list(range(6)), tmp_path)
    assert [work.done(i) for i in range(6)] == [True, True, True, False, True, True]
    assert work.attempts(3) == 1, "wrong input does not get better by repeating"
    assert run(Squares(str(tmp_path)), list(range(6)), tmp_path) == 1


def test_what_can_pass_is_tried_again(tmp_path: Path) -> None:
    work = Squares(str(tmp_path), shaky=(1, 4))
    done = report(work, list(range(6)), tmp_path)
    assert (done.items, done.retried, done.counts["square_items"]) == (6, 2, 6)
    assert done.seconds > 0
    assert [work.attempts(i) for i in range(6)] == [1, 2, 1, 1, 2, 1]


def test_attempts_are_bounded(tmp_path: Path) -> None:
    work = Squares(str(tmp_path), shaky=(1,))
    with pytest.raises(PhaseError, match=r"number 1: ConnectionError: the line was cut$"):
        run(work, [0, 1], tmp_path, attempts=1)


def test_a_runner_that_loses_work_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilbeam.pipelines.engine.phase.submit", lambda *_, **__: Counter())
    with pytest.raises(
        PhaseError, match=r"1 item\(s\) could not be done although the runner reported success, the first number 5"
    ):
        run(Squares(str(tmp_path)), [5], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_other_ways_of_running_do_the_same(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))  # worker processes import the work by its module's name
    work = Squares(str(tmp_path), broken=(3,))
    options = pipeline_options([f"--direct_running_mode={mode}", "--direct_num_workers=2"])
    with pytest.raises(PhaseError, match=r"number 3: 3 is broken"):
        run_phase("square", work, list(range(6)), errors=tmp_path / "errors", options=options)
    assert [work.done(i) for i in range(6)] == [True, True, True, False, True, True]


@pytest.mark.local_runner(reason="its worker processes are what is tested")
@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_process_that_is_killed_is_noticed_and_its_work_repeated(tmp_path: Path, always: bool) -> None:
    command = [sys.executable, str(SUPPORT / "square_work.py"), str(tmp_path), str(int(always))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    done = [(tmp_path / f"{i}.txt").exists() for i in range(6)]
    if always:
        assert re.search(
            r"square: \d item\(s\) could not be done, the first number \d: [12] of 2 worker processes died", out.stdout
        )
        assert not done[2]
    else:
        assert out.stdout.strip() == "6", out.stderr
        assert all(done)


def test_work_runs_on_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads(1):
            assert torch.get_num_threads() == 1
            assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_work_without_models_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from square_work import Squares\n"
        "from distilbeam.pipelines.engine.beam_options import pipeline_options\n"
        "from distilbeam.pipelines.engine.phase import run_phase\n"
        "where = Path(sys.argv[1])\n"
        "how = {'errors': where / 'errors', 'options': pipeline_options(), 'models': False}\n"
        "print(run_phase('square', Squares(sys.argv[1]), [3], **how).items, 'torch' in sys.modules)\n"
    )
    support = {"PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **support}, check=False)
    assert done.stdout == "1 False\n", done.stderr
    assert (tmp_path / "3.txt").read_text() == "9"
