"""Text and conversations become blocks: every token once, segments and masks where they belong, and only what is new is read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import EOS, SENTENCES, write_tokenizer

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.corpus import documents
from distilbeam.pipelines.corpus.ingesting import CorpusSummary, ingest_corpus
from distilbeam.pipelines.corpus.settings import corpus_options

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ingested(sources: list[Path], out: Path, folder: Path, format_: str = "lm", **settings: Any) -> CorpusSummary:
    given = {"format": format_, "tokenizer": str(folder), "sequence_length": LENGTH, **settings}
    return ingest_corpus([str(source) for source in sources], out, corpus_options(**given))


def blocks(out: Path) -> dict[str, Any]:
    table = pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("*.parquet"))])
    columns = {name: np.array(table[name].to_pylist()) for name in ("input_ids", "segment_ids", "completion_mask")}
    return {**columns, "example_id": table["example_id"].to_pylist()}


def ids_of(folder: Path, text: str) -> list[int]:
    found: list[int] = load_tokenizer(folder, "--tokenizer").tokenizer(text)["input_ids"]
    return found


def test_text_flows_through_blocks_and_no_token_is_lost(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "lines.jsonl"
    texts = [*SENTENCES, "", "the end"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    summary = ingested([source], tmp_path / "pool", folder)
    end = ids_of(folder, EOS)
    expected = [token for text in texts if text for token in [*ids_of(folder, text), *end]]
    found = blocks(tmp_path / "pool")
    there = found["segment_ids"] > 0
    assert found["input_ids"][there].tolist() == expected
    assert (found["completion_mask"] == there).all()
    assert (found["input_ids"][~there] == end[0]).all()
    assert there[:-1].all(), "only the last block has padding"
    for ids, segments in zip(found["input_ids"], found["segment_ids"], strict=True):  # a segment ends where a text does
        ends = np.flatnonzero(ids[:-1] == end[0])
        edges = np.flatnonzero((np.diff(segments) != 0) & (segments[1:] != 0))
        assert set(edges) == {e for e in ends if segments[e + 1] != 0}
        assert segments[0] == 1
    assert (summary.tokens, summary.blocks, summary.bad) == (len(expected), -(-len(expected) // LENGTH), 0)
    metadata = json.loads(pq.read_schema(next((tmp_path / "pool").glob("*.parquet"))).metadata[b"distilbeam.tokenizer"])
    tokenizer = load_tokenizer(folder, "--tokenizer")
    assert metadata == {"fingerprint": tokenizer.fingerprint(), "num_classes": 300, "chat_template": ""}


def test_a_file_of_text_is_one_document_however_long(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 70)
    text = "\n".join(SENTENCES * 3)
    (tmp_path / "one.txt").write_text(text)
    with gzip.open(tmp_path / "two.txt.gz", "wt") as file:
        file.write(text)
    ingested([tmp_path / "one.txt"], tmp_path / "one", folder)
    ingested([tmp_path / "two.txt.gz"], tmp_path / "two", folder)
    one, two = blocks(tmp_path / "one"), blocks(tmp_path / "two")
    assert one["example_id"] == two["example_id"], "what a block holds is its id, wherever it comes from"
    tokens = one["input_ids"][one["segment_ids"] > 0].tolist()
    assert (one["segment_ids"].max(axis=1) == 1).all()
    assert tokens[-1:] == ids_of(folder, EOS)
    assert load_tokenizer(folder, "--tokenizer").tokenizer.decode(tokens[:-1]) == text


def test_parquet_and_json_lines_give_the_same_blocks(tmp_path: Path, folder: Path) -> None:
    pq.write_table(pa.table({"body": SENTENCES}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in SENTENCES))
    for name in ("a.parquet", "a.jsonl"):
        ingested([tmp_path / name], tmp_path / f"pool-{name}", folder, column="body")
    assert blocks(tmp_path / "pool-a.parquet")["example_id"] == blocks(tmp_path / "pool-a.jsonl")["example_id"]
    with pytest.raises(ValueError, match="has no column text, its columns are body; --column names another"):
        ingested([tmp_path / "a.parquet"], tmp_path / "pool-none", folder)


def test_a_conversation_stands_whole_and_its_assistant_alone_is_predicted(tmp_path: Path, folder: Path) -> None:
    chats = [
        [{"role": "user", "content": "the letter"}, {"role": "assistant", "content": SENTENCES[i % 5][: 4 + i]}]
        for i in range(12)
    ]
    bad = [[{"role": "user", "content": "nobody answers"}], [{"role": "assistant", "content": "long " * 40}], "no chat"]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, *bad]) + "{\n")
    summary = ingested([source], tmp_path / "pool", folder, "chat", sequence_length=32)
    found = blocks(tmp_path / "pool")
    tokenizer = load_tokenizer(folder, "--tokenizer").tokenizer
    seen = []
    for ids, segments, mask in zip(found["input_ids"], found["segment_ids"], found["completion_mask"], strict=True):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            seen.append((tokenizer.decode(ids[at]), tokenizer.decode(ids[at & (mask == 1)])))
    expected = [
        (f"<|user|>the letter{EOS}<|assistant|>{c[1]['content']}{EOS}", f"{c[1]['content']}{EOS}") for c in chats
    ]
    assert sorted(seen) == sorted(expected)
    assert summary.segments == 12
    letters = [json.loads(line) for line in (tmp_path / "pool" / "_dead_letters.jsonl").read_text().splitlines()]
    assert [letter["line"] for letter in letters] == [13, 14, 15, 16]
    for letter, why in zip(
        letters,
        (
            "no token is the assistant's",
            "tokens, a block has 32; raise --sequence-length",
            "must be a list of messages",
            "not JSON",
        ),
        strict=True,
    ):
        assert why in letter["error"]


def test_a_template_that_marks_no_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}) + "\n")
    plain = write_tokenizer(tmp_path / "plain", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(
        ValueError, match=r"does not mark the assistant's tokens.*put {% generation %} and {% endgeneration %}"
    ):
        ingested([tmp_path / "chat.jsonl"], tmp_path / "pool", plain, "chat")
    none = write_tokenizer(tmp_path / "none", chat_template=None)
    with pytest.raises(ValueError, match="has no chat template, which --format chat needs"):
        ingested([tmp_path / "chat.jsonl"], tmp_path / "pool", none, "chat")


def test_only_new_and_changed_sources_are_read(tmp_path: Path, folder: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " + SENTENCES[0])
    assert ingested([tmp_path], tmp_path / "pool", folder).made == 2
    former = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "pool").glob("*.parquet")}
    (tmp_path / "c.txt").write_text(SENTENCES[1])
    (tmp_path / "b.txt").write_text(" ".join(SENTENCES))
    summary = ingested([tmp_path], tmp_path / "pool", folder)
    assert (summary.sources, summary.made) == (3, 2)
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "pool").glob("*.parquet")}
    assert [name[0] for name in sorted(now) if now[name] == former.get(name)] == ["a"]
    assert summary.tokens == int((blocks(tmp_path / "pool")["segment_ids"] > 0).sum())
    with pytest.raises(ValueError, match="was made with another tokenizer, format, length or column"):
        ingested([tmp_path], tmp_path / "pool", folder, sequence_length=32)


def test_files_are_bounded_and_those_of_a_shorter_source_are_removed(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(" ".join(SENTENCES * 4))
    ingested([source], tmp_path / "pool", folder, file_bytes=3 * 7 * LENGTH)
    rows = [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "pool").glob("*.parquet"))]
    assert set(rows[:-1]) == {3}
    assert len(rows) > 2
    source.write_text(SENTENCES[0])
    summary = ingested([source], tmp_path / "pool", folder, file_bytes=3 * 7 * LENGTH)
    assert len(list((tmp_path / "pool").glob("*.parquet"))) == summary.pool_files == 1


def test_what_cannot_be_a_corpus_is_said(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(ValueError, match=r"must be JSON lines or Parquet for --format chat"):
        ingested([tmp_path / "a.txt"], tmp_path / "p1", folder, "chat")
    with pytest.raises(
        ValueError, match=r"at least one document .* the first record that is none is empty.jsonl 1: the record must"
    ):
        ingested([tmp_path / "empty.jsonl"], tmp_path / "p2", folder)
    (tmp_path / "p3").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "p3" / "other.parquet")
    with pytest.raises(ValueError, match="holds something else already; name a new directory"):
        ingested([tmp_path / "a.txt"], tmp_path / "p3", folder)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 500}) + "\n" + json.dumps({"text": "short"}) + "\n")
    summary = ingested([tmp_path / "long.jsonl"], tmp_path / "p4", folder, max_record_bytes=100)
    assert (summary.bad, summary.segments) == (1, 1)
    assert summary.first_bad is not None
    assert summary.first_bad["error"] == "the line has more than max_record_bytes = 100 bytes"
