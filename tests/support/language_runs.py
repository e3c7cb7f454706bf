"""Small runs of language models: a teacher and pools of blocks of a few thousand weights and tokens."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from language_models import blocks_of, write_model

LENGTH = 16
STUDENT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


def write_blocks(path: Path, rows: int, seed: int, per_group: int = 12) -> pa.Table:
    """Write blocks of two texts, the last with padding behind, in row groups; return them."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, LENGTH), np.int64)
    for row in segments:
        cut, end = sorted(rng.choice(np.arange(4, LENGTH + 1), 2, replace=False))
        row[cut:end], row[end:] = 2, 0
    table = blocks_of(segments, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=per_group)
    return table


def settings_of(place: Path, **sections: Any) -> dict[str, Any]:
    """Write teacher and pools of a run, and give its settings with changes; a value of None takes a setting out."""
    if not (place / "teacher").exists():
        write_model(place / "teacher")
        write_blocks(place / "pool" / "a.parquet", 36, 1)
        write_blocks(place / "pool" / "b.parquet", 24, 2)
        write_blocks(place / "held-out.parquet", 10, 3)
    settings: dict[str, Any] = {
        "run": {"directory": "run", "rounds": 2},
        "data": {"pool": "pool", "validation": "held-out.parquet"},
        "teacher": {"kind": "causal_lm", "model": "teacher", "device": "cpu"},
        "labels": {"kind": "top_k", "k": 5, "held_out_k": 6},
        "selection": {"method": "herding", "budget": 12},
        "student": {"kind": "causal_lm", "config": STUDENT, "tokenizer": "teacher"},
        "training": {"epochs": 2, "batch_size": 6, "lr": 1e-2},
        "engine": {"unit_rows": 12, "shard_rows": 4, "threads": 1},
    }
    for name, values in sections.items():
        if isinstance(values, dict):
            changed = {**settings.get(name, {}), **values}
            settings[name] = {key: value for key, value in changed.items() if value is not None}
        else:
            settings[name] = values
    return settings


def write_run(place: Path, **sections: Any) -> Path:
    """Write a run; return its configuration file."""
    (place / "run.toml").write_text(tomli_w.dumps(settings_of(place, **sections)))
    return place / "run.toml"


def asked(log: Path) -> Counter[str]:
    """Count how often the teacher labelled each block."""
    return Counter(log.read_text().split("\n")[:-1] if log.exists() else [])


def log_what_is_asked(log: Path) -> None:
    """Have every teacher of this process write the ids of blocks that it labels to a file, a line each."""
    from distilbeam.teacher.tokens.causal_lm import CausalLMTeacher

    labels = CausalLMTeacher.token_labels

    def logged(self: CausalLMTeacher, blocks: pa.RecordBatch, spec: Any) -> Any:
        _note(log, blocks)
        return labels(self, blocks, spec)

    CausalLMTeacher.token_labels = logged  # type: ignore[method-assign]


def log_what_is_asked_apart(log: Path) -> None:
    """Write down likewise what is asked in a process apart, as blocks are that were in flight when a run was killed."""
    from distilbeam.pipelines.labelling import portions

    ask_apart = portions.ask_apart

    def logged(question: Any) -> Any:
        _note(log, question.rows)
        return ask_apart(question)

    portions.ask_apart = logged


def _note(log: Path, blocks: pa.RecordBatch) -> None:
    with log.open("a") as file:
        file.write("".join(f"{id_}\n" for id_ in blocks.column("example_id").to_pylist()))


if __name__ == "__main__":  # python language_runs.py LOG ARGUMENTS: the command line, with a log of what is asked
    log_what_is_asked(Path(sys.argv[1]))
    log_what_is_asked_apart(Path(sys.argv.pop(1)))
    from distilbeam.pipelines.cli.main import main

    main()
