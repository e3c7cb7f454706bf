"""A schema registry for tests: its REST interface over a real HTTP server, as far as clients that register and read use it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class SchemaRegistry:
    """Schemas by number and by subject and version.

    Args:
      user: USER:PASSWORD that every request must have, or "".

    Attributes:
      address: where it listens, once it does.
      asked: paths of all requests, in their order.
      failures: answers of 503 that are still to be given.
    """

    def __init__(self, user: str = "") -> None:
        self.user, self.address = user, ""
        self.asked: list[str] = []
        self.failures = 0
        self._by_number: dict[int, dict[str, Any]] = {}
        self._serialized: dict[int, bytes] = {}
        self._versions: dict[str, list[int]] = {}

    def add(self, subject: str, schema: dict[str, Any], serialized: bytes = b"") -> int:
        """Register a schema as clients post it; `serialized` is its FileDescriptorProto. Return its number."""
        number = 1 + len(self._by_number)
        self._by_number[number], self._serialized[number] = schema, serialized
        self._versions.setdefault(subject, []).append(number)
        return number

    def answer(self, path: str) -> tuple[int, Any]:
        """Answer a GET."""
        self.asked.append(path)
        if self.failures:
            self.failures -= 1
            return 503, {"error_code": 503, "message": "starting"}
        plain, _, query = path.partition("?")
        if plain == "/schemas/types":
            return 200, ["JSON", "PROTOBUF", "AVRO"]
        if by_number := re.fullmatch(r"/schemas/ids/(\d+)", plain):
            number = int(by_number[1])
            if number not in self._by_number:
                return 404, {"error_code": 40403, "message": f"Schema {number} not found"}
            return 200, self._shown(number, query)
        if by_version := re.fullmatch(r"/subjects/([^/]+)/versions/(\d+)", plain):
            versions = self._versions.get(by_version[1], [])
            if int(by_version[2]) > len(versions):
                return 404, {"error_code": 40402, "message": "Version not found"}
            number = versions[int(by_version[2]) - 1]
            told = {"subject": by_version[1], "version": int(by_version[2]), "id": number}
            return 200, self._shown(number, query) | told
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def _shown(self, number: int, query: str) -> dict[str, Any]:
        shown = dict(self._by_number[number])
        if query == "format=serialized":
            shown["schema"] = base64.b64encode(self._serialized[number]).decode()
        if shown.get("schemaType") == "AVRO":
            del shown["schemaType"]  # as registries do
        return shown


@contextmanager
def schema_registry(user: str = "") -> Iterator[SchemaRegistry]:
    """Run a schema registry in the block."""
    registry = SchemaRegistry(user)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = f"Basic {base64.b64encode(registry.user.encode()).decode()}"
            if registry.user and self.headers.get("Authorization") != wanted:
                self._say(401, {"error_code": 401, "message": "Unauthorized"})
            else:
                self._say(*registry.answer(self.path))

        def _say(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    registry.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield registry
    server.shutdown()
    server.server_close()
