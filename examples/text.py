"""Text: which package is a docstring from? A student of hashed n-grams, on texts of packages that are installed.

    python examples/text.py [DIRECTORY]

The texts are the first paragraphs of docstrings, without the names of the packages. The teacher, a network over
16,384 hashed n-grams, has learned from half of them; the student begins with 80 and buys 2 x 120 labels. About a
minute on one core.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.pipelines import run
from distilbeam.student import load_student
from distilbeam.teacher import InputConfig, make_input

PACKAGES = ("asyncio", "email", "numpy", "scipy", "sklearn", "torch")
TEACHERS_INPUT = {"kind": "text", "columns": ["text"], "buckets": 16_384}


def main(directory: Path) -> None:
    """Gather the texts, train the teacher, run, and try the student."""
    directory.mkdir(parents=True, exist_ok=True)
    texts, labels = balanced(400)
    parts = {"labelled": (0, 80), "validation": (80, 280), "test": (280, 580), "pool": (580, 1_300)}
    for name, (start, end) in parts.items():
        columns = {"text": texts[start:end]} | ({} if name == "pool" else {"package": labels[start:end]})
        pq.write_table(pa.table(columns), directory / f"{name}.parquet")
    save_teacher(texts[1_300:], labels[1_300:], directory / "teacher.pt2")

    done = run(
        {
            "run": {"directory": "run", "rounds": 2},
            "data": {**{name: f"{name}.parquet" for name in parts}, "label": "package"},
            "teacher": {"kind": "torch", "model": "teacher.pt2", "input": TEACHERS_INPUT},
            "selection": {"budget": 120},
            "student": {
                "kind": "text",
                "dim": 32,
                "hidden": [],
                "input": {"kind": "text", "columns": ["text"], "ngram_form": "ids"},
            },
            # without the last training, which takes most of the time
            "training": {"epochs": 20, "lr": 0.01, "self_training": False, "final_training": "apart"},
        },
        base=directory,
    )
    test = pq.read_table(directory / "test.parquet")
    for number in (0, 2):
        student = load_student(done / f"students/round={number:03d}")
        right = np.mean(student.predict(test)["prediction"].to_numpy() == test["package"].to_numpy())
        print(f"student after round {number}: {right:.1%} of the test rows")
    print(student.predict(["Return the eigenvalues of a symmetric matrix."], top_k=2).to_pylist())


def balanced(each: int) -> tuple[list[str], list[str]]:
    """Gather as many texts of each package, shuffled."""
    found = {name: sorted(texts_of(name)) for name in PACKAGES}
    rng = np.random.default_rng(0)
    pairs = [(found[name][i], name) for name in PACKAGES for i in rng.permutation(len(found[name]))[:each]]
    order = rng.permutation(len(pairs))
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order]


def texts_of(package: str) -> set[str]:
    """Gather the first paragraphs of a package's docstrings; words that name a package are taken out."""
    names = re.compile("|".join((*PACKAGES, "np", "scikit", "learn", "coroutine", "tensor")), re.IGNORECASE)
    texts = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = importlib.import_module(package)
        modules = [root] + [m for name in submodules(root) if (m := imported(name)) is not None]
        for module in modules:
            for _, thing in inspect.getmembers(module):
                if callable(thing) and str(getattr(thing, "__module__", "")).startswith(package):
                    members = [member for _, member in inspect.getmembers(thing)] if inspect.isclass(thing) else []
                    for documented in (thing, *members):
                        text = (inspect.getdoc(documented) or "").split("\n\n")
                        text = " ".join(names.sub("", " ".join(text[:3])).split())
                        if len(text.split()) >= 8:
                            texts.add(text[:600])
    return texts


def submodules(root: object) -> list[str]:
    """Name the public modules and packages right below a package."""
    found = pkgutil.iter_modules(root.__path__)  # type: ignore[attr-defined]
    return [f"{root.__name__}.{item.name}" for item in found if not item.name.startswith("_")]  # type: ignore[attr-defined]


def imported(name: str) -> object | None:
    """Import a module, or give None where it needs what is not installed."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError, RuntimeError):
        return None


def save_teacher(texts: list[str], labels: list[str], path: Path) -> None:
    """Train a network over hashed n-grams, made as the run's teacher will make them, and export it."""
    torch.manual_seed(0)
    prepare = make_input(InputConfig(**TEACHERS_INPUT))
    x = torch.from_numpy(prepare(pa.record_batch({"text": texts})))
    y = torch.tensor([PACKAGES.index(label) for label in labels])
    network = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 128), torch.nn.ReLU(), torch.nn.Linear(128, len(PACKAGES))
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(12):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    # a program keeps its example, and a slice would keep all that it was cut from
    program = torch.export.export(network.eval(), (x[:2].clone(),), dynamic_shapes=shapes)
    torch.export.save(program, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="text-")))
