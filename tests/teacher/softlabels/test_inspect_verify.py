"""Looking at a dataset, and checking it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from distilbeam.teacher import inspect_labels, verify_labels
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, entry_path, file_checksum, read_manifest, write_shard

NAMES = ("ant", "bee", "[cat]", "dog")
W = np.random.default_rng(0).normal(size=(3, 4))


class Linear:
    """The teacher of the datasets here."""

    parallel = 1

    def __init__(self, shift: float = 0.0, name: str = "linear:1", broken: int | None = None) -> None:
        self.shift, self.name, self.broken = shift, name, broken

    def fingerprint(self) -> str:
        return self.name

    def logits(self, batch: pa.RecordBatch) -> np.ndarray:
        x = np.array(batch["x"].to_pylist())
        if (
            self.broken is not None
            and (batch["example_id"].to_numpy(zero_copy_only=False) == f"row-{self.broken}").any()
        ):
            raise RuntimeError("no answer")
        answer = x @ W
        answer[:, 0] += self.shift
        return answer.astype(np.float32)

    def close(self) -> None:
        pass


def spec(kind: Any = "top_k", k: int | None = 2, **fields: Any) -> SoftLabelSpec:
    return SoftLabelSpec(4, kind, k, classes=NAMES, teacher="linear:1", carried=("x",), **fields)


def write(folder: Path, wanted: SoftLabelSpec, rows: int = 300, shards: int = 3) -> Path:
    x = np.random.default_rng(1).normal(size=(rows, 3)) * 2
    for i, part in enumerate(np.array_split(np.arange(rows), shards)):
        labels = encode(x[part] @ W, wanted, rng=np.random.default_rng(i))
        columns = dict(zip(labels.schema.names, labels.columns, strict=True))
        table = pa.table({"example_id": [f"row-{r}" for r in part], "x": x[part].tolist(), **columns})
        write_shard(folder, f"s{i}", table, wanted, f"k{i}")
    return folder


def shown(thing: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=120, no_color=True).print(thing)
    return out.getvalue()


@pytest.mark.parametrize("wanted", [spec("dense", None), spec(), spec("sampled", 30)])
def test_inspection_counts_what_is_there(tmp_path: Path, wanted: SoftLabelSpec) -> None:
    found = inspect_labels(write(tmp_path, wanted), samples=4, bins=5)
    manifest = read_manifest(tmp_path)
    assert (found.shards, found.rows, found.bytes, found.spec) == (3, 300, manifest.bytes, wanted)
    assert found.bytes_per_row == manifest.bytes / 300
    logits = np.random.default_rng(1).normal(size=(300, 3)) * 2 @ W
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    if wanted.kind != "sampled":
        np.testing.assert_array_equal(found.confidence, np.histogram(p.max(axis=1), bins=5, range=(0, 1))[0])
    assert sum(found.confidence) == found.confidence_rows == 300
    assert set(found.column_bytes) == set(pq.read_schema(tmp_path / "s0.parquet").names)
    assert len(found.samples) == 4
    for sample in found.samples:
        row = int(sample.example_id.removeprefix("row-"))
        name, probability = sample.classes[0]
        if wanted.kind != "sampled":
            assert name == NAMES[p[row].argmax()]
            assert abs(probability - p[row].max()) < 2e-4
        assert probability == max(value for _, value in sample.classes)


def test_inspection_prints_names_as_they_are(tmp_path: Path) -> None:
    text = shown(inspect_labels(write(tmp_path, spec()), samples=50))
    for part in (
        "top 2 with tail",
        "4 (ant, bee, [cat], dog)",
        "linear:1",
        "300",
        "row-",
        "[cat] 0.",
        "largest probability",
    ):
        assert part in text


def test_inspection_opens_only_as_many_shards_as_it_needs(tmp_path: Path) -> None:
    write(tmp_path, spec())
    (tmp_path / "s1.parquet").unlink()
    found = [
        inspect_labels(tmp_path, most_rows=50, seed=seed) for seed in range(12) if not _opens(tmp_path, seed, "s1")
    ]
    assert found
    assert {f.confidence_rows for f in found} == {100}
    assert {f.rows for f in found} == {300}
    with pytest.raises(
        ValueError, match=r"s1.parquet cannot be read \(.*\); 'distilbeam verify' says what else is damaged"
    ):
        inspect_labels(tmp_path)


def _opens(folder: Path, seed: int, name: str) -> bool:
    first = np.random.default_rng(seed).permutation(3)[0]
    return read_manifest(folder).paths()[first].stem == name


def test_binary_ids_are_shown_in_hexadecimal(tmp_path: Path, labelled: Callable[..., pa.Table]) -> None:
    table = labelled(np.zeros((2, 4)), SoftLabelSpec(4))
    table = table.set_column(0, "example_id", pa.array([b"\x01\xff", b"\x02\xee"]))
    write_shard(tmp_path, "s", table, SoftLabelSpec(4), "k")
    assert {s.example_id for s in inspect_labels(tmp_path).samples} == {"01ff", "02ee"}


@pytest.mark.parametrize(
    "wanted", [spec("dense", None), spec(), spec("sampled", 30), spec(storage="float16"), spec(temperature=2.0)]
)
def test_a_whole_dataset_verifies(tmp_path: Path, wanted: SoftLabelSpec) -> None:
    write(tmp_path, wanted)
    plain = verify_labels(tmp_path)
    assert plain.ok
    assert (plain.shards, plain.rows, plain.comparison) == (3, 300, None)
    again = verify_labels(tmp_path, Linear(), sample=100)
    assert again.problems == ()
    assert again.comparison is not None
    assert (again.comparison.rows, again.comparison.failed, again.comparison.same_teacher) == (100, 0, True)
    assert again.comparison.largest_difference < 2e-4
    assert "everything is as the manifest says" in shown(again)


@pytest.mark.parametrize("wanted", [spec("dense", None), spec(), spec("sampled", 2048)])
def test_a_teacher_that_says_something_else_is_found(tmp_path: Path, wanted: SoftLabelSpec) -> None:
    found = verify_labels(write(tmp_path, wanted), Linear(shift=3.0), sample=100)
    assert found.comparison is not None
    assert found.comparison.largest_difference > 0.1
    assert len(found.problems) == 1
    assert "the teacher's probabilities differ by up to" in found.problems[0]
    assert found.comparison.example_id in found.problems[0]


def test_another_teacher_and_unanswered_rows_are_problems(tmp_path: Path) -> None:
    write(tmp_path, spec())
    other = verify_labels(tmp_path, Linear(name="linear:2"), sample=10)
    assert other.problems == ("the labels are of the teacher linear:1, another one was given to compare with",)
    broken = verify_labels(tmp_path, Linear(broken=7), sample=300)
    assert broken.problems == ("the teacher cannot answer 1 of 300 rows that it has labelled",)
    assert broken.comparison is not None
    assert broken.comparison.largest_difference < 2e-4


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table], **entry: Any) -> None:
    """Replace the second shard and bring its manifest entry up to date, so that only the content is wrong."""
    path = folder / "s1.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    data = json.loads(entry_path(folder, "k1").read_text())
    data |= {"bytes": path.stat().st_size, "checksum": file_checksum(path), **entry}
    entry_path(folder, "k1").write_text(json.dumps(data))


def replaced(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        table.column_names.index(name), table.schema.field(name).with_type(values.type), values
    )


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda f: (f / "s1.parquet").unlink(), "s1.parquet is missing; label its rows again"),
    "cut": (lambda f: (f / "s1.parquet").write_bytes((f / "s1.parquet").read_bytes()[:-5]), "bytes, it has "),
    "flipped": (
        lambda f: (f / "s1.parquet").write_bytes(
            (lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:])((f / "s1.parquet").read_bytes())
        ),
        "must have the checksum sha256:",
    ),
    "unknown checksum": (
        lambda f: rewrite(f, lambda t: t, checksum="md4:00"),
        "a checksum must be of sha256 or blake2b, got 'md4'",
    ),
    "rows": (lambda f: rewrite(f, lambda t: t, rows=99), "s1.parquet must have 99 rows, it has 100"),
    "footer": (
        lambda f: rewrite(f, lambda t: t.replace_schema_metadata({})),
        "s1.parquet has no specification in its footer",
    ),
    "other footer": (
        lambda f: rewrite(f, lambda t: t.replace_schema_metadata({"distilbeam.softlabels": spec(k=3).to_json()})),
        "s1.parquet and its manifest entry differ in k (3 and 2)",
    ),
    "column": (
        lambda f: rewrite(f, lambda t: t.drop_columns(["teacher_margin"])),
        "soft labels must have a column teacher_margin",
    ),
    "carried": (lambda f: rewrite(f, lambda t: t.drop_columns(["x"])), "s1.parquet must have the columns x"),
    "mass": (
        lambda f: rewrite(f, replaced("teacher_tail_logmass", pa.array(np.zeros(100, np.float32)))),
        "s1.parquet: the probabilities of row 0 must sum to one",
    ),
    "nan": (
        lambda f: rewrite(f, replaced("teacher_tail_logmass", pa.array(np.full(100, np.nan, np.float32)))),
        "s1.parquet: the probabilities of row 0 must sum to one",
    ),
    "twice": (
        lambda f: rewrite(f, replaced("example_id", pa.array(["row-0", *(f"row-{i}" for i in range(101, 200))]))),
        "1 rows have an example_id that another row has too; label into an empty folder",
    ),
    "no parquet": (
        lambda f: rewrite(f, lambda t: t) or _garble(f),  # type: ignore[func-returns-value]
        "s1.parquet: ",
    ),
}


def _garble(folder: Path) -> None:
    (folder / "s1.parquet").write_bytes(b"not parquet")
    data = json.loads(entry_path(folder, "k1").read_text())
    data.update(bytes=11, checksum=file_checksum(folder / "s1.parquet"))
    entry_path(folder, "k1").write_text(json.dumps(data))


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_problem(tmp_path: Path, damage: str) -> None:
    write(tmp_path, spec())
    act, message = DAMAGES[damage]
    act(tmp_path)
    found = verify_labels(tmp_path)
    assert not found.ok
    assert len(found.problems) == 1, found.problems
    assert message in found.problems[0]
    assert "wrong: " in shown(found)


def test_left_over_files_are_a_note(tmp_path: Path) -> None:
    write(tmp_path, spec())
    (tmp_path / "left.parquet").write_bytes(b"")
    found = verify_labels(tmp_path)
    assert found.ok
    assert found.notes == (
        "1 Parquet files belong to no manifest entry and are not read (left.parquet); they may be removed",
    )
