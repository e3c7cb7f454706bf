from __future__ import annotations

import math

import pytest
import torch

from distilbeam.student.training.augment import drop_words
from distilbeam.student.training.config import AugmentConfig

ROWS, LENGTH, PADDING = 200, 50, 0


def dropped(config: AugmentConfig, epoch: int = 0, positions: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.arange(1, LENGTH + 1).repeat(ROWS, 1)
    return drop_words(ids, torch.arange(ROWS) if positions is None else positions, config, 7, epoch, 0, PADDING)


def test_words_are_dropped_with_the_probability_and_become_padding() -> None:
    changed = dropped(AugmentConfig(word_dropout=0.2))
    gone = changed == PADDING
    assert torch.equal(changed[~gone], torch.arange(1, LENGTH + 1).repeat(ROWS, 1)[~gone])
    count = ROWS * LENGTH
    bound = 5 * math.sqrt(0.2 * 0.8 / count)  # five standard deviations
    assert abs(float(gone.float().mean()) - 0.2) < bound
    # neither a place nor a row is favoured: five standard deviations over the smaller number, and a union of 250 of them
    assert float((gone.float().mean(0) - 0.2).abs().max()) < 5 * math.sqrt(0.16 / ROWS)
    assert float((gone.float().mean(1) - 0.2).abs().max()) < 5 * math.sqrt(0.16 / LENGTH)


def test_what_is_dropped_depends_on_the_example_and_the_epoch_alone() -> None:
    config = AugmentConfig(word_dropout=0.3)
    whole = dropped(config)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped(config, positions=order), whole[order])
    assert not torch.equal(dropped(config, epoch=1), whole)


def test_numbers_of_n_grams_become_zero_and_without_the_setting_nothing_is_touched() -> None:
    numbers = torch.rand(8, 16) + 1
    changed = drop_words(numbers, torch.arange(8), AugmentConfig(word_dropout=0.5), 0, 0, 1, None)
    assert set((changed / numbers).unique().tolist()) == {0.0, 1.0}
    assert drop_words(numbers, torch.arange(8), AugmentConfig(), 0, 0, 1, None) is numbers


def test_inputs_without_words_are_a_sentence(tmp_path) -> None:
    import pyarrow as pa

    from distilbeam.student.networks.config import StudentConfig
    from distilbeam.student.training.config import TrainConfig
    from distilbeam.student.training.train import train

    rows = pa.table(
        {"x": pa.FixedSizeListArray.from_arrays(pa.array([0.0, 1.0] * 4, pa.float32()), 2), "label": [0, 1] * 2}
    )
    with pytest.raises(ValueError, match=r"augment.word_dropout needs texts or tokens, got an input of kind"):
        train(
            StudentConfig(kind="linear", input={"columns": ["x"]}),
            TrainConfig(epochs=1, augment=AugmentConfig(word_dropout=0.1)),
            classes=["0", "1"],
            labelled=rows,
            label_column="label",
            soft_labels=[],
            validation=None,
            directory=tmp_path / "student",
            seed=0,
        )
