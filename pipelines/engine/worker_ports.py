"""Beam's ports for worker processes on this machine, on its loopback alone.

Beam opens the ports that its worker processes talk to on every network of the machine, without encryption or a password,
and gives no option for it. Its modules take their servers from `grpc.server`; here they are given one that binds what they
would bind to every network to the loopback instead.
"""

from __future__ import annotations

import types
from typing import Any

_EVERYWHERE = ("[::]:", "0.0.0.0:")
_LOOPBACK = "127.0.0.1:"


def bind_to_loopback() -> None:
    """Let Beam's modules for local worker processes bind to the loopback; a second call does nothing."""
    from apache_beam.runners.portability import local_job_service
    from apache_beam.runners.portability.fn_api_runner import worker_handlers
    from apache_beam.runners.worker import worker_pool_main

    for module in (local_job_service, worker_handlers, worker_pool_main):
        if not isinstance(module.grpc, _Grpc):
            module.grpc = _Grpc(module.grpc)


class _Grpc(types.ModuleType):
    """The package `grpc`, but for where its servers bind."""

    def __init__(self, package: Any) -> None:
        super().__init__(package.__name__)
        self._package = package

    def __getattr__(self, name: str) -> Any:
        return getattr(self._package, name)

    def server(self, *arguments: Any, **options: Any) -> Any:
        """Make a server."""
        made = self._package.server(*arguments, **options)
        bind = made.add_insecure_port
        made.add_insecure_port = lambda address: bind(_local(address))
        return made


def _local(address: str) -> str:
    for everywhere in _EVERYWHERE:
        if address.startswith(everywhere):
            return _LOOPBACK + address.removeprefix(everywhere)
    return address
