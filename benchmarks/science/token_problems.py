"""The problem of study 8: Python's documentation, a teacher of it, labels in every form, and students of text of their own.

Text, tokenizer and student are those of `distilbeam init --example lm`; the teacher is larger than that one's. Of a hundred
documents 62 train tokenizer and teacher, 3 are held out, and 35 are five pools of 7, about 64,000 tokens each: a seed has its own,
and its own student. Labels are made by the label phase and read from Parquet by the trainer; what students are measured on has the
teacher's whole distribution.

With the folder of a model that is there already, such as SmolLM2-135M, that one is the teacher and has the tokenizer: the pools have
28,000 of its tokens each (half of the documents), students are measured on its 64 most probable classes and the mass of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.corpus.ingesting import ingest_corpus
from distilbeam.pipelines.corpus.settings import corpus_options
from distilbeam.pipelines.examples.lm import LENGTH, python_texts, train_teacher, write_tokenizer
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.progress import Progress
from distilbeam.student.data import TokenLabelDataset
from distilbeam.student.language.config import LanguageModelConfig, TokenTrainConfig
from distilbeam.student.language.evaluate import evaluate_language_model
from distilbeam.student.language.train import train_language_model

POOLS = 5
# of a hundred documents
PARTS = {"teacher": 62, **{f"pool-{number}": 7 for number in range(POOLS)}, "held-out": 3}
TEACHER = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER_SEED, TEACHER_LR = 0, 1.5e-3
STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MEASURED = ("bits_per_byte", "nll", "kl", "agreement", "teacher_bits_per_byte")
Kind = Literal["top_k", "sampled"]


@dataclass(frozen=True)
class Form:
    """A form of labels: `kind` and `k`; k is None for all classes, which is top_k of every class."""

    kind: Kind
    k: int | None = None


WHOLE = Form("top_k")
MOST = Form("top_k", 64)


@dataclass(frozen=True)
class TokenProblem:
    """Text and teacher, in a folder where they and labels are made when they are asked for, and found later.

    Attributes:
      folder: of all such problems.
      steps: of the teacher's training.
      documents: how many to take at most; None for all.
      model: folder of a model that is the teacher; None for one that is trained here.
    """

    folder: Path
    steps: int
    documents: int | None = None
    model: Path | None = None

    @cached_property
    def root(self) -> Path:
        """The folder of this one, with corpus and teacher."""
        root = self.folder / f"{self.steps if self.model is None else self.model.name}-{self.documents}"
        if not (root / "teacher" / "config.json").exists():
            texts: dict[str, list[str]] = {name: [] for name in PARTS}
            for text in list(python_texts())[: self.documents]:
                texts[_part(text)].append(text)
            shutil.rmtree(root, ignore_errors=True)
            (root / "corpus").mkdir(parents=True)
            for name, those in texts.items():
                lines = (json.dumps({"text": text}, ensure_ascii=False) for text in those)
                (root / "corpus" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            self._write_teacher(root / "teacher", texts["teacher"])
        return root

    def _write_teacher(self, folder: Path, texts: list[str]) -> None:
        if self.model is not None:
            folder.symlink_to(self.model.resolve(), target_is_directory=True)
            return
        write_tokenizer(folder, texts)
        train_teacher(folder, texts, TEACHER_SEED, self.steps, Progress(), sizes=TEACHER, lr=TEACHER_LR)

    def labels(self, form: Form, part: str) -> Path:
        """Label a part of the text in a form, if that was not done; give the labels' folder."""
        k = form.k or self.ids
        folder = self.root / f"{part}-{form.kind}-{k}"
        if (folder / "done").exists():
            return folder / "labels"
        shutil.rmtree(folder, ignore_errors=True)
        pool = self.root / f"{part}-blocks"
        options = corpus_options(format="lm", tokenizer=str(self.root / "teacher"), sequence_length=LENGTH)
        ingest_corpus([str(self.root / "corpus" / f"{part}.jsonl")], pool, options)
        teacher = {"kind": "causal_lm", "model": str(self.root / "teacher"), "device": "cpu"}
        settings = {
            "run": {"directory": str(folder)},
            "data": {"pool": str(pool)},
            "teacher": teacher,
            "labels": {"kind": form.kind, "k": k},
        }
        with opened_job(parse_label_config(settings)) as job:
            work = job.work(job.dataset, job.dead_letters)
            for task in job.plan().tasks:
                work.settle(list(work(task)))
        (folder / "done").touch()
        return folder / "labels"

    @cached_property
    def ids(self) -> int:
        """Number of classes."""
        return len(json.loads((self.root / "teacher" / "tokenizer.json").read_text())["model"]["vocab"])

    def learned(self, form: Form, parts: Sequence[str], training: dict[str, Any], seed: int) -> dict[str, float]:
        """Train a student from labels and measure it.

        Args:
          seed: decides the student's weights and the order of its learning.
          form: of the labels.
          parts: of the text.
          training: settings of `TokenTrainConfig`.

        Returns:
          `MEASURED`, of held-out text; `tokens` with a label, `bytes_a_token` of the labels' files, `classes_a_token` that a label
          names, and the processor's seconds of the training.
        """
        given = [self.labels(form, part) for part in parts]
        out = self.root / f"student-{os.getpid()}"  # two processes may compute cells of other forms
        for left in (out, out.with_name(f"{out.name}.training")):
            shutil.rmtree(left, ignore_errors=True)
        student = LanguageModelConfig(config=STUDENT, tokenizer=str(self.root / "teacher"))
        begun = time.process_time()
        train_language_model(student, TokenTrainConfig(**training), soft_labels=given, directory=out, seed=seed)
        seconds = time.process_time() - begun
        found = evaluate_language_model(out, self.labels(WHOLE if self.model is None else MOST, "held-out"))
        return {
            **{name: found[name] for name in MEASURED},
            **size_of(given),
            "seconds": seconds,
        }


def _part(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=4, key=b"study 8").digest()
    place = int.from_bytes(digest, "big") % sum(PARTS.values())
    for name, share in PARTS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the parts are all there is")


def size_of(labels: Sequence[Path]) -> dict[str, float]:
    """Measure labels: `tokens` with a label, `bytes_a_token` of the Parquet files, `classes_a_token` that a label names."""
    blocks = TokenLabelDataset(list(labels), 64, 0, columns=())
    tokens = classes = 0
    for batch in blocks:
        named = batch["teacher_classes"].numpy() >= 0
        tokens += int(named[..., 0].sum())
        classes += int((named & np.isfinite(batch["teacher_logprobs"].numpy())).sum())
    files = [file.stat().st_size for folder in labels for file in folder.glob("*.parquet")]
    return {"tokens": tokens, "bytes_a_token": sum(files) / tokens, "classes_a_token": classes / tokens}
