"""Logits to labels and back, against float64 and against the definitions."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, softmax

from distilbeam.teacher.softlabels import SoftLabelSpec, decode, encode, label_schema
from distilbeam.teacher.softlabels.codec import TAIL_FLOOR, round_to_half
from distilbeam.teacher.softlabels.selecting import draw_classes, largest, row_uniforms

STORAGES = ["float32", "float16"]
LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(2, 40)),
    elements=st.floats(-80, 80, width=32),
)


def half_bound(z: np.ndarray, num_classes: int) -> np.ndarray:
    """The bound that the codec's module promises for a stored log-probability z."""
    in_float32 = 2.0**-23 * (np.abs(z) + math.log2(num_classes) + 4)
    return in_float32 + np.maximum(2.0**-11 * (np.abs(z) + in_float32), 2.0**-25)


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.sampled_from(STORAGES), st.sampled_from([0.5, 1.0, 3.0]))
def test_dense_is_the_log_softmax_within_the_stated_bound(logits: np.ndarray, storage: Any, temperature: float) -> None:
    spec = SoftLabelSpec(logits.shape[1], storage=storage, temperature=temperature)
    labels = decode(encode(logits, spec), spec)
    exact = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    # the division by the temperature adds one float32 rounding of at most 2^-24 |z|
    assert (np.abs(labels.logprobs - exact) <= half_bound(exact, logits.shape[1]) + 2.0**-22 * np.abs(exact)).all()
    assert labels.logprobs.dtype == np.float32
    assert labels.classes is None
    assert labels.tail_logmass is None


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.data(), st.sampled_from(STORAGES))
def test_top_k_keeps_the_largest_and_sums_to_one_with_the_tail(
    logits: np.ndarray, data: st.DataObject, storage: Any
) -> None:
    c = logits.shape[1]
    k = data.draw(st.integers(1, c))
    spec = SoftLabelSpec(c, "top_k", k, storage=storage)
    labels = decode(encode(logits, spec), spec)
    assert labels.classes is not None
    assert labels.tail_logmass is not None
    # the oracle: a stable sort of the float32 logits after the shift that the codec documents
    order = np.argsort(-(logits - logits.max(axis=1, keepdims=True)), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(labels.classes, order)
    exact = log_softmax(logits.astype(np.float64), axis=1)
    kept = np.take_along_axis(exact, order, axis=1)
    assert (np.abs(labels.logprobs - kept) <= half_bound(kept, c)).all()
    rest = softmax(logits.astype(np.float64), axis=1)
    np.put_along_axis(rest, order, 0, axis=1)
    np.testing.assert_allclose(np.exp(labels.tail_logmass), np.maximum(rest.sum(axis=1), 1e-7), rtol=2e-5)
    total = np.exp(labels.logprobs.astype(np.float64)).sum(axis=1) + np.exp(labels.tail_logmass)
    entropy = -(np.exp(exact) * exact).sum(axis=1)
    assert (np.abs(total - 1) <= 1.01 * 2.0**-11 * entropy + 2e-6).all()


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.sampled_from(STORAGES))
def test_top_k_of_all_classes_is_dense(logits: np.ndarray, storage: Any) -> None:
    c = logits.shape[1]
    dense, all_k = SoftLabelSpec(c, storage=storage), SoftLabelSpec(c, "top_k", c, storage=storage)
    whole = decode(encode(logits, all_k), all_k)
    np.testing.assert_array_equal(whole.dense(c), decode(encode(logits, dense), dense).logprobs)
    np.testing.assert_array_equal(whole.tail_logmass, TAIL_FLOOR)


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(1, 64), st.sampled_from(STORAGES), st.integers(0, 2**32 - 1))
def test_sampled_frequencies_are_counts_over_draws(logits: np.ndarray, draws: int, storage: Any, seed: int) -> None:
    spec = SoftLabelSpec(logits.shape[1], "sampled", draws, storage=storage)
    labels = decode(encode(logits, spec, rng=np.random.default_rng(seed)), spec)
    assert labels.classes is not None
    counts = np.exp(labels.logprobs.astype(np.float64)) * draws
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
    np.testing.assert_allclose(counts.sum(axis=1), draws, rtol=1e-6)
    for row, count in zip(labels.classes, counts, strict=True):
        distinct = row[row >= 0]
        assert (np.diff(distinct) > 0).all()
        assert (np.rint(count[: len(distinct)]) >= 1).all()
        assert (row[len(distinct) :] == -1).all()
        assert np.isneginf(labels.logprobs[labels.classes < 0]).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("draws", [1, 7, 1000, 2048])
def test_every_count_survives_half_precision(draws: int, storage: Any) -> None:
    # two classes whose counts take every value from 0 to draws
    logits = np.log(np.maximum(np.stack([np.linspace(0, 1, 4000), np.linspace(1, 0, 4000)], axis=1), 1e-9))
    spec = SoftLabelSpec(2, "sampled", draws, storage=storage)
    labels = decode(encode(logits, spec, rng=np.random.default_rng(3)), spec)
    counts = np.exp(labels.logprobs.astype(np.float64)) * draws
    assert np.abs(counts - np.rint(counts)).max() < 1e-3
    assert len(np.unique(np.rint(counts))) > 0.6 * draws


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_frequencies_are_restored_to_the_last_bit_from_a_table_in_pieces(
    pieces: int, storage: Any, rng: np.random.Generator
) -> None:
    draws, spec = 300, SoftLabelSpec(4, "sampled", 300, storage=storage)
    batches = [encode(3 * rng.normal(size=(40, 4)), spec) for _ in range(pieces)]
    labels = decode(pa.Table.from_batches(batches, label_schema(spec)), spec)
    assert labels.classes is not None
    assert labels.logprobs.shape == labels.classes.shape == (40 * pieces, draws)
    counts = np.rint(np.exp(labels.logprobs.astype(np.float64)) * draws).astype(np.float32)
    assert (counts.sum(axis=1) == draws).all()
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(labels.logprobs, np.log(counts / np.float32(draws)))


def test_frequencies_that_were_rounded_in_float32_are_restored_too(rng: np.random.Generator) -> None:
    spec = SoftLabelSpec(9, "sampled", 100)
    batch = encode(3 * rng.normal(size=(70, 9)), spec)
    exact = batch["teacher_logprobs"].flatten().to_numpy()
    rounded = round_to_half(exact).astype(np.float32)
    assert (rounded != exact)[np.isfinite(exact)].mean() > 0.9
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rounded), type=batch.schema.field("teacher_logprobs").type)
    old = batch.set_column(0, batch.schema.field("teacher_logprobs"), lists)
    np.testing.assert_array_equal(decode(old, spec).logprobs.ravel(), exact)


def test_sampled_labels_are_unbiased() -> None:
    """Each class's mean frequency over N draws lies within a bound that chance breaks once in a billion.

    By Bernstein's inequality |mean - p| <= sqrt(2 p (1 - p) t / N) + t / (3 N) except with probability 2 exp(-t); with
    t = log(2 x 12 classes x 1e9) a union bound over the classes leaves 1e-9.
    """
    p = softmax(np.array([3.0, 2, 1.5, 1, 0.5, 0, -1, -2, -3, -5, -8, -12]))
    rows, draws = 20_000, 50
    spec = SoftLabelSpec(12, "sampled", draws)
    labels = decode(encode(np.tile(np.log(p), (rows, 1)), spec, rng=np.random.default_rng(5)), spec)
    mean = np.exp(labels.dense(12).astype(np.float64)).mean(axis=0)
    n, t = rows * draws, math.log(2 * 12 * 1e9)
    assert (np.abs(mean - p) <= np.sqrt(2 * p * (1 - p) * t / n) + t / (3 * n) + 1e-9).all()


def test_draws_of_different_rows_are_independent() -> None:
    """The correlation of neighbouring rows' counts is within 6 standard errors of 0."""
    rows = 20_000
    spec = SoftLabelSpec(2, "sampled", 1)
    labels = decode(encode(np.zeros((rows, 2)), spec, rng=np.random.default_rng(6)), spec)
    assert labels.classes is not None
    sign = 2.0 * labels.classes[:, 0] - 1
    assert abs((sign[:-1] * sign[1:]).mean()) <= 6 / math.sqrt(rows)


def test_without_a_generator_equal_logits_give_equal_draws(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(50, 30))
    spec = SoftLabelSpec(30, "sampled", 20)
    assert encode(logits, spec).equals(encode(logits.copy(), spec))
    assert not encode(logits, spec).equals(encode(logits + rng.normal(size=logits.shape), spec))


def test_the_same_rows_in_a_longer_batch_have_the_same_labels(rng: np.random.Generator) -> None:
    """Blocks are cut by rows; where the cut falls must not show."""
    logits = rng.normal(size=(10_000, 70)).astype(np.float32)
    for spec in (SoftLabelSpec(70), SoftLabelSpec(70, "top_k", 9)):
        whole = decode(encode(logits, spec), spec)
        part = decode(encode(logits[3000:7001], spec), spec)
        np.testing.assert_array_equal(whole.logprobs[3000:7001], part.logprobs)


def test_margin_is_the_difference_of_the_two_largest_probabilities(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(200, 17)) * 4
    p = np.sort(softmax(logits, axis=1), axis=1)
    for spec in (SoftLabelSpec(17), SoftLabelSpec(17, "top_k", 1), SoftLabelSpec(17, "sampled", 3)):
        margin = encode(logits, spec)["teacher_margin"].to_numpy()
        np.testing.assert_allclose(margin, p[:, -1] - p[:, -2], atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, "torch", "torch.bfloat16", int]
)
def test_every_type_of_logits_is_taken_at_its_own_values(dtype: Any, rng: np.random.Generator) -> None:
    values = rng.integers(-20, 20, size=(30, 8)).astype(np.float32)  # exact in every type
    spec = SoftLabelSpec(8, "top_k", 3)
    if dtype == "torch":
        given: Any = torch.tensor(values, requires_grad=True)
    elif dtype == "torch.bfloat16":
        given = torch.tensor(values).bfloat16()
    else:
        given = values.astype(dtype)
    assert encode(given, spec).equals(encode(values, spec))


def test_huge_logits_lose_nothing_before_the_shift() -> None:
    # 1e9 + 1 is 1e9 in float32: the largest logit must be subtracted in float64
    spec = SoftLabelSpec(2)
    labels = decode(encode(np.array([[1e9, 1e9 + 1]]), spec), spec)
    np.testing.assert_allclose(labels.logprobs, log_softmax([[0.0, 1.0]], axis=1), atol=1e-3)


def test_impossible_classes_stay_impossible_and_finite_ones_finite() -> None:
    spec = SoftLabelSpec(3)
    labels = decode(encode(np.array([[0.0, -np.inf, -1e6]]), spec), spec)
    np.testing.assert_array_equal(labels.logprobs, [[0.0, -np.inf, -65504.0]])


def test_sampled_labels_never_draw_impossible_classes(rng: np.random.Generator) -> None:
    logits = rng.normal(size=(4000, 9))
    logits[:, [0, 4, 8]] = -np.inf
    spec = SoftLabelSpec(9, "sampled", 64)
    classes = decode(encode(logits, spec, rng=rng), spec).classes
    assert set(np.unique(classes)) == {-1, 1, 2, 3, 5, 6, 7}


@pytest.mark.parametrize(("uniform", "drawn"), [(0.0, 1), (1 - 2.0**-53, 3), (0.25, 2)])
def test_extreme_draws_have_a_mass(uniform: float, drawn: int) -> None:
    """The ends of [0, 1) and an exact border between two classes, in the last row of the largest block."""

    class Constant:
        def random(self, shape: tuple[int, int]) -> np.ndarray:
            return np.full(shape, uniform)

    mass = np.tile(np.array([0, 0.5, 0.5, 1, 0], np.float32), (4096, 1))
    classes, counts = draw_classes(mass, 2, Constant())  # type: ignore[arg-type]
    np.testing.assert_array_equal(classes, np.tile([drawn, -1], (4096, 1)))
    np.testing.assert_array_equal(counts, np.tile([2.0, 0.0], (4096, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, "all"])
def test_rows_without_a_distribution_are_refused(bad: Any) -> None:
    logits = np.zeros((30_000, 20), np.float32)
    logits[20_123, :] = -np.inf if bad == "all" else [bad] + [0] * 19
    message = r"^logits must be finite \(-inf for a class that a row cannot have\), row 20,123 is not$"
    with pytest.raises(ValueError, match=message):
        encode(logits, SoftLabelSpec(20))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((4, 3)), r"logits must have shape \[rows, 5\], got \[4, 3\]"),
        (np.zeros(5), r"logits must have shape \[rows, 5\], got \[5\]"),
        (np.full((1, 5), "a"), "logits must be floating, got <U1"),
        (np.zeros((1, 5), complex), "logits must be floating, got complex128"),
    ],
)
def test_what_is_no_matrix_of_logits_is_refused(logits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(logits, SoftLabelSpec(5))


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled"])
@pytest.mark.parametrize("storage", STORAGES)
def test_no_rows_are_no_labels(kind: Any, storage: Any) -> None:
    spec = SoftLabelSpec(6, kind, None if kind == "dense" else 2, storage=storage)
    batch = encode(np.zeros((0, 6)), spec)
    assert batch.num_rows == 0
    assert batch.schema.equals(label_schema(spec), check_metadata=True)
    labels = decode(batch, spec)
    assert labels.logprobs.shape == (0, spec.width)
    assert decode(pa.Table.from_batches([], batch.schema), spec).logprobs.shape == (0, spec.width)


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled"])
def test_chunked_tables_and_slices_decode_like_whole_ones(kind: Any, rng: np.random.Generator) -> None:
    spec = SoftLabelSpec(6, kind, None if kind == "dense" else 3)
    batch = encode(rng.normal(size=(11, 6)), spec)
    whole = decode(batch, spec)
    table = pa.Table.from_batches([batch.slice(0, 4), batch.slice(4, 7)])
    for logprobs in (decode(table, spec).logprobs[2:9], decode(table.slice(2, 7), spec).logprobs):
        np.testing.assert_array_equal(logprobs, whole.logprobs[2:9])
    if whole.classes is not None:
        np.testing.assert_array_equal(decode(table.slice(2, 7), spec).classes, whole.classes[2:9])


def test_decoding_does_not_copy(rng: np.random.Generator) -> None:
    spec = SoftLabelSpec(6, "top_k", 3)
    batch = encode(rng.normal(size=(11, 6)), spec)
    labels = decode(batch, spec)
    assert labels.logprobs.ctypes.data == batch["teacher_logprobs"].flatten().buffers()[1].address
    assert labels.classes is not None
    assert labels.classes.ctypes.data == batch["teacher_classes"].flatten().buffers()[1].address


def test_decode_refuses_other_columns(rng: np.random.Generator) -> None:
    spec = SoftLabelSpec(6, "top_k", 3)
    batch = encode(rng.normal(size=(4, 6)), spec)
    with pytest.raises(ValueError, match="soft labels must have a column teacher_classes; the columns are teacher_log"):
        decode(batch.select(["teacher_logprobs", "teacher_margin"]), spec)
    with pytest.raises(ValueError, match=r"column teacher_logprobs must be fixed_size_list<.*>\[4\] for top_k labels"):
        decode(batch, SoftLabelSpec(6, "top_k", 4))
    lists = pa.array([[1.0, 2.0, 3.0], None, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))
    missing = pa.table({**dict(zip(batch.schema.names, batch.columns, strict=True)), "teacher_logprobs": lists})
    with pytest.raises(ValueError, match="every row of a label column must have 3 values and none missing"):
        decode(missing, spec)


def test_dense_view_of_top_k_shares_the_tail_equally() -> None:
    logits = np.log([[0.5, 0.3, 0.1, 0.1]])
    spec = SoftLabelSpec(4, "top_k", 2)
    np.testing.assert_allclose(np.exp(decode(encode(logits, spec), spec).dense(4)), [[0.5, 0.3, 0.1, 0.1]], rtol=5e-4)


@pytest.mark.parametrize("classes", [32_000, 300_000])
def test_large_vocabularies(classes: int, rng: np.random.Generator) -> None:
    logits = rng.normal(size=(6, classes)).astype(np.float32) * 3
    exact = log_softmax(logits.astype(np.float64), axis=1)
    spec = SoftLabelSpec(classes, "top_k", 64)
    labels = decode(encode(logits, spec), spec)
    assert labels.classes is not None
    np.testing.assert_array_equal(labels.classes, np.argsort(-logits, axis=1, kind="stable")[:, :64])
    kept = np.take_along_axis(exact, labels.classes, axis=1)
    assert (np.abs(labels.logprobs - kept) <= half_bound(kept, classes)).all()
    np.testing.assert_allclose(np.exp(labels.tail_logmass), 1 - np.exp(kept).sum(axis=1), rtol=1e-4)
    dense = SoftLabelSpec(classes)
    total = np.exp(decode(encode(logits, dense), dense).logprobs.astype(np.float64)).sum(axis=1)
    assert (np.abs(total - 1) < 0.0062).all()
    sampled = SoftLabelSpec(classes, "sampled", 50)
    drawn = decode(encode(logits, sampled, rng=rng), sampled)
    np.testing.assert_allclose(np.exp(drawn.logprobs.astype(np.float64)).sum(axis=1), 1, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
def test_largest_is_a_stable_sort_with_many_ties(classes: int, k: int, values: int, seed: int) -> None:
    k = min(k, classes)
    given_ = np.random.default_rng(seed).integers(0, values, size=(5, classes)).astype(np.float32)
    np.testing.assert_array_equal(largest(given_, k), np.argsort(-given_, axis=1, kind="stable")[:, :k])


@given(hnp.arrays(np.float32, 20, elements=st.floats(-1e6, 0, width=32)))
def test_half_rounding_is_nearest_and_finite(values: np.ndarray) -> None:
    half = round_to_half(values).astype(np.float64)
    clipped = np.maximum(values.astype(np.float64), -65504)
    assert (np.abs(half - clipped) <= np.maximum(2.0**-11 * np.abs(clipped), 2.0**-25)).all()


def test_the_draws_of_a_row_depend_on_its_seed_and_on_no_other_row() -> None:
    spec = SoftLabelSpec(num_classes=50, kind="sampled", k=16)
    rng = np.random.default_rng(0)
    logits, seeds = rng.normal(size=(9000, 50)).astype(np.float32), rng.integers(0, 2**63, 9000).astype(np.uint64)
    whole = encode(logits, spec, seeds=seeds)
    order = rng.permutation(9000)
    assert encode(logits[order], spec, seeds=seeds[order]).equals(
        pa.RecordBatch.from_struct_array(whole.to_struct_array().take(order))
    )
    assert encode(logits[5:6], spec, seeds=seeds[5:6]).equals(whole.slice(5, 1))
    assert encode(logits[order], spec)[1].take(np.argsort(order)).equals(encode(logits, spec)[1]), (
        "hashes of the logits"
    )
    assert not encode(logits, spec, seeds=seeds + np.uint64(1)).equals(whole)


def test_seeded_draws_have_the_teachers_frequencies() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    rows, draws = 20_000, 8
    seeds = np.frombuffer(np.random.default_rng(1).bytes(8 * rows), np.uint64)
    spec = SoftLabelSpec(num_classes=4, kind="sampled", k=draws)
    labels = decode(encode(np.tile(np.log(p), (rows, 1)), spec, seeds=seeds), spec)
    share = np.exp(labels.dense(4)).mean(axis=0)
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / (rows * draws))).all()


def test_consecutive_seeds_give_independent_uniform_numbers() -> None:
    uniforms = row_uniforms(np.arange(4000, dtype=np.uint64), 256)
    n = uniforms.size
    assert abs(uniforms.mean() - 0.5) <= 5 / np.sqrt(12 * n)
    counts = np.bincount((uniforms * 1000).astype(int).ravel(), minlength=1000)
    assert abs(((counts - n / 1000) ** 2 / (n / 1000)).sum() - 999) <= 5 * np.sqrt(2 * 999)
    for one, two in ((uniforms[:-1], uniforms[1:]), (uniforms[:, :-1], uniforms[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) <= 5 / np.sqrt(one.size)
