"""The client that Beam starts in the place of a worker: it asks the fork server for one and ends when the worker does.

A program of its own that imports nothing of the project, so that it starts in milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

SOCKET = "socket"  # its name in the server's folder


def main() -> int:
    """Ask for a worker with this process's environment; return its status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver is interrupted too, and lets the worker end
    folder, log_level = sys.argv[1:]
    request = {"environment": dict(os.environ), "directory": str(Path.cwd()), "log_level": log_level}
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # the whole path may be longer than a socket's name can be
        server.connect(SOCKET)
        server.sendall(json.dumps(request).encode() + b"\n")
        answer = server.recv(1)
    return answer[0] if answer else 1


if __name__ == "__main__":
    sys.exit(main())
