"""Requests to a server of a language model, repeated when, and only when, the reason for their failure can pass."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from distilbeam.teacher.config import OpenAIConfig
from distilbeam.teacher.protocol import TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.tfserving.calling import wait_before
from distilbeam.teacher.tfserving.channels import request_headers

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_NOT_THE_ROWS = frozenset({401, 403, 404, 405})
_WORDS = 400
_CAP = re.compile(r"max[_-]?logprobs|prompt_logprobs|requested .*logprobs", re.IGNORECASE)
_ALLOWED = re.compile(r"(?:max(?:imum)?[^0-9]{0,40}|allowed[^0-9]{0,40}|up to )(\d+)", re.IGNORECASE)
_CONTEXT = re.compile(
    r"maximum context length|max_tokens must be at least 1", re.IGNORECASE
)  # the latter: one too long


class RequestRefused(ValueError):  # noqa: N818  (what the server did)
    """The server refused this prompt; others may be answered."""


class Server:
    """A server that answers JSON with JSON.

    Args:
      config: address, deadline, attempts, waits and headers.
      sleep: waits for a number of seconds.
      jitter: gives a random number between two bounds.
    """

    def __init__(
        self,
        config: OpenAIConfig,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._config, self._sleep, self._jitter = config, sleep, jitter

    def post(self, path: str, body: Mapping[str, Any], k: int) -> Any:
        """Send a request.

        Args:
          path: behind the address.
          body: JSON values.
          k: classes that are asked for, for the sentence where the server allows fewer.

        Returns:
          The answer's JSON.

        Raises:
          RequestRefused: the server refuses this request.
          TeacherMisfit: it refuses every one: it allows fewer classes.
          TeacherUnavailable: it is not there, knows no such model, or wants credentials, after all attempts.
        """
        last, told = "", 0.0
        for attempt in range(self._config.attempts):
            if attempt:
                wait = wait_before(attempt, self._config.first_wait_s, self._config.longest_wait_s, self._jitter)
                self._sleep(max(told, wait))
            told = 0.0
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as e:
                said = _said(e)
                if e.code not in PASSING:
                    raise self._refusal(e.code, said, k) from e
                last = f"status {e.code}: {said}"
                told = _seconds(e.headers.get("Retry-After"), self._config.longest_wait_s)
            except (OSError, HTTPException, TimeoutError) as e:
                last = str(getattr(e, "reason", e)) or type(e).__name__
        raise TeacherUnavailable(
            f"teacher.address: {self._config.address} does not answer after {self._config.attempts} attempts: {last}"
        )

    def _once(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", **dict(request_headers(self._config.headers))}
        request = urllib.request.Request(
            f"{self._config.address}{path}", json.dumps(body).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self._config.timeout_s) as answer:
            data = answer.read()
        try:
            return json.loads(data)
        except ValueError as e:
            raise RequestRefused(f"the server must answer with JSON, got {data[:60]!r}") from e

    def _refusal(self, code: int, said: str, k: int) -> Exception:
        if code == 400 and (misfit := cap_misfit(said, k)) is not None:
            return misfit
        if code == 400 and _CONTEXT.search(said):
            return RequestRefused(
                f"the server's context has no room for this text and the token that it is to add ({said}); start it with a larger "
                "--max-model-len, by one than the longest text, or ingest with a smaller --sequence-length"
            )
        if code in _NOT_THE_ROWS:
            return TeacherUnavailable(
                f"teacher.address: {self._config.address} refuses with status {code}: {said}; see teacher.model and "
                "teacher.headers"
            )
        return RequestRefused(f"the server refuses with status {code}: {said}")


def cap_misfit(said: str, k: int) -> TeacherMisfit | None:
    """Read a refusal of more classes than the server allows.

    Args:
      said: its words.
      k: classes that were asked for.

    Returns:
      The error, with both ways out; None where the words are of something else.
    """
    if not _CAP.search(said):
        return None
    allowed = _ALLOWED.search(said)
    number = allowed[1] if allowed else "20"
    return TeacherMisfit(
        f"the server allows {number} log-probabilities of each token, {k} are asked for; start it with "
        f"--max-logprobs {k} or set labels.k = {number}, of held-out blocks labels.held_out_k ({said})"
    )


def _said(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        data = json.loads(text)
        found = data.get("message") or data.get("detail") or (data.get("error") or {}).get("message") or text
    except (ValueError, AttributeError):
        found = text
    return " ".join(str(found).split())[:_WORDS]


def _seconds(text: str | None, longest: float) -> float:
    return min(longest, float(text)) if text is not None and text.strip().isdecimal() else 0.0
