"""An S3 server over HTTP in this process: it counts requests, and fails those that a test wants to fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilbeam.storage.paths import to_path


@dataclass(frozen=True)
class Request:
    """A request as the server saw it."""

    method: str
    key: str
    query: str


Refuses = Callable[[Request], tuple[str, str] | None]
DENIED = ("403 Forbidden", "AccessDenied")  # passed on at once
BUSY = ("503 Service Unavailable", "SlowDown")  # tried again by the store's package


@dataclass
class ObjectStore:
    """The server.

    Attributes:
      url: where it listens.
      requests: what it was asked, in order.
      refuses: gives the status and code with which a request is refused, or None.
    """

    app: Any
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    refuses: Refuses = field(default=lambda _: None)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a request (WSGI)."""
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"].lstrip("/"), environ["QUERY_STRING"])
        self.requests.append(request)
        if (refusal := self.refuses(request)) is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = refusal
            body = f"<Error><Code>{code}</Code><Message>not today</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer: Iterable[bytes] = self.app(environ, start_response)
        return answer

    def bucket(self, name: str) -> Path:
        """Make a bucket."""
        place: Any = to_path(f"s3://{name}")
        place.fs.mkdir(name)
        return to_path(f"s3://{name}")

    @contextmanager
    def counted(self) -> Iterator[list[Request]]:
        """Collect the requests of a block."""
        before, found = len(self.requests), list[Request]()
        yield found
        found += self.requests[before:]

    @contextmanager
    def refusing(self, refuses: Refuses) -> Iterator[None]:
        """Refuse requests while the block runs."""
        self.refuses = refuses
        try:
            yield
        finally:
            self.refuses = lambda _: None


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run the server, and lead the store's package to it through the environment, as users do."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from s3fs import S3FileSystem
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as real stores do

        def log(self, *_: Any, **__: Any) -> None:
            pass

    store = ObjectStore(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.port}"
    settings = {"AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    former = {name: os.environ.get(name) for name in (*settings, "AWS_DEFAULT_REGION")}
    os.environ.update(settings, AWS_DEFAULT_REGION="us-east-1")
    S3FileSystem.clear_instance_cache()  # those of another server
    try:
        yield store
    finally:
        S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def copy_folder(source: Path, target: Path) -> None:
    """Put the files of a local folder into a store."""
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
