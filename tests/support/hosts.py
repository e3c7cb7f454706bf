"""Hosts of a network on one machine: network namespaces behind a bridge, with one file system, and links that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """A host: a network namespace and its link.

    Attributes:
      name: of the namespace.
      link: the end of its link on this side.
    """

    name: str
    link: str

    def command(self, *words: str) -> list[str]:
        """Return the words that run a program on the host."""
        return ["ip", "netns", "exec", self.name, *words]

    def cut_off(self) -> None:
        """Take its network away."""
        _ip("link", "set", self.link, "down")

    def connect(self) -> None:
        """Give it its network back."""
        _ip("link", "set", self.link, "up")


@contextmanager
def hosts(count: int) -> Iterator[tuple[str, list[Host]]]:
    """Make hosts; yield this machine's address among them. Skips the test where that is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("hosts are network namespaces, which need the program ip")
    number = os.getpid() % 60_000
    net, bridge = f"10.{200 + number % 50}.{number // 256}", f"dsb{number}"
    made = [Host(f"dsb{number}-{i}", f"dsb{number}v{i}") for i in range(count)]
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{net}.1/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for i, host in enumerate(made):
                _ip("netns", "add", host.name)
                _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
                _ip("link", "set", host.link, "master", bridge)
                _ip("link", "set", host.link, "up")
                inside = ("-n", host.name)
                _ip(*inside, "addr", "add", f"{net}.{i + 2}/24", "dev", "eth0")
                _ip(*inside, "link", "set", "eth0", "up")
                _ip(*inside, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces cannot be made here: {e.stderr.strip()}")
        yield f"{net}.1", made
    finally:
        for host in made:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", host.name)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
