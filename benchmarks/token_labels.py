"""Labels of tokens: labelling against the plain loop, draws against the forward pass, Parquet to tensors against datasets.

    python benchmarks/token_labels.py --quick                                          # about a minute
    python benchmarks/token_labels.py --json benchmarks/results/token_labels.json      # some minutes

See `measuring/token_labelling.py` for what is measured. One thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring.record import machine, write
from measuring.token_labelling import decoding, labelling

PARTS = ("labelling", "decoding")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="four layers and few blocks: whether it runs, not how fast"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = machine(["torch", "transformers", "pyarrow", "datasets"], threads=arguments.threads)
    quick, results = arguments.quick, dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        if "labelling" in arguments.parts:
            size = {"blocks": 4, "layers": 4 if quick else 30, "repetitions": 1 if quick else 2}
            results["labelling"] = labelling(Path(folder), length=512, k=20, **size)
        if "decoding" in arguments.parts:
            size = {"blocks": 64 if quick else 512, "repetitions": 1 if quick else 3}
            results["decoding"] = decoding(Path(folder), length=512, k=64, **size)
    print(json.dumps(results, indent=1))
    write(arguments.json, about, results)


if __name__ == "__main__":
    main()
