"""Students of texts by their settings, beside TF-IDF and logistic regression on the same labels.

    python benchmarks/text_students.py --quick                                     # two minutes, docstrings alone
    python benchmarks/text_students.py --data DIR --json benchmarks/results/text_students.json

Sets: CLINC150 (150 intents of short queries; DIR/clinc150.parquet), 10 training and 5 validation rows of each, its test set; and
docstrings of the installed packages by the module that they stand in (21 modules, long technical texts, which anybody who has
distilbeam has), 60 training and 15 validation rows of each, at most 100 of the others to test. The labels are the true ones: what is
compared is the student. Everything else is as `[training]` is by default, but for `lr` where a row says so. Accuracy on the test
rows in %, mean and standard deviation over the seeds, which draw the rows too; processor seconds of a training.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measuring.record import machine, write
from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train

FORMER = {"buckets": 4096, "analyzer": "word", "ngrams": (1, 2), "ngram_form": "vector", "max_length": 128}
WIDE = {**FORMER, "ngram_form": "ids", "buckets": 2**15}
CHARS = {"analyzer": "char_wb", "ngrams": (2, 4)}
# name -> [student], its input, learning rate (None: the default)
STUDENTS: dict[str, tuple[dict[str, Any], dict[str, Any], float | None]] = {
    "hidden 64-64, words, vector of 4,096": ({"hidden": (64, 64)}, FORMER, None),
    "hidden none, words, vector of 4,096": ({"hidden": ()}, FORMER, None),
    "hidden none, characters, vector of 8,192": ({"hidden": ()}, {**FORMER, **CHARS, "buckets": 2**13}, None),
    "hidden none, words, ids of 32,768": ({"hidden": ()}, WIDE, None),
}
BASELINE = "TF-IDF and logistic regression"
PACKAGES = ("apache_beam", "matplotlib", "numpy", "scipy", "sklearn", "torch")
MODULES = 21


def clinc150(data: Path, rng: np.random.Generator) -> dict[str, pa.Table]:
    """Draw 10 and 5 rows of each intent; the test set is the published one."""
    table = pq.read_table(data / "clinc150.parquet", columns=["text", "label", "split"])
    split, label = np.array(table["split"].to_pylist()), table["label"].to_numpy()
    train_rows, validation = _per_class(np.flatnonzero(split == "train"), label, (10, 5), rng)
    parts = {"train": train_rows, "validation": validation, "test": np.flatnonzero(split == "test")}
    named = pa.table({"text": table["text"], "label": pa.array([f"{number:03d}" for number in label])})
    return {name: named.take(rows) for name, rows in parts.items()}


def docstrings(rng: np.random.Generator) -> dict[str, pa.Table]:
    """Draw 60 and 15 docstrings of each of the modules that have most, and at most 100 others to test."""
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for package in PACKAGES:
        for module, text in _docstrings_of(package):
            modules[text].add(module)
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    for text, found in sorted(modules.items()):
        if len(found) == 1:
            by_module[next(iter(found))].append(text)
    chosen = sorted(sorted(by_module, key=lambda module: (-len(by_module[module]), module))[:MODULES])
    texts = [text for module in chosen for text in by_module[module]]
    names = np.array([module for module in chosen for _ in by_module[module]])
    table = pa.table({"text": texts, "label": pa.array(names)})
    parts = _per_class(np.arange(len(texts)), names, (60, 15, 100), rng)
    return {name: table.take(rows) for name, rows in zip(("train", "validation", "test"), parts, strict=True)}


def _docstrings_of(package: str) -> Iterator[tuple[str, str]]:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        if len(parts) < 3 or any(part.startswith(("_", "test")) for part in parts[1:-1]):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 80:
                    yield ".".join(parts[:2]), " ".join(text.split())


def _per_class(rows: Any, label: Any, counts: tuple[int, ...], rng: np.random.Generator) -> list[Any]:
    shuffled = rng.permutation(rows)
    parts: list[list[int]] = [[] for _ in counts]
    for name in np.unique(label[rows]):
        own, start = shuffled[label[shuffled] == name], 0
        for part, count in zip(parts, counts, strict=True):
            part += own[start : start + count].tolist()
            start += count
    return [np.array(part) for part in parts]


def student_accuracy(parts: dict[str, pa.Table], name: str, seed: int, epochs: int) -> float:
    """Train a student and give its accuracy on the test rows."""
    settings, inputs, lr = STUDENTS[name]
    config = StudentConfig(kind="text", **settings, input={"kind": "text", "columns": ["text"], **inputs})
    training = TrainConfig(epochs=epochs, **({} if lr is None else {"lr": lr}))
    classes = sorted(set(parts["train"]["label"].to_pylist()))
    common: dict[str, Any] = {"label_column": "label", "soft_labels": [], "seed": seed, "classes": classes}
    with tempfile.TemporaryDirectory() as folder:
        train(
            config,
            training,
            labelled=parts["train"],
            validation=parts["validation"],
            directory=Path(folder) / "s",
            **common,
        )
        said = load_student(Path(folder) / "s").predict(parts["test"])["prediction"]
    return float(np.mean(np.array(said.to_pylist()) == np.array(parts["test"]["label"].to_pylist())))


def baseline_accuracy(parts: dict[str, pa.Table]) -> float:
    """Fit scikit-learn's usual pair for texts, as it comes, and give its accuracy on the test rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
    )
    model.fit(parts["train"]["text"].to_pylist(), parts["train"]["label"].to_pylist())
    return float(model.score(parts["test"]["text"].to_pylist(), parts["test"]["label"].to_pylist()))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with clinc150.parquet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--students", nargs="*", default=list(STUDENTS), help="names of students; all without it")
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one seed, 5 epochs, three students")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs, arguments.students = 1, 5, list(STUDENTS)[:3]
    torch.set_num_threads(1)
    about = machine(["torch", "scikit-learn"], threads=1)
    results = []
    sets = ["docstrings", *(["clinc150"] if arguments.data is not None else [])]
    for which in sets:
        cells: defaultdict[str, list[float]] = defaultdict(list)
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        for seed in range(arguments.seeds):
            rng = np.random.default_rng([seed, 24])
            parts = docstrings(rng) if which == "docstrings" else clinc150(arguments.data, rng)
            for name in [BASELINE, *arguments.students]:
                start = time.process_time()
                found = (
                    baseline_accuracy(parts)
                    if name == BASELINE
                    else student_accuracy(parts, name, seed, arguments.epochs)
                )
                cells[name].append(found)
                seconds[name].append(time.process_time() - start)
                print(f"{which} seed {seed} {name}: {100 * found:.1f}", file=sys.stderr, flush=True)
        print(f"\n{which}: {', '.join(f'{len(t):,} {n}' for n, t in parts.items())} rows, {arguments.seeds} seed(s)")
        for name, values in cells.items():
            spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
            print(f"  {name:44} {100 * np.mean(values):5.1f} +- {100 * spread:3.1f}   {np.mean(seconds[name]):6.1f} s")
            results.append({"set": which, "student": name, "accuracy": values, "seconds": seconds[name]})
    write(arguments.json, about | {"epochs": arguments.epochs}, results)


if __name__ == "__main__":
    main()
