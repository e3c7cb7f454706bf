"""Study 8: which labels of tokens serve a small language model, at equal text and at equal bytes.

    python -m benchmarks.science.study8 --quick                  # no data needed: minutes
    python -m benchmarks.science.study8 --work DIR [--minutes M] [--seeds N] [--parts NAME ...] [--methods NAME ...]
    python -m benchmarks.science.study8 --work DIR --parts smollm2 --model FOLDER     # as examples/smollm2.py writes it

The text is Python's own documentation, with one teacher for all seeds (`token_problems`, extra: hf). A seed has text, weights and an
order of its own, which all of its students share; they take as many steps. What is named before a comma is the form of the
labels, after it what differs from the plain loss of that form, which is KL (of top-k labels with the bucket of all other classes)
without the text's own token. `half hard` mixes in the cross-entropy of that token by half, as `training.hard_share` does.

| part | text | what is asked |
|---|---|---|
| forms | 64,000 tokens | draws, top-k with the tail and half hard, truncated; plain training |
| all | the same | every class, with and without half hard |
| shares | the same | other shares of the text's own token |
| objectives | the same | other divergences |
| better | the same | a part of the forms, of a teacher that was trained three times as long |
| more | 192,000 tokens, those of three seeds | the same part of them |
| smollm2 | half of the documents, 28,000 tokens of SmolLM2-135M's | the same part of them, with that model as the teacher |
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.science.cells import Cell, Store, run
from benchmarks.science.command import RESULTS
from benchmarks.science.token_problems import PARTS, POOLS, STUDENT, TEACHER, TEACHER_SEED, Form, TokenProblem
from distilbeam.pipelines.examples.lm import LENGTH, VOCABULARY

RECIPE = 1
TRAINING = {"epochs": 4, "batch_size": 8, "lr": 0.002}
REAL, REAL_DOCUMENTS = "SmolLM2-135M", 2_500  # of 4,970: a token costs it 4 ms
TEXTS = {
    "64k tokens": (1, 1),
    "64k tokens, better teacher": (1, 3),
    "192k tokens": (3, 1),
    REAL: (1, 1),
}  # pools; times the teacher's steps
HARD, HALF = {"hard_share": 1.0}, {"hard_share": 0.5}


@dataclass(frozen=True)
class Method:
    """A form of labels, and what differs from `SOFT` in the training."""

    form: Form
    training: dict[str, Any]


SOFT = {"hard_share": 0.0}


def _draws(k: int, **training: Any) -> Method:
    return Method(Form("sampled", k), training)


def _top(k: int | None, **training: Any) -> Method:
    return Method(Form("top_k", k), training)


METHODS = {
    "plain": _draws(12, **HARD),
    "25 draws": _draws(25),
    "top 20": _top(20),
    "top 20, half hard": _top(20, **HALF),
    "top 8": _top(8),
    "top 8, half hard": _top(8, **HALF),
    "12 draws": _draws(12),
    "50 draws": _draws(50),
    "top 20, truncated": _top(20, objective="truncated_kl"),
    "top 64": _top(64),
    "top 64, half hard": _top(64, **HALF),
    "25 draws, half hard": _draws(25, **HALF),
    "top 20, truncated, half hard": _top(20, objective="truncated_kl", **HALF),
    "all": _top(None),
    "all, half hard": _top(None, **HALF),
    "12 draws, half hard": _draws(12, **HALF),
    "50 draws, half hard": _draws(50, **HALF),
    "25 draws, quarter hard": _draws(25, hard_share=0.25),
    "top 20, quarter hard": _top(20, hard_share=0.25),
    "top 20, three quarters hard": _top(20, hard_share=0.75),
    "top 20, reverse KL": _top(20, objective="reverse_kl"),
    "top 20, JSD": _top(20, objective="jsd", beta=0.5),
    "top 20, skew KL": _top(20, objective="skew_kl", alpha=0.1),
    "all, reverse KL": _top(None, objective="reverse_kl"),
    "all, JSD": _top(None, objective="jsd", beta=0.5),
}
NAMES = tuple(METHODS)
FEW = ("plain", "25 draws", "25 draws, half hard", "top 20", "top 20, half hard")
FEW += ("25 draws, quarter hard", "top 20, quarter hard")
STUDY_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "forms": ("64k tokens", NAMES[:13]),
    "all": ("64k tokens", NAMES[13:15]),
    "shares": ("64k tokens", NAMES[15:20]),
    "objectives": ("64k tokens", NAMES[20:]),
    "better": ("64k tokens, better teacher", FEW),
    "more": ("192k tokens", FEW),
    "smollm2": (REAL, FEW),
}
QUICK = ("plain", "12 draws", "top 8", "top 8, half hard", "all")


@dataclass(frozen=True)
class Arguments:
    """What the study was asked to do; see `command.Arguments`.

    Attributes:
      steps: of a teacher's training.
      documents: how many to take at most.
      model: folder of SmolLM2-135M.
    """

    seeds: range
    store: Store
    minutes: float | None
    out: Path
    parts: tuple[str, ...]
    methods: tuple[str, ...]
    steps: int = 600
    documents: int | None = None
    model: Path | None = None


def main() -> None:
    """Compute and report."""
    given = arguments()
    rows = collect(given)
    from benchmarks.science.report8 import write_report

    write_report(given.out, rows)


def arguments(words: list[str] | None = None) -> Arguments:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little text, a short teacher, five methods, two seeds")
    parser.add_argument("--work", type=Path, help="directory of the cells and teachers; a stopped study goes on there")
    parser.add_argument("--minutes", type=float, help="compute no new cells after so long, and report what is there")
    parser.add_argument("--seeds", type=int, help="number of seeds (5; 2 for --quick)")
    parser.add_argument("--parts", nargs="+", choices=STUDY_PARTS, help="which parts to compute")
    parser.add_argument("--methods", nargs="+", choices=NAMES, help="which methods to compute")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M, for the part of that name")
    parser.add_argument("--out", type=Path, help="directory of the results")
    given = parser.parse_args(words)
    if given.model is None and "smollm2" in (given.parts or ()):
        parser.error("--parts smollm2 needs --model, the folder of the teacher that examples/smollm2.py writes")
    every = [name for name in STUDY_PARTS if name != "smollm2" or given.model is not None]
    torch.set_num_threads(1)
    work = given.work or Path(tempfile.mkdtemp(prefix="science-"))
    out = given.out or (work / "results" if given.quick else RESULTS)
    store, quick = Store(work / "cells"), bool(given.quick)
    return Arguments(
        seeds=range(given.seeds or (2 if quick else 5)),
        store=store,
        minutes=given.minutes,
        out=out,
        parts=tuple(given.parts or (["forms"] if quick else every)),
        methods=tuple(given.methods or (QUICK if quick else NAMES)),
        steps=60 if quick else 600,
        documents=600 if quick else None,
        model=given.model,
    )


def study_cells(given: Arguments) -> list[Cell]:
    """List the cells: part by part and seed by seed, so that a study that is stopped has a part's methods at equal seeds."""
    folder = given.store.directory.parent / "token-problems"
    cells = []
    for text, methods in (STUDY_PARTS[name] for name in given.parts):
        steps = given.steps * TEXTS[text][1]
        documents = given.documents if text != REAL else REAL_DOCUMENTS
        problem = TokenProblem(folder, steps, documents, given.model if text == REAL else None)
        teacher = {**TEACHER, "steps": steps, "vocabulary": VOCABULARY} if text != REAL else {"model": REAL}
        for seed in given.seeds:
            for method in (name for name in methods if name in given.methods):
                form = _form(text, method)
                key = {
                    "study": "study8",
                    "recipe": RECIPE,
                    "text": text,
                    "method": method,
                    "seed": seed,
                    "form": [form.kind, form.k],
                    "training": {**TRAINING, **SOFT, **METHODS[method].training},
                    "about": {
                        "python": platform.python_version(),  # whose documentation it is
                        "student": STUDENT,
                        "teacher": teacher,
                        "length": LENGTH,
                        "parts": PARTS,
                        "teacher_seed": TEACHER_SEED,
                        "documents": documents,
                    },
                }
                cells.append(Cell(key, partial(_compute, problem, key)))
    return cells


def _form(text: str, method: str) -> Form:
    """Give a method's form of labels; what learns no label reads those that another method has of a teacher that is slow to ask."""
    return METHODS["25 draws" if (text, method) == (REAL, "plain") else method].form


def _compute(problem: TokenProblem, key: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [f"pool-{(key['seed'] + number) % POOLS}" for number in range(TEXTS[key["text"]][0])]
    return [problem.learned(Form(*key["form"]), parts, key["training"], key["seed"])]


def collect(given: Arguments) -> list[dict[str, Any]]:
    """Compute what is missing; give all rows."""
    rows = []
    for key, figures in run(given.store, study_cells(given), given.minutes, lambda line: print(line, flush=True)):
        rows += [{name: key[name] for name in ("text", "method", "seed")} | row for row in figures]
    if not rows:
        raise SystemExit("there is nothing to report: no cell was computed yet, give --minutes more or leave it out")
    return rows


if __name__ == "__main__":
    main()
