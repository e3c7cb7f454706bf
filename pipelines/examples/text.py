"""Texts: messages to a shop, generated from phrases, of which each wants one of eight things; a student of hashed n-grams.

A message says what it wants in one of some hundred ways, mostly after or before a sentence about something else, with letters
mistyped here and there, and words forgotten. Sixty labelled messages hold few of these ways, so the labels that a run buys are worth something; the
teacher has learned from 3,000.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines.examples.teachers import write_teacher
from distilbeam.progress import Progress

PARTS = {"labelled": 60, "validation": 200, "test": 400, "pool": 1_200}
TEACHERS_ROWS = 3_000
_FORGOTTEN = 0.15  # of the words; what is left of some messages does not say any more what is wanted
BUCKETS = 16_384

CONFIG = """# Which message wants what: a text student learns from a teacher that read 3,000 messages.
# Relative paths are relative to this file; every setting can be overridden: --set section.key=value

[run]
directory = "run"
rounds = 2
seed = {seed}

[data]
pool = "pool"
labelled = "labelled.parquet"
validation = "validation.parquet"
test = "test.parquet"
label = "wants"
id = "id"

[teacher]
kind = "torch"
model = "teacher.pt2"
input = {{ kind = "text", columns = ["text"], buckets = {buckets} }}

[selection]
budget = 100

[student]
kind = "text"
dim = 32
input = {{ kind = "text", columns = ["text"] }}

[training]
epochs = 40
lr = 0.01
# Without the last training on what the pool and the validation set still hold, which takes most of the time:
self_training = false
final_training = "apart"
"""

# what is wanted: ways to say it, each made of one piece of every group
WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "address": (
        ("please change", "how do I correct", "I have to update", "could you alter", "there is a mistake in"),
        ("my address", "the street on my order", "where you deliver", "the postcode", "the place it goes to", "the door number"),
    ),
    "cancel": (
        ("please stop", "I want to cancel", "call off", "do not send", "I no longer need", "take back"),
        ("my order", "what I bought an hour ago", "the purchase", "both jackets", "the second item", "the whole basket"),
    ),
    "damage": (
        ("the lamp", "the screen", "one shoe", "the box", "a cup", "what I unpacked", "the second item"),
        ("is broken", "arrived cracked", "has a scratch", "came torn", "is in pieces", "does not switch on", "is dented"),
    ),
    "delivery": (
        ("when comes", "where is", "how long until I get", "I am still waiting for", "nobody brought", "can you trace"),
        ("my parcel", "the package", "what I ordered", "the delivery", "the courier with my lamp", "my order"),
    ),
    "invoice": (
        ("I need", "please send", "where can I print", "my company wants", "could you write"),
        ("an invoice", "a receipt", "the bill with tax", "a copy of the bill", "proof that I paid", "the document for the tax office"),
    ),
    "payment": (
        ("my card", "the bank transfer", "the payment", "my voucher", "the checkout", "paying by phone"),
        ("was refused", "does not go through", "shows an error", "is not taken", "was charged twice", "hangs at the last step"),
    ),
    "password": (
        ("I cannot", "it is not possible to", "I forgot how to", "since today I fail to", "your page does not let me"),
        ("log in", "sign in", "open my account", "reset the password", "get the code by mail", "reach my profile"),
    ),
    "refund": (
        ("I want", "when do I get", "you still owe me", "please return", "I am waiting for"),
        ("my money", "the refund", "what I paid", "the amount back", "the 40 euros", "my money for the shoes I sent back"),
    ),
}  # fmt: skip
ASIDES = (
    "hello", "good morning", "I am a customer of many years", "the parcel itself was fine", "I have an account with you",
    "I paid by card", "my order has two items", "the invoice is here", "it is for my mother", "thank you for the quick delivery",
    "I sent the shoes back last week", "my address has not changed", "please answer by mail", "I tried it twice", "many thanks",
    "I read the page about refunds", "the password works", "nothing is broken", "I do not want to cancel", "it was a present",
)  # fmt: skip


def write(directory: Path, seed: int, progress: Progress) -> None:
    """Write the example's messages, teacher and configuration.

    Args:
      directory: where to write; made if it is not there.
      seed: of the messages and of the teacher's training.
      progress: told the epochs of the teacher's training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    texts, wants = messages(sum(PARTS.values()) + TEACHERS_ROWS, np.random.default_rng(seed))
    start = 0
    for name, rows in PARTS.items():
        columns = {"id": [f"message-{i:05d}" for i in range(start, start + rows)], "text": texts[start : start + rows]}
        if name == "pool":
            (directory / name).mkdir()
            pq.write_table(pa.table(columns), directory / name / "part-0.parquet")
        else:
            pq.write_table(pa.table({**columns, "wants": wants[start : start + rows]}), directory / f"{name}.parquet")
        start += rows
    prepare = make_input(InputConfig(kind="text", columns=("text",), buckets=BUCKETS))
    x = torch.from_numpy(prepare(pa.record_batch({"text": texts[start:]})))
    y = torch.tensor([sorted(WAYS).index(want) for want in wants[start:]])
    write_teacher(_network, x, y, directory / "teacher.pt2", seed, progress, epochs=6)
    (directory / "new.txt").write_text("the courier never rang\nmy card is refused each time\n")
    (directory / "distilbeam.toml").write_text(CONFIG.format(seed=seed, buckets=BUCKETS))


def messages(rows: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Generate messages, no two alike.

    Args:
      rows: how many.
      rng: draws them.

    Returns:
      Their texts [rows] and what each wants [rows].
    """
    found: dict[str, str] = {}
    while len(found) < rows:
        want = str(rng.choice(sorted(WAYS)))
        said = " ".join(str(rng.choice(pieces)) for pieces in WAYS[want])
        asides = [str(aside) for aside in rng.choice(ASIDES, 2, replace=False)]
        before, after = rng.random(2) < 0.6
        parts = [*asides[:1] * int(before), said, *asides[1:] * int(after)]
        words = [_mistyped(word, rng) for word in ", ".join(parts).split() if rng.random() > _FORGOTTEN]
        found.setdefault(" ".join(words), want)
    return list(found), list(found.values())


def _mistyped(word: str, rng: np.random.Generator) -> str:
    """Swap two neighbouring letters of one word in ten."""
    if len(word) < 4 or rng.random() > 0.1:
        return word
    i = int(rng.integers(len(word) - 1))
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(BUCKETS, 192), nn.ReLU(), nn.Linear(192, len(WAYS)))
