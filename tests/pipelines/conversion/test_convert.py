"""Other trainers' data sets of log-probabilities and token labels: every number where it belongs, there and back.

The teacher is a Markov chain, whose log-probabilities are known in float64: what follows a token depends on that token alone.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra hf")

import small_language_trainings as small
from language_models import write_tokenizer

from distilbeam.inputs.blocks import has_label
from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.conversion import packing
from distilbeam.pipelines.conversion.exporting import write_axolotl
from distilbeam.pipelines.conversion.importing import Converted, ConvertOptions, convert_labels
from distilbeam.pipelines.conversion.rows import read_rows
from distilbeam.pipelines.ingest.sources import find_sources
from distilbeam.student.data.token_labels import TokenLabelDataset
from distilbeam.student.language.train import train_language_model
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels, decode_tokens, read_manifest
from distilbeam.teacher.softlabels.inspect_tokens import inspect_token_labels
from distilbeam.teacher.softlabels.verify import verify_labels
from distilbeam.teacher.softlabels.verify_tokens import wanted_form
from distilbeam.teacher.tokens.block_answers import BlockAnswers
from distilbeam.teacher.tokens.protocol import TokenForm

C, K, LENGTH = 300, 6, 32
Float64 = npt.NDArray[np.float64]


def chain(seed: int = 0) -> Float64:
    """The log-probabilities [C, C] of what follows each token."""
    logits = np.random.default_rng(seed).normal(0, 3.5, (C, C))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


CHAIN = chain()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def text(rng: np.random.Generator, length: int) -> list[int]:
    ids = [int(rng.integers(C))]
    while len(ids) < length:
        ids.append(int(rng.choice(C, p=np.exp(CHAIN[ids[-1]]))))
    return ids


def texts(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [text(rng, 6 + i % 20) for i in range(count)]


def most_probable(token: int) -> list[int]:
    return [int(c) for c in np.argsort(-CHAIN[token])[:K]]


def current(ids: list[int], prompt: int = 0) -> dict[str, Any]:
    """A row as axolotl reads it now: list j is of the token behind j; the last one is of a token that is not there."""
    top = [most_probable(t) for t in ids]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * prompt + ids[prompt:],
        "target_token_ids": top,
        "target_logprobs": [[float(CHAIN[t, c]) for c in kept] for t, kept in zip(ids, top, strict=True)],
        "target_mask": [[1] * K for _ in ids],
    }


def legacy(ids: list[int], prompt: int = 0) -> dict[str, Any]:
    """A row as it was read formerly: list j is of token j, and the prompt has none: lists of the last tokens, as answered."""
    first = max(prompt, 1)
    answered = [
        [{"token": f"token_id:{c}", "logprob": float(CHAIN[t, c])} for c in most_probable(t)]
        for t in ids[first - 1 : -1]
    ]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "logprobs": answered}


def plain(ids: list[int]) -> dict[str, Any]:
    """Ragged lists, one fewer than tokens, and the token that is there behind the others where it is not among them."""
    lists = []
    for t, there in itertools.pairwise(ids):
        kept = most_probable(t)
        lists.append(kept if there in kept else [*kept, there])
    return {
        "input_ids": ids,
        "token_ids": lists,
        "logprobs": [[float(CHAIN[t, c]) for c in kept] for t, kept in zip(ids[:-1], lists, strict=True)],
    }


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def converted(source: Path, out: Path, folder: Path, form: Any = "axolotl", **settings: Any) -> Converted:
    return convert_labels([str(source)], out, ConvertOptions(form, str(folder), LENGTH, **settings))


def read(out: Path) -> tuple[dict[str, npt.NDArray[Any]], TokenLabels]:
    manifest = read_manifest(out)
    table = pa.concat_tables([pq.read_table(path) for path in manifest.paths()]).combine_chunks()
    columns = {name: np.array(table[name].to_pylist()) for name in ("input_ids", "segment_ids", "completion_mask")}
    return columns, decode_tokens(table, manifest.spec)


def segments(columns: dict[str, npt.NDArray[Any]]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Each segment: its block and its places."""
    found = []
    for block, row in enumerate(columns["segment_ids"]):
        found += [(block, np.flatnonzero(row == one)) for one in range(1, row.max() + 1)]
    return found


def check(out: Path, wanted: dict[tuple[int, ...], int], *, told: bool = False) -> None:
    """Compare each label with the chain; `wanted` has the length of each text's prompt."""
    columns, labels = read(out)
    assert labels.tail_logmass is not None
    assert (labels.labelled == has_label(columns["segment_ids"], columns["completion_mask"])).all()
    found = {tuple(columns["input_ids"][b, at].tolist()): (b, at) for b, at in segments(columns)}
    assert set(found) == set(wanted)
    for ids, (block, at) in found.items():
        first = max(wanted[ids], 1)  # the first token that has text before it and is to be predicted
        assert labels.labelled[block, at].tolist() == [first <= j + 1 < len(ids) for j in range(len(ids))]
        for j in range(first - 1, len(ids) - 1):
            label = (block, at[j])
            kept = most_probable(ids[j])
            assert labels.classes[label].tolist() == kept
            expected = CHAIN[ids[j], kept]
            np.testing.assert_array_equal(labels.logprobs[label], expected.astype(np.float16).astype(np.float32))
            rest = np.exp(np.delete(CHAIN[ids[j]], kept)).sum()  # not as one minus the others
            assert labels.tail_logmass[label] == pytest.approx(np.log(rest), abs=1e-6)
            there = CHAIN[ids[j], ids[j + 1]]
            if told or ids[j + 1] in kept:
                assert labels.token_logprob[label] == pytest.approx(there, rel=1e-6)
            else:
                assert np.isnan(labels.token_logprob[label])


@pytest.mark.parametrize(
    "form", ["current.jsonl", "current.parquet", "legacy.jsonl.gz", "legacy.parquet", "plain.jsonl"]
)
def test_every_label_is_the_teachers(tmp_path: Path, folder: Path, form: str) -> None:
    found = texts(1, 40)
    prompts = [0 if form.startswith("plain") else i % 4 for i in range(len(found))]
    make = {"current": current, "legacy": legacy}.get(form.split(".")[0])
    rows = [make(ids, p) if make else plain(ids) for ids, p in zip(found, prompts, strict=True)]
    source = tmp_path / form
    if form.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=7)
    else:
        write_json(source, rows)
    told = form.startswith("plain")
    result = converted(source, tmp_path / "labels", folder, "lists" if told else "axolotl", teacher="chain")
    assert result.alignment == ("own" if form.startswith("legacy") else "next")
    assert (result.spec.k, result.spec.teacher, result.spec.version) == (K, "chain", "2.0")
    assert result.spec.tokenizer == load_tokenizer(folder, "--tokenizer").fingerprint()
    check(tmp_path / "labels", {tuple(ids): p for ids, p in zip(found, prompts, strict=True)}, told=told)
    assert verify_labels(tmp_path / "labels", None).ok
    inspected = inspect_token_labels(tmp_path / "labels")
    assert inspected.labels == result.counts["labels"]
    assert np.isfinite(inspected.bits)
    assert (result.counts["unknown"] > 0) is not told


@pytest.mark.parametrize(("form", "alignment"), [("legacy", "own"), ("current", "next")])
def test_what_axolotl_itself_made_is_read(tmp_path: Path, folder: Path, form: str, alignment: str) -> None:
    """Rows that `transform_logprobs` of axolotl 0.19's two strategies made of the chain's 4 most probable tokens, whose mass it makes 1."""
    result = converted(Path(__file__).with_name(f"axolotl-{form}.parquet"), tmp_path / "labels", folder)
    assert result.alignment == alignment
    columns, labels = read(tmp_path / "labels")
    assert labels.tail_logmass is not None
    found = segments(columns)
    assert len(found) == 10
    for block, at in found:
        ids = columns["input_ids"][block, at]
        prompt = (len(ids) - 6) % 4
        # its mask is that of token j, also where list j is of the token behind: the first answer to a prompt is left out then
        first = max(prompt, 1) - 1 if form == "legacy" else prompt
        assert labels.labelled[block, at].tolist() == [first <= j < len(ids) - 1 for j in range(len(ids))]
        for j in np.flatnonzero(labels.labelled[block, at]):
            kept = most_probable(ids[j])[:4]
            assert labels.classes[block, at[j]].tolist() == kept
            expected = CHAIN[ids[j], kept] - np.log(np.exp(CHAIN[ids[j], kept]).sum())
            np.testing.assert_allclose(labels.logprobs[block, at[j]], expected, atol=2e-3)  # of half precision
            assert labels.tail_logmass[block, at[j]] < -8


@pytest.mark.parametrize("alignment", ["own", "next"])
def test_there_and_back_changes_nothing(tmp_path: Path, folder: Path, alignment: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "_BATCH_BYTES", 3 * LENGTH * K * 8)
    found = texts(2, 40)
    rows = [current(ids, i % 3) for i, ids in enumerate(found)]
    converted(write_json(tmp_path / "a.jsonl", rows), tmp_path / "labels", folder)
    write_axolotl(tmp_path / "labels", tmp_path / "back", alignment)
    back = [row for file in sorted((tmp_path / "back").iterdir()) for row in pq.read_table(file).to_pylist()]
    by_text = {tuple(row["input_ids"]): row for row in back}
    assert len(by_text) == len(rows)
    for row in rows:
        got, length = by_text[tuple(row["input_ids"])], len(row["input_ids"])
        for name in ("input_ids", "attention_mask", "labels"):
            assert got[name] == row[name]
        shift = int(alignment == "own")
        for j in range(length):
            source = j - shift
            if 0 <= source < length - 1 and row["labels"][source + 1] != -100:
                assert got["target_token_ids"][j] == row["target_token_ids"][source]
                assert got["target_logprobs"][j] == np.float16(row["target_logprobs"][source]).tolist()
                assert got["target_mask"][j] == [1] * K
            else:
                assert got["target_mask"][j] == [0] * K
    again = converted(tmp_path / "back", tmp_path / "again", folder)
    assert again.alignment == alignment
    (one, first), (two, second) = read(tmp_path / "labels"), read(tmp_path / "again")
    places = [{tuple(c["input_ids"][b, at].tolist()): (b, at) for b, at in segments(c)} for c in (one, two)]
    assert set(places[0]) == set(places[1])
    for text, at in places[0].items():
        np.testing.assert_array_equal(first.classes[at], second.classes[places[1][text]])
        np.testing.assert_array_equal(first.logprobs[at], second.logprobs[places[1][text]])


def test_padding_is_no_text(tmp_path: Path, folder: Path) -> None:
    """On both sides, with lists of its own that are somebody else's."""
    found, rows = texts(10, 20), []
    for number, ids in enumerate(found):
        before, behind = number % 4, number % 3
        row = current([7] * before + ids + [7] * behind)
        row["attention_mask"] = [0] * before + [1] * len(ids) + [0] * behind
        del row["labels"]
        rows.append(row)
    rows.append({**current([7] * 9), "attention_mask": [0] * 9})
    result = converted(write_json(tmp_path / "a.jsonl", rows), tmp_path / "labels", folder)
    assert (result.counts["rows"], result.counts["empty"]) == (21, 1)
    assert result.counts["tokens"] == sum(map(len, found))
    check(tmp_path / "labels", {tuple(ids): 0 for ids in found})


def test_a_row_goes_whole_into_the_fullest_block_with_room(tmp_path: Path, folder: Path) -> None:
    rng = np.random.default_rng(11)
    found = [text(rng, length) for length in (20, 22, 10, 12)]
    result = converted(write_json(tmp_path / "a.jsonl", [current(ids) for ids in found]), tmp_path / "labels", folder)
    columns, _ = read(tmp_path / "labels")
    assert (result.blocks, result.counts["tokens"]) == (2, 2 * LENGTH)
    assert {tuple(row) for row in columns["input_ids"].tolist()} == {
        tuple(found[0] + found[3]),
        tuple(found[1] + found[2]),
    }
    check(tmp_path / "labels", {tuple(ids): 0 for ids in found})


def test_what_is_unclear_is_asked_for(tmp_path: Path, folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [current([int(t) for t in rng.integers(0, C, 25)]) for _ in range(8)]  # no text of this teacher
    source = write_json(tmp_path / "random.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"--alignment must be given.* in 0\.\d\d of 192 tokens .* and in 0\.\d\d of 192"
    ):
        converted(source, tmp_path / "labels", folder)
    assert not (tmp_path / "labels").exists()
    assert converted(source, tmp_path / "labels", folder, alignment="next").alignment == "next"
    place = tmp_path / "both"
    place.mkdir()
    write_json(place / "a.jsonl", [current(ids) for ids in texts(3, 40)])
    write_json(place / "b.jsonl", [legacy(ids) for ids in texts(9, 10)])
    with pytest.raises(ValueError, match=r"their own token in .*b\.jsonl and the next one in .*a\.jsonl"):
        converted(place, tmp_path / "both-labels", folder)
    few = write_json(tmp_path / "few.jsonl", [current(texts(3, 1)[0])])
    with pytest.raises(ValueError, match="which is not clear"):
        converted(few, tmp_path / "few", folder)


def changed(row: dict[str, Any], column: str, value: Any, place: int = 2) -> dict[str, Any]:
    lists = [list(one) if isinstance(one, list) else one for one in row[column]]
    lists[place] = value(lists[place])
    return {**row, column: lists}


BAD = {
    "ids must be below the 300 of --tokenizer, got 300": lambda r: changed(
        r, "target_token_ids", lambda x: [300, *x[1:]]
    ),
    "ids must be below the 300 of --tokenizer, got 777": lambda r: changed(r, "input_ids", lambda _: 777),
    "each list must have at least 6 classes, that of token 3 has 5": lambda r: changed(
        r, "target_mask", lambda x: [0, *x[1:]]
    ),
    "must be distinct": lambda r: changed(r, "target_token_ids", lambda x: [x[1], *x[1:]]),
    "must be at most 0, got 2.5": lambda r: changed(r, "target_logprobs", lambda x: [2.5, *x[1:]]),
    "must sum to at most 1": lambda r: changed(r, "target_logprobs", lambda x: [-0.1] * len(x)),
    "one is NaN": lambda r: changed(r, "target_logprobs", lambda x: [float("nan"), *x[1:]]),
    "has gaps": lambda r: changed(r, "attention_mask", lambda _: 0),
    "target_token_ids must have one value for each": lambda r: changed(r, "target_token_ids", lambda x: x[:-1]),
    "labels must have one value for each": lambda r: {**r, "labels": r["labels"][:-1]},
    "at most one list for each": lambda r: {**r, "input_ids": [1], "labels": [1], "attention_mask": [1]},
    "must have logprobs, the columns are input_ids": lambda r: {"input_ids": r["input_ids"]},
    "it has 40 tokens, a block has 32; raise --sequence-length": lambda _: current([*range(40)]),
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_row_that_cannot_be_is_named(tmp_path: Path, folder: Path, sentence: str) -> None:
    rows = [current(ids) for ids in texts(4, 20)]
    rows[11] = BAD[sentence](rows[11])
    source = write_json(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"a\.jsonl row 12: .*{sentence}"):
        converted(source, tmp_path / "labels", folder, k=K)
    assert not list((tmp_path / "labels").glob("*.parquet"))


def test_rows_come_as_they_are_read(tmp_path: Path) -> None:
    rows = [json.dumps(current(ids)) for ids in texts(4, 3)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*rows, '{"input_ids": 5}']))
    source = find_sources([str(path)], "axolotl")[0]
    stream = read_rows(source, "axolotl")
    assert [next(stream).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"a\.jsonl row 4 must be a line with a JSON object of lists"):
        next(stream)


def test_sums_that_rounding_made_more_than_one_are_one(tmp_path: Path, folder: Path) -> None:
    """And labels without anything for the other classes are counted."""
    rows = []
    for ids in texts(5, 20):
        row = current(ids)
        values = np.array(row["target_logprobs"])
        row["target_logprobs"] = (values - np.log(np.exp(values).sum(axis=1, keepdims=True) / 1.002)).tolist()
        rows.append({**row, "target_logprobs": np.minimum(row["target_logprobs"], 0).tolist()})
    result = converted(write_json(tmp_path / "a.jsonl", rows), tmp_path / "labels", folder)
    assert result.counts["whole"] == result.counts["labels"] > 0
    _, labels = read(tmp_path / "labels")
    total = np.exp(labels.logprobs[labels.labelled].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(total, 1, atol=2e-3)
    assert verify_labels(tmp_path / "labels", None).ok


def test_further_files_are_added_and_others_refused(tmp_path: Path, folder: Path) -> None:
    place, out = tmp_path / "data", tmp_path / "labels"
    place.mkdir()
    write_json(place / "b.jsonl", [current(ids) for ids in texts(6, 20)])
    assert converted(place, out, folder, k=K).made == 1
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    write_json(place / "a.jsonl", [current(ids) for ids in texts(7, 20)])
    result = converted(place, out, folder, k=K)
    assert (result.made, result.files, result.counts["rows"]) == (1, 2, 40)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    with pytest.raises(ValueError, match="holds labels of other sources"):
        converted(place, out, folder, k=K - 1)


class ChainTeacher:
    """The chain as a teacher that can be asked again."""

    num_classes, max_length, source = C, None, "logits"

    def __init__(self, tokenizer: Path, table: Float64 = CHAIN) -> None:
        self._fingerprint, self._table = load_tokenizer(tokenizer, "--tokenizer").fingerprint(), table

    def fingerprint(self) -> str:
        return "chain"

    def tokenizer_fingerprint(self) -> str:
        return self._fingerprint

    def token_labels(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> TokenLabels:
        columns = {name: np.array(blocks[name].to_pylist()) for name in ("input_ids", "segment_ids", "completion_mask")}
        found = TokenLabels.empty(len(blocks), spec)
        for place in np.argwhere(has_label(columns["segment_ids"], columns["completion_mask"])):
            at = tuple(place)
            said = self._table[columns["input_ids"][at]]
            found.classes[at] = np.argsort(-said)[: spec.k]
            found.logprobs[at] = said[found.classes[at]]
            found.token_logprob[at] = said[columns["input_ids"][at[0], at[1] + 1]]
        return found

    def close(self) -> None:
        pass


def test_the_teacher_is_asked_again(tmp_path: Path, folder: Path) -> None:
    """What the labels do not say of the token that is there is no difference; another teacher is one."""
    source = write_json(tmp_path / "a.jsonl", [current(ids) for ids in texts(12, 40)])
    result = converted(source, tmp_path / "labels", folder, teacher="chain")
    assert result.counts["unknown"] > 0
    form = TokenForm(**wanted_form(result.spec))
    same = verify_labels(tmp_path / "labels", BlockAnswers(ChainTeacher(folder), form))
    assert same.ok, same.problems
    assert same.comparison is not None
    assert same.comparison.largest_difference < 2e-3
    other = verify_labels(tmp_path / "labels", BlockAnswers(ChainTeacher(folder, chain(1)), form))
    assert not other.ok


def test_commands_and_what_reads_the_labels(tmp_path: Path, folder: Path) -> None:
    source = write_json(tmp_path / "a.jsonl", [current(ids) for ids in texts(8, 40)])
    run, labels = CliRunner(), tmp_path / "labels"
    words = ["convert", str(source), "--from", "axolotl", "--tokenizer", str(folder), "--sequence-length", str(LENGTH)]
    shown = run.invoke(app, [*words, "--out", str(labels)])
    assert shown.exit_code == 0, shown.exception
    assert "Lists describe the next token" in shown.output
    shown = run.invoke(app, ["inspect", str(labels), "--tokenizer", str(folder)])
    assert shown.exit_code == 0, shown.exception
    assert f"top {K} with tail" in shown.output
    batch = next(iter(TokenLabelDataset(labels, batch_size=2, seed=0)))
    assert batch["teacher_logprobs"].shape == (2, LENGTH, K)
    student, training = small.settings(folder, None, epochs=1)
    data = {"soft_labels": [labels], "validation": labels}
    result = train_language_model(student, training, **data, directory=tmp_path / "student", seed=0)
    assert np.isfinite(result.metrics["validation_kl"])
    assert not [name for name in result.metrics if "teacher" in name], "some labels do not say it"
    shown = run.invoke(app, ["convert", str(labels), "--to", "axolotl", "--out", str(tmp_path / "back")])
    assert shown.exit_code == 0, shown.exception
    assert "40 row(s)" in shown.output
    for words, sentence in {
        "--out x": "one of --from and --to must be given",
        "--out x --from verl": "--from must be one of",
        "--out x --to verl": "--to must be axolotl",
        "--out x --from lists": "--tokenizer and --sequence-length",
        "--out x --to axolotl --alignment both": "--alignment must be one of",
        f"--out {tmp_path / 'back'} --to axolotl": "is there already",
    }.items():
        failed = run.invoke(app, ["convert", str(labels), *words.split()])
        assert sentence in str(failed.exception)
