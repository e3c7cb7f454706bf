"""Columns to a model's input."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from distilbeam.inputs.config import InputConfig, InputError, load_object, make_input

X = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)


def binary(x: np.ndarray, type_: pa.DataType | None = None) -> pa.Array:
    return pa.array([row.tobytes() for row in x], type_ or pa.binary(x[0].nbytes))


def batch(column: pa.Array, metadata: dict[str, str] | None = None) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([column], schema=pa.schema([pa.field("x", column.type, metadata=metadata)]))


LAYOUTS = {
    "fixed bytes": binary(X),
    "bytes": binary(X, pa.binary()),
    "large bytes": binary(X, pa.large_binary()),
    "fixed lists": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 6),
    "lists": pa.array(X.tolist(), pa.list_(pa.float32())),
    "large lists": pa.array(X.tolist(), pa.large_list(pa.float32())),
    "nested lists": pa.array(X.reshape(7, 2, 3).tolist(), pa.list_(pa.list_(pa.float32(), 3), 2)),
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(X.reshape(7, 2, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [slice(0, 7), slice(2, 6), slice(3, 3)])
def test_every_layout_gives_the_same_numbers(layout: str, window: slice) -> None:
    config = InputConfig(columns=("x",), shape=(6,))
    rows = batch(LAYOUTS[layout]).slice(window.start, window.stop - window.start)
    made = make_input(config)(rows)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    if window.stop > window.start:
        np.testing.assert_array_equal(made, X[window])
    else:
        assert made.shape == (0, 6)


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int32", "bool"])
def test_stored_types_become_float32(dtype: str) -> None:
    x = (X * 20).astype(dtype)
    expected = x.astype(np.float32)
    from_config = make_input(InputConfig(columns=("x",), dtype=dtype))(batch(binary(x)))
    np.testing.assert_array_equal(from_config, expected)
    from_field = make_input(InputConfig(columns=("x",)))(
        batch(binary(x), {"dtype": dtype, "shape": json.dumps([3, 2])})
    )
    np.testing.assert_array_equal(from_field, expected.reshape(7, 3, 2))
    if dtype != "bool":
        lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 6)
        np.testing.assert_array_equal(make_input(InputConfig(columns=("x",)))(batch(lists)), expected)


def test_raw_bytes_are_viewed_not_copied() -> None:
    column = binary(X)
    made = make_input(InputConfig(columns=("x",)))(batch(column))
    assert made.ctypes.data == column.buffers()[1].address


def test_columns_stand_side_by_side() -> None:
    rows = pa.record_batch({"a": X[:, 0], "b": pa.array(X[:, 1:3].tolist()), "c": (X[:, 3] * 10).astype(np.int64)})
    made = make_input(InputConfig(columns=("a", "b", "c")))(rows)
    np.testing.assert_array_equal(made, np.column_stack([X[:, :3], np.trunc(X[:, 3] * 10)]))


def test_numbers_are_scaled_and_normalised() -> None:
    x = np.arange(12, dtype=np.uint8).reshape(2, 6)
    config = InputConfig(columns=("x",), dtype="uint8", shape=(2, 3), scale=0.5, mean=(1.0,), std=(1, 2, 3, 4, 5, 6))
    expected = ((x * 0.5 - 1) / [1, 2, 3, 4, 5, 6]).reshape(2, 2, 3)
    np.testing.assert_allclose(make_input(config)(batch(binary(x))), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("column", "options", "message"),
    [
        (binary(X), {"columns": ("y",)}, "the input must have a column y; the columns are x"),
        (binary(X), {"shape": (7,)}, r"an example of shape [7] has 7 numbers, column x holds 6"),
        (binary(X), {"dtype": "float64", "shape": (6,)}, "an example of shape [6] has 6 numbers, column x holds 3"),
        (pa.array([b"abc"]), {}, "column x must hold whole float32 numbers, got 3 bytes in an example"),
        (pa.array([b"abcd", b"abc"]), {}, "column x must have as many bytes in every row: row 0 has 4, row 1 3"),
        (pa.array([[1.0], [1.0, 2.0]]), {}, "column x must have as many numbers in every row: row 0 has 1, row 1 2"),
        (pa.array([[1.0], None]), {}, "column x must not have missing values, got 1"),
        (pa.array([[1.0], [None]], pa.list_(pa.float64(), 1)), {}, "column x must not have missing values, got 1"),
        (
            pa.array(["a"]),
            {},
            "column x must hold numbers, lists of numbers or bytes, got string; make numbers of it, or read it with an "
            "input of kind 'function'",
        ),
        (pa.array([1.0]), {"mean": (1, 2)}, "mean must be one number or one per feature (1), got 2"),
    ],
)
def test_wrong_columns_are_sentences(column: pa.Array, options: dict[str, Any], message: str) -> None:
    config = InputConfig(**{"columns": ("x",), **options})
    with pytest.raises(InputError) as caught:
        make_input(config)(batch(column))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "x", "columns": ["x"]}, "column and columns must not both be given"),
        ({"columns": []}, "at least 1 item"),
        ({"kind": "image", "columns": ["a", "b"]}, "columns must be one column for image input, got 2"),
        ({"columns": ["a"], "shape": [0]}, r"shape must be positive whole numbers, got \[0\]"),
        (
            {"columns": ["a"], "dtype": "float31"},
            "dtype must be the name of a number type such as float32, got 'float31'",
        ),
        ({"columns": ["a"], "dtype": "str"}, "dtype must be a number type such as float32, got 'str'"),
        ({"columns": ["a"], "std": [0.0]}, r"std must be positive, got \[0.0\]"),
        (
            {"kind": "text", "columns": ["a"], "ngrams": [2, 1]},
            r"ngrams must be two ascending positive numbers, got \[2, 1\]",
        ),
        (
            {"kind": "function", "columns": ["a"]},
            "function must be given for input of kind 'function', and only for it",
        ),
        ({"columns": ["a"], "size": [0, 3]}, r"size must be positive whole numbers, got \[0, 3\]"),
    ],
)
def test_wrong_settings_are_sentences(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        InputConfig.model_validate(options)


@pytest.mark.parametrize(
    "config",
    [
        InputConfig(columns=("x",)),
        InputConfig(kind="image", columns=("x",)),
        InputConfig(kind="text", columns=("x",)),
        InputConfig(kind="function", columns=("x",), function="operator:itemgetter"),
    ],
)
def test_inputs_travel_by_pickle(config: InputConfig) -> None:
    made = make_input(config)
    assert pickle.loads(pickle.dumps(made)).config == made.config  # type: ignore[attr-defined]


def png(pixels: np.ndarray, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8)


def test_images_become_channels_first_between_0_and_1() -> None:
    images = [pixels(4, 5), pixels(4, 5)[::-1]]
    rows = batch(pa.array([png(i) for i in images]))
    made = make_input(InputConfig(kind="image", columns=("x",)))(rows)
    np.testing.assert_allclose(made, np.stack(images).transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert (made.dtype, made.flags.c_contiguous) == (np.float32, True)
    last = make_input(InputConfig(kind="image", columns=("x",), layout="hwc"))(rows)
    np.testing.assert_allclose(last, np.stack(images) / 255, rtol=1e-6)


def test_images_are_normalised_by_channel() -> None:
    image = pixels(3, 3)
    config = InputConfig(kind="image", columns=("x",), scale=1.0, mean=(1, 2, 3), std=(4, 5, 6), layout="hwc")
    made = make_input(config)(batch(pa.array([png(image)])))
    np.testing.assert_allclose(made[0], (image - np.array([1.0, 2, 3])) / [4, 5, 6], rtol=1e-5)


def test_images_are_stretched_or_cropped() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 255  # the middle square is white
    rows = batch(pa.array([png(image)]))
    crop = make_input(InputConfig(kind="image", columns=("x",), size=(4, 4), resize="crop"))(rows)
    np.testing.assert_array_equal(crop, np.ones((1, 3, 4, 4), np.float32))
    stretched = make_input(InputConfig(kind="image", columns=("x",), size=(4, 4)))(rows)
    assert stretched.shape == (1, 3, 4, 4)
    assert stretched[0, 0, 0, 0] < 0.5 < stretched[0, 0, 0, 1]


def test_grey_images_have_one_channel() -> None:
    image = pixels(4, 5, 1)
    made = make_input(InputConfig(kind="image", columns=("x",), mode="L"))(batch(pa.array([png(image)])))
    np.testing.assert_allclose(made, image[None, None] / 255, rtol=1e-6)


def test_images_of_hugging_face_datasets_and_jpeg() -> None:
    image = np.full((8, 8, 3), 120, np.uint8)
    column = pa.array([{"bytes": png(image, "JPEG"), "path": "a.jpg"}])
    made = make_input(InputConfig(kind="image", columns=("x",)))(batch(column))
    np.testing.assert_allclose(made, 120 / 255, atol=2 / 255)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([png(pixels(2, 2)), b"\x89PNG"]), "column x must hold encoded images, row 1 is none"),
        (pa.array([png(pixels(9, 9))[:-40]]), "column x must hold encoded images, row 0 is none"),
        (pa.array([png(pixels(2, 2)), None]), "column x must not have missing values, row 1 is missing"),
        (pa.array([1]), "column x must hold the bytes of encoded images, got int64"),
        (
            pa.array([png(pixels(2, 2)), png(pixels(2, 3))]),
            r"different sizes, \[2, 2\] in row 0 and \[2, 3\] in row 1; set size",
        ),
    ],
)
def test_wrong_images_are_sentences(column: pa.Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_input(InputConfig(kind="image", columns=("x",)))(batch(column))


def test_no_images_are_an_empty_array() -> None:
    empty = batch(pa.array([], pa.binary()))
    assert make_input(InputConfig(kind="image", columns=("x",), size=(4, 5)))(empty).shape == (0, 3, 4, 5)


def test_hashed_ngrams_have_unit_length_and_see_word_order() -> None:
    texts = ["play some jazz", "jazz some play", "play some jazz", "PLAY some jazz!", "an unrelated question"]
    make = make_input(InputConfig(kind="text", columns=("x",), buckets=512))
    made = make(batch(pa.array(texts)))
    assert (made.shape, made.dtype) == ((5, 512), np.float32)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-6)
    similarity = made @ made.T
    np.testing.assert_allclose(similarity[0, [2, 3]], 1, rtol=1e-6)
    assert similarity[0, 4] < 0.3 < similarity[0, 1] < 0.9
    unigrams = make_input(InputConfig(kind="text", columns=("x",), buckets=512, ngrams=(1, 1)))(batch(pa.array(texts)))
    np.testing.assert_allclose(unigrams[0], unigrams[1], rtol=1e-6)
    assert make(batch(pa.array([], pa.string()))).shape == (0, 512)


def test_hashed_ngrams_are_the_same_in_every_process() -> None:
    # Python's own hash of strings differs from process to process
    code = (
        "import pyarrow as pa; from distilbeam.inputs.config import *;"
        "x = make_input(InputConfig(kind='text', columns=('x',), buckets=64))(pa.record_batch({'x': ['one two three']}));"
        "print(x.nonzero()[1].tolist())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_tokens_are_padded_and_cut(tmp_path: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 1, "a": 2, "b": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = InputConfig(kind="text", columns=("x",), tokenizer="tokenizer.json", max_length=3).relative_to(tmp_path)
    made = make_input(config)(batch(pa.array(["a b", "a b a b", "what"])))
    np.testing.assert_array_equal(made, [[2, 3, 0], [2, 3, 2], [1, 0, 0]])
    assert made.dtype == np.int64


def test_text_must_be_text_and_the_tokenizer_must_exist() -> None:
    with pytest.raises(InputError, match="column x must hold text, got int64"):
        make_input(InputConfig(kind="text", columns=("x",)))(batch(pa.array([1])))
    with pytest.raises(InputError, match="column x must not have missing values, got 1"):
        make_input(InputConfig(kind="text", columns=("x",)))(batch(pa.array(["a", None])))
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
    with pytest.raises(
        ValueError, match=r"input.tokenizer: no.json does not exist; give the tokenizer.json of the model"
    ):
        make_input(InputConfig(kind="text", columns=("x",), tokenizer="no.json"))


def test_functions_get_the_batch_of_their_columns(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_input.py").write_text(
        "import numpy as np\n"
        "def doubled(batch):\n"
        "    assert batch.schema.names == ['x']\n"
        "    return 2 * batch['x'].to_numpy()[:, None]\n"
        "def one(batch):\n"
        "    return np.zeros(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = pa.record_batch({"y": [0.0, 0.0], "x": [1.0, 2.0]})
    made = make_input(InputConfig(kind="function", columns=("x",), function="own_input:doubled"))(rows)
    np.testing.assert_array_equal(made, [[2.0], [4.0]])
    one = make_input(InputConfig(kind="function", columns=("x",), function="own_input:one"))
    with pytest.raises(InputError, match=r"own_input:one must return arrays of 2 rows, got shape \[1\]"):
        one(rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json", "x must be 'module:name', got 'json'"),
        ("no_such_module:f", "x: module 'no_such_module' is not installed; install it or put it on PYTHONPATH"),
        ("json:nothing.here", "x: module 'json' has no 'nothing.here'"),
    ],
)
def test_names_of_objects_are_checked(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_object(name, "x")
    assert load_object("json:decoder.JSONDecoder", "x") is json.decoder.JSONDecoder


def test_preprocess_imports_no_framework() -> None:
    heavy = ("torch", "apache_beam", "tensorflow", "PIL", "sklearn")
    code = f"import sys, distilbeam.inputs.config; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
