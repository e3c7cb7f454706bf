"""What a language model computes, by hand; small trainings and scorings are done on one thread, large ones on as many as torch has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_language_trainings as small
import torch

pytest.importorskip("transformers", reason="needs distilbeam[hf]")

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.student.data import TokenLabelDataset
from distilbeam.student.language import threads as choice
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.language.evaluate import measure, token_bytes
from distilbeam.student.language.network import CausalLm, build_language_model
from distilbeam.student.language.scoring import score_blocks
from distilbeam.student.language.threads import forward_operations, step_operations
from distilbeam.student.language.train import train_language_model
from distilbeam.student.training.threads import PARAMETER

SEEN: dict[str, set[int]] = {"steps": set(), "looks": set()}
WIDTH = 16
MORE = [(1, 1), (0, 2)]  # how many operations the limit is above those of the model, and the threads that it has then
CPU = torch.device("cpu")


class Watched(small.Recurrent):
    """A language model that writes down how many threads its forward passes have."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes, width)
        self.backbone.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        SEEN["steps" if torch.is_grad_enabled() else "looks"].add(torch.get_num_threads())


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "watched_models", sys.modules[__name__])
    for seen in SEEN.values():
        seen.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lm")
    small.write_blocks(directory / "labels", directory / "tokenizer")
    return directory


def watched(place: Path) -> LanguageModelConfig:
    name, tokenizer = "watched_models:Watched", str(place / "tokenizer")
    return LanguageModelConfig(model=name, options={"width": WIDTH}, tokenizer=tokenizer)


def train(place: Path, directory: Path, **changes: Any) -> None:
    _, training = small.settings(place / "tokenizer", epochs=1, **changes)
    train_language_model(watched(place), training, soft_labels=[place / "labels"], directory=directory, seed=0)


@pytest.mark.parametrize(("more", "threads"), MORE)
def test_steps_of_a_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, threads: int
) -> None:
    network = CausalLm(small.Recurrent(small.VOCABULARY, WIDTH))
    monkeypatch.setattr(choice, "SMALL", more + step_operations(network, small.VOCABULARY, 8 * small.LENGTH))
    train(place, tmp_path / "student")
    assert SEEN["steps"] == {threads}
    assert torch.get_num_threads() == 2


def test_they_are_given_back_after_an_error(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the training loss became"):
        train(place, tmp_path / "student", lr=1e30, clip=1e30)
    assert SEEN["steps"] == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("more", "threads"), MORE)
def test_scoring_and_measuring(place: Path, monkeypatch: pytest.MonkeyPatch, more: int, threads: int) -> None:
    tokenizer = load_tokenizer(place / "tokenizer", "tokenizer")
    network = build_language_model(watched(place), tokenizer).eval()
    monkeypatch.setattr(choice, "SMALL", more + forward_operations(network, tokenizer.num_classes, 8 * small.LENGTH))
    SEEN["looks"].clear()  # of the trial whether texts see each other
    blocks = {name: np.ones((8, small.LENGTH), int) for name in ("input_ids", "segment_ids", "completion_mask")}
    score_blocks(network, blocks, "entropy", tokenizer.num_classes, CPU)
    assert SEEN["looks"] == {threads}
    SEEN["looks"].clear()
    held_out = TokenLabelDataset(place / "labels", 8, 0, columns=())
    measure(network, held_out, held_out.spec, token_bytes(tokenizer, tokenizer.num_classes), CPU)
    assert SEEN["looks"] == {threads}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_of_the_layers(place: Path, tied: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    student, _ = small.settings(place / "tokenizer", {"tie_word_embeddings": tied, "num_hidden_layers": 1})
    network = build_language_model(student, load_tokenizer(place / "tokenizer", "tokenizer"))
    width, inner, ids = 16, 32, small.VOCABULARY
    layer = 4 * width * width + 3 * width * inner
    norms = 3 * width
    assert forward_operations(network, ids, 10) == 2 * 10 * (layer + norms + width * ids)
    assert forward_operations(network, 100, 10) == 2 * 10 * (layer + norms + width * 100)
    parameters = layer + norms + width * ids * (1 if tied else 2)
    assert step_operations(network, ids, 10) == 3 * forward_operations(network, ids, 10) + PARAMETER * parameters
    tokens = torch.ones(1, 12, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        network.logits(network.hidden(tokens, tokens))
    assert forward_operations(network, ids, 12) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_the_last_layer_of_a_module_of_one_s_own_counts_once() -> None:
    network = CausalLm(small.Recurrent(50, 8))
    assert forward_operations(network, 50, 1) == 2 * (2 * 8 * 8 + 8 + 50 + 50 * 8)
