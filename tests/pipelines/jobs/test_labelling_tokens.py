"""A labelling job of tokens from end to end: text, blocks, labels, batches; what is paid is paid once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import SENTENCES, write_model, write_tokenizer

from distilbeam.inputs.blocks import has_label
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import load_any_config, load_config
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.student.data import TokenLabelDataset
from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, decode_tokens, read_manifest

LENGTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    forget_models()
    return tmp_path


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def write_job(place: Path, model: Path, **sections: Any) -> None:
    settings: dict[str, Any] = {
        "run": {"directory": "job"},
        "data": {"pool": "pool"},
        "teacher": {"kind": "causal_lm", "model": str(model), "device": "cpu"},
        "labels": {"kind": "top_k", "k": 5},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    if settings["teacher"]["kind"] == "openai":
        del settings["teacher"]["device"]
    (place / "label.toml").write_text(tomli_w.dumps(settings))


def write_text(place: Path, name: str, texts: list[str]) -> None:
    (place / "text").mkdir(exist_ok=True)
    (place / "text" / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def ingest(model: Path, out: str = "pool") -> str:
    return call(
        "ingest", "text", "--format", "lm", "--tokenizer", str(model), "--sequence-length", str(LENGTH), "--out", out
    )


def work(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "job" / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_text_becomes_labels_and_labels_become_batches(place: Path, model: Path, kind: str) -> None:
    write_text(place, "a.jsonl", SENTENCES)
    assert "blocks of 16 tokens in pool: 1 file(s) of 1 source(s), 1 of which were read now." in ingest(model)
    write_job(place, model, labels={"kind": kind, "k": 5})
    said = call("plan", "label.toml")
    blocks = pq.read_table(place / "pool").num_rows
    assert f"The pool has {blocks} rows in 1 file(s); 0 are labelled, {blocks} are not." in said
    assert f"{blocks * LENGTH:,} tokens; their context of 16 tokens is fixed by labelling" in said
    call("label", "label.toml")
    manifest = read_manifest(place / "job" / "labels")
    spec = manifest.spec
    assert (spec.version, spec.unit, spec.sequence_length, spec.num_classes, spec.k) == ("2.0", "token", LENGTH, 300, 5)
    assert spec.carried == ("input_ids", "segment_ids", "completion_mask")
    table = pq.read_table(manifest.paths()[0])
    labels = decode_tokens(table, spec)
    segments, mask = (np.array(table[name].to_pylist()) for name in ("segment_ids", "completion_mask"))
    np.testing.assert_array_equal(labels.labelled, has_label(segments, mask))
    teacher: Any = load_teacher({"kind": "causal_lm", "model": str(model), "device": "cpu"})
    expected = teacher.token_labels(table.combine_chunks().to_batches()[0], spec)
    np.testing.assert_array_equal(labels.classes, expected.classes)
    (summed,) = duckdb.sql(f"SELECT sum(list_sum(input_ids)) FROM '{manifest.paths()[0]}'").fetchall()[0]
    assert summed == np.array(table["input_ids"].to_pylist()).sum(), "other readers read it, too"
    batches = list(TokenLabelDataset(place / "job" / "labels", batch_size=3, seed=0))
    assert sum(len(batch["row"]) for batch in batches) == blocks
    shown = call("inspect", "job/labels", "--samples", "3")
    assert "300 ids" in shown
    assert "bits a token" in shown
    assert any(word in shown for word in ("token", "letter", "student", "teacher"))
    assert "everything is as the manifest says" in call("verify", "job/labels", "--teacher", "label.toml")
    assert {**work(place)["work"]["label"]}["teacher_calls"] == blocks


def test_a_handler_of_beam_labels_a_pool(place: Path, model: Path) -> None:
    """The same model behind a ModelHandler that answers prompts as vLLM does: the same classes, by the same commands."""
    write_text(place, "a.jsonl", SENTENCES)
    ingest(model)
    write_job(place, model, run={"directory": "local"})
    call("label", "label.toml")
    teacher = {"kind": "beam", "handler": "prompt_handlers:Prompts", "arguments": {"model": str(model)}}
    teacher |= {"files": [str(model)], "tokenizer": str(model)}
    settings = {"run": {"directory": "job"}, "data": {"pool": "pool"}, "teacher": teacher}
    (place / "handled.toml").write_text(tomli_w.dumps({**settings, "labels": {"kind": "top_k", "k": 5}}))
    call("label", "handled.toml")
    found, expected = (read_manifest(place / name / "labels") for name in ("job", "local"))
    assert (found.spec.source, expected.spec.source) == ("server:handler", "logits")
    one, other = (pq.read_table(one.paths()[0]).sort_by("example_id").combine_chunks() for one in (found, expected))
    assert one["example_id"].equals(other["example_id"])
    np.testing.assert_array_equal(decode_tokens(one, found.spec).classes, decode_tokens(other, expected.spec).classes)
    assert "everything is as the manifest says" in call("verify", "job/labels", "--teacher", "handled.toml")
    said = call(
        "verify", "local/labels", "--teacher", "handled.toml", code=1
    )  # it is another teacher that answers the same
    assert "another one was given to compare with" in said
    assert "differ by" not in said
    (place / "drawn.toml").write_text(tomli_w.dumps({**settings, "labels": {"kind": "sampled", "k": 5}}))
    with pytest.raises(ValueError, match=r"labels.kind must be 'top_k' and labels.temperature 1 for a server"):
        load_any_config(place / "drawn.toml")


def test_what_is_labelled_is_not_asked_again(place: Path, model: Path) -> None:
    write_text(place, "a.jsonl", SENTENCES[:3])
    ingest(model)
    write_job(place, model)
    call("label", "label.toml")
    first = work(place)["rows"]
    call("label", "label.toml")
    assert work(place)["labelled"] == 0
    write_text(place, "b.jsonl", SENTENCES[3:])
    ingest(model)
    call("label", "label.toml")
    now = work(place)
    assert now["kept"] == first
    assert now["labelled"] == now["rows"] - first > 0
    write_text(place, "c.jsonl", SENTENCES[:3])  # the same text from elsewhere: the same blocks
    ingest(model)
    call("label", "label.toml")
    assert work(place)["labelled"] == 0
    assert work(place)["work"]["label"]["teacher_calls"] == now["rows"]


def test_a_call_that_was_killed_goes_on(place: Path, model: Path) -> None:
    write_text(place, "a.jsonl", SENTENCES)
    ingest(model)
    write_job(place, model, engine={"shard_rows": 1})
    with opened_job(load_any_config(place / "label.toml")) as job:
        labels, plan = job.work(job.dataset, job.dead_letters), job.plan()
        steps = labels(plan.tasks[0])
        placed = [next(steps), next(steps)]  # and neither flushed nor committed
        steps.close()
    forget_models()
    call("label", "label.toml")
    blocks = pq.read_table(place / "pool").num_rows
    assert work(place)["rows"] == blocks
    assert work(place)["work"]["label"]["teacher_calls"] == blocks - len(placed)


def test_a_block_that_cannot_be_answered_is_a_dead_letter(place: Path, model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_text(place, "a.jsonl", SENTENCES)
    ingest(model)
    ids = np.array(pq.read_table(place / "pool")["input_ids"].to_pylist())
    tokens, counts = np.unique(ids, return_counts=True)
    only = int(next(t for t, c in zip(tokens, counts, strict=True) if c == 1))
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[only] = torch.nan
    write_tokenizer(tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    write_job(place, tmp_path / "broken")
    said = call("label", "label.toml")
    assert "1 rows have no label; why, is in" in said
    assert (work(place)["failed"], work(place)["rows"]) == (1, len(ids) - 1)
    (letters,) = (place / "job" / "deadletter" / "labels").glob("*.parquet")
    letter = pq.read_table(letters).to_pylist()[0]
    assert only in ids[letter["row"]]
    assert letter["stage"] == "answer"


def test_another_tokenizer_is_refused_before_anything_is_paid(place: Path, model: Path) -> None:
    write_text(place, "a.jsonl", SENTENCES)
    other = write_tokenizer(place / "other", vocabulary=280)
    call("ingest", "text", "--format", "lm", "--tokenizer", str(other), "--sequence-length", "16", "--out", "pool")
    write_job(place, model)
    with pytest.raises(
        ValueError, match=r"were made with another tokenizer \(280 ids, .*\) than the teacher's \(300 ids"
    ):
        call("label", "label.toml")
    call("ingest", "text", "--format", "lm", "--tokenizer", str(model), "--sequence-length", "129", "--out", "long")
    write_job(place, model, data={"pool": "long"}, run={"directory": "long-job"})
    with pytest.raises(
        ValueError, match=r"teacher reads at most 128; ingest the text again with --sequence-length 128"
    ):
        call("label", "label.toml")


def test_a_damaged_label_and_another_teacher_are_found(place: Path, model: Path, tmp_path: Path) -> None:
    write_text(place, "a.jsonl", SENTENCES)
    ingest(model)
    write_job(place, model)
    call("label", "label.toml")
    other = write_model(tmp_path / "other", seed=5)
    write_job(place, other, run={"directory": "elsewhere"})
    said = call("verify", "job/labels", "--teacher", "label.toml", code=1)
    assert "another one was given to compare with" in said
    assert "two answers of it now differ by" in said
    (tmp_path / "classes.toml").write_text('[teacher]\nkind = "torch"\nmodel = "a:b"\ninput = { column = "x" }\n')
    with pytest.raises(ValueError, match="holds labels of unit 'token', a teacher of kind 'torch' makes others"):
        call("verify", "job/labels", "--teacher", "classes.toml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"num_classes": 300}}, "classes and num_classes must be left out"),
        ({"labels": {"kind": "dense", "k": None}}, "labels.kind must be 'top_k' or 'sampled' for tokens"),
        ({"data": {"carry": ["title"]}}, "data.carry must be left out"),
        ({"teacher": {"classes": ["a", "b"]}}, "teacher.classes"),
        (
            {"teacher": {"kind": "openai", "address": "http://a:1", "tokenizer": "t"}, "labels": {"kind": "sampled"}},
            "labels.kind must be 'top_k' and labels.temperature 1 for a server",
        ),
    ],
)
def test_settings_that_are_of_classes_are_refused(place: Path, model: Path, sections: Any, message: str) -> None:
    sections = {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}
    write_job(place, model, **sections)
    if sections.get("labels", {}).get("kind") == "dense":
        text = (place / "label.toml").read_text().replace("k = 5\n", "")
        (place / "label.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_any_config(place / "label.toml")


def test_runs_and_streams_are_for_classes(place: Path, model: Path) -> None:
    write_job(place, model)
    with pytest.raises(ValueError, match=r"--watch is for teachers of classes, got teacher.kind = 'causal_lm'"):
        call("label", "label.toml", "--watch", "pool")
    run = {
        "data": {"pool": "p", "labelled": "l", "validation": "v"},
        "teacher": {"kind": "causal_lm", "model": str(model)},
        "selection": {"budget": 1},
        "student": {"kind": "mlp", "input": {"column": "x"}},
    }
    (place / "run.toml").write_text(tomli_w.dumps(run))
    with pytest.raises(
        ValueError, match=r"student.kind must be 'causal_lm' with teacher.kind = 'causal_lm', which labels the tokens"
    ):
        load_config(place / "run.toml")


def test_a_pool_that_holds_no_blocks_is_refused(place: Path, model: Path) -> None:
    import pyarrow as pa

    (place / "pool").mkdir()
    pq.write_table(pa.table({"example_id": ["a"], "input_ids": [[1, 2]]}), place / "pool" / "a.parquet")
    write_job(place, model)
    with pytest.raises(ValueError, match=r"data.pool has no column segment_ids"):
        call("plan", "label.toml")


def test_the_specification_says_what_the_tokenizer_is(place: Path, model: Path) -> None:
    write_text(place, "a.jsonl", SENTENCES[:1])
    ingest(model)
    write_job(place, model)
    call("label", "label.toml")
    entry = json.loads(next((place / "job" / "labels" / "_manifest").glob("*.json")).read_text())
    assert entry["spec"]["version"] == "2.0"
    pool = json.loads(pq.read_schema(next((place / "pool").glob("*.parquet"))).metadata[b"distilbeam.tokenizer"])
    assert entry["spec"]["tokenizer"] == pool["fingerprint"]
    assert SoftLabelSpec.from_json(entry["spec"]).source == "logits"
