"""The tokenizer of a language model: loaded from a folder, and identified by every id that it can emit.

Two models may learn from each other's distributions over tokens only where an id means the same to both. The fingerprint
of a tokenizer is a hash of all its tokens by id, of the special ones, of its normaliser and its pre-tokeniser; it is taken
below a number of ids, so that a tokenizer with further tokens is told to agree on all that the labels know.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distilbeam.extras import Need, require_extras


@dataclass(frozen=True)
class TokenizerFolder:
    """A fast tokenizer of transformers in a local folder.

    Attributes:
      folder: where it is.
      tokenizer: the loaded tokenizer.
    """

    folder: str
    tokenizer: Any

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token, added tokens among them."""
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def num_classes(self) -> int:
        """The highest id that it can emit, plus one: never the size of an embedding, which is padded."""
        return max(self.vocabulary.values()) + 1

    @property
    def end_of_text(self) -> int:
        """Id of the token that ends a text.

        Raises:
          ValueError: it names none.
        """
        found = self.tokenizer.eos_token_id
        if found is None:
            raise ValueError(
                f"the tokenizer in {self.folder} must name an eos_token, which ends each text; add it to "
                "tokenizer_config.json"
            )
        return int(found)

    def continued(self, text: str, tokens: int, following: Callable[[list[int]], int]) -> str:
        """Continue a text by one token after another.

        Args:
          text: at least one token.
          tokens: how many to add at most; the end of the text ends it.
          following: gives the id behind some ids.

        Returns:
          The text and what was added.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        for _ in range(tokens):
            found = following(ids)
            if found == self.tokenizer.eos_token_id:
                break
            ids.append(found)
        return str(self.tokenizer.decode(ids))

    def fingerprint(self, num_classes: int | None = None) -> str:
        """Hash what the ids below a number mean.

        Args:
          num_classes: number of ids; all without it.

        Returns:
          32 hexadecimal digits. A tokenizer that agrees on every id of another has the other's fingerprint at the other's
          `num_classes`, whatever further tokens it knows.
        """
        bound = self.num_classes if num_classes is None else num_classes
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        special = sorted(
            (int(id_), str(token.content))
            for id_, token in self.tokenizer.added_tokens_decoder.items()
            if token.special and id_ < bound
        )
        pairs = sorted((id_, token) for token, id_ in self.vocabulary.items() if id_ < bound)
        text = json.dumps([pairs, special, parts.get("normalizer"), parts.get("pre_tokenizer")], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def chat_template_hash(self) -> str:
        """Hash the chat template; empty where there is none. It is recorded with what it made, and not compared."""
        template = self.tokenizer.chat_template
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True) if template else ""
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if text else ""

    def require_same(self, fingerprint: str, num_classes: int, whose: str) -> None:
        """Refuse labels or blocks of another tokenizer.

        Args:
          fingerprint: of the other tokenizer, at its number of ids.
          num_classes: that number.
          whose: what was made with the other one, for the message.

        Raises:
          ValueError: the tokenizers differ in an id below `num_classes`.
        """
        if self.num_classes < num_classes:
            raise ValueError(
                f"the tokenizer in {self.folder} has {self.num_classes:,} ids, fewer than the {num_classes:,} of {whose}; use "
                "the tokenizer that made them"
            )
        if self.fingerprint(num_classes) != fingerprint:
            raise ValueError(
                f"the tokenizer in {self.folder} is not the one of {whose}: they differ in what one of the {num_classes:,} ids "
                "means; use the tokenizer that made them"
            )


def load_tokenizer(folder: str | Path, setting: str) -> TokenizerFolder:
    """Load the tokenizer of a folder; nothing is downloaded and no code of the folder is run.

    Args:
      folder: with tokenizer.json and tokenizer_config.json.
      setting: the setting that names it, for messages.

    Raises:
      ValueError: transformers is not installed, or the folder holds no fast tokenizer.
    """
    require_extras([Need(setting, "hf", ("transformers", "tokenizers"))])
    if not Path(folder).is_dir():
        raise ValueError(f"{setting}: {folder} must be a folder with tokenizer.json on this disk")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it names each of its libraries that is for other hardware
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # of a damaged folder anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{setting}: {folder} holds no tokenizer that transformers can load: {reason}") from e
    if not getattr(found, "is_fast", False):
        raise ValueError(f"{setting}: {folder} must hold a fast tokenizer (tokenizer.json), got {type(found).__name__}")
    return TokenizerFolder(str(folder), found)
