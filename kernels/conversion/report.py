"""What became of every linear layer of a student, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerPrecision:
    """One layer.

    Attributes:
      name: where it is in the student.
      kind: its class before the conversion.
      inputs: K.
      outputs: N.
      dtype: what its products run in: `fp8`, `int8`, or the dtype of its weight.
      reason: why it was not converted; empty when it was.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    dtype: str
    reason: str = ""

    @property
    def converted(self) -> bool:
        """Whether its products run in 8 bits now."""
        return not self.reason


@dataclass(frozen=True)
class LowPrecisionReport:
    """All layers that were considered; prints as a table."""

    backend: str
    layers: tuple[LayerPrecision, ...]

    @property
    def converted(self) -> int:
        """How many layers run in 8 bits."""
        return sum(layer.converted for layer in self.layers)

    def under_autocast(self, dtype: str) -> LowPrecisionReport:
        """Say the same of a student that runs under autocast, which gives the other layers' products a dtype.

        Args:
          dtype: such as `bfloat16`.
        """
        return LowPrecisionReport(
            self.backend, tuple(x if x.converted else replace(x, dtype=dtype) for x in self.layers)
        )

    def __str__(self) -> str:
        rows = [
            (x.name, f"{x.kind} {x.inputs:,} -> {x.outputs:,}", x.dtype, x.reason or f"converted by {self.backend}")
            for x in self.layers
        ]
        head = f"{self.converted} of {len(self.layers)} linear layers run in 8 bits"
        return "\n".join([head, *_aligned([("layer", "shape", "runs in", "why"), *rows])]) if rows else head


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
