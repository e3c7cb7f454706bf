"""Shell completion: what bash, zsh and fish are told when the tabulator is pressed, and `--install-completion`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distilbeam.pipelines.examples.registry import EXAMPLES


def completed(words: str, *, shell: str = "bash") -> list[str]:
    """What the shell is told for a line, of which the last word is completed."""
    parts = words.split(" ")
    environment = {
        **os.environ,
        "_DISTILBEAM_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(parts) - 1),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = "import sys; sys.argv = ['distilbeam']; from distilbeam.__main__ import main; main()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" not in out.stderr, out.stderr
    return out.stdout.split()


def test_commands() -> None:
    assert completed("distilbeam serve-") == ["serve-teacher", "serve-student"]
    assert {"init", "run", "predict", "to-dataset"} <= set(completed("distilbeam "))


@pytest.mark.parametrize(("line", "options"), [("run x --dry", ["--dry-run"]), ("predict x --top", ["--top-k"])])
def test_options(line: str, options: list[str]) -> None:
    assert completed(f"distilbeam {line}") == options


def test_names_of_examples() -> None:
    assert completed("distilbeam init mine --example ") == list(EXAMPLES)
    assert completed("distilbeam init mine --example st") == ["streaming"]


def test_it_is_installed_for_a_shell(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["distilbeam", "--install-completion", "bash"]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert out.returncode == 0, out.stderr
    script = tmp_path / ".bash_completions/distilbeam.sh"
    assert str(script) in (tmp_path / ".bashrc").read_text()
    # the script itself, in a bash that completes a word
    line = (
        f"source {script}; COMP_WORDS=(distilbeam to-); COMP_CWORD=1; "
        '_distilbeam_completion distilbeam; echo "${COMPREPLY[@]}"'
    )
    bash = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, check=False)
    assert bash.stdout.split() == ["to-dataset"], bash.stderr
