"""What a language model is unsure of, against loops in float64 and the gains of selection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_language_trainings as small
import torch
from language_models import write_tokenizer

from distilbeam.inputs.blocks import has_label
from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.selection.gains import GAINS, gain_named
from distilbeam.student.language import scoring
from distilbeam.student.language.network import CausalLm, build_language_model
from distilbeam.student.language.scoring import UNCERTAINTIES, score_blocks

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> CausalLm:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocabulary=small.VOCABULARY)
    student, _ = small.settings(folder)
    torch.manual_seed(0)
    return build_language_model(student, load_tokenizer(folder, "tokenizer")).eval()


def blocks(rows: int = 7) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    segments = np.ones((rows, small.LENGTH), np.int16)
    segments[1, 6:] = 2
    segments[2, 9:] = 0
    mask = np.ones_like(segments, np.uint8)
    mask[3, :10] = 0
    mask[4] = 0  # nothing to be predicted
    return {
        "input_ids": rng.integers(3, small.VOCABULARY, segments.shape).astype(np.int32),
        "segment_ids": segments,
        "completion_mask": mask,
    }


def test_every_gain_of_selection_is_one_of_blocks() -> None:
    assert UNCERTAINTIES.keys() == GAINS.keys()


@pytest.mark.parametrize("gain", GAINS)
def test_a_block_scores_the_mean_over_its_labelled_positions(network: CausalLm, gain: str) -> None:
    given, classes = blocks(), small.VOCABULARY - 5  # a last layer may have more outputs than the labels have ids
    given["input_ids"] %= classes
    found = score_blocks(network, given, gain, classes, CPU)
    labelled = has_label(given["segment_ids"], given["completion_mask"])
    for row in range(len(labelled)):
        ids, segments = (
            torch.from_numpy(given[n][row : row + 1].astype(np.int64)) for n in ("input_ids", "segment_ids")
        )
        with torch.no_grad():
            hidden = network.hidden(ids, segments)[0].double().numpy()
            logits = network.logits(network.hidden(ids, segments))[0, :, :classes].double().numpy()
        if row == 4:
            assert np.isnan(found.gains[row])
            assert np.isnan(found.embeddings[row]).all()
            continue
        assert found.gains[row] == pytest.approx(gain_named(gain)(logits[labelled[row]]).mean(), rel=1e-4)
        np.testing.assert_allclose(found.embeddings[row], hidden[labelled[row]].mean(axis=0), rtol=1e-3, atol=1e-5)


def test_scores_do_not_depend_on_what_is_scored_together(network: CausalLm, monkeypatch: pytest.MonkeyPatch) -> None:
    given = blocks()
    together = score_blocks(network, given, "entropy", small.VOCABULARY, CPU)
    monkeypatch.setattr(scoring, "TOKENS", 2 * small.LENGTH)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * small.VOCABULARY * 3)  # three positions at a time
    apart = score_blocks(network, given, "entropy", small.VOCABULARY, CPU)
    np.testing.assert_allclose(apart.gains, together.gains, rtol=1e-5)
    np.testing.assert_allclose(apart.embeddings, together.embeddings, rtol=1e-4, atol=1e-6)


def test_no_more_logits_exist_than_are_allowed(network: CausalLm, monkeypatch: pytest.MonkeyPatch) -> None:
    held, positions = [], 4
    of_head = CausalLm.logits

    def watched(self: CausalLm, hidden: torch.Tensor) -> torch.Tensor:
        held.append(len(hidden))
        return of_head(self, hidden)

    monkeypatch.setattr(CausalLm, "logits", watched)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * small.VOCABULARY * positions)
    given = blocks()
    score_blocks(network, given, "margin", small.VOCABULARY, CPU)
    assert max(held) == positions
    assert sum(held) == has_label(given["segment_ids"], given["completion_mask"]).sum()
