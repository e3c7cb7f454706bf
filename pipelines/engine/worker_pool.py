"""A pool of worker processes for runners that ask for them (Beam's EXTERNAL environment): Prism, Flink, Spark, no containers.

The service is Beam's own (`BeamFnExternalWorkerPool`). Beam's implementation starts an interpreter for each worker, which
imports for seconds; here a worker is forked from a process that has imported everything (`forkserver`), and one that is told to
stop, or whose runner is gone, keeps what the teacher has answered before it ends.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils import thread_pool_executor

from distilbeam.pipelines.engine.forkserver import server_folder
from distilbeam.pipelines.engine.forkserver_client import SOCKET

_LONGEST_PATH = 96  # of a socket's folder; the system allows 104 to 108 bytes with its name
WAIT_S = 30.0  # for a place; those of a phase that has ended become free within seconds


class WorkerPool(BeamFnExternalWorkerPoolServicer):
    """Starts workers, so many at a time.

    Args:
      count: most worker processes at a time.
      wait_s: seconds that a request for one more waits for a place.
      log_level: from which level on workers log on standard error.
    """

    def __init__(self, count: int, wait_s: float = WAIT_S, log_level: str = "ERROR") -> None:
        super().__init__()
        self._count, self._wait_s, self._log_level = count, wait_s, log_level
        self._places = threading.Semaphore(count)
        # Of workers, by who asked for them and their name: two Prisms give the same names.
        self._connections: dict[tuple[str, str], socket.socket] = {}
        self._lock = threading.Lock()
        self._server: Any = None
        self.address = ""

    def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serve until `stop` is called; the process that workers are forked from is started before.

        Returns:
          The address to name in `--environment_config`.

        Raises:
          ValueError: the port is taken.
        """
        server_folder()
        once = [("grpc.so_reuseport", 0)]  # two pools at one port would take turns
        self._server = grpc.server(thread_pool_executor.shared_unbounded_instance(), options=once)
        beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(self, self._server)
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as e:
            raise ValueError(
                f"--port {port} of {host} is not to be had: it is taken, or the host is another one"
            ) from e
        self._server.start()
        self.address = f"{'localhost' if host == '127.0.0.1' else host}:{bound}"
        return self.address

    def stop(self) -> None:
        """Take no more requests, and let the workers keep what they have and end."""
        if self._server is not None:
            self._server.stop(0)
        with self._lock:
            waiting = list(self._connections.values())
        for connection in waiting:
            _tell_to_end(connection)
        for _ in range(self._count):
            self._places.acquire(timeout=self._wait_s)

    def StartWorker(self, request: Any, context: Any) -> Any:  # noqa: N802  # Beam's name
        """Fork a worker that connects to the runner that asks."""
        if not self._places.acquire(timeout=self._wait_s):
            return beam_fn_api_pb2.StartWorkerResponse(
                error=f"all {self._count} workers of this pool are at work: start it with --count {self._count + 1} or more, or "
                "ask for fewer with --sdk_worker_parallelism"
            )
        try:
            connection = _connected()
        except (OSError, RuntimeError) as e:
            self._places.release()
            return beam_fn_api_pb2.StartWorkerResponse(error=f"the worker could not be started: {e}")
        key = (context.peer(), request.worker_id)
        with self._lock:
            self._connections[key] = connection
        wanted = {"control": request.control_endpoint.url, "worker_id": request.worker_id, "log_level": self._log_level}
        connection.sendall(json.dumps(wanted).encode() + b"\n")
        threading.Thread(target=self._await, args=(key, connection), daemon=True).start()
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:  # noqa: N802  # Beam's name
        """Let a worker end."""
        with self._lock:
            connection = self._connections.get((context.peer(), request.worker_id))
        if connection is not None:
            _tell_to_end(connection)
        return beam_fn_api_pb2.StopWorkerResponse()

    def _await(self, key: tuple[str, str], connection: socket.socket) -> None:
        with connection:
            connection.recv(1)  # when the worker has ended, however
        with self._lock:
            if self._connections.get(key) is connection:
                del self._connections[key]
        self._places.release()


def _connected() -> socket.socket:
    """Connect to the process that workers are forked from."""
    folder = server_folder()
    connection = socket.socket(socket.AF_UNIX)
    if len(str(folder)) < _LONGEST_PATH:
        connection.connect(str(folder / SOCKET))
        return connection
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # threads share the working directory: it stays where it is
    try:
        connection.connect(f"/proc/self/fd/{opened}/{SOCKET}")
    finally:
        os.close(opened)
    return connection


def _tell_to_end(connection: socket.socket) -> None:
    try:
        connection.sendall(b"\n")
    except OSError:  # it has ended by itself
        return
