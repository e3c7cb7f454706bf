"""Whether a training should take its last layer and its loss together: a measured table.

Apart are a linear layer and `distill_loss`, which holds the logits and their gradient; together is `linear_distill_loss`.
On a CPU (EPYC, one thread, float32, processor time of a whole step, `benchmarks/results/last_layer-cpu.json`) together takes
.52 to .91 of the time from 512 x 8,000 sparse logits on, and .20 to .8 of the memory, the less the fewer features; below,
its bookkeeping costs 100 to 800 microseconds; with dense labels, which have as many columns, it gains nothing. In bfloat16
a CPU that multiplies it is three times as fast apart, because together all sums are float32. On an H200 (`distill_loss-h200.json`) three products
and the loss of 4096 x 128,256 logits take 17 ms, together 20: there it is memory alone that decides.
"""

from __future__ import annotations

import torch

LEAST_LOGITS = {"cpu": 4_000_000, "cuda": 1 << 30}  # rows times classes; a gibi of them and their gradients are 4 GiB


def why_apart(rows: int, classes: int, device: torch.device, dtype: torch.dtype, *, sparse: bool) -> str | None:
    """Say why last layer and loss are better taken apart; None where together is known to pay.

    Args:
      rows: of a step.
      classes: outputs of the layer.
      device: where it is.
      dtype: what its products are made of.
      sparse: whether labels keep some classes of a row, or one.
    """
    least = LEAST_LOGITS.get(device.type)
    if not sparse:
        return "dense labels have as many columns as the logits"
    if least is None:
        return f"together is not known to pay on {device.type}"
    if device.type == "cpu" and dtype != torch.float32:
        return f"on a CPU its sums are float32, which takes longer than {str(dtype).removeprefix('torch.')}"
    if rows * classes < least:
        return f"{rows:,} x {classes:,} logits are fewer than {least:,}"
    return None
