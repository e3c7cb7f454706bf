"""What stands on standard error: our sentences alone, unless everything is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.quiet import keep_quiet, native_lines_dropped, wants_everything


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["label", "x.toml"], False),
        (["label", "x.toml", "--debug"], True),
        (["label", "x.toml", "--log-level", "debug"], True),
        (["label", "x.toml", "--log-level=debug"], True),
        (["label", "x.toml", "--log-level", "info"], False),
        (["label", "x.toml", "--", "--debug"], False),
        (["label", "debug"], False),
    ],
)
def test_everything_is_shown_to_who_asks_for_it(words: list[str], expected: bool) -> None:
    assert wants_everything(words) is expected


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"GRPC_VERBOSITY": "DEBUG"})
    keep_quiet()
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_native_lines_are_dropped_and_others_stay() -> None:
    code = """
import os, sys
from distilbeam.quiet import keep_quiet, native_lines_dropped
with native_lines_dropped():
    os.write(2, b"loud")
keep_quiet()
sys.stderr.write("before ")
with native_lines_dropped():
    os.write(2, b"silent")
os.write(2, b" after")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == "loudbefore  after"
    with native_lines_dropped():
        pass


@pytest.mark.parametrize(
    "statement", ["from distilbeam.pipelines import run", "from distilbeam.pipelines import LabelExamples"]
)
def test_an_import_prints_nothing(statement: str) -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", statement], capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == ""


def test_an_interrupt_during_the_imports_is_a_sentence() -> None:
    code = """
import sys
from distilbeam.__main__ import main
class Impatient:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Impatient())
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (130, "stopped; the same command begins again\n")


WRITE = """
import sys, transformers
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "stop"]
transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(sys.argv[1])
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "num_labels": 3}
model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=5, **sizes))
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]])
def test_a_hugging_face_teacher_and_worker_processes_print_nothing_of_their_own(
    tmp_path: Path, flags: list[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "bert")], capture_output=True, check=True)
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table({"id": np.arange(20), "t": ["stop"] * 20}), tmp_path / "pool" / "0.parquet")
    (tmp_path / "job.toml").write_text(
        '[run]\ndirectory = "job"\n[data]\npool = "pool"\nid = "id"\nnum_classes = 3\n'
        '[teacher]\nkind = "huggingface"\nmodel = "bert"\ninput = { kind = "text", column = "t" }\n'
    )
    command = [sys.executable, "-m", "distilbeam", "label", str(tmp_path / "job.toml"), *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "TQDM_DISABLE")}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
