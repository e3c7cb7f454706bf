from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distilbeam.pipelines.engine.malloc import keep_freed_memory

# page faults of a loop that frees and asks again, where the environment tells the C library to return memory at once
FAULTS = """
import resource, sys
import numpy as np
from distilbeam.pipelines.engine.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
arrays = [np.ones(2**18) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    arrays = [np.ones(2**18) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only glibc can be told")
def test_freed_memory_is_used_again_whatever_the_environment_says() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    faults = {}
    for way in ("keep", "return"):
        command = [sys.executable, "-c", FAULTS, way]
        faults[way] = int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
    pages = 50 * 4 * 2**18 * 8 // os.sysconf("SC_PAGE_SIZE")
    assert faults["return"] > pages / 2, "the environment has the effect that is to be undone"
    assert faults["keep"] < pages / 10
