"""A teacher that is a language model behind a server of vLLM or SGLang.

Each text of a block is a request of its own, so that none sees another, and some are in flight together. The prompt is sent
as ids. What a server knows is the most probable tokens and the one that is there: top-k labels at temperature 1. A prompt that the
server has in its cache has no log-probabilities: each request has a salt of its own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.teacher.config import OpenAIConfig
from distilbeam.teacher.protocol import NotPickled, TeacherChanged, TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.tokens.server_answers import Read, read_sglang, read_vllm
from distilbeam.teacher.tokens.server_calls import Server
from distilbeam.teacher.tokens.texts import Text, block_labels, texts_of


class OpenAITeacher(NotPickled):
    """Labels blocks by asking a server about each of their texts; see `TokenTeacher`.

    Args:
      config: the configuration, with paths resolved.
      server: answers requests; made of the configuration without it.

    Raises:
      ValueError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: OpenAIConfig, server: Server | None = None) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(config.tokenizer, "teacher.tokenizer")
        self._tokens = self._tokenizer.fingerprint()
        self._server = server or Server(config)
        self._threads = ThreadPoolExecutor(config.parallel, thread_name_prefix="openai")
        self.num_classes, self.max_length = self._tokenizer.num_classes, config.max_length
        self.parallel, self.source = config.parallel, f"server:{config.api}"

    def fingerprint(self) -> str:
        """Identify the answers by what the server calls its model, `version` and the tokenizer: its weights are not seen."""
        told = "\n".join((self._config.api, self._config.model, self._config.version, self._tokens))
        return f"openai:{self._config.model}:{hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"

    def tokenizer_fingerprint(self) -> str:
        """Identify what its ids mean."""
        return self._tokens

    def token_labels(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> TokenLabels:
        """Label blocks; see `TokenTeacher`. The first block that cannot be answered raises."""
        found = self.labels_of_each(blocks, spec)
        for one in found:
            if isinstance(one, Exception):
                raise one
        rows = [one.pack() for one in found if isinstance(one, TokenLabels)]
        return TokenLabels.unpack(np.concatenate(rows) if rows else np.empty((0, spec.answer_width), np.float32), spec)

    def labels_of_each(self, blocks: pa.RecordBatch, spec: SoftLabelSpec) -> list[TokenLabels | Exception]:
        """Label blocks, each of which succeeds or fails by itself.

        Raises:
          TeacherMisfit: the server allows fewer classes, whatever the blocks.
          TeacherUnavailable: it cannot be reached, whatever the blocks.
        """
        asked = [
            [(text, self._threads.submit(self._ask, text, spec)) for text in texts]
            for texts in texts_of(blocks, spec.sequence_length or 0)
        ]
        found: list[TokenLabels | Exception] = []
        try:
            found.extend(_block(texts, spec) for texts in asked)
        except BaseException:
            for texts in asked:
                for _, future in texts:
                    future.cancel()
            raise
        return found

    def close(self) -> None:
        """Give back the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, text: Text, spec: SoftLabelSpec) -> Read:
        ids = text.prompt(self.num_classes)
        k, model = spec.k or 0, self._config.model
        if self._config.api == "vllm":
            body: dict[str, Any] = {
                "model": model,
                "prompt": ids,
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": k,
            }
            answer = self._server.post("/v1/completions", {**body, "cache_salt": secrets.token_hex(16)}, k)
            return read_vllm(answer, ids, k, self.num_classes)
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}, "return_logprob": True}
        answer = self._server.post("/generate", {**body, "logprob_start_len": 0, "top_logprobs_num": k}, k)
        return read_sglang(answer, ids, k, self.num_classes)


def _block(texts: Sequence[tuple[Text, Future[Read]]], spec: SoftLabelSpec) -> TokenLabels | Exception:
    try:
        return block_labels([text for text, _ in texts], [future.result() for _, future in texts], spec)
    except (TeacherChanged, TeacherMisfit, TeacherUnavailable):
        raise
    except Exception as e:  # noqa: BLE001  (the block keeps it)
        return e
