"""A language model: a large one labels text token by token once, a small one learns from it.

    python examples/language_model.py [DIRECTORY] [TEXTS STEPS]

The text is Python's own documentation (docstrings and the topics of `help()`), the teacher a
Llama of 0.4 million weights that is trained on most of it first. One student learns the
teacher's labels of a tenth of the text, another the same text without labels. About two
minutes; with fewer TEXTS and STEPS of the teacher's training seconds, and worse models.
Extra: hf.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from distilbeam.pipelines.examples.lm import LENGTH, write
from distilbeam.progress import Progress
from distilbeam.student import load_language_model
from distilbeam.student.data import TokenLabelDataset
from distilbeam.student.language.evaluate import evaluate_language_model


def main(directory: Path, texts: int | None = None, steps: int = 1000) -> None:
    """Write text and teacher, label, train two students, compare them on text that nobody has learned."""
    write(directory, 0, Progress(), steps=steps, documents=texts)
    for part in ("pool", "held-out"):
        source, blocks = directory / "corpus" / f"{part}.jsonl", directory / part
        tokens = ("--format", "lm", "--tokenizer", directory / "teacher", "--sequence-length", LENGTH)
        distilbeam("ingest", source, *tokens, "--out", blocks)
    distilbeam("label", directory / "label.toml")
    distilbeam("label", directory / "held-out.toml")
    distilbeam("inspect", directory / "job" / "labels")

    first = next(iter(TokenLabelDataset(directory / "job" / "labels", 8, 0, columns=())))
    print("a batch:", {name: tuple(column.shape) for name, column in first.items()})

    for student in ("student", "plain"):
        distilbeam("launch", directory / f"{student}.toml")
        found = evaluate_language_model(directory / student, directory / "held-out-job" / "labels")
        print(f"{student}: {found['bits_per_byte']:.3f} bits per byte, ", end="")
        print(f"the teacher {found['teacher_bits_per_byte']:.3f}, KL to the teacher {found['kl']:.3f}, ", end="")
        print(f"the same first choice at {found['agreement']:.1%} of the tokens")
        print(repr(load_language_model(directory / student).complete("Return a list of", 24)))


def distilbeam(*words: object) -> None:
    """Give a command, as one would in a shell."""
    subprocess.run([sys.executable, "-m", "distilbeam", *map(str, words)], check=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    place = Path(given[0]) if given else Path(tempfile.mkdtemp(prefix="distilbeam-language-model-"))
    main(place, *map(int, given[1:]))
    print(f"Everything is in {place}")
