"""The configuration of runs of language models: what has no meaning there is refused, each in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from distilbeam.pipelines.config import TokenRunConfig, load_any_config, load_config, parse_run_config
from distilbeam.pipelines.token_config import NOT_OF_BLOCKS

SETTINGS: dict[str, Any] = {
    "data": {"pool": "pool", "validation": "held-out"},
    "teacher": {"kind": "causal_lm", "model": "teacher"},
    "labels": {"kind": "top_k", "k": 20},
    "selection": {"budget": 8},
    "student": {"kind": "causal_lm", "config": {"model_type": "llama"}, "tokenizer": "teacher"},
}


def changed(name: str, value: Any) -> dict[str, Any]:
    section, _, key = name.partition(".")
    found = {part: dict(values) for part, values in SETTINGS.items()}
    found.setdefault(section, {})
    if key:
        found[section][key] = value
    else:
        found[section] = value
    return found


def refused(name: str, value: Any) -> str:
    with pytest.raises(ValueError, match=r"\w") as e:
        parse_run_config(changed(name, value))
    said = str(e.value)
    assert "\n" not in said
    return said


def test_a_teacher_of_tokens_makes_it_a_run_of_a_language_model(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(SETTINGS))
    found = load_any_config(file)
    assert isinstance(found, TokenRunConfig)
    assert found.student.tokenizer == str(tmp_path / "teacher")
    assert (found.selection.scored, found.selection.gain, found.scores_at_first) == ("entropy", "entropy", False)
    with pytest.raises(ValueError, match="describes a run of a language model, and this is for classifiers"):
        load_config(file)


@pytest.mark.parametrize("name", NOT_OF_BLOCKS)
def test_what_is_of_classes_is_refused_with_its_reason(name: str) -> None:
    said = refused(name, {"budget": 1} if "." not in name else 1)
    assert said.startswith(f"{name} must be left out with a language model: it ")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("selection.method", "rad", "method must not be rad: a game against the teacher's mistakes"),
        ("selection.method", "correct-gain", "method must not be correct-gain"),
        ("selection.method", "badge", "badge reads logits, which a block has for each of its tokens"),
        ("selection.method", "herdin", "greedy, k-center, cluster-margin, herding, or module:Class, got herdin"),
        ("selection.gain", "loss", "gain must be one of margin, entropy, least_confidence"),
        ("selection.budget_tokens", 100, "budget, in blocks, or budget_tokens must be given, one of them"),
        (
            "run.rounds",
            1,
            "run.rounds must be at least 2 with selection.method = 'herding' and a student of random weights",
        ),
        ("labels.kind", "dense", "k must be given for top_k and sampled labels"),
        ("student.kind", "text", "student.kind must be 'causal_lm' with teacher.kind = 'causal_lm'"),
        ("training.objective", "sampled", "training.objective must be one of top_k labels"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(name: str, value: Any, words: str) -> None:
    assert words in refused(name, value)


def test_labels_of_rows_are_not_for_a_student_of_tokens() -> None:
    said = refused("teacher", {"kind": "torch", "model": "teacher.pt2", "input": {"column": "x"}})
    assert said.startswith(
        "student.kind must be that of a classifier with a teacher of classes, whose labels are of rows"
    )


def test_a_server_cannot_draw() -> None:
    served = {"kind": "openai", "address": "http://127.0.0.1:1", "model": "m", "tokenizer": "teacher"}
    settings = changed("teacher", served)
    settings["labels"] = {"kind": "sampled", "k": 4}
    with pytest.raises(ValueError, match=r"labels\.kind must be 'top_k' and labels\.temperature 1 for a server"):
        parse_run_config(settings)


def test_one_round_may_be_scored_by_trained_weights_or_chosen_by_chance() -> None:
    one = changed("run.rounds", 1)
    one["student"] = {"kind": "causal_lm", "model": "small"}
    assert parse_run_config(one).run.rounds == 1
    assert (
        parse_run_config({**changed("run.rounds", 1), "selection": {"budget": 8, "method": "uniform"}}).run.rounds == 1
    )
