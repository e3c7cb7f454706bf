"""The registry of strategies: the names by which `selection.method`, `selector` and the benchmarks know them.

| name | what it buys | reads | pool |
|---|---|---|---|
| uniform | chance | nothing | distributes |
| margin, entropy, least-confidence | the largest gains of that name | gains | distributes |
| greedy | the largest gains, of any name | gains | distributes |
| rad | the game against the teacher's mistakes | gains, the number of wrong labels | distributes |
| rad-loss | the game in which a wrong label also costs | gains, the number of wrong labels | distributes |
| rad-capped | the game with local bounds of the error rate | gains, local errors and caps | distributes |
| correct-gain | the largest expected gains of right labels | gains, local errors | distributes |
| k-center | points that cover the embedding space | embeddings | in memory |
| cluster-margin | small margins, spread over clusters | gains, embeddings | candidates in memory |
| badge | large gradients in different directions | logits, embeddings | in memory |
| herding | what covers the uncertain examples | gains, embeddings | in memory |

A new strategy is a file with a subclass of `Selector` and a line in `STRATEGIES`; one that lives elsewhere goes by
`module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from distilbeam.selection.gains import GAINS
from distilbeam.selection.strategies.selectors import Selector, TopGain

# name -> module of this folder and class; imported when one is asked for, since some bring scikit-learn
STRATEGIES = {
    "uniform": "selectors:Uniform",
    "greedy": "selectors:TopGain",
    "rad": "selectors:Rad",
    "rad-loss": "robust:RadLoss",
    "rad-capped": "robust:RadCapped",
    "correct-gain": "robust:CorrectGain",
    "k-center": "diverse:KCenter",
    "cluster-margin": "diverse:ClusterMargin",
    "badge": "diverse:Badge",
    "herding": "herding:Herding",
}
_TOP_GAINS = tuple(name.replace("_", "-") for name in GAINS)  # the largest gains of a name are a strategy of that name


def selector(name: str, **options: Any) -> Selector:
    """Make a selector by name.

    Args:
      name: one of `names()`, or `module:Class` of a `Selector` of one's own.
      options: the selector's own fields, for instance `wrong` for "rad".

    Returns:
      The selector.

    Raises:
      ValueError: the name is unknown, or an option is.

    Example:
      >>> from distilbeam.selection import CandidatePool
      >>> pool = CandidatePool(4, logits=np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [9.0, 0.0]]))
      >>> selector("margin").select(pool, 2, np.random.default_rng(0))
      array([ True, False,  True, False])
    """
    known = _canonical(name)
    if known in _TOP_GAINS and not options:
        return TopGain(gain=known)
    make = strategy_class(name)
    unknown = set(options) - set(_options_of(known, make))
    if unknown:
        raise ValueError(f"the selector {name} does not take all of the options {', '.join(options)}")
    return make(**options)


def selector_with(name: str, **offered: Any) -> Selector:
    """Make a selector by name with those of the offered options that it takes; see `selector`.

    `margin`, `entropy` and `least-confidence` say which gain they take and are offered none.
    """
    taken = _options_of(_canonical(name), strategy_class(name))
    return selector(name, **{option: value for option, value in offered.items() if option in taken})


def gain_read(name: str, gain: str) -> str | None:
    """Return the name of the gain that a pool is to be scored by for a strategy; None where it reads nothing.

    Args:
      name: of the strategy, as in `selector`.
      gain: the one for strategies of any gain.
    """
    strategy = selector_with(name, gain=gain)
    own: str = getattr(strategy, "gain", gain)
    return own if strategy.reads else None


def strategy_class(name: str, setting: str = "selector") -> type[Selector]:
    """Return the class of a strategy.

    Args:
      name: one of `names()`, or `module:Class`.
      setting: what holds the name, for the message.

    Raises:
      ValueError: there is none of that name, or the class is no `Selector`.
    """
    known = _canonical(name)
    if known in _TOP_GAINS:
        return TopGain
    if known in STRATEGIES:
        module, _, class_name = STRATEGIES[known].partition(":")
        found: type[Selector] = getattr(importlib.import_module(f"{__package__}.{module}"), class_name)
        return found
    if ":" not in name:
        raise ValueError(f"{setting} must be one of {', '.join(names())}, or module:Class, got {name}")
    from distilbeam.inputs.config import load_object  # for one's own alone: it brings pyarrow

    own = load_object(name, setting)
    if not (isinstance(own, type) and issubclass(own, Selector)):
        raise ValueError(f"{setting} must name a subclass of distilbeam.selection.Selector, got {name}")
    return own


def names() -> tuple[str, ...]:
    """Return the names of all selectors."""
    first, *others = STRATEGIES
    return (first, *_TOP_GAINS, *others)


def distributing() -> tuple[str, ...]:
    """Return the names of the selectors that distribute."""
    return tuple(name for name in names() if strategy_class(name).distributes)


def _canonical(name: str) -> str:
    return name if ":" in name else name.replace("_", "-")


def _options_of(known: str, make: type[Selector]) -> tuple[str, ...]:
    return () if known in _TOP_GAINS else tuple(inspect.signature(make).parameters)
