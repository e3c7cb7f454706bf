"""The data of a run of a language model: three sets of blocks, planned by their footers and checked before anything is spent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from distilbeam.inputs.blocks import block_length
from distilbeam.pipelines.jobs.blocks import COLUMNS
from distilbeam.pipelines.pool.content_digests import content_digests
from distilbeam.pipelines.pool.datasets import require_columns
from distilbeam.pipelines.pool.splits import Pool, plan_pool
from distilbeam.pipelines.token_config import TokenRunConfig
from distilbeam.storage.paths import to_path


@dataclass(frozen=True)
class TokenInputs:
    """The data of a run of a language model.

    Attributes:
      pool: the units of the blocks that may be bought.
      held_out: those of `validation` and, where there is one, `test`, by these names.
      length: tokens of a block of the pool.
      budget: blocks to buy in a round.
      cache: JSON file in which digests of files are kept; see `content_digests`.
    """

    pool: Pool
    held_out: dict[str, Pool]
    length: int
    budget: int
    cache: Path
    classes: tuple[str, ...] = ()  # ids have no names that a run could change

    @property
    def rows_digests(self) -> dict[str, str]:
        """Hash of what each held-out set holds, by the setting that names it."""
        return {f"data.{name}": _content(plan, self.cache) for name, plan in self.held_out.items()}

    @property
    def files_digest(self) -> str:
        """Hash of all footers."""
        parts = [self.pool.digest, *(held.digest for held in self.held_out.values())]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def load_token_inputs(config: TokenRunConfig, cache: Path) -> TokenInputs:
    """Plan the pool and the held-out sets.

    Args:
      config: the configuration.
      cache: JSON file in which digests of files are kept; see `content_digests`.

    Raises:
      ValueError: a missing file or column, rows that are no blocks, or a budget beyond the pool or below a block.
    """
    data, unit_rows = config.data, config.engine.unit_rows
    places = {"pool": data.pool, "validation": data.validation, "test": data.test}
    plans: dict[str, Pool] = {}
    for name, place in places.items():
        if place is not None:
            plans[name] = plan_pool(to_path(place), unit_rows, f"data.{name}", COLUMNS)
            require_columns(plans[name].columns, COLUMNS, f"data.{name}")
            block_length(pa.schema(plans[name].types), f"data.{name}")
    pool = plans.pop("pool")
    length = block_length(pa.schema(pool.types), "data.pool")
    return TokenInputs(pool, plans, length, _budget(config, pool, length), cache)


def _content(plan: Pool, cache: Path) -> str:
    digests = content_digests(plan, cache)
    return hashlib.blake2b("\n".join(digests.values()).encode(), digest_size=8).hexdigest()


def _budget(config: TokenRunConfig, pool: Pool, length: int) -> int:
    """Say how many blocks a round buys."""
    selection, rounds = config.selection, config.run.rounds
    name, given = "budget", selection.budget
    if given is None:
        name, tokens = "budget_tokens", selection.budget_tokens or 0
        given = tokens // length
        if not given:
            raise ValueError(
                f"selection.budget_tokens must be at least the {length:,} tokens of a block, got {tokens:,}"
            )
    if given * rounds > pool.rows:
        unit = "blocks" if name == "budget" else f"blocks of {length:,} tokens"
        raise ValueError(
            f"selection.{name} times run.rounds must be at most the {pool.rows:,} blocks of the pool, got {given:,} {unit} x "
            f"{rounds} = {given * rounds:,}"
        )
    return given
