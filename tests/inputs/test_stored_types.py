"""Columns in every way that Arrow stores their values, and values that no model can read: the row's error, not a number."""

from __future__ import annotations

import decimal
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.inputs.columns import plain, without_dictionaries
from distilbeam.inputs.config import InputConfig, InputError, make_input, padding_id, vocabulary_size, with_padding
from distilbeam.inputs.converting import converted
from distilbeam.teacher import ask

TEXTS = ["good film", "bad film", "good film", "", "dull play"]


def made(column: pa.Array, **options: Any) -> np.ndarray:
    config = InputConfig(**{"columns": ("x",), **options})
    array: np.ndarray = make_input(config)(pa.RecordBatch.from_arrays([column], ["x"]))
    return array


def runs(values: list[Any], type_: pa.DataType) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array(range(1, len(values) + 1), pa.int32()), pa.array(values, type_))


FORMS: dict[str, Callable[[], pa.Array]] = {
    "category": lambda: pa.array(TEXTS).dictionary_encode(),
    "category of large text": lambda: pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "large": lambda: pa.array(TEXTS, pa.large_string()),
    "view": lambda: pa.array(TEXTS, pa.string_view()),
    "runs": lambda: runs(TEXTS, pa.string()),
    "bytes": lambda: pa.array([t.encode() for t in TEXTS], pa.binary()),
    "large bytes": lambda: pa.array([t.encode() for t in TEXTS], pa.large_binary()),
    "bytes view": lambda: pa.array([t.encode() for t in TEXTS], pa.binary_view()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [slice(0, 5), slice(1, 4)])
def test_text_is_text_however_it_is_stored(form: str, window: slice) -> None:
    column = FORMS[form]().slice(window.start, window.stop - window.start)
    expected = made(pa.array(TEXTS)[window], kind="text", buckets=32)
    np.testing.assert_array_equal(made(column, kind="text", buckets=32), expected)
    assert made(column, kind="raw").tolist() == [text.encode() for text in TEXTS[window]]


def test_missing_text_of_a_category_is_found_and_bytes_must_be_utf8() -> None:
    with pytest.raises(InputError, match="column x must not have missing values, got 1"):
        made(pa.array(["a", None, "a"]).dictionary_encode(), kind="text")
    with pytest.raises(InputError, match="column x must hold text in UTF-8"):
        made(pa.array([b"\xff\xfe"], pa.large_binary()), kind="text")


X = [[1.0, -2.0], [3.0, 0.5], [0.0, 7.0]]
NUMBERS: dict[str, Callable[[], pa.Array]] = {
    "half": lambda: pa.array(np.array(X, np.float16).tolist(), pa.list_(pa.float16(), 2)),
    "decimal": lambda: pa.array([[decimal.Decimal(str(v)) for v in r] for r in X], pa.list_(pa.decimal128(20, 3))),
    "category": lambda: pa.array([r for row in X for r in row]).dictionary_encode(),
    "list view": lambda: pa.array([[9.0], *X], pa.list_view(pa.float64())).slice(1),
    "large list view": lambda: pa.array([[9.0], *X], pa.large_list_view(pa.float64())).slice(1),
    "runs": lambda: runs([r for row in X for r in row], pa.float64()),
}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_are_numbers_however_they_are_stored(form: str) -> None:
    found = made(NUMBERS[form]())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(3, 2), np.array(X, np.float32))


@pytest.mark.parametrize("type_", [pa.bool_(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int64()])
def test_whole_numbers_and_truths_are_numbers(type_: pa.DataType) -> None:
    np.testing.assert_array_equal(made(pa.array([1, 0, 1]).cast(type_)), [[1], [0], [1]])
    np.testing.assert_array_equal(
        made(pa.array([[1], [0]], pa.list_(type_) if type_ != pa.bool_() else None)), [[1], [0]]
    )


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2], pa.date32()),
        pa.array([1, 2], pa.timestamp("us")),
        pa.array([[1], [2]], pa.list_(pa.date32())),
        pa.array([["a"], ["b"]]),
        pa.array([{"a": 1}, {"a": 2}]),
    ],
)
def test_what_is_no_number_is_refused_whatever_the_rows(column: pa.Array) -> None:
    for rows in (column, column.slice(0, 0)):  # a schema can be tried without a row
        with pytest.raises(InputError, match=r"column x must hold numbers, lists of numbers or bytes, got .*; make"):
            made(rows)


def test_missing_numbers_in_lists_are_missing_values() -> None:
    for type_ in (pa.list_(pa.float64()), pa.large_list(pa.int64()), pa.list_(pa.float32(), 2)):
        with pytest.raises(InputError, match="column x must not have missing values, got 1"):
            made(pa.array([[1, 2], [3, None]], type_))


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        (
            pa.array([1.0, 1e39]),
            {},
            r"column x has numbers beyond float32, which ends at 3.4e38: row 1 has 1e\+39; set input.scale",
        ),
        (pa.array([[1.0, 2.0], [3.0, -1e300]]), {}, r"row 1 has -1e\+300"),
        (pa.array([np.array([1e200], "<f8").tobytes()], pa.binary(8)), {"dtype": "float64"}, r"row 0 has 1e\+200"),
        (pa.array([1e30], pa.float32()), {"scale": 1e10}, "row 0 has 1"),
        (pa.array([0, 2**53 + 1]), {}, r"row 1 has 9007199254740993: a whole number beyond 2\^53 is an id or a hash"),
        (pa.array([[0, 1], [2, 2**63]], pa.list_(pa.uint64(), 2)), {}, "row 1 has 9223372036854775808"),
    ],
)
def test_numbers_that_float32_does_not_hold_are_the_rows_errors(
    column: pa.Array, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(column, **options)


def test_numbers_that_are_no_numbers_pass() -> None:  # models of trees read a missing value in NaN
    np.testing.assert_array_equal(made(pa.array([np.nan, np.inf, -np.inf])), [[np.nan], [np.inf], [-np.inf]])


def test_large_numbers_are_scaled_before_they_are_rounded() -> None:
    np.testing.assert_allclose(made(pa.array([2e39, 1e39]), scale=1e-39), [[2], [1]], rtol=1e-6)
    second = 1_700_000_000
    found = made(pa.array([second + 1, second + 90]), mean=(second,))
    np.testing.assert_array_equal(found, [[1], [90]])  # float32 knows these seconds to 64 only


class _Sum:
    def fingerprint(self) -> str:
        return "sum"

    def logits(self, batch: pa.RecordBatch) -> np.ndarray:
        x = make_input(InputConfig(columns=("x",)))(batch)
        return np.stack([x[:, 0], -x[:, 0]], 1)

    def close(self) -> None: ...


def test_a_number_too_large_costs_its_row_alone() -> None:
    column = pa.array([float(i) for i in range(20)]).to_numpy().copy()
    column[13] = 1e300
    answers = ask(_Sum(), pa.record_batch({"x": column}), 2)
    assert [(error.row, error.stage) for error in answers.errors] == [(13, "input")]
    assert answers.logits[:, 0][answers.ok].tolist() == [i for i in range(20) if i != 13]


def tokens(column: pa.Array) -> list[list[int]]:
    found: list[list[int]] = made(column, kind="tokens", vocabulary=10, max_length=3, pad_id=9).tolist()
    return found


@pytest.mark.parametrize(
    "type_", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_view(pa.int64()), pa.list_(pa.uint8())]
)
def test_lists_of_none_and_of_one_id_are_rows(type_: pa.DataType) -> None:
    assert tokens(pa.array([[], [4], [1, 2, 3, 4]], type_)) == [[9, 9, 9], [4, 9, 9], [1, 2, 3]]
    assert tokens(pa.array([[5], [], [4]], type_).slice(1)) == [[9, 9, 9], [4, 9, 9]]


def test_lists_of_one_length_none_and_without_a_type_are_rows() -> None:
    assert tokens(pa.array([[4], [0]], pa.list_(pa.int64(), 1))) == [[4, 9, 9], [0, 9, 9]]
    assert tokens(pa.array([[], []], pa.list_(pa.int64(), 0))) == [[9, 9, 9], [9, 9, 9]]
    assert tokens(pa.array([[], []])) == [[9, 9, 9], [9, 9, 9]]  # list<null>: a file whose lists are all empty
    with pytest.raises(InputError, match="column x must not have missing values, got 1"):
        tokens(pa.array([[1], [2, None]]))


def test_categories_of_many_files_are_decoded_as_they_are_read() -> None:
    batch = pa.record_batch({"t": pa.array(["a", None, "b"]).dictionary_encode(), "n": [1, 2, 3]})
    found = without_dictionaries(batch.slice(1))
    assert found.to_pydict() == {"t": [None, "b"], "n": [2, 3]}
    assert found.schema.field("t").type == pa.string()
    assert without_dictionaries(found) is found
    assert plain(pa.array([1, 2])).to_pylist() == [1, 2]


def tokenizer(path: Path, vocabulary: list[str], *, pads_with: str | None = None, special: tuple[str, ...] = ()) -> str:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
    ids = {word: number for number, word in enumerate(vocabulary)}
    made_ = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made_.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made_.add_special_tokens(list(special))
    if pads_with is not None:
        made_.enable_padding(pad_id=ids[pads_with], pad_token=pads_with)
    made_.save(str(path))
    return str(path)


WORDS = ["not", "good", "film", "[UNK]"]


def text_input(file: str, **options: Any) -> InputConfig:
    return InputConfig(kind="text", columns=("x",), tokenizer=file, max_length=4, **options)


@pytest.mark.parametrize(
    ("vocabulary", "pads_with", "special"),
    [
        ([*WORDS, "[PAD]"], "[PAD]", ()),  # the setting of the file
        ([*WORDS, "end"], "end", ()),  # whatever its name
        ([*WORDS, "<pad>"], None, ("<pad>",)),  # a token of a usual name
        (["[UNK]", "[PAD]", "not", "good"], None, ()),
    ],
)
def test_texts_are_filled_with_the_tokenizers_own_padding(
    tmp_path: Path, vocabulary: list[str], pads_with: str | None, special: tuple[str, ...]
) -> None:
    config = text_input(tokenizer(tmp_path / "t.json", vocabulary, pads_with=pads_with, special=special))
    own = vocabulary.index(pads_with or ("<pad>" if "<pad>" in vocabulary else "[PAD]"))
    not_good = [vocabulary.index("not"), vocabulary.index("good")]
    found = make_input(config)(pa.record_batch({"x": ["not good", "not"]}))
    assert found.tolist() == [[*not_good, own, own], [not_good[0], own, own, own]]
    assert padding_id(config) == own
    assert vocabulary_size(config) == len(vocabulary)
    assert with_padding(config).pad_id == own
    chosen = config.model_copy(update={"pad_id": 7})
    assert padding_id(chosen) == 7
    assert make_input(chosen)(pa.record_batch({"x": ["not"]})).tolist() == [[not_good[0], 7, 7, 7]]


def test_a_tokenizer_that_names_no_padding_wants_it_said(tmp_path: Path) -> None:
    config = text_input(tokenizer(tmp_path / "t.json", WORDS))
    with pytest.raises(
        ValueError, match=r"input.pad_id must be given: .*t.json names no padding, and its id 0"
    ) as caught:
        make_input(config)
    assert "is the token 'not'; a model" in str(caught.value)
    assert "a student may take 4, one more than there are" in str(caught.value)
    assert vocabulary_size(config.model_copy(update={"pad_id": 4})) == 5


def test_inputs_without_a_tokenizer_are_filled_with_0() -> None:
    config = InputConfig(kind="tokens", columns=("x",), vocabulary=5)
    assert config.pad_id == padding_id(config) == 0
    assert with_padding(InputConfig(columns=("x",))) == InputConfig(columns=("x",))
    with pytest.raises(ValueError, match="input of kind 'tensor' must give ids to have a padding id; it gives numbers"):
        padding_id(InputConfig(columns=("x",)))


def test_a_file_that_is_no_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"input.tokenizer: .*t.json is no tokenizer.json"):
        make_input(text_input(str(tmp_path / "t.json")))


def test_a_padded_word_is_seen_by_a_student(tmp_path: Path) -> None:
    import torch

    from distilbeam.student.checkpoint import load_student, save_student
    from distilbeam.student.networks.build import build_student
    from distilbeam.student.networks.config import StudentConfig

    config = text_input(tokenizer(tmp_path / "t.json", [*WORDS, "[PAD]"], pads_with="[PAD]"))
    student = StudentConfig(kind="text", dim=4, hidden=(4,), input=config)
    torch.manual_seed(0)
    network = build_student(student, (4,), 2)
    save_student(tmp_path / "student", network, student, ["a", "b"], (4,))
    loaded = load_student(tmp_path / "student")
    assert loaded.config.input.pad_id == 4
    with_not, without = loaded.logits(pa.record_batch({"x": ["not good film", "good film"]}))
    assert np.abs(with_not - without).max() > 1e-3


def test_a_pool_of_categories_is_read_from_parquet() -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array(TEXTS).dictionary_encode()}), buffer)
    column = pq.read_table(pa.BufferReader(buffer.getvalue()))["x"].chunk(0)
    assert pa.types.is_dictionary(column.type)
    np.testing.assert_array_equal(made(column, kind="text"), made(pa.array(TEXTS), kind="text"))


@pytest.mark.parametrize(
    ("values", "dtype", "wrong"),
    [
        ([1.0, 70000.0], np.float16, "row 1 has 70000.0, the model reads numbers of type float16 from"),
        ([1.0, 3e9], np.int32, "row 1 has 3000000000.0, the model reads numbers of type int32 from -2147483648"),
        ([np.nan, 1.0], np.int64, "row 0 has nan, the model reads numbers of type int64"),
        ([-1, 3], np.uint8, "row 0 has -1, the model reads numbers of type uint8 from 0 to 255"),
        ([2**40, 3], np.int32, "row 0 has 1099511627776"),
    ],
)
def test_numbers_beyond_the_models_type_are_the_rows_errors(values: list[Any], dtype: Any, wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        converted(np.array(values), np.dtype(dtype))
    assert wrong in str(caught.value)


def test_numbers_within_the_models_type_are_converted() -> None:
    for values, dtype in (([1.7, np.inf, np.nan], np.float16), ([1.7, -2.0], np.int8), ([0.0, 2.0], np.bool_)):
        found = converted(np.array(values), np.dtype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.array(values).astype(dtype))
    assert converted(np.empty((0, 3)), np.dtype(np.int32)).shape == (0, 3)
