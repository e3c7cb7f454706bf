"""TokenLabelDataset: blocks and their labels as batches, windows bounded in bytes, and the way on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from language_models import blocks_of, labelled, random_labels

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.student.data import SoftLabelDataset, TokenLabelDataset, shuffle
from distilbeam.student.data.token_labels import tensor_bytes
from distilbeam.teacher.softlabels import SoftLabelSpec, decode_tokens, encode, write_shard

LENGTH, K, BLOCKS = 12, 4, 17
SEGMENTS = np.array([[1] * 5 + [2] * 5 + [0] * 2] * BLOCKS)


def spec_of(kind: Any) -> SoftLabelSpec:
    return SoftLabelSpec(
        300, kind, K, carried=BLOCK_COLUMNS, unit="token", sequence_length=LENGTH, tokenizer="ab", teacher="t"
    )


def write(folder: Path, kind: str = "top_k") -> SoftLabelSpec:
    spec = spec_of(kind)
    for seed in (0, 1):
        blocks = blocks_of(SEGMENTS, seed)
        table = labelled(blocks, random_labels(blocks, spec, seed), spec)
        write_shard(folder, f"s{seed}", table, spec, f"k{seed}")
    return spec


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
@pytest.mark.parametrize("wide_bytes", [1, 100, shuffle.WIDE_BYTES])
def test_batches_hold_the_blocks_of_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wide_bytes: int
) -> None:
    monkeypatch.setattr(shuffle, "WIDE_BYTES", wide_bytes)
    spec = write(tmp_path, kind)
    tables = [pq.read_table(tmp_path / f"s{seed}.parquet") for seed in (0, 1)]
    labels = [decode_tokens(table, spec) for table in tables]
    stored = {
        "input_ids": [np.array(table["input_ids"].to_pylist()) for table in tables],
        "segment_ids": [np.array(table["segment_ids"].to_pylist()) for table in tables],
        "completion_mask": [np.array(table["completion_mask"].to_pylist()) for table in tables],
        "teacher_classes": [one.classes for one in labels],
        "teacher_logprobs": [one.logprobs for one in labels],
        "teacher_token_logprob": [one.token_logprob for one in labels],
    }
    if kind == "top_k":
        stored["teacher_tail_logmass"] = [one.tail_logmass for one in labels]
    seen: list[int] = []
    for batch in TokenLabelDataset(tmp_path, batch_size=5, seed=0):
        rows = batch["row"].numpy()
        seen += rows.tolist()
        assert set(batch) == {*stored, "row"}
        for name, parts in stored.items():
            np.testing.assert_array_equal(batch[name].numpy(), np.concatenate(parts)[rows])
        assert batch["teacher_classes"].dtype == torch.int64
        assert batch["input_ids"].dtype == torch.int32
        assert batch["teacher_classes"].shape[1:] == (LENGTH, K)
    assert sorted(seen) == list(range(2 * BLOCKS)) != seen


def test_it_goes_on_at_another_number_of_processes(tmp_path: Path) -> None:
    write(tmp_path)
    alone = TokenLabelDataset(tmp_path, batch_size=4, seed=3)
    whole = [row for batch in alone for row in batch["row"].tolist()]
    stopped = TokenLabelDataset(tmp_path, batch_size=4, seed=3)
    steps = iter(stopped)
    before = [row for _ in range(3) for row in next(steps)["row"].tolist()]
    pair = [TokenLabelDataset(tmp_path, 2, 3, rank, 2) for rank in range(2)]
    for one in pair:
        one.load_state_dict(stopped.state_dict())
    after = [row for step in zip(*pair, strict=True) for batch in step for row in batch["row"].tolist()]
    assert before + after == whole


def test_windows_are_bounded_in_bytes(tmp_path: Path) -> None:
    spec = write(tmp_path)
    first = next(iter(TokenLabelDataset(tmp_path, batch_size=1, seed=0)))
    assert tensor_bytes(spec) == sum(value.nbytes for name, value in first.items() if name != "row")
    narrow = TokenLabelDataset(tmp_path, 4, 0, buffer_bytes=6 * tensor_bytes(spec) + 1)
    state = SoftLabelDataset(tmp_path, 4, 0, buffer_rows=6, unit="token").state_dict()
    narrow.load_state_dict(state)  # the size of the window is part of the order, and so of the state
    with pytest.raises(ValueError, match="the state's dataset must be that of this dataset"):
        TokenLabelDataset(tmp_path, 4, 0).load_state_dict(state)


def test_labels_of_the_other_unit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    spec = SoftLabelSpec(3, teacher="t")
    table = encode(np.zeros((2, 3)), spec)
    rows = blocks_of(SEGMENTS[:2]).select(["example_id"])
    for name, column in zip(table.schema.names, table.columns, strict=True):
        rows = rows.append_column(name, column)
    write_shard(tmp_path / "examples", "one", rows, spec, "k")
    with pytest.raises(
        ValueError, match=r"tokens holds labels of tokens .* a student of kind causal_lm learns from them$"
    ):
        SoftLabelDataset(tmp_path / "tokens", 2, 0)
    with pytest.raises(ValueError, match=r"examples holds labels of examples .* label a pool of blocks"):
        TokenLabelDataset(tmp_path / "examples", 2, 0)
