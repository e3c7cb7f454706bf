"""DistillKit's compressed log-probabilities: what its own code packed, packed texts, and what cannot be read.

The bytes in GOLDEN and what they decode to are what DistillKit's `LogprobCompressor` made of two distributions over 300
classes, log_softmax(3.5 * randn) of torch's seed 0; its decoder was asked for float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import write_tokenizer

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.conversion.distillkit import Compression, decompress, read_compression, unpack_ids
from distilbeam.pipelines.conversion.importing import Converted, ConvertOptions, convert_labels
from distilbeam.teacher.softlabels import decode_tokens, read_manifest

IDS = "1d914b22d87a18f4fe0b8fa1c600ead9c23a", "2e89530ee88a10e51f7ec04642c0c1fd2c73"
CLASSES = (
    [59, 69, 89, 45, 271, 134, 122, 254, 23, 62, 270, 96, 29, 182, 225, 58],
    [93, 37, 152, 238, 273, 132, 114, 287, 253, 257, 50, 44, 24, 127, 150, 115],
)
BINS = [
    {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
    {"scale_dtype": "float32", "element_bits": 1, "num_elements": 4},
]
GOLDEN: dict[str, tuple[dict[str, Any], tuple[str, str], tuple[list[float], list[float]]]] = {
    "exact": (
        {"k": 8, "exact_k": 8, "polynomial_terms": None, "residual_bins": [], "delta_encoding": False},
        (
            "356914be072b46c078bb80c064c480c037479bc0fa23a8c0e05fabc0857eadc0",
            "fee30cbfc74593bf5cb93fc0d09c41c0c6ced8c03556e0c09b05e6c03713f5c0",
        ),
        (
            [-0.1449326, -3.096376, -4.022884, -4.023973, -4.852443, -5.254392, -5.355453, -5.421694],
            [-0.5503539, -1.150567, -2.995688, -3.025196, -6.775241, -7.010523, -7.188184, -7.658596],
        ),
    ),
    "the recommended terms": (
        {
            "k": 16,
            "exact_k": 4,
            "exact_dtype": "bfloat16",
            "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
            "residual_bins": [],
            "delta_encoding": False,
        },
        (
            "14be46c081c081c023259bc04cd58f3fe9d76cbe1cd5ab3c5fdc2cba8a11aebf",
            "0dbf93bf40c042c0d501d9c0498e96bf42242c3eb8bb58bc44e6c13910b05d3f",
        ),
        (
            [
                -0.1445312,
                -3.09375,
                -4.03125,
                -4.03125,
                -4.848283,
                -5.295473,
                -5.292008,
                -5.401328,
                -5.600363,
                -5.843139,
                -6.087573,
                -6.302318,
                -6.46925,
                -6.584581,
                -6.659443,
                -6.720177,
            ],
            [
                -0.5507812,
                -1.148438,
                -3.0,
                -3.03125,
                -6.781474,
                -6.936474,
                -7.336726,
                -7.624472,
                -7.81663,
                -7.945917,
                -8.043762,
                -8.135965,
                -8.241108,
                -8.369839,
                -8.524519,
                -8.699014,
            ],
        ),
    ),
    "differences": (
        {"k": 12, "exact_k": 4, "polynomial_terms": [0, 1, 2], "residual_bins": [], "delta_encoding": True},
        (
            "356914be74e43cc0a42f6dbf00c08ebadceb36bfacd0993e211212bd",
            "fee30cbf90a719bff12cecbf00baf1bc59592dc050cca13f4e7909be",
        ),
        (
            [
                -0.1449326,
                -3.096376,
                -4.022884,
                -4.023973,
                -4.73851,
                -5.188288,
                -5.444632,
                -5.578864,
                -5.662309,
                -5.76629,
                -5.962131,
                -6.321156,
            ],
            [
                -0.5503539,
                -1.150567,
                -2.995688,
                -3.025196,
                -5.733774,
                -7.312557,
                -8.030047,
                -8.154749,
                -7.955166,
                -7.699801,
                -7.657158,
                -8.095741,
            ],
        ),
    ),
    "terms and bins": (
        {
            "k": 12,
            "exact_k": 2,
            "exact_dtype": "float16",
            "polynomial_terms": [0, "exp"],
            "term_dtype": "bfloat16",
            "residual_bins": BINS,
            "delta_encoding": False,
            "normalize_t": True,
            "error_diffusion": True,
        },
        ("a3b031c245c0a2bf9e27dfd4a03fd23e00", "67b89abc06c029c01330f7ccd4589d3f00"),
        (
            [
                -0.1448975,
                -3.095703,
                -4.016449,
                -4.05368,
                -4.834778,
                -5.254392,
                -5.473142,
                -5.691892,
                -5.973142,
                -5.8125,
                -6.15625,
                -6.5,
            ],
            [
                -0.550293,
                -1.150391,
                -2.967529,
                -3.15271,
                -6.648193,
                -7.010523,
                -7.448023,
                -7.916773,
                -8.448023,
                -7.84375,
                -8.5,
                -9.25,
            ],
        ),
    ),
    "bins alone": (
        {
            "k": 6,
            "exact_k": 0,
            "residual_bins": [{"scale_dtype": "float64", "element_bits": 11, "num_elements": 6}],
            "delta_encoding": True,
            "error_diffusion": True,
        },
        ("000000808e9c673f79c0015f4005c0dd40", "0000008017006e3f6d4d71043f8000f000"),
        (
            [-0.1441135, -3.095557, -4.023648, -4.023648, -4.853741, -5.254377],
            [-0.549323, -1.149916, -2.995641, -3.024938, -6.774983, -7.009361],
        ),
    ),
}
C, K, LENGTH = 300, 6, 32
LOGITS = np.random.default_rng(0).normal(0, 3.5, (C, C))
CHAIN = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))  # of what follows each token
EXACT = {"d": C, "k": K, "exact_k": K, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_distillkit_packed_is_read_as_it_reads_it(name: str) -> None:
    settings, packed, decoded = GOLDEN[name]
    compression = Compression.model_validate({"d": C, **settings})
    values = decompress(np.array([list(bytes.fromhex(row)) for row in packed], np.uint8), compression)
    np.testing.assert_allclose(values, decoded, rtol=2e-6, atol=2e-6)
    size = compression.id_bytes
    assert compression.id_bits == 9
    assert size == -(-9 * compression.k // 8)
    ids = np.array([list(bytes.fromhex(row)[:size]) for row in IDS], np.uint8)
    found = unpack_ids(ids, compression)
    assert found.tolist() == [row[: compression.k] for row in CLASSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(seed: int, count: int) -> list[list[int]]:
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        ids = [int(rng.integers(C))]
        while len(ids) < 6 + i % 9:
            ids.append(int(rng.choice(C, p=np.exp(CHAIN[ids[-1]]))))
        found.append(ids)
    return found


def most_probable(token: int) -> list[int]:
    return [int(c) for c in np.argsort(-CHAIN[token])[:K]]


def packed_bits(numbers: list[int], bits: int) -> list[int]:
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    return list(np.packbits([int(bit) for bit in text]))


def captured(ids: list[int]) -> dict[str, Any]:
    """A row of a capture: a list for each token but the last, of the token behind it."""
    top = [most_probable(t) for t in ids[:-1]]
    values = [CHAIN[t, kept].astype("<f4") for t, kept in zip(ids, top, strict=False)]
    return {
        "input_ids": ids,
        "compressed_logprobs": [list(row.tobytes()) for row in values],
        "bytepacked_indices": [packed_bits(kept, 9) for kept in top],
    }


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Texts as DistillKit packs them: each without its last token, numbered in the mask."""
    packed: dict[str, list[Any]] = {
        "input_ids": [],
        "compressed_logprobs": [],
        "bytepacked_indices": [],
        "attention_mask": [],
    }
    for number, row in enumerate(rows, 1):
        count = len(row["compressed_logprobs"])
        for name in ("input_ids", "compressed_logprobs", "bytepacked_indices"):
            packed[name] += row[name][:count]
        packed["attention_mask"] += [number] * count
    return packed


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    kinds = {"input_ids": pa.list_(pa.uint64()), "attention_mask": pa.list_(pa.int64())}
    lists, floats = pa.list_(pa.list_(pa.uint8())), pa.list_(pa.list_(pa.float32()))
    kinds |= {"compressed_logprobs": lists, "bytepacked_indices": lists}
    kinds |= {"top_values": floats, "token_ids": pa.list_(pa.list_(pa.int64()))}
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, kinds.get(name, floats)) for name in rows[0]]))


def write(place: Path, rows: list[dict[str, Any]], settings: dict[str, Any] | None = None, *, arrow: str = "") -> Path:
    place.mkdir(exist_ok=True)
    table = table_of(rows)
    if arrow:
        make = pa.ipc.new_stream if arrow == "stream" else pa.ipc.new_file
        with make(place / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, place / "data_0.parquet")
    if settings is not None:  # what is JSON is YAML
        (place / "compression_config.yaml").write_text(json.dumps(settings))
    return place


def converted(source: Path, out: Path, folder: Path, **settings: Any) -> Converted:
    return convert_labels([str(source)], out, ConvertOptions("distillkit", str(folder), LENGTH, **settings))


def check(out: Path, wanted: list[list[int]]) -> None:
    """Compare each label with the chain."""
    manifest = read_manifest(out)
    table = pa.concat_tables([pq.read_table(path) for path in manifest.paths()]).combine_chunks()
    ids, segments = (np.array(table[name].to_pylist()) for name in ("input_ids", "segment_ids"))
    assert len(set(table["example_id"].to_pylist())) == len(table)
    labels = decode_tokens(table, manifest.spec)
    assert labels.tail_logmass is not None
    found = []
    for block, row in enumerate(segments):
        for one in range(1, row.max() + 1):
            at = np.flatnonzero(row == one)
            found.append(ids[block, at].tolist())
            assert labels.labelled[block, at].tolist() == [True] * (len(at) - 1) + [False]
            for place in at[:-1]:
                before, kept = ids[block, place], most_probable(int(ids[block, place]))
                assert labels.classes[block, place].tolist() == kept
                np.testing.assert_allclose(labels.logprobs[block, place], CHAIN[before, kept], rtol=1e-3)
                rest = 1 - np.exp(CHAIN[before, kept]).sum()
                assert labels.tail_logmass[block, place] == pytest.approx(np.log(rest), abs=1e-4)
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("arrow", ["", "stream", "file"])
def test_a_capture_becomes_labels(tmp_path: Path, folder: Path, arrow: str) -> None:
    found = texts(0, 30)
    source = write(tmp_path / "capture", [captured(ids) for ids in found], EXACT, arrow=arrow)
    result = converted(source, tmp_path / "labels", folder)
    assert (result.alignment, result.spec.k, result.spec.source) == ("next", K, "distillkit")
    check(tmp_path / "labels", found)


def test_packed_texts_are_texts_again(tmp_path: Path, folder: Path) -> None:
    found = texts(1, 36)
    rows = [together([captured(ids) for ids in found[i : i + 4]]) for i in range(0, len(found), 4)]
    source = write(tmp_path / "packed", rows, arrow="stream")
    (tmp_path / "mine.yaml").write_text(json.dumps({"teacher": {"kind": "dataset", "logprob_compressor": EXACT}}))
    result = converted(source, tmp_path / "labels", folder, compression=str(tmp_path / "mine.yaml"))
    check(tmp_path / "labels", [ids[:-1] for ids in found])
    assert result.counts["rows"] == len(found)


def test_lists_that_are_not_compressed_are_read_too(tmp_path: Path, folder: Path) -> None:
    found, rows = texts(2, 30), []
    for ids in found:
        top = [most_probable(t) for t in ids]
        values = [CHAIN[t, kept].tolist() for t, kept in zip(ids, top, strict=True)]
        rows.append({"input_ids": ids, "token_ids": top, "top_values": values})
    converted(write(tmp_path / "plain", rows), tmp_path / "labels", folder)
    check(tmp_path / "labels", found)


def test_what_cannot_be_read_is_said(tmp_path: Path, folder: Path) -> None:
    rows = [captured(ids) for ids in texts(0, 12)]
    bare = write(tmp_path / "bare", rows)
    with pytest.raises(
        ValueError, match=r"--compression must be given: compression_config.yaml.* is not beside .*row 1$"
    ):
        converted(bare, tmp_path / "labels", folder)
    other = write(tmp_path / "other", rows, {**EXACT, "exact_dtype": "bfloat16"})
    with pytest.raises(
        ValueError, match="compressed_logprobs must have 12 bytes for each token by --compression, got 24"
    ):
        converted(other, tmp_path / "labels", folder)
    wide = write(tmp_path / "wide", rows, {**EXACT, "d": 70_000})
    with pytest.raises(
        ValueError, match="bytepacked_indices must have 13 bytes for each token by --compression, got 7"
    ):
        converted(wide, tmp_path / "labels", folder)
    legacy = write(tmp_path / "legacy", [{"input_ids": [1, 2], "packed_indices": [[1.0]], "exact_values": [[1.0]]}])
    with pytest.raises(ValueError, match=r"row 1: it is of DistillKit's legacy form: it holds logits less their mean"):
        converted(legacy, tmp_path / "labels", folder)
    for settings, sentence in {
        "polynomial_degree: 8": "is of DistillKit's legacy form",
        "- 3": "must hold names and values",
        "k: [": "cannot be read",
        json.dumps({**EXACT, "exact_k": 9}): "exact_k must be at most k = 6, got 9",
        json.dumps({**EXACT, "exact_k": 2, "residual_bins": BINS}): "at most the 4 elements that are not exact",
    }.items():
        (tmp_path / "c.yaml").write_text(settings)
        with pytest.raises(ValueError, match=sentence):
            read_compression(tmp_path / "c.yaml")
    assert not (tmp_path / "labels").exists()


def test_approximated_values_share_what_exact_ones_leave(tmp_path: Path, folder: Path) -> None:
    """A polynomial may be above what it follows; what is exact stays so."""
    settings = {**EXACT, "exact_k": 2, "polynomial_terms": [0]}
    found = texts(3, 20)
    rows, exact = [], []
    for ids in found:
        head = [CHAIN[t, most_probable(t)].astype("<f4") for t in ids[:-1]]
        values = [np.r_[v[:2], np.log((1.1 - np.exp(v[:2]).sum()) / (K - 2))].astype("<f4") for v in head]
        rows.append({**captured(ids), "compressed_logprobs": [list(v.tobytes()) for v in values]})
        exact.append([list(np.full(K, -0.5, "<f4").tobytes()) for _ in head])
    result = converted(write(tmp_path / "high", rows, settings), tmp_path / "labels", folder)
    assert result.counts["whole"] == result.counts["labels"]
    table = pq.read_table(read_manifest(tmp_path / "labels").paths()[0]).combine_chunks()
    labels, ids = decode_tokens(table, result.spec), np.array(table["input_ids"].to_pylist())
    for block, place in np.argwhere(labels.labelled):
        before = int(ids[block, place])
        kept = dict(zip(labels.classes[block, place].tolist(), labels.logprobs[block, place].tolist(), strict=True))
        for token in most_probable(before)[:2]:
            assert kept[token] == pytest.approx(CHAIN[before, token], rel=1e-3)
        assert np.exp(list(kept.values())).sum() == pytest.approx(1, abs=2e-3)
    wrong = [{**row, "compressed_logprobs": values} for row, values in zip(rows, exact, strict=True)]
    with pytest.raises(ValueError, match="must sum to at most 1"):
        converted(write(tmp_path / "wrong", wrong, EXACT), tmp_path / "wrong-labels", folder)


def test_the_command(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "capture", [captured(ids) for ids in texts(0, 30)], EXACT)
    words = [
        "convert",
        str(tmp_path / "capture"),
        "--tokenizer",
        str(folder),
        "--sequence-length",
        str(LENGTH),
        "--from",
    ]
    result = CliRunner().invoke(app, [*words, "distillkit", "--out", str(tmp_path / "labels")])
    assert result.exit_code == 0, result.output
    assert "Lists describe the next token" in result.output
    result = CliRunner().invoke(app, [*words, "lists", "--out", str(tmp_path / "o"), "--compression", "c.yaml"])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "--compression is for --from distillkit, got --from lists"
