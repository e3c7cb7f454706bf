"""How a model is served: names, limits, and that nothing is sent unencrypted to other machines unless somebody says so."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True)
class ServeOptions:
    """How a model is served.

    Attributes:
      host: address to listen on; the default is reached from this machine only.
      name: name of the model.
      version: version of the model. Without one it is made from the model's fingerprint, so that another model is
        another version and clients notice.
      top_k: send the k most probable classes instead of all logits.
      threads: requests that are read and written at once; the model itself is asked by one thread at a time.
      max_queued: requests that may wait besides; a client that is turned away asks again later.
      max_rows: most rows in a request.
      receive_s: seconds in which a request must have arrived once a thread waits for it.
      max_message_bytes: largest message received or sent.
      cert_file: certificate of the server; together with `key_file` it turns encryption on.
      key_file: key of the certificate.
      client_ca_file: authority whose certificates clients must show.
      insecure: serve other machines without encryption.
      grace_s: seconds that requests in progress have when the server is stopped.
    """

    host: str = "127.0.0.1"
    name: str = "teacher"
    version: int | None = None
    top_k: int | None = None
    threads: int = 8
    max_queued: int = 512
    max_rows: int = 16384
    receive_s: float = 20.0
    max_message_bytes: int = 64 * 2**20
    cert_file: str | None = None
    key_file: str | None = None
    client_ca_file: str | None = None
    insecure: bool = False
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file must be given together")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs cert_file and key_file")
        if self.cert_file is None and not self.insecure and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reached from other machines, and nothing would be encrypted: give cert_file and key_file "
                "(--cert-file, --key-file), or insecure (--insecure) where everybody on the network is trusted"
            )
        least_values = {
            "top_k": 1,
            "threads": 1,
            "max_queued": 0,
            "max_rows": 1,
            "max_message_bytes": 1024,
            "version": 0,
        }
        for name, least in {**least_values, "receive_s": 0, "grace_s": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def _is_loopback(host: str) -> bool:
    name = host.strip("[]")
    if name == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
