"""Trusted modules: whose code a student's folder may call.

A folder that says `kind = "module:factory"`, or an input of kind `function`, names code. It is called only where the
caller names it too: in the configuration of a run or a training, or by `trust`; a folder that came from elsewhere chooses
nothing by itself. Trust is a fact of a process: what has been trusted once stays so until it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from distilbeam.inputs.config import InputConfig
from distilbeam.student.networks.config import KINDS, StudentConfig

_PRUNED = (
    "distilbeam.student.export.prune:pruned_network"  # cuts a network that its options describe; calls nothing else
)
_trusted: set[str] = set()


def trust(*names: str) -> None:
    """Allow code to be called for the rest of this process.

    Args:
      names: `module:name`, or a module with all that is in it and below it.

    Raises:
      ValueError: a name is not of that form, or there is no such module.
    """
    for name in names:
        module, colon, path = name.partition(":")
        parts = [*module.split("."), *(path.split(".") if colon else ())]
        if not all(part.isidentifier() for part in parts):
            raise ValueError(f"--trust must name a module or module:name, got {name!r}")
    _trusted.update(names)


def trusted() -> tuple[str, ...]:
    """Return what this process trusts, sorted, for processes that it starts."""
    return tuple(sorted(_trusted))


def trust_config(config: StudentConfig) -> None:
    """Allow the code that the caller's own configuration names."""
    trust(*code_of(config))


def code_of(config: StudentConfig) -> list[str]:
    """List the factories and functions that a student's configuration names, those of ours left out."""
    own: list[str] = []
    if config.kind == _PRUNED:
        own += code_of(StudentConfig.model_validate(config.options.get("network")))
    elif config.kind not in KINDS:
        own.append(config.kind)
    return [*own, *code_of_input(config.input)]


def code_of_input(inputs: InputConfig) -> list[str]:
    """List the functions that an input calls."""
    return [inputs.function] if inputs.function is not None else []


def require_trusted(names: Iterable[str], where: Path, also: Sequence[str] = ()) -> None:
    """Refuse code that nobody trusts, before it is imported.

    Args:
      names: `module:name` that a file asks for.
      where: the file.
      also: names that the caller trusts for this file alone.

    Raises:
      ValueError: one is not trusted.
    """
    for name in names:
        if not any(_covers(given, name) for given in (*_trusted, *also)):
            module = name.partition(":")[0]
            raise ValueError(
                f"{where} wants to call {name}, and a file may not choose what is run: if you trust it, name it yourself with "
                f"--trust {module} (in Python: load_student(..., trust=[{module!r}])), or in your own configuration"
            )


def _covers(given: str, name: str) -> bool:
    return given in (name, module := name.partition(":")[0]) or module.startswith(f"{given}.")
