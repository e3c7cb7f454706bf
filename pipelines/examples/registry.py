"""Names of the examples, the module of each, and the commands that its reader gives next.

A further example is a module with `write(directory, seed, progress)` and an entry here: the command line, its help and its
tests know it then.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distilbeam.progress import Progress


@dataclass(frozen=True)
class Example:
    """An example that `init` writes.

    Attributes:
      module: module with `write(directory, seed, progress)`, which writes everything below `directory`; imported when it is called.
      what: what it is about, in a few words.
      config: the file to begin with, by its name in the directory.
      following: what to do next, in this order: commands, in which `{here}` stands for the directory, and sentences behind `#`.
    """

    module: str
    what: str
    config: str
    following: tuple[str, ...]

    def write(self, directory: Path, seed: int, progress: Progress) -> None:
        """Write the example into a directory, whole or not at all.

        Args:
          directory: where; made if it is not there.
          seed: of its data and its teacher.
          progress: told of the teacher's training.

        Raises:
          ValueError: a file that would be written is there already; nothing is written.
        """
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tmp-") as temporary:
            made = Path(temporary) / "example"
            importlib.import_module(self.module).write(made, seed, progress)
            for path in sorted(made.rglob("*")):
                there = directory / path.relative_to(made)
                if path.is_file() and there.exists():
                    raise ValueError(f"{there} is there already; name another directory or remove it")
            shutil.copytree(made, directory, dirs_exist_ok=True)

    def next_lines(self, directory: Path) -> Iterator[str]:
        """Write the following commands for an example in a directory, as a shell takes them."""
        for line in self.following:
            words = [word.replace("{here}", str(directory)) for word in line.split(" ")]
            yield " ".join(words if line.startswith("#") else map(shlex.quote, words))


EXAMPLES = {
    "digits": Example(
        "distilbeam.pipelines.examples.digits",
        "handwritten digits, pixels in a column",
        "distilbeam.toml",
        ("distilbeam run {here}/distilbeam.toml",),
    ),
    "text": Example(
        "distilbeam.pipelines.examples.text",
        "a shop's messages and what each wants",
        "distilbeam.toml",
        (
            "distilbeam plan {here}/distilbeam.toml",
            "distilbeam run {here}/distilbeam.toml",
            "distilbeam predict {here}/run --data {here}/new.txt --out {here}/predictions",
            "distilbeam export {here}/distilbeam.toml --format pt2",
        ),
    ),
    "images": Example(
        "distilbeam.pipelines.examples.images",
        "folders of PNG files, by the class that they show",
        "distilbeam.toml",
        (
            "distilbeam ingest {here}/files/pool --out {here}/pool --format images",
            "distilbeam ingest {here}/files/labelled --out {here}/labelled --format images --class-column digit",
            "distilbeam ingest {here}/files/validation --out {here}/validation --format images --class-column digit",
            "distilbeam ingest {here}/files/test --out {here}/test --format images --class-column digit",
            "distilbeam run {here}/distilbeam.toml",
            "distilbeam predict {here}/run --data {here}/files/test --out {here}/predictions",
        ),
    ),
    "nightly": Example(
        "distilbeam.pipelines.examples.nightly",
        "what is new gets its labels every night, by a teacher behind a server",
        "nightly.toml",
        (
            "# In a terminal of its own, until it says that it serves; where 8500 is taken, another --port, here and in nightly.toml:",
            "distilbeam serve-teacher {here}/teacher.toml --port 8500",
            "# The first night, the second, and a student:",
            "distilbeam plan {here}/nightly.toml",
            "distilbeam label {here}/nightly.toml",
            "cp {here}/arrived/day-2.parquet {here}/pool",
            "distilbeam label {here}/nightly.toml",
            "distilbeam launch {here}/training.toml",
            "distilbeam evaluate {here}/student --data {here}/test.parquet --label plan",
        ),
    ),
    "streaming": Example(
        "distilbeam.pipelines.examples.streaming",
        "messages get their labels as they come",
        "job.toml",
        (
            "# The messages of a folder of Parquet files, which end:",
            "distilbeam stream {here}/job.toml --source parquet:{here}/messages/*.parquet --out {here}/labels",
            "distilbeam inspect {here}/labels",
            "# Those of a topic of Kafka's: pip install 'distilbeam[kafka]', and",
            "# --source kafka:HOST:PORT:TOPIC --schema 'id:string=key,features:float32[8]' --until latest",
        ),
    ),
    "lm": Example(
        "distilbeam.pipelines.examples.lm",
        "a language model labels text token by token, and a small one learns that (extra: hf)",
        "run.toml",
        (
            "# Text becomes blocks of tokens: a pool, and text that nobody learns:",
            "distilbeam ingest {here}/corpus/pool.jsonl --format lm --tokenizer {here}/teacher --sequence-length 128 --out {here}/pool",
            "distilbeam ingest {here}/corpus/held-out.jsonl --format lm --tokenizer {here}/teacher --sequence-length 128 "
            "--out {here}/held-out",
            "# Two rounds of choosing, labelling and learning, the same student of the text alone, and the report:",
            "distilbeam run {here}/run.toml",
            "distilbeam inspect {here}/run/labels/round=000",
            "# Or step by step: label.toml, held-out.toml (distilbeam label), student.toml, plain.toml (distilbeam launch)",
        ),
    ),
}


def find_example(name: str) -> Example:
    """Find an example by its name.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in EXAMPLES:
        raise ValueError(f"--example must be {', '.join(EXAMPLES)}, got {name}")
    return EXAMPLES[name]
