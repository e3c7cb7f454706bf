"""A schema registry's REST interface: what it says about the schemas that its messages name by number.

A message begins with a zero byte and the number of its writer's schema (4 bytes, big-endian); in Protobuf the place of its
message type in the file follows, a list of zigzag varints. https://docs.confluent.io/platform/current/schema-registry
"""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from distilbeam.pipelines.streaming.kafka_client import parse_pairs

_ANSWER_S = 10.0
_ATTEMPTS = 3  # a registry that is away for a moment must not end a bundle
_PAUSE_S = 1.0
_KNOWN = ("basic.auth.user.info", "bearer.auth.token", "ssl.ca.location")
FRAME = 5  # bytes before a value


@dataclass(frozen=True)
class Registry:
    """A schema registry.

    Args:
      address: its URL.
      settings: `basic.auth.user.info` (USER:PASSWORD), `bearer.auth.token`, `ssl.ca.location` (a file), as pairs.
    """

    address: str
    settings: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # hold a password

    @classmethod
    def of(cls, address: str, settings: tuple[str, ...]) -> Registry:
        """Read an address and settings `KEY=VALUE` or `@FILE`.

        Raises:
          ValueError: no URL, or a setting that is not known.
        """
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            raise ValueError(f"--registry takes http://HOST:PORT or https://HOST, got '{address}'")
        pairs = parse_pairs("--registry-client", settings)
        for key in pairs:
            if key not in _KNOWN:
                raise ValueError(f"--registry-client: {key} is not known; it takes {', '.join(_KNOWN)}")
        return cls(address.rstrip("/"), tuple(sorted(pairs.items())))

    def require_answer(self, kind: str) -> None:
        """Check that it answers and knows a kind of schema, "AVRO" or "PROTOBUF".

        Raises:
          ValueError: it does not.
        """
        try:
            kinds = self._get("/schemas/types")
        except (OSError, ValueError) as e:
            raise ValueError(f"--registry: no schema registry answers at {self.address}: {_why(e)}") from e
        if kind not in kinds:
            raise ValueError(f"--registry: {self.address} has schemas of {', '.join(kinds)}, not of {kind}")

    def avro(self, number: int) -> dict[str, Any]:
        """Return an Avro schema with those that it refers to, by their names.

        Raises:
          LookupError: there is no such schema, or it is of another kind.
          OSError: the registry does not answer.
        """
        found = self._schema(number, "AVRO", "")
        return {"schema": json.loads(found["schema"]), "named": self._referred(found, "")}

    def protobuf(self, number: int) -> tuple[bytes, dict[str, bytes]]:
        """Return a serialized FileDescriptorProto and, by their names, the files that it imports.

        Raises:
          LookupError: there is no such schema, or it is of another kind.
          OSError: the registry does not answer.
        """
        found = self._schema(number, "PROTOBUF", "?format=serialized")
        files = {name: base64.b64decode(text) for name, text in self._referred(found, "?format=serialized").items()}
        return base64.b64decode(found["schema"]), files

    def _schema(self, number: int, kind: str, form: str) -> dict[str, Any]:
        found: dict[str, Any] = self._asked(f"/schemas/ids/{number}{form}", f"schema {number}")
        is_kind = found.get("schemaType", "AVRO")  # which is what it leaves out
        if is_kind != kind:
            raise LookupError(f"schema {number} of the registry is {is_kind}, not {kind}")
        return found

    def _referred(self, found: dict[str, Any], form: str) -> dict[str, str]:
        """Collect what a schema refers to and what that refers to, what is needed first at first."""
        named: dict[str, str] = {}
        for reference in found.get("references", ()):
            subject = urllib.parse.quote(reference["subject"], safe="")
            place = f"/subjects/{subject}/versions/{reference['version']}{form}"
            inner = self._asked(place, f"{reference['subject']} version {reference['version']}")
            named |= self._referred(inner, form) | {reference["name"]: inner["schema"]}
        return named

    def _asked(self, place: str, what: str) -> Any:
        for attempt in range(_ATTEMPTS):
            try:
                return self._get(place)
            except urllib.error.HTTPError as e:
                if e.code == 404:
                    raise LookupError(f"the registry has no {what}") from e
                if e.code < 500 or attempt == _ATTEMPTS - 1:
                    raise OSError(f"the schema registry at {self.address} refuses {what}: {_why(e)}") from e
            except OSError as e:
                if attempt == _ATTEMPTS - 1:
                    raise OSError(f"no schema registry answers at {self.address}: {_why(e)}") from e
            time.sleep(_PAUSE_S)
        raise AssertionError

    def _get(self, place: str) -> Any:
        given = dict(self.settings)
        request = urllib.request.Request(self.address + place, headers={"Accept": "application/json"})
        if user := given.get("basic.auth.user.info"):
            request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
        elif token := given.get("bearer.auth.token"):
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=_ANSWER_S, context=_tls(given.get("ssl.ca.location"))) as answer:
            return json.load(answer)


@lru_cache(maxsize=4)
def _tls(authority: str | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority)


def number_of(value: bytes) -> int | None:
    """Return the number of the schema that a message names; None where it names none."""
    return int.from_bytes(value[1:FRAME], "big") if len(value) >= FRAME and value[0] == 0 else None


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    return str(getattr(error, "reason", error))
