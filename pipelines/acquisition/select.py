"""The choice of a round: solve the game once, freeze the plan, round the marginals to exactly the budget.

The driver adds the units' sketches, solves the game of Robust Active Distillation (arXiv 2210.01213, Algorithm 1) for the
expected number of wrong teacher labels, makes the solution exact with one light pass over the gains and writes the plan;
from then on the plan is read, never made again. Each unit then rounds its own marginals with a generator derived from
(seed, round, unit) down to at most one fractional carry, and one last step rounds the carries, so that exactly the budget
is chosen, each example with exactly its marginal. Strategies that are no such game, uncertainty herding among them, see the
examples together (`in_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.acquisition.in_memory import KEPT, candidates_share, chosen_in_memory
from distilbeam.pipelines.acquisition.score import Candidates, picks_file, read_gains, read_sketches, unbought_rows
from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.selection.rounding import round_carries, round_shard, shard_rng
from distilbeam.selection.sketch.gain_sketch import GainSketch, Threshold
from distilbeam.selection.strategies.registry import gain_read, selector_with
from distilbeam.selection.strategies.selectors import Selector, Uniform
from distilbeam.storage.atomic import committed_directory
from distilbeam.storage.files import read_json, write_json, write_parquet

_UnitMarginals: TypeAlias = tuple[Unit, npt.NDArray[np.int64], npt.NDArray[np.float32] | None, npt.NDArray[np.float64]]


class _Carry(NamedTuple):
    unit: Unit
    pick: pa.Table
    probability: float


@dataclass(frozen=True)
class Choice:
    """What is to be chosen, and where its files are.

    Attributes:
      pool: the frozen pool.
      directory: `selected/round=NNN`: `plan.json`, `gains/`, `picks/`.
      method: name of a strategy, as in `selection.strategies.registry`.
      budget: labels to buy.
      wrong_share: expected share of wrong teacher labels, in [0, 1].
      bought: picks directories of earlier rounds.
      seed: the run's seed.
      round: number of the round; part of every generator's seed.
      digests: hashes of the pool, student and teacher that the plan belongs to.
      labelled: for strategies that read embeddings, gives those of what has a label, float32 [m, d].
      gain: name of the gain, for strategies of any; one of `selection.gains.GAINS`.
    """

    pool: Pool
    directory: Path
    method: str
    budget: int
    wrong_share: float
    bought: tuple[str, ...]
    seed: int
    round: int
    digests: dict[str, str]
    labelled: Callable[[], npt.NDArray[np.float32]] | None = None
    gain: str = "margin"

    def strategy(self, examples: int = 0) -> Selector:
        """Make the strategy, for a pool of so many examples."""
        # without its own limit: `candidates` bounds what it holds, and a budget beyond the limit has candidates beyond it
        return selector_with(self.method, gain=self.gain, wrong=examples * self.wrong_share, limit=None)

    @property
    def scored(self) -> str | None:
        """Name of the gain that the strategy needs the pool scored by; None where it reads nothing of the examples."""
        return gain_read(self.method, self.gain)

    def candidates(self, left: int) -> Candidates | None:
        """Say which of the `left` examples the strategy compares in memory, and what is to be kept of them; None for none."""
        kept = tuple(name for name in KEPT if name in self.strategy().reads)
        share = candidates_share(left, self.budget)
        return Candidates(share, self.seed, self.round, str(self.embeddings), kept) if kept else None

    @property
    def embeddings(self) -> Path:
        """Directory of what is kept of the candidates of strategies that compare them."""
        return self.directory / "embeddings"

    @property
    def gains(self) -> Path:
        """Directory of the gains files."""
        return self.directory / "gains"

    @property
    def picks(self) -> Path:
        """Directory of the chosen rows: `row` (int64), `gain` (float32, null if chosen by chance), `inclusion_probability` (float32)."""
        return self.directory / "picks"


def choose(choice: Choice) -> dict[str, Any]:
    """Freeze the plan and choose the rows; what is already there is kept.

    Returns:
      The plan.

    Raises:
      ValueError: the plan on disk belongs to another student, teacher or pool, or the budget exceeds what is left.
    """
    # In two commits: the plan is written first and read from then on, so that a choice that was killed goes on with the same
    # threshold, even if the gains were scored again on another processor.
    plan = _frozen_plan(choice)
    if not choice.picks.exists():
        with committed_directory(choice.picks) as picks:
            is_drawn = "threshold" in plan or "probability" in plan
            (_pick if is_drawn else _pick_in_memory)(choice, plan, picks)
    return plan


def _frozen_plan(choice: Choice) -> dict[str, Any]:
    path = choice.directory / "plan.json"
    if not path.exists():
        write_json(path, _solve(choice))
    plan: dict[str, Any] = read_json(path)
    changed = [name for name, digest in choice.digests.items() if plan["digests"].get(name) != digest]
    if changed:
        raise ValueError(
            f"{path} was made with another {' and another '.join(changed)}; start a new run directory for the new one"
        )
    return plan


def _solve(choice: Choice) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "method": choice.method,
        "budget": choice.budget,
        "seed": choice.seed,
        "round": choice.round,
        "digests": choice.digests,
    }
    if choice.scored is None:
        left = sum(len(unbought_rows(unit, choice.bought)) for unit in choice.pool.units)
        _check_budget(choice.budget, left)
        by_chance = {"probability": choice.budget / left} if isinstance(choice.strategy(), Uniform) else {}
        return {**plan, "examples": left, **by_chance}
    sketch = reduce(_merged, read_sketches(choice.gains, choice.pool.units), GainSketch())
    _check_budget(choice.budget, sketch.count)
    # the adversary of the game spoils as many labels as the teacher is expected to have wrong among what is left
    wrong = choice.strategy().wrong_in_game(sketch.count, choice.wrong_share)
    if wrong is None:  # no game with a threshold: chosen in memory, when it is picked
        return {**plan, "examples": sketch.count}
    # exact by the sketch alone unless the level or the cut falls inside a bin, whose values a second pass counts
    threshold = _refined(sketch.solve(wrong, choice.budget), choice)
    return {
        **plan,
        "examples": sketch.count,
        "wrong": wrong,
        "value": threshold.value,
        "threshold": threshold.to_json(),
    }


def _merged(total: GainSketch, other: GainSketch) -> GainSketch:
    total.merge(other)
    return total


def _refined(threshold: Threshold, choice: Choice) -> Threshold:
    """Make the solution exact: one light pass over the gains, as a rule."""
    while (refinement := threshold.refinement()) is not None:
        for unit in choice.pool.units:
            refinement.add(read_gains(choice.gains, unit)[1])
        threshold = refinement.solve()
    return threshold


def _check_budget(budget: int, left: int) -> None:
    if budget > left:
        raise ValueError(
            f"selection.budget must be at most the {left:,} examples that are left in the pool, got {budget:,}"
        )


def _pick_in_memory(choice: Choice, plan: dict[str, Any], directory: Path) -> None:
    found = chosen_in_memory(
        choice.strategy(plan["examples"]),
        choice.pool.units,
        choice.gains,
        choice.embeddings,
        choice.labelled,
        choice.bought,
        plan["budget"],
        _rng(choice, choice.method),
    )
    for unit, rows, gains, probabilities in found:
        _write_picks(picks_file(directory, unit), _pick_columns(rows, gains, probabilities))


def _pick(choice: Choice, plan: dict[str, Any], directory: Path) -> None:
    # Exactly the budget, though no unit knows of another: each rounds its own marginals so that all but one are 0 or 1, the one
    # that is left (the carry) keeps a probability, and the carries are rounded together, last. The sum of all marginals is the
    # budget, a whole number, so that the carries' probabilities sum to a whole number too.
    carries: list[_Carry] = []
    chosen = 0
    for unit, rows, gains, marginals in _marginals(choice, plan):
        selected, carry, probability = round_shard(marginals, _rng(choice, unit.uid))
        columns = _pick_columns(rows, gains, marginals)
        if carry >= 0:  # undecided: not written with its unit, but added to its file if it wins
            selected[carry] = False
            carries.append(_Carry(unit, columns.slice(carry, 1), probability))
        chosen += _write_picks(picks_file(directory, unit), columns.filter(pa.array(selected)))
    # generators by unit and by name: what one unit draws does not depend on which others there are or who drew before
    won = round_carries([c.probability for c in carries], _rng(choice, "carries"))
    for winner in compress(carries, won):
        chosen += _add_pick(picks_file(directory, winner.unit), winner.pick)
    assert chosen == choice.budget, f"{chosen} rows chosen for a budget of {choice.budget}"


def _marginals(choice: Choice, plan: dict[str, Any]) -> Iterator[_UnitMarginals]:
    threshold = Threshold.from_json(plan["threshold"]) if "threshold" in plan else None
    for unit in choice.pool.units:
        if threshold is None:
            rows = unbought_rows(unit, choice.bought)
            yield unit, rows, None, np.full(len(rows), plan["probability"])
        else:
            rows, gains = read_gains(choice.gains, unit)
            yield unit, rows, gains, threshold.marginals(gains)


def _pick_columns(
    rows: npt.NDArray[np.int64], gains: npt.NDArray[np.float32] | None, marginals: npt.NDArray[np.float64]
) -> pa.Table:
    gain = pa.nulls(len(rows), pa.float32()) if gains is None else pa.array(gains)
    return pa.table({"row": rows, "gain": gain, "inclusion_probability": marginals.astype(np.float32)})


def _write_picks(path: Path, picks: pa.Table) -> int:
    if picks.num_rows:
        write_parquet(path, picks, flushed=False)
    return int(picks.num_rows)


def _add_pick(path: Path, pick: pa.Table) -> int:
    picks = pa.concat_tables([pq.read_table(path), pick]) if path.exists() else pick
    write_parquet(path, picks.sort_by("row"), flushed=False)
    return 1


def _rng(choice: Choice, name: str) -> np.random.Generator:
    rng: np.random.Generator = shard_rng(choice.seed, choice.round, name)
    return rng
