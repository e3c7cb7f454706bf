"""The example of language models: Python's own documentation, a teacher trained on it, and a student with half of its weights.

The text is the docstrings of the standard library's modules and the topics of `help()`: nothing is shipped or downloaded, and
what a Python version has is recorded by a hash (`text.json`). Documents are parted by a hash of their text: most train tokenizer and
teacher, some are the pool that is labelled, some are held out from everybody.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilbeam.extras import Need, require_extras
from distilbeam.pipelines.engine.phase import threads
from distilbeam.progress import Progress

VOCABULARY, LENGTH = 1024, 128
END = "<|end|>"
PARTS = {"teacher": 82, "pool": 10, "held-out": 8}  # of a hundred documents
LEAST = 60  # letters of a document
# half a minute of one core: at that price a larger model, which sees less text, is a worse teacher (4.3 nats a token with 4 layers of 160
# in twice the time, 3.9 with these)
TEACHER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
BATCH, LR = 4, 4e-3
BUDGET_TOKENS = 24_576  # of a round

STUDENT = '{ model_type = "llama", hidden_size = 64, intermediate_size = 160, num_hidden_layers = 2, num_attention_heads = 2 }'

LABEL = """# Token labels of {name}: `distilbeam label` on this file.
[run]
directory = "{directory}"

[data]
pool = "{pool}"

[teacher]
kind = "causal_lm"
model = "teacher"
device = "cpu"

[labels]
kind = "{kind}"
k = {k}
"""
RUN = """# A run: `distilbeam run` on this file. Blocks of the pool are chosen, labelled by the teacher, and learned, in two rounds; the
# report compares the student with the teacher, and with the same student of the text alone.
[run]
directory = "run"
rounds = 2
seed = {seed}

[data]
pool = "pool"
validation = "held-out"           # nobody learns it

[teacher]
kind = "causal_lm"
model = "teacher"
device = "cpu"

[labels]
kind = "sampled"                  # 32 draws of each token's distribution
k = 32

[selection]
method = "herding"                # what covers best the blocks that the student is unsure of
gain = "entropy"
budget_tokens = {budget}
compare_uniform = false           # true: as many blocks by chance, too

[student]
kind = "causal_lm"
tokenizer = "teacher"
config = {student}

[training]
epochs = 4
batch_size = 8
lr = 0.002

[engine]
threads = 1                       # of so small a student: two wait for each other
"""
TRAINING = """# {what}: `distilbeam launch` on this file.
[data]
soft_labels = ["job/labels"]
validation = "held-out-job/labels"
directory = "{directory}"
seed = {seed}

[student]
kind = "causal_lm"
tokenizer = "teacher"
config = {student}

[training]
epochs = 4
batch_size = 8
lr = 0.002
{more}
"""


def write(directory: Path, seed: int, progress: Progress, *, steps: int = 1000, documents: int | None = None) -> None:
    """Write the example's text, tokenizer, teacher and configurations.

    Args:
      directory: where to write; made if it is not there.
      seed: decides the teacher's weights and the order of its training.
      progress: told the steps of the teacher's training.
      steps: of it.
      documents: how many to take at most; all of them without it.
    """
    require_extras([Need("--example lm", "hf", ("transformers", "tokenizers"))])
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for text in list(python_texts())[:documents]:
        parts[_part_of(text)].append(text)
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (corpus / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_tokenizer(directory / "teacher", parts["teacher"])
    with threads(1):  # two are slower on a machine that others use, and little faster on one that nobody does
        train_teacher(directory / "teacher", parts["teacher"], seed, steps, progress)
    _write_settings(directory, seed)
    digest = hashlib.blake2b("\0".join(t for texts in parts.values() for t in texts).encode(), digest_size=16)
    told = {
        "python": sys.version.split()[0],
        "text": digest.hexdigest(),
        "documents": {name: len(texts) for name, texts in parts.items()},
        "bytes": {name: sum(len(text.encode()) for text in texts) for name, texts in parts.items()},
    }
    (directory / "text.json").write_text(json.dumps(told, indent=1) + "\n")


def python_texts() -> Iterator[str]:
    """Give the docstrings of the standard library's modules, classes and functions and the topics of `help()`, each once.

    Yields:
      Texts in an order that does not depend on the machine.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    root = Path(sysconfig.get_path("stdlib"))
    for text in (*(topics[name] for name in sorted(topics)), *_docstrings(root)):
        text = text.strip()
        if len(text) >= LEAST and text not in seen:
            seen.add(text)
            yield text


def _docstrings(root: Path) -> Iterator[str]:
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the escapes of other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def _part_of(text: str) -> str:
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 100
    for name, share in PARTS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the parts are a hundred hundredths")


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train a byte-pair encoding of `VOCABULARY` ids on texts, and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)


def train_teacher(
    folder: Path,
    texts: list[str],
    seed: int,
    steps: int,
    progress: Progress,
    *,
    sizes: Mapping[str, int] = TEACHER,
    lr: float = LR,
) -> None:
    """Train a Llama on rows of the texts one after another, ends of text between them, and save it beside its tokenizer.

    Args:
      folder: with the tokenizer.
      texts: to learn.
      seed: decides the weights and the order.
      steps: of `BATCH` rows.
      progress: called at each step.
      sizes: of the model, settings of `transformers.LlamaConfig`.
      lr: the highest learning rate.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = [tokenizer.eos_token_id]
    ids = torch.tensor([i for found in tokenizer(texts)["input_ids"] for i in [*found, *end]])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2 * LENGTH,
            eos_token_id=end[0],
            bos_token_id=None,
            **sizes,
        )
        model: Any = transformers.LlamaForCausalLM(config)
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        model.train()
        for step in range(steps):
            batch = rows[torch.randint(len(rows), (BATCH,))]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress.step(step + 1, steps, f"the teacher's loss {float(loss.detach()):.2f}")
    model.eval().save_pretrained(folder)


def _write_settings(directory: Path, seed: int) -> None:
    (directory / "run.toml").write_text(RUN.format(seed=seed, budget=BUDGET_TOKENS, student=STUDENT))
    label = directory / "label.toml"
    label.write_text(LABEL.format(name="the pool", directory="job", pool="pool", kind="sampled", k=32))
    held_out = LABEL.format(name="held-out text", directory="held-out-job", pool="held-out", kind="top_k", k=20)
    (directory / "held-out.toml").write_text(held_out)
    student = TRAINING.format(
        what="A student of the teacher's labels", directory="student", seed=seed, student=STUDENT, more=""
    )
    (directory / "student.toml").write_text(student)
    plain = TRAINING.format(
        what="The same student of the text alone",
        directory="plain",
        seed=seed,
        student=STUDENT,
        more="hard_share = 1.0   # reads no label",
    )
    (directory / "plain.toml").write_text(plain)
