"""A text student whose embeddings start from a sentence encoder: through a run, killed, with a pool larger than what is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines import run
from distilbeam.pipelines.acquisition.encode_texts import EncodeTexts
from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.run import Run
from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.encoder_table import read_table

WORDS, CLASSES, POOL, DIM = 30, 3, 160, 4


def texts(rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    # a class has ten words of its own
    words = [[f"w{10 * label + rng.integers(0, 10)}" for _ in range(rng.integers(2, 6))] for label in labels]
    said = np.eye(CLASSES, 6)[labels] + 0.1 * rng.normal(size=(rows, 6))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(said.astype(np.float16).reshape(-1)), 6)
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(CLASSES, 4)[labels].astype(np.float32).reshape(-1)), 4)
    return pa.table(
        {
            "key": [f"{seed}-{i}" for i in range(rows)],
            "text": [" ".join(w) for w in words],
            "x": x,
            "v": vectors,
            "label": labels,
        }
    )


@pytest.fixture
def settings(problem: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    data = copy.deepcopy(problem)
    for path in (tmp_path / "pool").glob("*.parquet"):
        path.unlink()
    pool = texts(POOL, 1).drop_columns(["label"])
    for number in range(2):
        pq.write_table(pool.slice(80 * number, 80), tmp_path / "pool" / f"{number}.parquet", row_group_size=20)
    for name, rows, seed in (("labelled", 15, 2), ("validation", 30, 3), ("test", 40, 4)):
        pq.write_table(texts(rows, seed).drop_columns(["v"]), tmp_path / f"{name}.parquet")
    reads = {"kind": "text", "columns": ["text"], "buckets": 64, "ngrams": [1, 1], "ngram_form": "ids", "max_length": 6}
    data["student"] = {
        "kind": "text",
        "hidden": [],
        "dim": DIM,
        "input": reads,
        "init": "encoder",
        "encoder": {"column": "v"},
    }
    data["run"]["rounds"], data["selection"]["compare_uniform"] = 1, False
    return data


def of(data: dict[str, Any], tmp_path: Path) -> Run:
    return Run(parse_config(data).relative_to(tmp_path), RunDirectory(tmp_path / "run"))


def test_students_start_where_the_encoder_puts_their_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, base=tmp_path, until=("encode", None))
    made = of(settings, tmp_path)
    table = read_table(made.encoder_start(made.config.student).table)
    assert table.shape == (64, DIM)
    assert not (tmp_path / "asked.log").exists(), "the teacher is not asked"
    pool = texts(POOL, 1)
    inputs = load_inputs(made, pool)
    bags = np.stack([table[row[row != 0]].mean(axis=0) for row in inputs])
    said = np.stack(pool["v"].to_numpy(zero_copy_only=False)).astype(float)
    centred = said - said.mean(axis=0)
    # most of what the vectors say of a text is in its bag: a linear map of the bags gives them back
    given = bags @ np.linalg.lstsq(bags, centred, rcond=None)[0]
    assert np.square(centred - given).sum() < 0.2 * np.square(centred).sum()
    run(settings, base=tmp_path)
    student = load_student(made.directory.student(1))
    near = np.corrcoef(np.abs(student.module.embedding.weight.detach().numpy()[1:]).sum(1), np.abs(table[1:]).sum(1))
    assert near[0, 1] > 0.9, "three epochs do not lead far from where it started"


def load_inputs(made: Run, pool: pa.Table) -> np.ndarray:
    from distilbeam.inputs.config import make_input

    (batch,) = pool.combine_chunks().to_batches()
    return np.asarray(make_input(made.config.student.input)(batch))


def test_random_weights_are_what_other_students_start_from(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = copy.deepcopy(settings)
    del plain["student"]["init"], plain["student"]["encoder"]
    run(plain, base=tmp_path, until=("train", 0))
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_phase_that_was_killed_goes_on_to_the_same_table(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, base=tmp_path, until=("encode", None))
    made = of(settings, tmp_path)
    start = made.encoder_start(made.config.student)
    first, files = start.table.read_bytes(), sorted(Path(start.work.output).glob("*.parquet"))
    assert len(files) == len(made.inputs.pool.units) > 1
    times = {file: file.stat().st_mtime_ns for file in files}
    start.table.unlink()
    files[0].unlink()
    run(settings, base=tmp_path, until=("encode", None))
    assert start.table.read_bytes() == first
    assert [file for file in files if file.stat().st_mtime_ns != times[file]] == files[:1]


def test_of_a_large_pool_some_rows_are_encoded(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["student"]["encoder"]["rows"] = 40
    made = of(settings, tmp_path)
    start = made.encoder_start(made.config.student)
    start.fit()
    rows = sum(pq.read_metadata(file).num_rows for file in Path(start.work.output).glob("*.parquet"))
    # 160 rows, each drawn with 1/4: a standard deviation of 5.5, five of which are allowed
    assert 40 - 27 < rows < 40 + 27


def test_rows_that_the_student_cannot_read_or_without_a_finite_vector_are_left_out(
    settings: dict[str, Any],
) -> None:
    pool = texts(20, 5).drop_columns(["label"])
    said = np.stack(pool["v"].to_numpy(zero_copy_only=False)).astype(np.float32)
    said[3, 2] = np.nan
    vectors = pa.array([None if i == 9 else row.tolist() for i, row in enumerate(said)], pa.list_(pa.float32()))
    words = [None if i == 7 else t for i, t in enumerate(pool["text"].to_pylist())]
    pool = pool.set_column(1, "text", [words]).set_column(3, "v", vectors)
    student = parse_config(settings).student
    assert student.encoder is not None
    work = EncodeTexts(student.encoder, student.input, "", 1.0, 0, 16)
    (batch,) = pool.combine_chunks().to_batches()
    found = work._encoded(batch)
    assert found.num_rows == 17
    kept = [i for i in range(20) if i not in (3, 7, 9)]
    np.testing.assert_array_equal(np.stack(found["vector"].to_numpy(zero_copy_only=False)), said[kept])
    assert [sum(w) for w in found["weights"].to_pylist()] == pytest.approx([1.0] * 17)
    none = batch.take(pa.array([7, 9]))
    assert work._encoded(none).num_rows == 0
    odd = pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))
    with pytest.raises(ValueError, match=r"vectors of v must have as many numbers in every row, got 1 and 2"):
        work._encoded(pa.record_batch({"text": ["w1", "w2"], "v": odd}))


def test_a_pool_without_the_column_or_with_other_values_is_a_sentence(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["student"]["encoder"]["column"] = "w"
    with pytest.raises(ValueError, match=r"data.pool has no column w"):
        run(settings, base=tmp_path)
    settings["student"]["encoder"]["column"] = "key"
    with pytest.raises(ValueError, match=r"student.encoder.column: key must hold lists of numbers, got string"):
        run(settings, base=tmp_path)


def test_a_hugging_face_folder_encodes_the_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path / "encoder"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    (folder).mkdir()
    (folder / "vocab.txt").write_text("\n".join(names))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=len(names), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(shape).eval()
    model.save_pretrained(folder)
    settings["student"]["encoder"] = {"folder": "encoder"}
    run(settings, base=tmp_path, until=("encode", None))
    made = of(settings, tmp_path)
    unit = made.inputs.pool.units[0]
    start = made.encoder_start(made.config.student)
    said = np.stack(
        pq.read_table(Path(start.work.output) / f"{unit.uid}.parquet")["vector"].to_numpy(zero_copy_only=False)
    )
    text = texts(POOL, 1)["text"].to_pylist()[unit.pool_row + 5]
    with torch.no_grad():  # alone, without padding
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(said[5], states / np.linalg.norm(states), atol=1e-5)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    from distilbeam.student.data.sentence_encoder import SentenceEncoder

    with torch.no_grad():
        first = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(SentenceEncoder(str(folder), 128)([text])[0], first / np.linalg.norm(first), atol=1e-5)
    with pytest.raises(ValueError, match=r"must be a folder with config.json"):
        SentenceEncoder(str(tmp_path / "nowhere"), 128)
