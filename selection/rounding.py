"""Dependent rounding: turn marginals that sum to b into exactly b chosen points, each with exactly its marginal.

The pivotal method: two fractional points meet; the sum of their probabilities stays, one of them becomes 0 or 1,

    alpha = min(1 - q_i, q_j), beta = min(q_i, 1 - q_j):
    with probability beta / (alpha + beta)  q_i += alpha, q_j -= alpha,  else  q_i -= beta, q_j += beta,

so every marginal is kept and no two points are positively correlated. Pairs may be taken in any order. Here the points meet
in a random order, each time the next one against the survivor of the former ones; beyond 65,536 undecided points, chunk after
chunk, each chunk in a random order. In that order the cumulative sum of the marginals cuts the points into strata of mass
one: inside a stratum the survivor is a point drawn in proportion to its mass, and the point that crosses into the next
stratum fights it for the seat. That needs one cumulative sum, a binary search and two random numbers for each seat, and no
loop over points. Because any order will do, a shard of a distributed pool rounds itself down to one fractional point, its
carry, and a last step rounds the carries. (Systematic sampling has the same marginals but correlates pairs positively; it is
not used.)

Cost: 10 to 50 ns for each point, growing with the share that is chosen: between one and four sorts of the marginals; with
numba, where there are many, 10 to 35 ns and the same choice. O(n) memory. float64.

References:
  Gandhi, Khuller, Parthasarathy, Srinivasan: Dependent rounding and its applications to approximation algorithms, 2006.
  Deville, Tillé: Unequal probability sampling without replacement through a splitting method, 1998 (the pivotal method).
  arXiv 2210.01213, Algorithm 2 (DEPROUND).
"""

from __future__ import annotations

import json
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from distilbeam.selection import compiled
from distilbeam.selection.checks import Floats, as_vector, require_each

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

# Points whose cumulative sum is taken at once: fits the second-level cache and keeps the sum's rounding below 1e-11.
_CHUNK = 1 << 16
# How far a sum of marginals may be from a whole number: the rounding of their computation, for up to 10^9 of them.
SUM_TOLERANCE = 1e-6


def dep_round(marginals: npt.ArrayLike, rng: np.random.Generator) -> Bools:
    """Choose exactly sum(marginals) points, point i with probability marginals[i], no pair positively correlated.

    Args:
      marginals: float [n] in [0, 1], with a whole sum (within 1e-6).
      rng: the only source of randomness; the same state gives the same choice.

    Returns:
      bool [n]: which points are chosen.

    Raises:
      ValueError: a marginal is outside [0, 1] or NaN, or the sum is not a whole number.

    Example:
      >>> int(dep_round([0.5, 0.5, 0.25, 0.75], np.random.default_rng(0)).sum())
      2
    """
    array = as_marginals(marginals)
    total = float(array.sum())
    if abs(total - round(total)) > SUM_TOLERANCE:
        raise ValueError(
            f"marginals must sum to a whole number of examples (within {SUM_TOLERANCE:g}), got {total:.9g}; "
            "rad_marginals and Threshold.marginals give such marginals, round_shard takes any sum"
        )
    selected, carry, probability = _round(array, rng)
    if carry >= 0:
        selected[carry] = probability > 0.5
    assert selected.sum() == round(total), f"{selected.sum()} points chosen for marginals that sum to {total}"
    return selected


def round_shard(marginals: npt.ArrayLike, rng: np.random.Generator) -> tuple[Bools, int, float]:
    """Round one shard's marginals until at most one point is undecided.

    Args:
      marginals: float [n] in [0, 1], of any sum.
      rng: the shard's generator, from `shard_rng`.

    Returns:
      bool [n] of the chosen points (False for the carry); the carry's index, -1 if there is none; and the probability with
      which the carry is still to be chosen, 0.0 if there is none. Over both steps every point keeps its marginal.

    Raises:
      ValueError: a marginal is outside [0, 1] or NaN.

    Example:
      >>> selected, carry, probability = round_shard([0.5, 0.5, 0.5], np.random.default_rng(0))
      >>> int(selected.sum()), probability
      (1, 0.5)
    """
    return _round(as_marginals(marginals), rng)


def _round(array: Floats, rng: np.random.Generator) -> tuple[Bools, int, float]:
    selected = array == 1
    undecided = np.flatnonzero((array > 0) & ~selected)
    order = rng.permutation(min(undecided.size, _CHUNK))
    carry, mass, kernels = -1, 0.0, compiled.kernels(undecided.size)
    for start in range(0, undecided.size, _CHUNK):
        chunk = undecided[start : start + _CHUNK]
        # Points of different chunks meet only through a carry, so one random order may serve all chunks.
        local = order if len(chunk) == len(order) else order[order < len(chunk)]
        points, masses, sums = _meeting(array, chunk, local, carry, mass, kernels)
        winners, last, mass = _seat(sums, masses, rng, kernels)
        selected[points[winners]] = True
        carry = int(points[last]) if last >= 0 else -1
    return selected, carry, mass


def round_carries(probabilities: npt.ArrayLike, rng: np.random.Generator) -> Bools:
    """Decide the carries of all shards: the last, global step of a distributed rounding.

    Args:
      probabilities: float [m] in [0, 1], the carries' probabilities in the order of the plan; may be empty. Their sum is
        whole because the marginals of the whole pool sum to the budget.
      rng: the generator of this rounding, and of nothing else.

    Returns:
      bool [m]: which carries are chosen.

    Raises:
      ValueError: a probability is outside [0, 1] or NaN, or the sum is not whole within 1e-6: a shard is missing or was
        rounded with another plan.
    """
    return dep_round(probabilities, rng)


def shard_rng(seed: int, round: int, shard_id: str) -> np.random.Generator:  # noqa: A002 (the run's term)
    """Derive the generator of one shard in one round, the same on every machine and in every retry.

    Args:
      seed: the run's seed, one for all shards.
      round: number of the round, so that a shard draws anew in each.
      shard_id: stable identifier of the shard.

    Returns:
      A generator seeded by blake2b of the three; Python's own `hash` differs from process to process.

    Example:
      >>> [int(shard_rng(0, 0, shard).integers(100)) for shard in ("a", "b", "a")]
      [49, 15, 49]
    """
    key = json.dumps([int(seed), int(round), str(shard_id)]).encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(blake2b(key, digest_size=16).digest(), "little")))


def as_marginals(marginals: npt.ArrayLike) -> Floats:
    """Return marginals as float64 [n] after checking that each is in [0, 1]."""
    array = np.asarray(as_vector("marginals", marginals), np.float64)
    if array.size and array.min() >= 0 and array.max() <= 1:  # neither holds where a number is NaN
        return array
    require_each("marginals", array, (array >= 0) & (array <= 1), "probabilities from 0 to 1")
    return array


def _meeting(
    array: Floats, chunk: Indices, order: Indices, carry: int, mass: float, kernels: compiled.Kernels | None
) -> tuple[Indices, Floats, Floats]:
    """Line points up in the order in which they meet: first the carry of the points before, of mass 0 if there is none.

    Returns:
      The points, their masses and the cumulative sum of these.
    """
    if kernels is None:
        points = np.append(carry, chunk[order])
        masses = array[points]
        masses[0] = mass  # 0 without a carry: a point that never wins
        return points, masses, np.cumsum(masses)
    size = len(order) + 1
    points, masses, sums = np.empty(size, np.int64), np.empty(size), np.empty(size)
    kernels.line_up(array, chunk, order, carry, mass, points, masses, sums)
    return points, masses, sums


def _seat(
    sums: Floats, masses: Floats, rng: np.random.Generator, kernels: compiled.Kernels | None
) -> tuple[Indices, int, float]:
    """Let points meet in the order of `_meeting`.

    Args:
      sums: cumulative sum of the masses.
      masses: in [0, 1), all but the first one positive.
      rng: draws two uniform numbers for each seat: which point is met, and who wins.
      kernels: compiled functions, or None to use numpy; both choose the same points.

    Returns:
      The winners of the seats, the point that is still undecided (-1: none) and its remaining mass.
    """
    seats = int(sums[-1])
    places, fights = rng.random(seats), rng.random(seats)
    if kernels is None:
        winners, crosser, survivor = _fill_seats(sums, masses, places, fights)
    else:
        winners = np.empty(seats, np.int64)
        crosser, survivor = kernels.fill_seats(sums, masses, places, fights, winners)
    mass = float(sums[-1]) - seats
    if mass <= 0:
        return winners, -1, 0.0
    last = min(int(np.searchsorted(sums, seats + rng.random() * mass, side="right")), len(masses) - 1)
    return winners, survivor if last == crosser else last, mass


def _fill_seats(sums: Floats, masses: Floats, places: Floats, fights: Floats) -> tuple[Indices, int, int]:
    """Decide all seats at once from two uniform random numbers for each.

    Returns:
      The winners, the last crosser and the point that is undecided after it; -1 for both if there is no seat.
    """
    if not places.size:
        return np.zeros(0, np.int64), -1, -1
    floors = np.arange(len(places), dtype=np.float64)
    # A mass below 1 crosses at most one whole number, in float64 too, and the first point crosses none.
    whole = sums.astype(np.int64)
    crossers = np.flatnonzero(whole[1:] != whole[:-1]) + 1
    inside = sums[crossers - 1] - floors
    champions = np.searchsorted(sums, floors + places * inside, side="right")
    np.minimum(champions, crossers - 1, out=champions)
    # The champion takes the seat with probability (1 - q) / ((1 - q) + (1 - p)), q the crosser's mass, p the champion's.
    crosser_loss = 1.0 - masses[crossers]
    champion_wins = fights * (crosser_loss + 1.0 - inside) < crosser_loss
    is_survivor = np.zeros(len(places), bool)
    is_survivor[1:] = champions[1:] == crossers[:-1]
    survivors = _survivors(crossers, champions, champion_wins, is_survivor)
    champions[1:] = np.where(is_survivor[1:], survivors[:-1], champions[1:])
    return np.where(champion_wins, champions, crossers), int(crossers[-1]), int(survivors[-1])


def _survivors(crossers: Indices, champions: Indices, champion_wins: Bools, is_survivor: Bools) -> Indices:
    """Give the point that goes on undecided after each seat.

    It is the crosser where the champion won, else the champion; where that is itself the survivor of the seat before, the
    identity is passed along from the last seat that settled it.
    """
    survivors = np.where(champion_wins, crossers, champions)
    settled = np.where(champion_wins | ~is_survivor, np.arange(len(crossers)), 0)
    return np.asarray(survivors[np.maximum.accumulate(settled)])
