"""Recorded answers of vLLM and SGLang: what is read of them, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from distilbeam.teacher.answers import AnswerError
from distilbeam.teacher.softlabels.codec import TAIL_FLOOR
from distilbeam.teacher.tokens.server_answers import Read, read_sglang, read_vllm

IDS, K, CLASSES = [7, 3, 9, 4], 2, 20
# what vLLM says of a prompt of four tokens with prompt_logprobs = 2: nothing of the first, and the third token beyond rank 2
RECORDED = """{"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": " x", "prompt_logprobs": [null,
 {"3": {"logprob": -0.25, "rank": 1, "decoded_token": " a"}, "8": {"logprob": -2.5, "rank": 2, "decoded_token": " b"}},
 {"9": {"logprob": -6.5, "rank": 11, "decoded_token": " c"}, "5": {"logprob": -0.5, "rank": 1, "decoded_token": " d"},
  "1": {"logprob": -1.5, "rank": 2, "decoded_token": " e"}},
 {"2": {"logprob": 0.0, "rank": 1, "decoded_token": " f"}, "4": {"logprob": -9999.0, "rank": 2, "decoded_token": " g"}}]}]}"""
SGLANG = {
    "text": " x",
    "meta_info": {
        "input_token_logprobs": [[None, 7, None], [-0.25, 3, None], [-6.5, 9, None], [-9999.0, 4, None]],
        "input_top_logprobs": [
            None,
            [[-0.25, 3, None], [-2.5, 8, None]],
            [[-0.5, 5, None], [-1.5, 1, None]],
            [[0.0, 2, None], [-9999.0, 4, None]],
        ],
    },
}


def vllm(change: Any = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(RECORDED)
    if change is not None:
        change(answer["choices"][0]["prompt_logprobs"])
    return answer


@pytest.mark.parametrize(("read", "answer"), [(read_vllm, vllm()), (read_sglang, SGLANG)])
def test_a_recorded_answer_is_read(read: Any, answer: Any) -> None:
    found: Read = read(answer, IDS, K, CLASSES)
    classes, logprobs, tail, there = found
    assert classes.tolist() == [[3, 8], [5, 1], [2, 4]]
    assert logprobs.tolist() == [[-0.25, -2.5], [-0.5, -1.5], [0.0, -math.inf]]
    assert there.tolist() == [-0.25, -6.5, -math.inf]
    expected = [
        math.log(1 - math.exp(-0.25) - math.exp(-2.5)),
        math.log(1 - math.exp(-0.5) - math.exp(-1.5)),
        TAIL_FLOOR,
    ]
    np.testing.assert_allclose(tail, expected, rtol=1e-6)


def test_what_vllm_0_32_said_of_smollm2_is_read() -> None:
    """The token that is there stands first, whatever its rank; `prompt_logprobs` is beside much that does not matter."""
    answer = json.loads("""{"id": "cmpl-b9970dfd55d554f1", "object": "text_completion", "created": 1795951005, "model": "smollm",
 "choices": [{"index": 0, "text": " to", "logprobs": null, "finish_reason": "length", "stop_reason": null, "token_ids": null,
 "prompt_logprobs": [null,
 {"253": {"logprob": -5.151916027069092, "rank": 15, "decoded_token": " a"},
  "29": {"logprob": -0.9626898765563965, "rank": 1, "decoded_token": "-"},
  "28": {"logprob": -2.1574149131774902, "rank": 2, "decoded_token": ","},
  "284": {"logprob": -3.4404406547546387, "rank": 3, "decoded_token": " and"}},
 {"1398": {"logprob": -4.398988246917725, "rank": 5, "decoded_token": " list"},
  "540": {"logprob": -3.3718924522399902, "rank": 1, "decoded_token": " more"},
  "216": {"logprob": -3.7747130393981934, "rank": 2, "decoded_token": " "},
  "1603": {"logprob": -4.330289363861084, "rank": 3, "decoded_token": " non"}},
 {"282": {"logprob": -0.08613124489784241, "rank": 1, "decoded_token": " of"},
  "338": {"logprob": -4.565278053283691, "rank": 2, "decoded_token": " that"},
  "351": {"logprob": -4.604138374328613, "rank": 3, "decoded_token": " with"}}],
 "prompt_token_ids": null, "routed_experts": null}],
 "usage": {"prompt_tokens": 4, "total_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": null}}""")
    classes, logprobs, tail, there = read_vllm(answer, [14362, 253, 1398, 282], 3, 49_152)
    assert classes.tolist() == [[29, 28, 284], [540, 216, 1603], [282, 338, 351]]
    np.testing.assert_allclose(there, [-5.151916, -4.398988, -0.0861312], rtol=1e-6)
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=1) + np.exp(tail), 1, rtol=1e-6)


def test_a_token_of_an_equal_rank_beyond_k_is_no_label() -> None:
    def tie(positions: list[Any]) -> None:
        positions[2]["9"] = {"logprob": -1.5, "rank": 2}

    classes, _, _, there = read_vllm(vllm(tie), IDS, K, CLASSES)
    assert classes[1].tolist() == [5, 1]
    assert there[1] == -1.5

    def among_them(positions: list[Any]) -> None:
        positions[2] = {"9": {"logprob": -1.5, "rank": 3}, "5": {"logprob": -0.5, "rank": 1}}

    classes, _, _, _ = read_vllm(vllm(among_them), IDS, K, CLASSES)
    assert classes[1].tolist() == [5, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop(), r"for the 3 tokens behind the first of 4, got 2; a cache of prompts leaves some out"),
        (lambda p: p.__setitem__(2, None), "got 2; a cache of prompts"),
        (lambda p: p.__setitem__(0, p[1]), "got 4"),
        (lambda p: p[1].pop("8"), "the 2 most probable tokens, got 1 at 0"),
        (lambda p: p[2].pop("9"), "the log-probability of the token that is there, 9, got others"),
        (lambda p: p[1].__setitem__(" a", p[1].pop("8")), "must name tokens by their ids"),
        (lambda p: p[1]["8"].__setitem__("logprob", math.nan), "must be numbers, one is NaN"),
        (lambda p: p[1]["8"].__setitem__("logprob", 3.5), "must be at most 0, got 3.5: logits are no labels"),
        (lambda p: p[1].__setitem__("20", p[1].pop("8")), "ids must be below the 20 of the tokenizer, got 20"),
    ],
)
def test_what_is_no_answer_is_refused(change: Any, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        read_vllm(vllm(change), IDS, K, CLASSES)


def test_an_answer_without_log_probabilities_is_refused() -> None:
    for read, answer in (
        (read_vllm, {"choices": []}),
        (read_vllm, {"choices": [{"text": "x"}]}),
        (read_sglang, {"text": "x"}),
    ):
        with pytest.raises(AnswerError, match="must answer with log-probabilities of the prompt, got none"):
            read(answer, IDS, K, CLASSES)
    other = json.loads(json.dumps(SGLANG))
    other["meta_info"]["input_token_logprobs"][2][1] = 11
    with pytest.raises(AnswerError, match="about the prompt's tokens, got 11 where 9 is"):
        read_sglang(other, IDS, K, CLASSES)
