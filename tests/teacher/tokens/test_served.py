"""A language model behind a server: one request for each text, a bounded window, repetitions, and what the server refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import blocks_of, write_tokenizer
from language_server import TABLE, LanguageServer, Reply, language_server, vllm_answer

from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.predict import ask
from distilbeam.teacher.protocol import TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.softlabels import TokenLabels

LENGTH, K = 16, 3
SEGMENTS = np.array([[1] * 6 + [2] * 7 + [3] + [0] * 2, [1] * 16])


@pytest.fixture
def fake() -> Iterator[LanguageServer]:
    with language_server() as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def teacher_of(fake: LanguageServer, tokenizer: Path, k: int = K, **settings: Any) -> Any:
    form = {"kind": "top_k", "k": k, "temperature": 1.0, "storage": "float32", "sequence_length": LENGTH, "carried": ()}
    config = {
        "kind": "openai",
        "address": fake.address,
        "model": "m",
        "tokenizer": str(tokenizer),
        "first_wait_s": 0.01,
    }
    return load_teacher({**config, "longest_wait_s": 0.05, **settings}, form=form)


def batch() -> Any:
    return blocks_of(SEGMENTS).combine_chunks().to_batches()[0]


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_each_text_is_a_request_and_its_labels_are_what_the_server_says(
    fake: LanguageServer, tokenizer: Path, api: str
) -> None:
    teacher = teacher_of(fake, tokenizer, api=api)
    labels = TokenLabels.unpack(ask(teacher, batch(), teacher.spec.answer_width).logits, teacher.spec)
    ids = np.array(batch()["input_ids"].to_pylist())
    prompts = sorted(body.get("prompt") or body["input_ids"] for body in fake.asked)
    assert prompts == sorted([ids[0, :6].tolist(), ids[0, 6:13].tolist(), ids[1].tolist()]), (
        "one token predicts nothing"
    )
    for row, place in np.argwhere(labels.labelled):
        expected = TABLE[ids[row, place]]
        order = np.argsort(-expected)[:K]
        assert labels.classes[row, place].tolist() == order.tolist()
        np.testing.assert_allclose(labels.logprobs[row, place], expected[order], rtol=1e-6)
        np.testing.assert_allclose(labels.token_logprob[row, place], expected[ids[row, place + 1]], rtol=1e-6)
        np.testing.assert_allclose(
            np.exp(labels.tail_logmass[row, place]), 1 - np.exp(expected[order]).sum(), rtol=1e-5
        )
    assert labels.labelled.sum() == 5 + 6 + 15
    assert teacher.spec.source == f"server:{api}"
    if api == "vllm":
        assert len({body["cache_salt"] for body in fake.asked}) == 3, "a cached prompt has no log-probabilities"
        assert {body["max_tokens"] for body in fake.asked} == {1}
    else:
        assert {(body["logprob_start_len"], body["top_logprobs_num"]) for body in fake.asked} == {(0, K)}


def test_the_window_is_bounded(fake: LanguageServer, tokenizer: Path) -> None:
    fake.pair = threading.Barrier(
        2, timeout=60
    )  # each request waits for another one: two are in flight, or nothing is answered
    teacher = teacher_of(fake, tokenizer, parallel=2)
    blocks = blocks_of(np.repeat(SEGMENTS, 4, axis=0)).combine_chunks().to_batches()[0]
    assert ask(teacher, blocks, teacher.spec.answer_width).ok.all()
    assert fake.most == 2


def test_what_can_pass_is_asked_again(fake: LanguageServer, tokenizer: Path) -> None:
    fake.refuse = lambda number, _: (
        ((429, {"Retry-After": "0"}, {}), (503, {}, {"message": "busy"}))[number] if number < 2 else None
    )
    teacher = teacher_of(fake, tokenizer, parallel=1)
    assert ask(teacher, batch(), teacher.spec.answer_width).ok.all()
    assert len(fake.asked) == 3 + 2
    fake.refuse = lambda number, body: (429, {}, {"error": {"message": "too many requests"}})  # noqa: ARG005
    with pytest.raises(TeacherUnavailable, match="does not answer after 3 attempts: status 429: too many requests"):
        ask(teacher_of(fake, tokenizer, attempts=3), batch(), teacher.spec.answer_width)


def test_a_server_that_says_nothing_is_given_up(fake: LanguageServer, tokenizer: Path) -> None:
    fake.wait_s = 1.0
    with pytest.raises(TeacherUnavailable, match="does not answer after 2 attempts: timed out"):
        ask(teacher_of(fake, tokenizer, attempts=2, timeout_s=0.1), batch(), 2 * LENGTH * (K + 1))


def test_a_cap_is_said_with_both_ways_out(fake: LanguageServer, tokenizer: Path) -> None:
    said = {
        "message": "Requested prompt logprobs of 64, which is greater than max allowed: 20",
        "type": "BadRequestError",
    }
    fake.refuse = lambda number, body: (400, {}, said)  # noqa: ARG005
    teacher = teacher_of(fake, tokenizer, k=64)
    with pytest.raises(
        TeacherMisfit, match=r"the server allows 20 .* start it with --max-logprobs 64 or set labels.k = 20"
    ):
        ask(teacher, batch(), teacher.spec.answer_width)


def test_a_block_that_is_refused_is_left_out_alone(fake: LanguageServer, tokenizer: Path) -> None:
    fake.refuse = lambda number, body: (400, {}, {"message": "too long"}) if len(body["prompt"]) == 16 else None  # noqa: ARG005
    teacher = teacher_of(fake, tokenizer)
    answers = ask(teacher, batch(), teacher.spec.answer_width)
    assert answers.ok.tolist() == [True, False]
    assert answers.errors[0].error == "RequestRefused: the server refuses with status 400: too long"


@pytest.mark.parametrize(
    "said",  # by vLLM 0.32 of a prompt as long as its context, and of a longer one
    [
        "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
        "This model's maximum context length is 15 tokens. However, your prompt contains 16 input tokens, which exceeds this limit",
    ],
)
def test_a_text_that_fills_the_server_s_context_is_left_out_with_the_way_out(
    fake: LanguageServer, tokenizer: Path, said: str
) -> None:
    refused = {"error": {"message": said, "type": "BadRequestError", "param": None, "code": 400}}
    fake.refuse = lambda number, body: (400, {}, refused) if len(body["prompt"]) == 16 else None  # noqa: ARG005
    teacher = teacher_of(fake, tokenizer)
    answers = ask(teacher, batch(), teacher.spec.answer_width)
    assert answers.ok.tolist() == [True, False]
    assert said in answers.errors[0].error
    assert "start it with a larger --max-model-len" in answers.errors[0].error


def test_too_few_positions_are_no_labels(fake: LanguageServer, tokenizer: Path) -> None:
    def cached(_: int, body: dict[str, Any]) -> Reply:
        answer = vllm_answer(body)
        if len(body["prompt"]) == 7:
            answer["choices"][0]["prompt_logprobs"][1:4] = []
        return 200, {}, answer

    fake.refuse = cached
    teacher = teacher_of(fake, tokenizer)
    answers = ask(teacher, batch(), teacher.spec.answer_width)
    assert answers.ok.tolist() == [False, True]
    assert "for the 6 tokens behind the first of 7, got 3" in answers.errors[0].error


def test_credentials_come_from_the_environment(
    fake: LanguageServer, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_TOKEN", "secret-1")
    teacher = teacher_of(fake, tokenizer, headers={"authorization": {"env": "LM_TOKEN", "prefix": "Bearer "}})
    assert ask(teacher, batch(), teacher.spec.answer_width).ok.all()
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer secret-1"}
    fake.refuse = lambda number, body: (401, {}, {"error": {"message": "no key"}})  # noqa: ARG005
    with pytest.raises(
        TeacherUnavailable, match=r"refuses with status 401: no key; see teacher.model and teacher.headers"
    ):
        ask(teacher, batch(), teacher.spec.answer_width)
    with pytest.raises(ValueError, match=r"address must be http://host:port"):
        teacher_of(fake, tokenizer, address="127.0.0.1:80")


def test_the_fingerprint_is_of_what_is_told(fake: LanguageServer, tokenizer: Path) -> None:
    one = teacher_of(fake, tokenizer).fingerprint()
    assert one == teacher_of(fake, tokenizer, parallel=3, address="http://elsewhere").fingerprint()
    assert (
        len(
            {
                one,
                teacher_of(fake, tokenizer, version="2").fingerprint(),
                teacher_of(fake, tokenizer, model="n").fingerprint(),
            }
        )
        == 3
    )
