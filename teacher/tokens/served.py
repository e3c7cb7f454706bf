"""A teacher that is a language model behind a server of vLLM or SGLang.

Each text of a block is a request of its own, so that none sees another, and some are in flight together. The prompt is sent
as ids. What a server knows is the most probable tokens and the one that is there: top-k labels at temperature 1. A prompt that the
server has in its cache has no log-probabilities: each request has a salt of its own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.blocks import BLOCK_COLUMNS, INPUT_IDS, has_label
from distilbeam.inputs.config import InputError, require_columns
from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.teacher.config import OpenAIConfig
from distilbeam.teacher.protocol import NotPickled, TeacherChanged, TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.softlabels.columns import flat_values
from distilbeam.teacher.tokens.server_answers import Read, read_sglang, read_vllm
from distilbeam.teacher.tokens.server_calls import Server


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
        require_columns(blocks, BLOCK_COLUMNS)
        length = spec.sequence_length or 0
        ids, segments, mask = (flat_values(blocks.column(name), length) for name in BLOCK_COLUMNS)
        there = has_label(segments, mask)
        asked = [
            [
                (start, stop, self._threads.submit(self._ask, ids[row, start:stop].tolist(), spec))
                for start, stop in texts
            ]
            for row, texts in enumerate(_texts(line, at) for line, at in zip(segments, there, strict=True))
        ]
        found: list[TokenLabels | Exception] = []
        try:
            for row, texts in enumerate(asked):
                found.append(self._block(texts, there[row], spec))
        except BaseException:
            for texts in asked:
                for _, _, future in texts:
                    future.cancel()
            raise
        return found

    def close(self) -> None:
        """Give back the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _block(
        self, texts: Sequence[Any], there: npt.NDArray[np.bool_], spec: SoftLabelSpec
    ) -> TokenLabels | Exception:
        labels = TokenLabels.empty(1, spec)
        for start, stop, future in texts:
            try:
                classes, logprobs, tail, token_logprob = future.result()
            except (TeacherChanged, TeacherMisfit, TeacherUnavailable):
                raise
            except Exception as e:  # noqa: BLE001  (the block keeps it)
                return e
            at = np.flatnonzero(there[start : stop - 1])
            labels.classes[0, start + at], labels.logprobs[0, start + at] = classes[at], logprobs[at]
            labels.token_logprob[0, start + at] = token_logprob[at]
            assert labels.tail_logmass is not None
            labels.tail_logmass[0, start + at] = tail[at]
        return labels

    def _ask(self, ids: list[int], spec: SoftLabelSpec) -> Read:
        if not 0 <= min(ids) <= max(ids) < self.num_classes:
            raise InputError(f"column {INPUT_IDS} must hold ids from 0 to {self.num_classes - 1:,}, got {max(ids):,}")
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


def _texts(segments: npt.NDArray[Any], there: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """List the texts of a block that have a label, as ranges."""
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return [(start, stop) for start, stop in pairwise(edges) if there[start:stop].any()]
