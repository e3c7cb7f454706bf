"""Choosing an implementation: the first that can run, or every reason why not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from distilbeam.kernels import fp8_linear, laurel_residual, quantize_rowwise
from distilbeam.kernels.resolve import never, resolve


def refuse(*reasons):
    return lambda: reasons


def test_the_first_that_can_run_is_chosen():
    assert resolve("op", None, {"fast": refuse("no device"), "slow": never, "slower": never}) == "slow"
    assert resolve("op", "slower", {"fast": refuse("no device"), "slow": never, "slower": never}) == "slower"


def test_an_explicit_choice_raises_with_all_its_reasons_and_a_way_out():
    backends = {"fast": refuse("no device", "the dtype is float64"), "slow": never}
    message = r"op cannot run here \(fast: no device; fast: the dtype is float64\); slow can"
    with pytest.raises(NotImplementedError, match=message):
        resolve("op", "fast", backends)


def test_when_none_can_run_every_reason_is_given():
    with pytest.raises(NotImplementedError, match=r"\(a: first; b: second\)$"):
        resolve("op", None, {"a": refuse("first"), "b": refuse("second")})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="must be one of reference or None, got 'refrence'; did you mean 'reference'"):
        resolve("op", "refrence", {"reference": never})


@pytest.mark.skipif(torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs here")
@pytest.mark.parametrize(("name", "reason"), [("triton", "no CUDA device"), ("pallas", "no TPU device")])
def test_operations_say_which_device_a_kernel_needs(name, reason, monkeypatch):
    monkeypatch.delenv("DISTILBEAM_PALLAS_INTERPRET", raising=False)
    x = torch.zeros(2, 2)
    for operation, arguments in ((laurel_residual, (x, x)), (fp8_linear, (x, x)), (quantize_rowwise, (x, torch.int8))):
        with pytest.raises(NotImplementedError, match=rf"{name}: .*{reason}.*; .*reference.* can"):
            operation(*arguments, implementation=name)


def test_importing_the_operations_loads_no_backend_and_no_other_part():
    code = (
        "import sys, distilbeam.kernels as k; [getattr(k, name) for name in k.__all__]; "
        "bad = {'triton', 'jax', 'tensorflow', 'apache_beam'} | {f'distilbeam.{p}.' for p in "
        "('pipelines', 'teacher', 'selection', 'student')}; "
        "print([m for m in sys.modules if m in bad or any(m.startswith(b) for b in bad if b.endswith('.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
