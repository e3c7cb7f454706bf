"""A language model behind a ModelHandler of Beam: what it says is what the same model says when it is run here."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import blocks_of, write_model

from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.predict import ask
from distilbeam.teacher.protocol import TeacherMisfit
from distilbeam.teacher.softlabels import TokenLabels

LENGTH, K = 24, 6
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [3] * 4 + [0] * 3, [1] * 24, [0] * 24, [1] * 2 + [2] * 22])
FORM = {"kind": "top_k", "k": K, "temperature": 1.0, "storage": "float32", "sequence_length": LENGTH, "carried": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


def handled(model: Path, name: str = "Prompts", arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    config = {
        "kind": "beam",
        "handler": f"prompt_handlers:{name}",
        "arguments": {"model": str(model), **(arguments or {})},
        "files": [str(model)],
        "tokenizer": str(model),
    }
    return load_teacher({**config, **settings}, form={**FORM, "k": settings.pop("k", K)})


def batch() -> Any:
    return blocks_of(SEGMENTS).combine_chunks().to_batches()[0]


def labels_of(teacher: Any) -> TokenLabels:
    answers = ask(teacher, batch(), teacher.spec.answer_width)
    assert answers.ok.all(), answers.errors
    return TokenLabels.unpack(answers.logits, teacher.spec)


@pytest.mark.parametrize("plain", [False, True])
def test_its_labels_are_those_of_the_same_model_run_here(model: Path, plain: bool) -> None:
    teacher = handled(model, arguments={"plain": plain})
    local = load_teacher({"kind": "causal_lm", "model": str(model), "device": "cpu"}, form=FORM)
    found, expected = labels_of(teacher), labels_of(local)
    np.testing.assert_array_equal(found.labelled, expected.labelled)
    assert found.labelled.sum() == 8 + 7 + 3 + 23 + 1 + 21
    np.testing.assert_array_equal(found.classes, expected.classes)
    for name in ("logprobs", "tail_logmass", "token_logprob"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    asked = teacher.teacher._handler.asked
    assert [count for count, _ in asked] == [3, 3], "the handler's own limit of examples"
    assert {a["extra_body"]["prompt_logprobs"] for _, a in asked} == {K}
    assert {a["max_tokens"] for _, a in asked} == {1}
    assert len({a["extra_body"]["cache_salt"] for _, a in asked}) == 2, "a cached prompt has no log-probabilities"
    assert teacher.spec.source == "server:handler"
    assert teacher.spec.tokenizer == local.spec.tokenizer


def test_a_block_with_a_wrong_answer_is_left_out_alone(model: Path) -> None:
    teacher = handled(model, arguments={"drop": 22})
    answers = ask(teacher, batch(), teacher.spec.answer_width)
    assert answers.ok.tolist() == [True, True, True, False]
    assert "for the 21 tokens behind the first of 22, got 20" in answers.errors[0].error


def test_a_cap_is_said_with_both_ways_out(model: Path) -> None:
    teacher = handled(model, arguments={"allowed": 4})
    with pytest.raises(
        TeacherMisfit, match=r"the server allows 4 .* start it with --max-logprobs 6 or set labels.k = 4"
    ):
        ask(teacher, batch(), teacher.spec.answer_width)


def test_what_gives_no_distribution_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = handled(model, "Texts")
    answers = ask(teacher, batch(), teacher.spec.answer_width)
    assert answers.ok.tolist() == [False, False, True, False], "a block without a label asks nothing"
    assert "must answer with log-probabilities of the prompt, got none" in answers.errors[0].error
    import prompt_handlers

    chat = types.ModuleType("apache_beam.ml.inference.vllm_inference")
    chat.VLLMChatModelHandler = prompt_handlers.Prompts  # type: ignore[attr-defined]  # the class that Beam has there
    monkeypatch.setitem(sys.modules, chat.__name__, chat)
    with pytest.raises(
        ValueError, match=r"is given messages and writes the prompt itself.* name VLLMCompletionsModelHandler"
    ):
        handled(model)


def test_settings_say_which_of_both_it_is(model: Path) -> None:
    with pytest.raises(
        ValueError, match="input must be left out with a tokenizer: the handler is given the ids of texts"
    ):
        handled(model, input={"column": "x"})
    with pytest.raises(ValueError, match="max_length must be left out without a tokenizer"):
        load_teacher({"kind": "beam", "handler": "m:h", "version": "1", "input": {"column": "x"}, "max_length": 3})
    with pytest.raises(ValueError, match=r"teacher.beam.input|teacher.input"):
        load_teacher({"kind": "beam", "handler": "m:h", "version": "1"})
    with pytest.raises(ValueError, match="the pool's blocks have 24 tokens, the teacher reads at most 16"):
        handled(model, max_length=16)
    one, other = handled(model), handled(model, version="2")
    assert one.fingerprint().startswith("beam:prompt_handlers:Prompts:")
    assert one.fingerprint() != other.fingerprint()
