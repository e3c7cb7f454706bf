"""Run the tests of the Triton kernels in its interpreter, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_device import INTERPRETED, needs_triton, run_interpreted

FILES = (
    "test_triton.py",
    pytest.param("test_triton_in_place.py", marks=pytest.mark.exhaustive),  # the same sums, stored elsewhere
    "test_triton_prepared.py",
    "test_low_precision_triton.py",
    "test_loss_fuzz.py",
)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
@pytest.mark.parametrize("tests", FILES)
def test_the_kernels_in_the_interpreter(tests):
    run_interpreted(Path(__file__).with_name(tests))
