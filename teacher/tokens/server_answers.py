"""What servers say of the tokens of a prompt, read into labels.

vLLM answers with a mapping for each token of the prompt, the first of which is null, from ids to log-probability and rank. The
token that is there comes too when its rank is beyond k, and is no label then. SGLang answers with two lists: the
log-probability of each token that is there, and the k most probable ones. Answers keyed by text are ambiguous (two ids may
have one text) and refused; so is an answer for fewer positions than the prompt has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.teacher.answers import AnswerError
from distilbeam.teacher.softlabels.codec import TAIL_FLOOR

# Classes int32 [n - 1, k], their log-probabilities, tails and log-probabilities of the tokens that are there, float32.
Read = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]
_NEVER = -9999.0  # what vLLM writes for -inf
Entry = tuple[int, float]


def read_vllm(answer: Mapping[str, Any], ids: Sequence[int], k: int, num_classes: int) -> Read:
    """Read an answer of vLLM's /v1/completions.

    Args:
      answer: the JSON object.
      ids: the prompt, n tokens.
      k: classes of each label.
      num_classes: number of ids C.

    Returns:
      The labels of the first n - 1 positions.

    Raises:
      AnswerError: it is none, or has other positions, fewer classes or ids beyond C.
    """
    try:
        found = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        found = None
    _require_positions(found, ids)
    entries, there = [], []
    for position, token in zip(found[1:], ids[1:], strict=True):
        try:
            said = [(int(key), _number(one["logprob"])) for key, one in position.items()]
        except AnswerError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise AnswerError(
                "the server must name tokens by their ids; start vLLM without return_tokens_as_text, or use its /v1/completions"
            ) from e
        own = [logprob for id_, logprob in said if id_ == token]
        if not own:
            raise AnswerError(
                f"the server must say the log-probability of the token that is there, {token}, got others"
            )
        # not by its rank: of equal logits the token that is there may count as k + 1 and be among the k all the same
        entries.append(said if len(said) <= k else [entry for entry in said if entry[0] != token])
        there.append(own[0])
    return _labels(entries, there, k, num_classes)


def read_sglang(answer: Mapping[str, Any], ids: Sequence[int], k: int, num_classes: int) -> Read:
    """Read an answer of SGLang's /generate; see `read_vllm`."""
    facts = answer.get("meta_info") if isinstance(answer, Mapping) else None
    tokens = facts.get("input_token_logprobs") if isinstance(facts, Mapping) else None
    tops = facts.get("input_top_logprobs") if isinstance(facts, Mapping) else None
    _require_positions(tokens, ids)
    _require_positions(tops, ids)
    assert tokens is not None
    assert tops is not None
    entries, there = [], []
    for said, top, token in zip(tokens[1:], tops[1:], ids[1:], strict=True):
        try:
            logprob, id_ = _number(said[0]), int(said[1])
            entries.append([(int(one[1]), _number(one[0])) for one in top or ()][:k])
        except AnswerError:
            raise
        except (ValueError, TypeError, IndexError) as e:
            raise AnswerError("the server must answer with log-probabilities and ids of tokens") from e
        if id_ != token:
            raise AnswerError(f"the server must answer about the prompt's tokens, got {id_} where {token} is")
        there.append(logprob)
    return _labels(entries, there, k, num_classes)


def _require_positions(found: Any, ids: Sequence[int]) -> None:
    """Refuse answers for other than all positions: a first one without a label, and n - 1 with one."""
    if not isinstance(found, list):
        raise AnswerError("the server must answer with log-probabilities of the prompt, got none")
    labelled = len(found) - 1 if found and _is_empty(found[0]) else len(found)
    if len(found) != len(ids) or labelled != len(ids) - 1 or any(_is_empty(one) for one in found[1:]):
        raise AnswerError(
            f"the server must answer for the {len(ids) - 1:,} tokens behind the first of {len(ids):,}, got "
            f"{sum(not _is_empty(one) for one in found):,}; a cache of prompts leaves some out: switch it off"
        )


def _is_empty(said: Any) -> bool:
    return said is None or (isinstance(said, list) and bool(said) and said[0] is None)


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise AnswerError("the server's log-probabilities must be numbers, one is NaN")
    if number > 1e-3:
        raise AnswerError(f"the server's log-probabilities must be at most 0, got {number:g}: logits are no labels")
    return -math.inf if number <= _NEVER else min(number, 0.0)


def _labels(entries: Sequence[Sequence[Entry]], there: Sequence[float], k: int, num_classes: int) -> Read:
    for number, kept in enumerate(entries):
        if len(kept) != k:
            raise AnswerError(
                f"the server must answer with the {k} most probable tokens, got {len(kept)} at {number:,}"
            )
    ordered = [sorted(kept, key=lambda entry: (-entry[1], entry[0])) for kept in entries]
    classes = np.array([[id_ for id_, _ in kept] for kept in ordered], np.int32).reshape(-1, k)
    if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
        raise AnswerError(
            f"the server's ids must be below the {num_classes:,} of the tokenizer, got {int(classes.max()):,}: its model or its "
            "tokenizer is another one"
        )
    logprobs = np.array([[logprob for _, logprob in kept] for kept in ordered], np.float64).reshape(-1, k)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(-np.expm1(np.log(np.exp(logprobs).sum(axis=1))), 0))
    return (
        classes,
        logprobs.astype(np.float32),
        np.maximum(tail, TAIL_FLOOR).astype(np.float32),
        np.array(there, np.float32),
    )
