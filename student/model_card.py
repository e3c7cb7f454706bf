"""The model card of a student or an export: what it is, what it learned from, how good it is, what for, and how to call it.

Markdown, `README.md` in its folder. It says what is known where it is written: a training knows its rows, a run its teacher,
pool and figures too, and `distilbeam evaluate` and `export` put theirs in.

References:
  Mitchell et al., Model Cards for Model Reporting, FAT* 2019, arXiv:1810.03993 (the sections).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distilbeam.student.networks.config import StudentConfig

CARD = "README.md"
MOST_CLASSES = 200  # rows of the table of classes


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
      config: the student's configuration.
      classes: names of the classes in the order of the logits.
      parameters: how many numbers training adjusted.
      extra: what the training remembered; see `save_student`.
      fingerprint: of the student; None before it has one.
      export: `export.json` of an export; None for a student.
      facts: what else is known of data, teacher and labels: a sentence or number by its name.
      figures: by set of examples, as `student.evaluation.metrics.evaluate` gives them.
      per_class: as `student.evaluation.metrics.per_class` gives it, with the name of its set under `on`.
      on: the set that `per_class` is of.
    """

    config: StudentConfig
    classes: Sequence[str]
    parameters: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    export: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    per_class: Sequence[Mapping[str, Any]] = ()
    on: str = ""

    def text(self) -> str:
        """Write the card."""
        sections = [
            self._head(),
            ["## Data and labels", "", *_table(("", ""), self._data())],
            ["## Figures", "", *self._figures()],
            ["## Intended use", "", *self._use()],
            ["## How to call it", "", *self._calls()],
        ]
        return "\n\n".join("\n".join(lines) for lines in sections) + "\n"

    def _head(self) -> list[str]:
        what = "A student"
        if self.export is not None:
            name = self.export["format"]
            what = f"{'A' if name.startswith('p') else 'An'} {name} export of a student"
        return [
            f"# {what}: {len(self.classes)} classes from {', '.join(self.config.input.columns)}",
            "",
            f"A network of kind `{self.config.kind}` with {self.parameters:,} parameters, distilled from a teacher by distilbeam. "
            f"It reads the column(s) {_code(self.config.input.columns)} ({self.config.input.kind} input) and says one of "
            f"{len(self.classes)} classes: {_shown(self.classes)}.",
        ]

    def _data(self) -> list[tuple[str, str]]:
        metrics, training = self.extra.get("metrics", {}), self.extra.get("training", {})
        rows: dict[str, Any] = dict(self.facts)
        rows["labels of the teacher that it learned"] = metrics.get("soft_rows")
        rows["human labels that it learned"] = metrics.get("hard_rows")
        rows["pseudo-labels that it learned"] = metrics.get("pseudo_rows")
        if "epochs" in metrics:
            rows["training"] = (
                f"{metrics['best_epoch']:,} of {metrics['epochs']:,} epochs, objective {training.get('objective', 'distill')}, "
                f"learning rate {training.get('lr', 0):g}, seed {self.extra.get('seed', 0)}"
            )
        if "validation_accuracy" in metrics:
            rows["accuracy on the validation rows that chose the epoch"] = f"{metrics['validation_accuracy']:.1%}"
        if "pruned" in self.extra:
            rows["pruned"] = f"{self.extra['pruned']['ratio']:.0%} of the channels"
        if self.export is not None:
            compared = self.export["compared_with_student"]
            rows["compared with the student"] = (
                f"same class for {compared['same_class']:.1%} of {compared['rows']} examples, logits within "
                f"{compared['largest_difference']:.2g}"
            )
            if self.export["examples"] is not None and self.export["format"] == "int8":
                rows["calibrated on"] = f"{self.export['examples']['rows']:,} examples of the pool"
            rows["made with"] = ", ".join(f"{name} {v}" for name, v in self.export["packages"].items() if v)
        rows["fingerprint of the student"] = self.fingerprint
        return [(name, f"{v:,}" if isinstance(v, int) else str(v)) for name, v in rows.items() if v is not None]

    def _figures(self) -> list[str]:
        if not self.figures:
            return [
                "Nothing has been measured where this was written: `distilbeam evaluate FOLDER --data LABELLED.parquet`."
            ]
        header = ("set", "examples", "accuracy", "NLL", "ECE", "agreement with the teacher")
        rows = [
            (
                name,
                f"{found['examples']:,}",
                f"{found['accuracy']:.1%}",
                f"{found['nll']:.3f}",
                f"{found['ece']:.3f}",
                f"{found['agreement']:.1%}" if "agreement" in found else "",
            )
            for name, found in self.figures.items()
        ]
        lines = _table(header, rows)
        if self.per_class:
            met = sorted((row for row in self.per_class if row["examples"]), key=lambda row: row["recall"])
            more = (
                f", the {MOST_CLASSES} of the lowest recall" if len(met) > MOST_CLASSES else ", the lowest recall first"
            )
            cells = [
                (row["class"], f"{row['examples']:,}", *(_percent(row[name]) for name in ("recall", "precision", "f1")))
                for row in met[:MOST_CLASSES]
            ]
            lines += ["", f"By class on {self.on}{more}:", ""]
            lines += _table(("class", "examples", "recall", "precision", "F1"), cells)
        return lines

    def _use(self) -> list[str]:
        return [
            "For inputs like those that it learned from, in a place where a wrong class can be borne as often as the figures say. It "
            "answers every input with one of its classes, also what belongs to none of them; `confidence` is the softmax of its "
            "logits, whose calibration is the ECE above. It has learned the teacher's mistakes as well as its knowledge. Measure it "
            "on labelled examples of your own before use, by group where it concerns people. Terms of use are those of the teacher "
            "and of the data, which this file does not know."
        ]

    def _calls(self) -> list[str]:
        call = "\n".join(("```sh", "distilbeam predict FOLDER --data FILES --out PREDICTIONS", "```"))
        name = self.config.input.columns[0]
        if self.export is None:
            python = (
                "from distilbeam.student import load_student",
                f'load_student("FOLDER").predict({{"{name}": [...]}})',
            )
            return ["\n".join(("```python", *python, "```", "", call))]
        graph = self.export["graph"]
        inside = (
            f"In the graph: {'; '.join(graph)}." if graph else "The graph takes what `export.json` says under `input`."
        )
        reader = ("python FOLDER/reader.py < rows.jsonl     # a line each: " + _example(self.config.input.columns),)
        return [
            f"Without distilbeam, by `reader.py` in this folder (`pip install {' '.join(self._packages())}`):",
            "",
            "\n".join(("```sh", *reader, "```")),
            "",
            f"`{self.export['file']}` takes `{self._input()}`, {self.export['input_dtype']} [{', '.join(self._shape())}], and gives `logits` "
            f"[batch, {len(self.classes)}]. {inside}",
            "",
            "With distilbeam:",
            "",
            call,
        ]

    def _input(self) -> str:
        assert self.export is not None
        return "input_ids" if "sequence" in self.export["dimensions"] else "input"

    def _packages(self) -> list[str]:
        """Name what the reader needs."""
        assert self.export is not None
        packages = ["numpy", "onnxruntime" if self.export["file"].endswith(".onnx") else "torch"]
        packages += ["pillow"] if self.export["input"].get("kind") == "image" else []
        return packages + (["tokenizers"] if self.export["input"].get("tokenizer") else [])

    def _shape(self) -> list[str]:
        assert self.export is not None
        sizes = ["batch", *map(str, self.export["input_shape"])]
        for place, name in enumerate(self.export["dimensions"]):
            sizes[place] = name
        return sizes


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _shown(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(_cell(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _example(columns: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{name}": ...' for name in columns) + "}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
