"""Connections to servers: credentials, headers, limits.

Secrets are read from files and the environment when they are needed, and appear in no configuration, message or log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import grpc

from distilbeam.teacher.config import HeaderConfig, TfServingConfig


def open_channel(address: str, config: TfServingConfig) -> grpc.Channel:
    """Open a connection; nothing is sent yet.

    Args:
      address: `host:port`, or any other name that gRPC resolves.
      config: the configuration.

    Returns:
      The channel. It is neither picklable nor fork-safe: made and closed where it is used.

    Raises:
      ValueError: a certificate or key cannot be read.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if config.server_name:
        options.append(("grpc.ssl_target_name_override", config.server_name))
    if not config.tls:
        return grpc.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(
        read_secret(config.ca_file, "teacher.ca_file"),
        read_secret(config.key_file, "teacher.key_file"),
        read_secret(config.cert_file, "teacher.cert_file"),
    )
    return grpc.secure_channel(address, credentials, options)


def read_secret(path: str | None, setting: str) -> bytes | None:
    """Read a certificate or key.

    Args:
      path: the file, or None.
      setting: the setting that names it, for the message.

    Raises:
      ValueError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"{setting}: {path} cannot be read ({e.strerror}); check the path and who may read it") from e


def request_headers(headers: Mapping[str, HeaderConfig]) -> list[tuple[str, str]]:
    """Read the values of the headers, which may have been renewed since the last request.

    Raises:
      ValueError: an environment variable or file is missing, or its value cannot be a header's; the value is not shown.
    """
    return [(name.lower(), _printable(name, header.prefix + _value(name, header))) for name, header in headers.items()]


def _printable(name: str, value: str) -> str:
    """Refuse what gRPC would refuse, with the value, in an error that ends in a log."""
    if not all(" " <= character <= "~" for character in value):
        raise ValueError(
            f"teacher.headers.{name}: its value must be one line of printable ASCII characters, it has others; check the "
            "file or the environment variable"
        )
    return value


def _value(name: str, header: HeaderConfig) -> str:
    if header.file is not None:
        data = read_secret(header.file, f"teacher.headers.{name}.file")
        assert data is not None
        return data.decode("latin-1").strip()
    assert header.env is not None
    value = os.environ.get(header.env)
    if value is None:
        raise ValueError(
            f"teacher.headers.{name}.env: the environment has no {header.env}; set it where the workers run"
        )
    return value
