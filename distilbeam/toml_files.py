"""Configuration files, whatever an editor made of them: with a byte order mark or without, with any end of line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
      path: the file, in UTF-8.

    Raises:
      ValueError: it is not valid TOML, or not UTF-8.
      OSError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: {e}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: it must be stored in UTF-8; {e}") from e
