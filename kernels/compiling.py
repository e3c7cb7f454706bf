"""Keeping functions out of torch.compile's graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
