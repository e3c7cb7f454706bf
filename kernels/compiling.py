"""Keeping functions out of torch.compile's graphs, and their numbers out of autocast's hands."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def not_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Do what `torch.compiler.disable` does, without importing the compiler, which takes a second, before it is in use."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            apart: Result = torch.compiler.disable(function)(*args, **kwargs)
            return apart
        return function(*args, **kwargs)

    return call


def not_narrowed(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off, which may narrow nothing that is computed here; where it is off, that costs nothing."""
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
