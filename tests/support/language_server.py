"""A language model behind a real HTTP server that answers as vLLM and SGLang do; its next token depends on the one before alone."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import log_softmax

TABLE = log_softmax(np.random.default_rng(0).normal(0, 2, (300, 300)), axis=1)  # of the token before
Reply = tuple[int, dict[str, str], Any]


class LanguageServer:
    """A server that answers as vLLM or SGLang do, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        self.refuse: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: None  # noqa: ARG005
        self.wait_s = 0.0
        self.pair: threading.Barrier | None = None
        self._lock = threading.Lock()
        this = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, answer = this.answer(self.path, body, dict(self.headers))
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def prompts(self) -> Counter[tuple[int, ...]]:
        """How often each prompt was asked."""
        return Counter(tuple(body["prompt" if "prompt" in body else "input_ids"]) for body in self.asked)

    def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            number = len(self.asked)
            self.asked.append({**body, "path": path})
            self.headers.append(headers)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.wait_s)
        if self.pair is not None:
            self.pair.wait()
        with self._lock:
            self._now -= 1
        refused = self.refuse(number, body)
        if refused is not None:
            return refused
        return 200, {}, vllm_answer(body) if path == "/v1/completions" else sglang_answer(body)


def vllm_answer(body: dict[str, Any]) -> Any:
    ids, k, positions = body["prompt"], body["prompt_logprobs"], [None]
    for before, token in pairwise(ids):
        order = np.argsort(-TABLE[before])
        rank = {int(c): r + 1 for r, c in enumerate(order)}
        wanted = [*order[:k].tolist(), *([token] if rank[token] > k else [])]
        positions.append({str(c): {"logprob": TABLE[before, c], "rank": rank[c]} for c in wanted})  # type: ignore[arg-type]
    return {"choices": [{"prompt_logprobs": positions}]}


def sglang_answer(body: dict[str, Any]) -> Any:
    ids, k = body["input_ids"], body["top_logprobs_num"]
    pairs = list(pairwise(ids))
    tops = [[[TABLE[b, c], int(c), None] for c in np.argsort(-TABLE[b])[:k]] for b, _ in pairs]
    tokens = [[TABLE[b, t], t, None] for b, t in pairs]
    return {"meta_info": {"input_token_logprobs": [[None, ids[0], None], *tokens], "input_top_logprobs": [None, *tops]}}


@contextmanager
def language_server() -> Iterator[LanguageServer]:
    """Serve while the block runs."""
    server = LanguageServer()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
