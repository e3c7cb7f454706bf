"""ModelHandlers of Beam around a causal language model, which answer prompts as vLLM's /v1/completions does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.ml.inference.base import ModelHandler, PredictionResult


class Completion:
    """What the OpenAI client makes of an answer: an object that knows its plain form."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    def model_dump(self) -> dict[str, Any]:
        return self._answer


class Prompts(ModelHandler[Sequence[int], Any, Any]):
    """Runs a folder's model over one prompt at a time."""

    def __init__(
        self, model: str, allowed: int = 20, *, plain: bool = False, drop: int | None = None, log: str | None = None
    ) -> None:
        super().__init__(max_batch_size=3)
        self._folder, self._allowed, self._plain, self._drop, self._log = model, allowed, plain, drop, log
        self.asked: list[tuple[int, dict[str, Any]]] = []

    def load_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._folder).eval()

    def run_inference(
        self, batch: Sequence[Sequence[int]], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Any]:
        arguments = inference_args or {}
        k = arguments["extra_body"]["prompt_logprobs"]
        self.asked.append((len(batch), arguments))
        if k > self._allowed:  # vLLM's own words
            raise ValueError(f"Requested prompt logprobs of {k}, which is greater than max allowed: {self._allowed}")
        if self._log is not None:  # a line of a file for each prompt, whatever becomes of this process
            with Path(self._log).open("a") as file:
                file.writelines(f"{list(ids)}\n" for ids in batch)
        for ids in batch:
            answer = completion(model, ids, k)
            if len(ids) == self._drop:
                del answer["choices"][0]["prompt_logprobs"][1]
            yield answer if self._plain else PredictionResult(ids, Completion(answer))


class Texts(Prompts):
    """Answers with text alone, as a server does that is asked for nothing else."""

    def run_inference(
        self,
        batch: Sequence[Sequence[int]],
        model: Any,  # noqa: ARG002
        inference_args: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Iterable[Any]:
        return [{"choices": [{"text": " and", "prompt_logprobs": None}]} for _ in batch]


def completion(model: Any, ids: Sequence[int], k: int) -> dict[str, Any]:
    """The k most probable tokens at each position of a prompt, and the one that is there."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double().numpy()
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    positions: list[dict[str, Any] | None] = [None]
    for row, token in zip(logprobs[:-1], ids[1:], strict=True):
        order = np.argsort(-row, kind="stable")
        rank = {int(c): r + 1 for r, c in enumerate(order)}
        said = {str(token): {"logprob": float(row[token]), "rank": rank[token], "decoded_token": f"t{token}"}}
        said |= {str(c): {"logprob": float(row[c]), "rank": rank[int(c)], "decoded_token": f"t{c}"} for c in order[:k]}
        positions.append(said)
    return {"object": "text_completion", "choices": [{"index": 0, "text": " a", "prompt_logprobs": positions}]}
