"""SoftLabelDataset: what it gives out, in which order, and how it goes on after a stop."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distilbeam.inputs.config import InputConfig
from distilbeam.kernels import DenseLabels, SampledLabels, TopKLabels
from distilbeam.student.data.loader import SoftLabelDataset, teacher_labels
from distilbeam.student.data.sampler import EpochOrder, Shares, step_starts
from distilbeam.teacher.softlabels import decode

SHARDS = [[5, 7], [11], [3, 4, 13]]  # 43 rows in six row groups
ROWS = 43


def numbers(batches):
    return [int(number) for batch in batches for number in batch["number"]]


def joined(datasets):
    """What all ranks give out, step by step."""
    return [number for step in zip(*datasets, strict=True) for number in numbers(step)]


def ranks(path, world_size, state=None, batch_size=4, **options):
    datasets = [SoftLabelDataset(path, batch_size, 7, rank, world_size, **options) for rank in range(world_size)]
    for dataset in datasets:
        if state is not None:
            dataset.load_state_dict(state)
    return datasets


@pytest.mark.parametrize(("kind", "k"), [("dense", None), ("top_k", 2), ("sampled", 5)])
def test_batches_hold_the_rows_of_the_shards(write_labels, kind, k):
    path = write_labels(SHARDS, kind=kind, k=k)
    dataset = SoftLabelDataset(path, batch_size=8, seed=0, input=InputConfig(columns=("x",)))
    stored = [pq.read_table(file) for file in sorted(path.glob("*.parquet"))]
    labels = [decode(table, dataset.spec) for table in stored]
    x = np.concatenate([np.stack(table["x"].to_numpy(zero_copy_only=False)) for table in stored])
    weight = np.concatenate([table["weight"].to_numpy() for table in stored])
    for batch in dataset:
        rows = batch["number"].numpy()
        assert batch["row"].tolist() == rows.tolist()
        np.testing.assert_array_equal(batch["inputs"], x[rows])
        np.testing.assert_array_equal(batch["weight"], weight[rows])
        assert kind == "dense" or batch["teacher_classes"].dtype == torch.int64  # what torch gathers by
        for name, part in (
            ("teacher_logprobs", "logprobs"),
            ("teacher_classes", "classes"),
            ("teacher_tail_logmass", "tail_logmass"),
        ):
            if getattr(labels[0], part) is None:
                assert name not in batch
            else:
                np.testing.assert_array_equal(batch[name], np.concatenate([getattr(la, part) for la in labels])[rows])


def test_without_an_input_every_tensor_column_comes_along(write_labels):
    batch = next(iter(SoftLabelDataset(write_labels(SHARDS), 4, 0)))
    assert batch["x"].shape == (4, 2)
    assert batch["alpha"].shape == (4,)
    assert "example_id" not in batch


@pytest.mark.parametrize("buffer_rows", [1, 12, 65_536])
def test_every_row_once_an_epoch_in_an_order_that_ranks_do_not_change(write_labels, buffer_rows):
    path = write_labels(SHARDS)
    alone = ranks(path, 1, buffer_rows=buffer_rows)
    first, second = joined(alone), joined(alone)
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second
    for world_size in (2, 3, 5):
        datasets = ranks(path, world_size, buffer_rows=buffer_rows)
        assert joined(datasets) == first
        assert joined(datasets) == second
        assert {len(dataset) for dataset in datasets} == {-(-ROWS // (4 * world_size))}


def test_the_order_follows_the_seed(write_labels):
    path = write_labels(SHARDS)
    orders = [numbers(SoftLabelDataset(path, 4, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("buffer_rows", [12, 65_536])
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (3, 2), (1, 3), (3, 1)])
def test_a_stopped_epoch_goes_on_exactly_at_any_world_size(write_labels, buffer_rows, epochs, before, after):
    path = write_labels(SHARDS)
    whole = ranks(path, 1, buffer_rows=buffer_rows)
    stopped = ranks(path, before, buffer_rows=buffer_rows)
    for _ in range(epochs):
        assert joined(stopped) == joined(whole)
    undisturbed = joined(whole) + joined(whole)
    iterators = [iter(dataset) for dataset in stopped]
    seen = [number for _ in range(2) for iterator in iterators for number in numbers([next(iterator)])]
    states = [dataset.state_dict() for dataset in stopped]
    assert all(state == states[0] for state in states)
    resumed = ranks(path, after, states[0], buffer_rows=buffer_rows)
    rest = joined(resumed)
    assert seen + rest + joined(resumed) == undisturbed


def test_a_state_taken_at_the_end_of_an_epoch_starts_the_next(write_labels):
    path = write_labels(SHARDS)
    dataset = SoftLabelDataset(path, 4, 7)
    list(dataset)
    resumed = SoftLabelDataset(path, 4, 7)
    resumed.load_state_dict(dataset.state_dict())
    assert numbers(resumed) == numbers(dataset)


def test_a_rank_without_a_share_of_the_last_step_gets_an_empty_batch(write_labels):
    path = write_labels([[3]])
    datasets = ranks(path, 4, batch_size=2)
    sizes = [[len(batch["number"]) for batch in dataset] for dataset in datasets]
    assert sizes == [[0], [1], [1], [1]]
    assert all(batch["teacher_logprobs"].shape[1] == 3 for dataset in datasets for batch in dataset)


def test_several_datasets_are_one(write_labels):
    paths = [write_labels([[5, 4]], name="round=000"), write_labels([[6]], name="round=001", seed=1, first=9)]
    dataset = SoftLabelDataset(paths, 4, 0)
    assert dataset.rows == 15
    assert sorted(numbers(dataset)) == list(range(15))


def test_only_the_manifest_decides_what_is_read(write_labels):
    path = write_labels(SHARDS)
    (path / "shard-000.parquet").rename(path / "stray.parquet")
    (path / "_manifest" / "labels000.json").unlink()
    assert sorted(numbers(SoftLabelDataset(path, 4, 0))) == list(range(12, ROWS))


def test_labels_are_made_for_the_losses(write_labels):
    for kind, k, made in (("dense", None, DenseLabels), ("top_k", 2, TopKLabels), ("sampled", 5, SampledLabels)):
        dataset = SoftLabelDataset(write_labels([[6]], name=kind, kind=kind, k=k), 6, 0)
        batch = next(iter(dataset))
        labels = teacher_labels(batch, dataset.spec)
        assert isinstance(labels, made)
        assert torch.equal(labels.logprobs, batch["teacher_logprobs"])


def test_the_mean_of_a_column(write_labels):
    dataset = SoftLabelDataset(write_labels(SHARDS), 4, 0)
    assert dataset.mean("weight") == pytest.approx(1.0)
    assert dataset.scalar_columns >= {"weight", "alpha", "candidates", "number", "teacher_margin"}


def test_the_last_two_steps_share_what_whole_ones_leave():
    assert np.diff([*step_starts(0, 257, 64), 257]).tolist() == [64, 64, 64, 33, 32]
    assert np.diff([*step_starts(0, 256, 64), 256]).tolist() == [64, 64, 64, 64]
    assert step_starts(0, 65, 64).tolist() == [0, 33]
    assert step_starts(0, 40, 64).tolist() == [0]
    assert step_starts(7, 7, 64).tolist() == []
    assert np.diff([*step_starts(0, 3, 1), 3]).tolist() == [1, 1, 1]


@given(rows=st.integers(1, 300), step_rows=st.integers(1, 40))
def test_steps_are_even_and_the_same_from_any_of_them_on(rows, step_rows):
    starts = step_starts(0, rows, step_rows)
    sizes = np.diff([*starts, rows])
    assert len(starts) == -(-rows // step_rows)
    assert sizes.max() <= step_rows
    assert len(starts) == 1 or sizes.min() >= step_rows // 2
    assert (sizes[:-2] == step_rows).all()
    for i, start in enumerate(starts):
        assert step_starts(int(start), rows, step_rows).tolist() == starts[i:].tolist()


@given(
    groups=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    buffer_rows=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
)
def test_shares_and_pieces_tile_the_epoch(groups, buffer_rows, batch_size, world_size):
    order, rows = EpochOrder(groups, buffer_rows, 1, 0), sum(groups)
    parts = [Shares.of(0, rows, batch_size, rank, world_size) for rank in range(world_size)]
    position = 0
    starts = step_starts(0, rows, batch_size * world_size)
    for step in range(len(starts)):
        for part in parts:
            assert part.ends[step] == [*starts, rows][step + 1]
            assert part.starts[step] == position
            position = int(part.stops[step])
            assert position - part.starts[step] <= batch_size
        sizes = [int(part.stops[step] - part.starts[step]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert position == rows
    assert sorted(group for window in order.windows for group in window) == list(range(len(groups)))
    assert all(sum(groups[g] for g in window) >= buffer_rows for window in order.windows[:-1])
    for part in parts:
        steps = zip(part.starts.tolist(), part.stops.tolist(), strict=True)
        own = [position for start, stop in steps for position in range(start, stop)]
        found = []
        for window, before, upto in part.windows(order):
            positions = part.positions(order.starts[window], order.starts[window + 1]).tolist()
            assert positions == own[before:upto]
            everywhere, (places, count) = order.places(window), part.places(order, window)
            assert count == len(positions)
            for there, mine in zip(everywhere.tolist(), places.tolist(), strict=True):
                position = order.starts[window] + there
                assert mine == (positions.index(position) if position in positions else -1)
            found += positions
        assert found == own


def test_each_mistake_is_named(write_labels, tmp_path):
    path = write_labels(SHARDS)
    for arguments, message in (
        ((path, 0, 0), "batch_size must be at least 1, got 0"),
        ((path, 1, 0, 2, 2), "rank must be between 0 and 1, got 2"),
        (([], 1, 0), "path must name at least one soft-label dataset, got none"),
        ((tmp_path / "nothing", 1, 0), "has no soft labels"),
        (([path, write_labels([[3]], name="other", teacher="u")], 1, 0), r"differ in teacher \('t' and 'u'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SoftLabelDataset(*arguments)
    state = SoftLabelDataset(path, 4, 0).state_dict()
    for change, message in (
        ({"seed": 1}, "the state's seed must be that of this dataset, 0, got 1"),
        ({"dataset": "x"}, "the state's dataset must be that of this dataset"),
        ({"version": 1}, "the state's version must be that of this dataset, 3, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SoftLabelDataset(path, 4, 0).load_state_dict({**state, **change})
