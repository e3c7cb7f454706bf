"""The score phase over blocks: what is bought is not scored, what cannot be scored is listed, and the files are those of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from language_models import write_tokenizer
from language_runs import STUDENT, write_blocks

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.acquisition.score import Candidates, read_candidates, read_gains, read_sketches
from distilbeam.pipelines.acquisition.score_blocks import NO_LABEL, ScoreBlocks, arrays_of
from distilbeam.pipelines.acquisition.unusable_rows import gather_unusable
from distilbeam.pipelines.jobs.blocks import COLUMNS
from distilbeam.pipelines.pool.splits import Pool, plan_pool
from distilbeam.student.language import scoring
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.language.folder import load_language_model
from distilbeam.student.language.untrained import write_untrained
from distilbeam.teacher.softlabels import SoftLabelSpec

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
ROWS = 30


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder, "tokenizer")
    spec = SoftLabelSpec(
        tokenizer.num_classes,
        kind="top_k",
        k=4,
        teacher="t",
        unit="token",
        sequence_length=16,
        tokenizer=tokenizer.fingerprint(),
    )
    write_untrained(LanguageModelConfig(config=STUDENT, tokenizer=str(folder)), spec, tmp_path / "student", 0)
    return tmp_path / "student"


def pool_of(tmp_path: Path, table: pa.Table) -> Pool:
    pq.write_table(table, tmp_path / "pool.parquet", row_group_size=10)
    return plan_pool(tmp_path / "pool.parquet", 10, "pool", COLUMNS)


def score(work: ScoreBlocks, pool: Pool) -> None:
    for unit in work.remaining(pool.units):
        work.settle(list(work(unit)))


def test_each_unit_has_the_scores_of_its_blocks(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_blocks(tmp_path / "all.parquet", ROWS, 1)
    pool = pool_of(tmp_path, table)
    bought = tmp_path / "bought"
    bought.mkdir()
    pq.write_table(pa.table({"row": np.array([0, 7])}), bought / f"{pool.units[1].uid}.parquet")
    seen = []
    every = scoring.score_blocks
    monkeypatch.setattr(
        scoring,
        "score_blocks",
        lambda network, blocks, *rest: (seen.append(len(blocks["input_ids"])), every(network, blocks, *rest))[1],
    )
    candidates = Candidates(1.0, 0, 0, str(tmp_path / "embeddings"))
    work = ScoreBlocks(str(student), "entropy", str(tmp_path / "gains"), (str(bought),), 300, 4, candidates=candidates)
    score(work, pool)
    assert sum(seen) == ROWS - 2
    assert max(seen) <= 4
    model = load_language_model(student)
    expected = every(model.network, arrays_of(table), "entropy", 300, next(model.network.parameters()).device)
    for number, unit in enumerate(pool.units):
        rows, gains = read_gains(tmp_path / "gains", unit)
        assert rows.tolist() == [r for r in range(10) if number != 1 or r not in (0, 7)]
        np.testing.assert_allclose(gains, expected.gains[10 * number + rows], rtol=1e-5)
        wanted, kept = read_candidates(tmp_path / "embeddings", unit, ["embeddings"])
        assert wanted.tolist() == rows.tolist()
        np.testing.assert_allclose(kept["embeddings"], expected.embeddings[10 * number + rows], rtol=1e-3, atol=1e-5)
    assert sum(sketch.count for sketch in read_sketches(tmp_path / "gains", pool.units)) == ROWS - 2
    assert work.remaining(pool.units) == []


def test_blocks_that_cannot_be_scored_are_left_out_and_listed(tmp_path: Path, student: Path) -> None:
    table = write_blocks(tmp_path / "all.parquet", ROWS, 1)
    columns = {name: np.array(values) for name, values in arrays_of(table).items()}
    columns["input_ids"][3, 2] = 300
    columns["completion_mask"][14] = 0
    for name, values in columns.items():
        kind = table.schema.field(name).type
        flat = pa.array(values.reshape(-1), kind.value_type)
        table = table.set_column(
            table.schema.get_field_index(name),
            table.schema.field(name),
            pa.FixedSizeListArray.from_arrays(flat, type=kind),
        )
    pool = pool_of(tmp_path, table)
    work = ScoreBlocks(str(student), "margin", str(tmp_path / "gains"), (), 300, 8)
    score(work, pool)
    found = gather_unusable(tmp_path / "gains", pool.units)
    assert [(row["row"], row["reason"]) for row in found] == [
        (3, "id 300 is none of the 300 of the labels"),
        (14, NO_LABEL),
    ]
    rows = [10 * n + r for n, unit in enumerate(pool.units) for r in read_gains(tmp_path / "gains", unit)[0]]
    assert rows == [row for row in range(ROWS) if row not in (3, 14)]
