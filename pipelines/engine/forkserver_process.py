"""The process that worker processes are forked from, with everything a worker imports imported once.

Beam starts a worker process as a fresh interpreter, which imports for seconds before it does anything, for every worker of
every phase. Here one process imports, has no threads, and forks a worker whenever it is asked to; `forkserver` starts it,
`forkserver_client` and `worker_pool` ask it. It ends, and its workers with it, when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from distilbeam.pipelines.engine.forkserver_client import SOCKET

FAILED = 1
_PATIENCE_S = 30.0  # for a request in flight


class Server:
    """Forks a worker for every connection, and tells the connection when the worker has ended.

    A connection sends one line of JSON, the arguments of `run_worker` or of `run_harness`, and is sent one byte, zero if the
    worker ended well. A second line has the worker keep what it has and end; a connection that is closed before the worker has
    ended has it killed.

    Args:
      listener: the socket that connections come to.
      lifeline: a file that ends when the server shall.
      folder: where it is written down how workers ended that did not end well.
    """

    def __init__(self, listener: socket.socket, lifeline: int, folder: Path) -> None:
        self._listener, self._lifeline, self._folder = listener, lifeline, folder
        self._workers: dict[int, socket.socket] = {}  # by process id
        self._requests: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, wake = socket.socketpair()
        self._woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._inherited = (listener, self._woken, wake)
        for source in (listener, lifeline, self._woken):
            self._selector.register(source, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until the lifeline ends."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._lifeline:
                    self._end()
                    return
                self._handle(key.fileobj)

    def _handle(self, source: Any) -> None:
        if source is self._listener:
            connection, _ = source.accept()
            self._requests[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)
        elif source is self._woken:
            source.recv(4096)
            self._reap()
        else:
            self._receive(source)

    def _receive(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(1 << 20)
        except ConnectionError:
            received = b""
        self._requests[connection] += received
        if not received:
            self._forget(connection)
        elif connection in self._workers.values():
            self._tell_to_end(connection)
        elif received.endswith(b"\n"):
            self._fork(connection, json.loads(self._requests[connection]))

    def _fork(self, connection: socket.socket, request: dict[str, Any]) -> None:
        worker = os.fork()
        if worker == 0:
            status = FAILED
            try:
                self._become_worker(request)
                status = 0
            finally:
                _keep_answers()
                sys.stderr.flush()
                os._exit(status)
        self._workers[worker] = connection

    def _tell_to_end(self, connection: socket.socket) -> None:
        for worker, owner in self._workers.items():
            if owner is connection:
                os.kill(worker, signal.SIGTERM)

    def _become_worker(self, request: dict[str, Any]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for inherited in (*self._inherited, *self._requests):
            inherited.close()
        (run_harness if "control" in request else run_worker)(**request)

    def _reap(self) -> None:
        while self._workers:
            worker, status = os.waitpid(-1, os.WNOHANG)
            if worker == 0:
                return
            if (connection := self._workers.pop(worker, None)) is not None:
                if status:
                    self._note_death(worker, status)
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    connection.sendall(bytes([FAILED if status else 0]))
                self._forget(connection)

    def _note_death(self, worker: int, status: int) -> None:
        """Write down how a worker ended before anybody hears that it did: the driver may look only then."""
        temporary = self._folder / f".{worker}"
        temporary.write_text(str(status))
        temporary.replace(self._folder / f"death-{worker}")

    def _forget(self, connection: socket.socket) -> None:
        for worker, owner in self._workers.items():
            if owner is connection:
                os.kill(worker, signal.SIGKILL)
        if self._requests.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()

    def _end(self) -> None:
        for worker in self._workers:
            os.kill(worker, signal.SIGKILL)


def run_worker(environment: dict[str, str], directory: str, log_level: str) -> None:
    """Run Beam's worker in this process to its end.

    Args:
      environment: environment variables, those with which Beam tells a worker where its runner is among them.
      directory: the working directory.
      log_level: from which level on it logs.
    """
    from apache_beam.runners.worker import sdk_worker_main

    os.environ.clear()
    os.environ.update(environment, PIPELINE_OPTIONS=json.dumps({"default_sdk_harness_log_level": log_level}))
    os.chdir(directory)
    sys.path += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    logging.getLogger(sdk_worker_main.__name__).setLevel(
        "ERROR"
    )  # it warns of missing folders that only containers have
    sdk_worker_main.main([])


def run_harness(control: str, worker_id: str, log_level: str) -> None:
    """Run Beam's worker in this process until its runner ends it, is gone, or SIGTERM comes.

    Args:
      control: address of the runner's control service.
      worker_id: its name for the worker.
      log_level: from which level on it logs.
    """
    from apache_beam.runners.worker.sdk_worker import SdkHarness

    signal.signal(signal.SIGTERM, lambda *_: _end_with_answers())
    logging.basicConfig(level=log_level, format="%(message)s", force=True)
    SdkHarness(control, worker_id=worker_id).run()


def _end_with_answers() -> None:
    def end() -> None:
        _keep_answers()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()  # the handler's own thread may hold what it waits for


def _keep_answers() -> None:
    """Keep what a teacher has answered to this worker, whose runner may be gone in the middle of its work."""
    from distilbeam.pipelines.engine.item_fn import end_process_work

    end_process_work(_PATIENCE_S)


def main() -> None:
    """Listen in the folder given as the first argument, import the modules that follow, and serve until input ends."""
    folder, *modules = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver is interrupted too, and ends this
    try:
        listener = socket.socket(socket.AF_UNIX)
        directory = Path.cwd()
        os.chdir(folder)  # the whole path may be longer than a socket's name can be
        listener.bind(SOCKET)
        os.chdir(directory)
        listener.listen()
        logging.disable(logging.WARNING)  # what packages say of others that are missing, the driver has heard already
        for module in modules:
            __import__(module)
        logging.disable(logging.NOTSET)
        print("ready", flush=True)
        Server(listener, sys.stdin.fileno(), Path(folder).absolute()).serve()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
