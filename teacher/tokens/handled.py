"""A teacher that is a language model behind a ModelHandler of Apache Beam, such as Beam's own of vLLM.

`run_inference` is given each text of a block as a list of ids and told `{"max_tokens": 1, "temperature": 1.0, "extra_body":
{"prompt_logprobs": k, ...}}`, which Beam's `VLLMCompletionsModelHandler` passes on to its server; what it answers is what vLLM's
/v1/completions does, as an object of the OpenAI client or as plain data. Beam's chat handler is given messages and writes
the prompt itself: which tokens its log-probabilities are of is not known, and it is refused.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.teacher.answers import AnswerError
from distilbeam.teacher.backends.beam import artefact_of, make_handler, most_at_once
from distilbeam.teacher.config import BeamConfig
from distilbeam.teacher.protocol import NotPickled
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.tokens.server_answers import Read, read_vllm
from distilbeam.teacher.tokens.server_calls import cap_misfit
from distilbeam.teacher.tokens.texts import block_labels, texts_of

_CHAT = ("apache_beam.ml.inference.vllm_inference", "VLLMChatModelHandler")
_AT_ONCE = 64  # texts, where neither the handler nor the configuration says: a server's own queue holds the rest


class HandlerTeacher(NotPickled):
    """Labels blocks by asking a ModelHandler about each of their texts; see `TokenTeacher`.

    Args:
      config: the configuration with a tokenizer, paths resolved.

    Raises:
      ValueError: the factory does not return a ModelHandler, or one that is given messages; the tokenizer cannot be loaded; or a
        file is missing.
    """

    source = "server:handler"
    parallel = 1

    def __init__(self, config: BeamConfig) -> None:
        self._name = config.handler
        handler: Any = make_handler(config)
        chat = getattr(sys.modules.get(_CHAT[0]), _CHAT[1], None)
        if chat is not None and isinstance(handler, chat):
            raise ValueError(
                f"teacher.handler: {config.handler} is given messages and writes the prompt itself, so that its log-probabilities are "
                "of tokens that are not known here; name VLLMCompletionsModelHandler, which is given ids, and ingest --format chat"
            )
        self._artefact = artefact_of(config)
        self._tokenizer = load_tokenizer(config.tokenizer or "", "teacher.tokenizer")
        self._tokens = self._tokenizer.fingerprint()
        self.num_classes, self.max_length = self._tokenizer.num_classes, config.max_length
        self._at_once = most_at_once(config, handler) or _AT_ONCE
        self._handler = handler
        self._model: Any = handler.load_model()

    def fingerprint(self) -> str:
        """Identify the answers by the handler's settings, code and files; see `Teacher`."""
        return f"beam:{self._name}:{self._artefact.digest()}"

    def tokenizer_fingerprint(self) -> str:
        """Identify what its ids mean."""
        return self._tokens

    def token_labels(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> TokenLabels:
        """Label blocks; see `TokenTeacher`."""
        rows = texts_of(blocks, spec.sequence_length or 0)
        prompts = [text.prompt(self.num_classes) for texts in rows for text in texts]
        answers = iter(self._answers(prompts, spec.k or 0))
        found = [block_labels(texts, [next(answers) for _ in texts], spec).pack() for texts in rows]
        return TokenLabels.unpack(
            np.concatenate(found) if found else np.empty((0, spec.answer_width), np.float32), spec
        )

    def close(self) -> None:
        """Drop the model, which ends a server that the handler started."""
        self._model = None

    def _answers(self, prompts: Sequence[list[int]], k: int) -> list[Read]:
        if self._model is None:
            raise RuntimeError("the teacher was closed; load it again")
        found: list[Read] = []
        for start in range(0, len(prompts), self._at_once):
            group = prompts[start : start + self._at_once]
            asked = {"prompt_logprobs": k, "cache_salt": secrets.token_hex(16)}  # what a cache has, has none
            arguments = {"max_tokens": 1, "temperature": 1.0, "extra_body": asked}
            try:
                results = list(self._handler.run_inference(group, self._model, arguments))
            except Exception as e:
                if (misfit := cap_misfit(str(e), k)) is not None:
                    raise misfit from e
                raise
            if len(results) != len(group):
                raise AnswerError(f"the handler must answer each of {len(group)} prompts, got {len(results)} answers")
            found += [read_vllm(_plain(one), ids, k, self.num_classes) for one, ids in zip(results, group, strict=True)]
        return found


def _plain(result: Any) -> Any:
    """Return an answer as plain data: of a PredictionResult, an object of the OpenAI client, or what it is."""
    answer = getattr(result, "inference", result)
    return answer.model_dump() if hasattr(answer, "model_dump") else answer
