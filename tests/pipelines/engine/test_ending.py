"""Ctrl-C reaches the phase that is at work, once; a process that gave a pipeline up ends in spite of its threads."""

from __future__ import annotations

import subprocess
import sys

from distilbeam.pipelines.engine.ending import interrupt, interruptible


def test_the_phase_at_work_is_told_once() -> None:
    told: list[str] = []
    assert not interrupt()
    with interruptible(lambda: told.append("outer")) as outer:
        with interruptible(lambda: told.append("inner")) as inner:
            assert interrupt()
            assert not interrupt()
            assert (told, inner.is_set(), outer.is_set()) == (["inner"], True, False)
        assert interrupt()
        assert told == ["inner", "outer"]
    assert not interrupt()


def test_a_given_up_pipeline_does_not_keep_its_process() -> None:
    code = (
        "import threading, sys\n"
        "from distilbeam.pipelines.engine.ending import end_given_up, give_up\n"
        "threading.Thread(target=threading.Event().wait).start()\n"  # as a pipeline's, which waits for ever
        "end_given_up(3)\n"  # nothing was given up
        "print('said')\n"
        "give_up()\n"
        "end_given_up(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (7, "said\n")


def test_it_imports_neither_beam_nor_torch() -> None:
    code = (
        "import sys, distilbeam.pipelines.engine.ending; print({'apache_beam', 'torch', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
