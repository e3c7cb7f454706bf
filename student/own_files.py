"""The files that a student's input needs, inside the folder that needs them: it is whole, and moves to another machine."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from distilbeam.inputs.config import InputConfig

TOKENIZER = "tokenizer.json"


def with_own_files(config: InputConfig, directory: Path) -> InputConfig:
    """Copy the files of an input into a folder.

    Args:
      config: the input, with paths that lead to its files from here.
      directory: the folder.

    Returns:
      The input with paths that are relative to the folder.

    Raises:
      ValueError: a file is not there.
    """
    if not config.tokenizer:
        return config
    try:
        shutil.copyfile(config.tokenizer, directory / TOKENIZER)
    except OSError as e:
        raise ValueError(f"input.tokenizer: {config.tokenizer} cannot be read ({e.strerror}); put it back") from e
    return config.model_copy(update={"tokenizer": TOKENIZER})


def found_in(config: InputConfig, directory: Path) -> InputConfig:
    """Lead the paths of an input to its files, which are in its folder, or where the folders of version 0.1 say.

    Args:
      config: the input as it stands in the folder.
      directory: the folder.

    Raises:
      ValueError: a file is not there.
    """
    if not config.tokenizer:
        return config
    for path in (directory / config.tokenizer, directory / TOKENIZER):
        if path.is_file():
            return config.model_copy(update={"tokenizer": str(path.absolute())})
    raise ValueError(
        f"{directory} needs the tokenizer {directory / config.tokenizer}, which is not there; copy it to "
        f"{directory / TOKENIZER}"
    )


def content_of(config: InputConfig) -> str | None:
    """Identify the contents of an input's files, wherever they are; None where it has none."""
    if not config.tokenizer:
        return None
    return content_of_file(config.tokenizer)


def content_of_folder(path: str | Path) -> str:
    """Identify the settings and weights in a folder of transformers, wherever it is."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted([*Path(path).glob("*.json"), *Path(path).glob("*.safetensors")]):
        digest.update(f"{file.name} {content_of_file(file)} ".encode())
    return digest.hexdigest()


def content_of_file(path: str | Path) -> str:
    """Identify the contents of a file, wherever it is."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
