"""Loading beyond the order: mixtures, inputs of every kind, transforms, caches, and how little a rank decodes."""

from __future__ import annotations

import io
import threading
import time
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distilbeam.inputs.config import InputConfig, InputError, make_input
from distilbeam.student.data import shuffle
from distilbeam.student.data.batch_rng import Place
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.student.data.prefetch import Work, in_background
from distilbeam.student.data.sampler import EpochOrder, Shares, mixed_visits
from distilbeam.student.data.shuffle import Memory
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

SHARDS = [[5, 7], [11], [3, 4, 13]]  # 43 rows in six row groups
STREAMED = {"buffer_rows": 12, "cache_bytes": 0}
CACHED = {"buffer_rows": 12, "cache_bytes": 2**20}


def numbers(batches):
    return [int(number) for batch in batches for number in batch["number"]]


def write_column(path, column, groups, **more):
    """Write a dataset with a carried column `c`; row groups have the given sizes."""
    spec = SoftLabelSpec(3, teacher="t", carried=("c",))
    labels = encode(np.random.default_rng(0).normal(size=(len(column), 3)), spec)
    columns = {
        "example_id": pa.array([str(i) for i in range(len(column))]),
        "number": pa.array(np.arange(len(column))),
        "c": column,
        **more,
    }
    columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
    batch = pa.record_batch(columns)
    starts = np.cumsum([0, *groups])
    parts = [batch.slice(start, size) for start, size in zip(starts, groups, strict=False)]
    write_shard(path, "shard", parts, spec, "key")
    return path


def pictures(count, size=8):
    rng = np.random.default_rng(1)
    encoded = []
    for _ in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
        encoded.append(out.getvalue())
    return pa.array(encoded)


@pytest.mark.parametrize("options", [STREAMED, CACHED])
def test_an_epoch_mixes_datasets_by_weight(write_labels, options):
    """Of 50 rows, 30 in one dataset and 20 in the other, 3 : 1 makes 37.5 and 12.5, the larger remainder first."""
    paths = [write_labels([[7, 13], [10]], name="first"), write_labels([[20]], name="second", seed=1, first=30)]
    dataset = SoftLabelDataset(paths, 4, 0, mixing_weights=(3, 1), **options)
    left_out = []
    for _ in range(2):
        seen = np.bincount(numbers(dataset), minlength=50)
        assert seen[:30].sum() == 38
        assert set(seen[:30]) == {1, 2}
        assert seen[30:].sum() == 12
        assert set(seen[30:]) == {0, 1}
        left_out.append(frozenset(np.flatnonzero(seen == 0)))
    assert left_out[0] != left_out[1]  # drawn anew in every epoch
    assert len(dataset) == 13


def test_mixed_epochs_are_the_same_for_all_ranks_and_go_on_exactly(write_labels):
    paths = [write_labels([[7, 13], [10]], name="first"), write_labels([[20]], name="second", seed=1, first=30)]

    def opened(rank, world_size):
        return SoftLabelDataset(paths, 4, 0, rank, world_size, mixing_weights=(1, 4), **STREAMED)

    alone = opened(0, 1)
    whole, after = numbers(alone), numbers(alone)
    two = [opened(rank, 2) for rank in range(2)]
    iterators = [iter(dataset) for dataset in two]
    seen = [number for _ in range(3) for iterator in iterators for number in numbers([next(iterator)])]
    three = [opened(rank, 3) for rank in range(3)]
    for dataset in three:
        dataset.load_state_dict(two[0].state_dict())
    rest = [number for step in zip(*three, strict=True) for number in numbers(step)]
    rest += [number for step in zip(*three, strict=True) for number in numbers(step)]
    assert seen + rest == whole + after
    with pytest.raises(ValueError, match="resume with the same files, seed, buffer_rows and mixing_weights"):
        SoftLabelDataset(paths, 4, 0, **STREAMED).load_state_dict(alone.state_dict())


def test_a_dataset_of_weight_0_is_left_out(write_labels):
    paths = [write_labels([[4]], name="first"), write_labels([[6]], name="second", seed=1, first=4)]
    dataset = SoftLabelDataset(paths, 3, 0, mixing_weights=(0, 2.5))
    seen = np.bincount(numbers(dataset), minlength=10)
    assert seen[:4].sum() == 0
    assert seen[4:].sum() == 10
    assert dataset.mean("number") == pytest.approx(6.5, abs=1)  # over the visits: of 4 to 9 alone


@given(
    datasets=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=4),
    weights=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_visits_follow_the_weights_and_no_row_is_favoured(datasets, weights):
    weights = weights[: len(datasets)]
    weights[0] += 1
    visits = mixed_visits(datasets, weights)
    total = sum(map(sum, datasets))
    assert sum(visits) == total
    first = 0
    for groups, weight in zip(datasets, weights, strict=True):
        mine = visits[first : first + len(groups)]
        share = total * weight / sum(weights)
        assert abs(sum(mine) - share) < 1
        for rows, count in zip(groups, mine, strict=True):
            assert abs(count - rows * sum(mine) / sum(groups)) < 1
        first += len(groups)


@given(
    group_rows=st.lists(st.integers(1, 8), min_size=1, max_size=6), more=st.integers(0, 20), buffer=st.integers(1, 20)
)
def test_an_order_with_visits_holds_each_row_as_often_as_it_should(group_rows, more, buffer):
    visits = [(more * (i + 1)) % 19 for i in range(len(group_rows))]
    order = EpochOrder(group_rows, buffer, 3, 1, visits)
    seen = [np.zeros(rows, int) for rows in group_rows]
    for window, units in enumerate(order.windows):
        rows = [(g, r) for g, r in _rows_of(order, units)]
        assert sorted(order.places(window)) == list(range(len(rows)))
        for group, row in rows:
            seen[group][row] += 1
    for counts, wanted in zip(seen, visits, strict=True):
        assert counts.sum() == wanted
        assert counts.max() - counts.min() <= 1


def _rows_of(order, units):
    for unit in units:
        group = order.units[unit][0]
        drawn = order.drawn(unit)
        for row in range(order.group_rows[group]) if drawn is None else drawn:
            yield group, row


@settings(deadline=None, max_examples=25)
@given(
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    buffer_rows=st.integers(1, 60),
    workers=st.integers(1, 3),
    cached=st.booleans(),
    wide=st.booleans(),
    stop=st.integers(0, 6),
)
def test_batches_depend_on_nothing_but_the_order(
    tmp_path_factory, batch_size, world_size, buffer_rows, workers, cached, wide, stop
):
    """Whatever the ranks, threads, cache, where one stopped and when rows are copied: row i comes with the columns of row i."""
    with mock.patch.object(shuffle, "WIDE_BYTES", 1 if wide else shuffle.WIDE_BYTES):
        _check_batches(tmp_path_factory, batch_size, world_size, buffer_rows, workers, cached, stop)


def _check_batches(tmp_path_factory, batch_size, world_size, buffer_rows, workers, cached, stop):
    path = tmp_path_factory.getbasetemp() / "depends"
    values = np.random.default_rng(2).normal(size=(43, 5)).astype(np.float32)
    if not path.exists():
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 5)
        write_column(path, column, [5, 7, 11, 3, 4, 13], weight=pa.array(values[:, 0]))
    reference = numbers(SoftLabelDataset(path, 43, 1, buffer_rows=buffer_rows))
    options = {"workers": workers, "buffer_rows": buffer_rows, "cache_bytes": 2**20 if cached else 0}
    inputs = InputConfig(columns=("c",))
    first = SoftLabelDataset(path, 3, 1, input=inputs, **options)
    iterator = iter(first)
    seen = [batch for _, batch in zip(range(stop), iterator, strict=False)]
    iterator.close()
    datasets = [
        SoftLabelDataset(path, batch_size, 1, rank, world_size, input=inputs, **options) for rank in range(world_size)
    ]
    for dataset in datasets:
        dataset.load_state_dict(first.state_dict())
    steps = list(zip(*datasets, strict=True))
    seen += [batch for step in steps for batch in step]
    assert numbers(seen) == reference
    for batch in seen:
        rows = batch["number"].numpy()
        np.testing.assert_array_equal(batch["inputs"], values[rows])
        np.testing.assert_array_equal(batch["weight"], values[rows, 0])
        assert {name: value.dtype for name, value in batch.items()} == {
            "number": torch.int64,
            "row": torch.int64,
            "weight": torch.float32,
            "inputs": torch.float32,
            "teacher_margin": torch.float32,
            "teacher_logprobs": torch.float32,
        }


@pytest.mark.parametrize("options", [STREAMED, CACHED])
@pytest.mark.parametrize(
    ("column", "config"),
    [
        (pictures(43), {"kind": "image"}),
        (pa.array([f"word {i} again" for i in range(43)]), {"kind": "text", "buckets": 32}),
        (pa.array([f"word {i} again" for i in range(43)]), {"kind": "text", "ngram_form": "ids", "max_length": 6}),
        (pa.array([[i] * (i % 4) for i in range(43)]), {"kind": "tokens", "vocabulary": 50, "max_length": 3}),
        (pa.array([np.full(6, i, np.uint8).tobytes() for i in range(43)]), {"dtype": "uint8", "shape": (1, 2, 3)}),
        (pa.FixedSizeListArray.from_arrays(pa.array(np.arange(86, dtype=np.float16)), 2), {"scale": 0.5}),
        (pa.array(np.arange(43)), {"mean": (3.0,), "std": (2.0,)}),
    ],
)
def test_inputs_of_every_kind_belong_to_their_rows(tmp_path, column, config, options):
    config = InputConfig(columns=("c",), **config)
    path = write_column(tmp_path / "labels", column, [5, 7, 11, 20])
    expected = make_input(config)(pa.record_batch({"c": column}))
    dataset = SoftLabelDataset(path, 4, 0, input=config, **options)
    for _ in range(2):
        for batch in dataset:
            assert batch["inputs"].dtype == torch.from_numpy(expected).dtype
            np.testing.assert_array_equal(batch["inputs"], expected[batch["number"].numpy()])
    assert dataset.input_shape == expected.shape[1:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_decodes_its_own_rows_only_and_reads_no_window_it_has_no_row_in(tmp_path, monkeypatch, world_size):
    path = write_column(tmp_path / "labels", pictures(48), [6] * 8)
    decoded = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda data: decoded.append(data) or real(data))
    config = InputConfig(kind="image", columns=("c",))
    for rank in range(world_size):
        dataset = SoftLabelDataset(path, 4, 0, rank, world_size, input=config, **STREAMED)
        decoded.clear()
        mine = sum(len(batch["row"]) for batch in dataset)
        assert mine == 48 // world_size
        assert len(decoded) == mine
    # a step of 24 rows spans two windows of 12: each rank needs one of them
    dataset = SoftLabelDataset(
        path, 24 // world_size, 0, 0, world_size, buffer_rows=12 * 2 // world_size, cache_bytes=0
    )
    read = []
    monkeypatch.setattr(type(dataset._groups[0]), "read", _counting(type(dataset._groups[0]).read, read))
    list(dataset)
    assert len(read) < 8


def _counting(function, calls):
    def counted(self, columns):
        calls.append(self.number)
        return function(self, columns)

    return counted


def test_small_datasets_are_read_once_and_large_ones_every_epoch(write_labels, monkeypatch):
    path = write_labels(SHARDS)
    for options, expected in ((CACHED, 6), (STREAMED, 12)):
        dataset = SoftLabelDataset(path, 4, 0, **options)
        read = []
        kind = type(dataset._groups[0])
        with monkeypatch.context() as patch:
            patch.setattr(kind, "read", _counting(kind.read, read))
            first, second = numbers(dataset), numbers(dataset)
        assert len(read) == expected
        assert sorted(first) == sorted(second) == list(range(43))


@pytest.mark.parametrize("wide_bytes", [1, shuffle.WIDE_BYTES])
def test_a_batch_is_nobody_elses(write_labels, monkeypatch, wide_bytes):
    """What a training does to a batch reaches neither the cache nor the batches beside it."""
    monkeypatch.setattr(shuffle, "WIDE_BYTES", wide_bytes)
    path = write_labels(SHARDS)
    spoilt, clean = SoftLabelDataset(path, 4, 0, **CACHED), SoftLabelDataset(path, 4, 0, **STREAMED)
    for _ in range(2):
        for one, other in zip(spoilt, clean, strict=True):
            for name in one:
                torch.testing.assert_close(one[name], other[name])
                one[name].zero_()


def test_memory_is_used_again_when_its_last_slice_is_gone_and_not_before():
    memory = Memory(pinned=False)
    tensor = memory.tensor((4, 3), np.dtype(np.float32))
    assert tensor.shape == (4, 3)
    assert tensor.dtype == torch.float32
    place, rows = tensor.data_ptr(), tensor[1:3]
    rows[:] = 7.0
    del tensor
    other = memory.tensor((4, 3), np.dtype(np.float32))
    assert other.data_ptr() != place
    assert (rows == 7.0).all()
    del rows
    assert memory.tensor((3, 2), np.dtype(np.int64)).data_ptr() == place
    assert memory.tensor((0, 2), np.dtype(np.int64)).shape == (0, 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_transform_sees_its_place_whatever_the_threads_and_after_a_resume(write_labels, workers):
    path = write_labels(SHARDS)

    def noisy(batch, place):
        assert threading.current_thread() is not threading.main_thread()
        noise = torch.rand(len(batch["row"]), generator=place.generator())
        return {**batch, "noise": noise, "place": torch.full_like(batch["row"], place.position)}

    def opened(threads):
        return SoftLabelDataset(path, 4, 5, transform=noisy, workers=threads, **STREAMED)

    reference = opened(1)
    expected = [*reference, *reference]
    assert [int(batch["place"][0]) for batch in expected[:11]] == list(range(0, 43, 4))
    assert not torch.equal(expected[0]["noise"], expected[1]["noise"])
    assert not torch.equal(expected[0]["noise"], expected[11]["noise"])
    stopped = opened(workers)
    iterator = iter(stopped)
    found = [next(iterator) for _ in range(5)]
    resumed = opened(workers)
    resumed.load_state_dict(stopped.state_dict())
    found += [*resumed, *resumed]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["noise"], other["noise"])
    assert torch.equal(
        Place(5, 0, 8).generator().get_state(),
        torch.Generator().manual_seed(Place(5, 0, 8).generator().initial_seed()).get_state(),
    )


def test_an_error_in_the_background_reaches_the_training_and_ends_its_threads(tmp_path):
    column = pictures(20).to_pylist()
    column[13] = b"no image"
    path = write_column(tmp_path / "labels", pa.array(column), [10, 10])
    dataset = SoftLabelDataset(path, 4, 0, input=InputConfig(kind="image", columns=("c",)), **STREAMED)
    before = threading.active_count()
    with pytest.raises(
        InputError,
        match=r"shard.parquet: row 13 .example_id '13'. gives no input: .* must hold encoded images, it is none",
    ):
        list(dataset)
    assert threading.active_count() == before
    iterator = iter(SoftLabelDataset(path, 1, 0, **STREAMED))
    next(iterator)
    iterator.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("threads", "ahead"), [(1, 2), (3, 3)])
def test_as_many_windows_are_read_ahead_as_there_are_readers(threads, ahead):
    order, read = EpochOrder([4] * 12, 1, 0, 0), []

    def shuffle(_order, window, found, _shares):
        return [(window, found)]

    work = Work(order, Shares.of(0, 48, 4, 0, 1), read.append, shuffle, lambda parts, _sizes, _starts: [parts])
    batches = in_background(work, 1, threads)
    for taken in range(12):
        next(batches)
        # of one piece that is taken, one for each thread that makes some, and the windows ahead
        wanted = min(12, taken + 1 + threads + ahead)
        _wait_until(lambda wanted=wanted: len(read) >= wanted)
        assert len(read) == wanted
    assert sorted(read) == list(range(12))
    assert next(batches, None) is None


def _wait_until(true):
    give_up = time.monotonic() + 60
    while not true() and time.monotonic() < give_up:
        time.sleep(0.001)


def test_rounds_may_have_columns_of_their_own_and_other_number_types(tmp_path):
    one = pa.array(np.arange(6, dtype=np.int16))
    write_column(tmp_path / "a", one, [3, 3], extra=pa.array(np.arange(6.0)), gain=pa.array([1.0, None] * 3))
    write_column(tmp_path / "b", one.cast(pa.int32()), [6], gain=pa.array([2.0] * 6))
    dataset = SoftLabelDataset([tmp_path / "a", tmp_path / "b"], 12, 0)
    batch = next(iter(dataset))
    assert "extra" not in batch
    assert dataset.scalar_columns == {"number", "c", "gain", "teacher_margin"}
    assert batch["c"].tolist() == batch["number"].tolist()
    assert int(torch.isnan(batch["gain"]).sum()) == 3
    assert sorted(batch["row"].tolist()) == list(range(12))


def test_datasets_of_more_files_than_a_process_may_open(write_labels):
    resource = pytest.importorskip("resource")
    path = write_labels([[2]] * 40)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = max(int(name) for name in __import__("os").listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, limits[1]))
        assert sorted(numbers(SoftLabelDataset(path, 4, 0))) == list(range(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_files_that_are_not_what_was_committed_are_refused(write_labels):
    path = write_labels(SHARDS)
    shard = path / "shard-001.parquet"
    table = pq.read_table(shard)
    dataset = SoftLabelDataset(path, 4, 0)
    pq.write_table(table.slice(0, 4), shard)
    with pytest.raises(ValueError, match=r"shard-001.parquet was written again after the dataset was opened"):
        list(dataset)
    with pytest.raises(ValueError, match=r"shard-001.parquet must have the 11 rows that its manifest says, got 4"):
        SoftLabelDataset(path, 4, 0)
    pq.write_table(table, shard, compression="none")
    with pytest.raises(ValueError, match=r"shard-001.parquet must have the [\d,]+ bytes that its manifest says, got"):
        SoftLabelDataset(path, 4, 0)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-001.parquet is missing, its manifest says that it was committed"):
        SoftLabelDataset(path, 4, 0)


def test_each_mistake_is_a_sentence(write_labels, tmp_path):
    path = write_labels(SHARDS)
    for options, message in (
        ({"mixing_weights": (1, 2)}, "mixing_weights must be one for each of the 1 datasets, got 2"),
        ({"mixing_weights": (-1,)}, r"mixing_weights must be finite, at least 0 and not all 0, got \[-1\]"),
        ({"mixing_weights": (0.0,)}, r"mixing_weights must be finite, at least 0 and not all 0, got \[0.0\]"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
        ({"input": InputConfig(columns=("y",))}, "the input must have a column y"),
        (
            {"input": InputConfig(kind="raw", columns=("example_id",))},
            "input of kind 'raw' must be one array of numbers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SoftLabelDataset(path, 4, 0, **options)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        SoftLabelDataset(path, 4, -1)
    with pytest.raises(ValueError, match="input must be given to the dataset"):
        _ = SoftLabelDataset(path, 4, 0).input_shape
    holes = write_column(tmp_path / "missing", pa.array([1, None, 3]), [3])
    with pytest.raises(ValueError, match="column c of whole numbers must not have missing values, got 1; name the"):
        list(SoftLabelDataset(holes, 4, 0))
    assert len(list(SoftLabelDataset(holes, 4, 0, columns=("number",)))) == 1
    lists = pa.array([[1.0, 2.0], [None, 4.0]], pa.list_(pa.float32(), 2))
    with pytest.raises(ValueError, match="column c must not have missing values in its lists; fill them"):
        list(SoftLabelDataset(write_column(tmp_path / "holes", lists, [2]), 4, 0))
    wide, narrow = (pa.array([[1.0] * n], pa.list_(pa.float32(), n)) for n in (3, 2))
    paths = [write_column(tmp_path / name, column, [1]) for name, column in (("wide", wide), ("narrow", narrow))]
    with pytest.raises(
        ValueError, match="column c must have types that go together in all shards, got fixed_size_list"
    ):
        SoftLabelDataset(paths, 4, 0)
    ragged = write_column(tmp_path / "ragged", pa.array([[1.0], [2.0], [1.0, 2.0], [3.0, 4.0]]), [2, 2])
    with pytest.raises(
        InputError, match=r"row 2 .*inputs of all rows must have the shape \[1\] of the first, got \[2\]"
    ):
        list(SoftLabelDataset(ragged, 1, 0, input=InputConfig(columns=("c",)), buffer_rows=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_pinned_batches_are_pinned(write_labels):
    def changed(batch, place):
        return {**batch, "weight": batch["weight"] + place.epoch}

    for transform in (None, changed):
        dataset = SoftLabelDataset(write_labels(SHARDS), 4, 0, transform=transform, pin_memory=True, **STREAMED)
        for batch in dataset:
            assert all(value.is_pinned() for value in batch.values())
            moved = {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}
            torch.cuda.synchronize()
            assert all(torch.equal(moved[name].cpu(), value) for name, value in batch.items())
