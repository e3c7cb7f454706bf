"""Whole runs of language models whose teacher is behind a server, and behind a ModelHandler: each text is asked about once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed_runs import StartedRun
from language_runs import settings_of, write_run
from language_server import TABLE, LanguageServer, language_server
from typer.testing import CliRunner

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.pipelines.steps import run
from distilbeam.teacher.protocol import TeacherMisfit
from distilbeam.teacher.softlabels import decode_tokens, read_manifest

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
DATASETS = ("teacher/validation", "labels/round=000", "labels/round=001", "uniform/labels/round=000")
Prompts = Counter[tuple[int, ...]]


def served(address: str, **settings: Any) -> dict[str, Any]:
    teacher = {"kind": "openai", "address": address, "model": "m", "tokenizer": "teacher", "parallel": 4}
    return {**teacher, "device": None, **settings}


def handled(place: Path) -> dict[str, Any]:
    arguments = {"model": "teacher", "log": "asked.log"}  # relative: of what the command is started in
    teacher = {"kind": "beam", "handler": "prompt_handlers:Prompts", "arguments": arguments, "tokenizer": "teacher"}
    return {**teacher, "model": None, "device": None, "files": [str(place / "teacher")]}


def blocks_of(root: Path, *names: str) -> pa.Table:
    paths = [path for name in names for path in read_manifest(root / name).paths()]
    return pa.concat_tables([pq.read_table(path, columns=["example_id", *BLOCK_COLUMNS]) for path in paths])


def labelled(root: Path, name: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in read_manifest(root / name).paths()])


def texts(blocks: pa.Table) -> Prompts:
    """The texts of blocks that have a label, each of which is a request."""
    found: Prompts = Counter()
    for ids, segments in zip(blocks["input_ids"].to_pylist(), blocks["segment_ids"].to_pylist(), strict=True):
        edges = [0, *(j for j in range(1, len(ids)) if segments[j] != segments[j - 1]), len(ids)]
        parts = [tuple(ids[a:b]) for a, b in pairwise(edges) if segments[a]]
        found.update(part for part in parts if len(part) > 1)
    return found


def once_each(root: Path) -> Prompts:
    """The texts that a finished run has paid: those of all its labels, a block of several datasets once."""
    every = blocks_of(root, *DATASETS)
    first = {id_: row for row, id_ in reversed([*enumerate(every["example_id"].to_pylist())])}
    return texts(every.take([*first.values()]))


def logged(log: Path) -> Prompts:
    return Counter(tuple(json.loads(line)) for line in log.read_text().splitlines())


def result(place: Path) -> dict[str, Any]:
    """What must not depend on whether the run was killed."""
    root = place / "run"
    return {
        "shards": [[(e.key, e.rows, e.checksum) for e in read_manifest(root / name).entries] for name in DATASETS],
        "students": {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("model.safetensors"))},
        "plans": [p.read_bytes() for p in sorted(root.rglob("plan.json"))],
    }


def command(*words: str) -> str:
    forget_models()
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LanguageServer]]:
    """The folder of a run that asked a server, chosen by entropy, and the server."""
    place = tmp_path_factory.mktemp("served")
    with language_server() as server:
        config = write_run(place, teacher=served(server.address), selection={"method": "entropy"})
        assert "Report:" in command("run", str(config))
        yield place, server


def test_a_server_is_asked_about_each_text_once(finished: tuple[Path, LanguageServer]) -> None:
    place, server = finished
    asked = len(server.asked)
    assert server.prompts == once_each(place / "run")
    assert {body["prompt_logprobs"] for body in server.asked} == {5, 6}, (
        "labels.k of the pool, held_out_k of validation"
    )
    assert "Nothing to do: all 12 steps are done" in command("run", str(place / "run.toml"))
    assert len(server.asked) == asked


def test_what_it_said_is_what_is_learned(finished: tuple[Path, LanguageServer]) -> None:
    place, _ = finished
    root = place / "run"
    spec = read_manifest(root / "labels/round=001").spec
    assert (spec.source, spec.kind, spec.k) == ("server:vllm", "top_k", 5)
    blocks = labelled(root, "labels/round=001")
    labels, ids = decode_tokens(blocks, spec), np.array(blocks["input_ids"].to_pylist())
    at = np.argwhere(labels.labelled)
    assert len(at) > 60
    for block, place_ in at:
        order = np.argsort(-TABLE[ids[block, place_]])[:5]
        assert labels.classes[block, place_].tolist() == order.tolist()
        np.testing.assert_allclose(labels.logprobs[block, place_], TABLE[ids[block, place_]][order], rtol=1e-3)
    figures = json.loads((root / "report/metrics.json").read_text())
    assert figures["teacher"]["continued"] is None, "a server is asked for labels alone"
    assert figures["teacher"]["tokens_per_s"] > 0
    # the teacher's own figure is that of the table, over the validation blocks
    held_out = labelled(root, "teacher/validation")
    ids = np.array(held_out["input_ids"].to_pylist())
    there = decode_tokens(held_out, read_manifest(root / "teacher/validation").spec).labelled
    of_truth = [-TABLE[ids[b, j], ids[b, j + 1]] for b, j in np.argwhere(there)]
    assert figures["teacher"]["nll"] == pytest.approx(np.mean(of_truth), rel=1e-3)
    assert figures["rounds"][1]["mean_gain"]["bought"] > figures["rounds"][1]["mean_gain"]["pool"]


@pytest.mark.slow
def test_killed_it_goes_on_at_another_address_and_pays_once(
    tmp_path: Path, finished: tuple[Path, LanguageServer]
) -> None:
    with language_server() as first, language_server() as second:
        first.wait_s = 0.02  # so that the kill comes between two blocks
        write_run(tmp_path, teacher=served(first.address), selection={"method": "entropy"})
        assert StartedRun(tmp_path).kill_when("labels/round=001/_manifest/*.json")
        paid = [name for name in DATASETS[:3] if (tmp_path / "run" / name / "_manifest").exists()]
        committed = texts(blocks_of(tmp_path / "run", *paid))
        assert sum(committed.values()) > 20
        assert not committed - first.prompts
        words = ("-m", "distilbeam", "run", "run.toml", "--set", f"teacher.address={second.address}")
        StartedRun(tmp_path, words).finish()
        assert not committed & second.prompts, "what is committed was asked again"
        assert result(tmp_path) == result(finished[0])
        both, wanted = first.prompts + second.prompts, once_each(tmp_path / "run")
        assert both.keys() == wanted.keys()
        again = both - wanted
        # the kill costs the request of 4 blocks that was in flight, of at most two texts each
        assert sum(again.values()) <= 4 * 2


@pytest.mark.slow
def test_a_handler_is_asked_about_each_text_once_though_the_run_was_killed(tmp_path: Path) -> None:
    settings_of(tmp_path)  # writes the teacher's folder, which its settings name
    write_run(tmp_path, teacher=handled(tmp_path))
    started = StartedRun(tmp_path)
    assert started.kill_when("labels/round=001/_manifest/*.json")
    before = logged(tmp_path / "asked.log")
    committed = texts(blocks_of(tmp_path / "run", "teacher/validation", "labels/round=000"))
    assert not committed - before
    assert "Report:" in started.finish()
    now, wanted = logged(tmp_path / "asked.log"), once_each(tmp_path / "run")
    assert not (now - before) & committed
    assert now.keys() == wanted.keys()
    assert sum((now - wanted).values()) <= 4 * 2, "the kill costs a shard of 4 blocks at most"
    spec = read_manifest(tmp_path / "run/labels/round=001").spec
    assert spec.source == "server:handler"
    plan = json.loads((tmp_path / "run/selected/round=001/plan.json").read_text())
    assert (plan["method"], plan["examples"]) == ("herding", 48)


def test_a_cap_below_what_the_run_stores_is_said_before_a_block_is_paid(tmp_path: Path) -> None:
    def capped(_: int, body: dict[str, Any]) -> Any:
        said = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: 7"
        return (400, {}, {"message": said}) if body["prompt_logprobs"] > 7 else None

    with language_server() as server:
        server.refuse = capped
        settings = settings_of(tmp_path, teacher=served(server.address), labels={"k": 9})
        with pytest.raises(TeacherMisfit, match=r"the server allows 7 .* --max-logprobs 9 or set labels.k = 7"):
            run(settings, base=tmp_path)
        assert [len(body["prompt"]) for body in server.asked] == [2], "held-out blocks were paid for nothing"
        server.refuse = lambda number, body: None  # noqa: ARG005  (it was started with --max-logprobs 9)
        root = run(settings, base=tmp_path, until=("ask", None))
        assert len(read_manifest(root / "teacher/validation").entries) == 3
