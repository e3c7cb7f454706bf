"""Compile a Triton kernel for a GPU that is not there, and read what it would use of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
POINTERS = {"bf16": "*bf16", "fp32": "*fp32", "fp16": "*fp16", "i32": "*i32", "i8": "*i8"}


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code: registers per thread, bytes of shared memory, and how often each instruction occurs."""

    registers: int
    shared: int
    instructions: Counter[str]

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return self.count("LDL") + self.count("STL")

    def count(self, prefix: str) -> int:
        """Count the instructions whose names begin like this."""
        return sum(number for name, number in self.instructions.items() if name.startswith(prefix))


def compile_for(
    capability: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    odd: Collection[str] = (),
    **options: Any,
) -> Compiled:
    """Compile for a compute capability.

    Args:
      capability: 80, 90, ...
      kernel: a function under triton.jit.
      signature: types of the arguments that are no constants; pointers and sizes are taken as multiples of 16.
      constants: values of the others.
      num_warps: warps of a program.
      odd: sizes that are no multiples of 16.
      options: further options of the compiler.

    Returns:
      What was compiled.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or kind == "i32"]
    aligned = [name for name in aligned if name not in odd]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, **options}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage, code = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return Compiled(int(found[1]), done.metadata.shared, Counter(INSTRUCTION.findall(code)))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
