"""Images: a folder of PNG files becomes a pool, a convolutional student learns from a teacher's answers.

    python examples/images.py [DIRECTORY]

The images are scikit-learn's handwritten digits, written as files of 16 x 16 pixels. `distilbeam ingest` makes the
pool. About a minute on one core.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits

CONFIG = """
[run]
directory = "run"
rounds = 2

[data]
pool = "pool"
labelled = "labelled.parquet"
validation = "validation.parquet"
test = "test.parquet"
label = "digit"

[teacher]
kind = "torch"
model = "teacher.pt2"
input = { kind = "image", columns = ["image"], mode = "L", size = [16, 16] }

[selection]
budget = 80

[student]
kind = "cnn"
width = 0.25
input = { kind = "image", columns = ["image"], mode = "L", size = [16, 16] }

[training]
epochs = 15
self_training = false     # without the last training, which takes most of the time
final_training = "apart"
lr = 0.01
augment = { crop = 1 }
"""


def main(directory: Path) -> None:
    """Write images and tables, ingest, run, and export what came of it."""
    digits = load_digits()
    images = np.kron(digits.images, np.ones((2, 2))) * 255 / 16
    files = [png(image.astype(np.uint8)) for image in images]
    order = np.random.default_rng(0).permutation(len(files))
    parts = {"labelled": order[:60], "validation": order[60:260], "test": order[260:660]}
    (directory / "files").mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        columns = {"image": [files[row] for row in rows], "digit": digits.target[rows]}
        pq.write_table(pa.table(columns), directory / f"{name}.parquet")
    for row in order[660:1_200]:
        (directory / "files" / f"{row:04d}.png").write_bytes(files[row])
    save_teacher(images[order[1_200:]], digits.target[order[1_200:]], directory / "teacher.pt2")
    (directory / "distilbeam.toml").write_text(CONFIG)

    distilbeam("ingest", str(directory / "files"), "--out", str(directory / "pool"), "--format", "images")
    distilbeam("run", str(directory / "distilbeam.toml"))
    distilbeam("export", str(directory / "distilbeam.toml"), "--format", "pt2")


def distilbeam(*words: str) -> None:
    """Give a command, as one would in a shell."""
    subprocess.run([sys.executable, "-m", "distilbeam", *words], check=True)


def png(pixels: np.ndarray) -> bytes:
    """Write pixels [height, width] as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save_teacher(images: np.ndarray, digits: np.ndarray, path: Path) -> None:
    """Train a small convolutional network on images that nobody else sees, and export it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 10)),
    )
    x = torch.from_numpy(images.astype(np.float32) / 255)[
        :, None
    ]  # as the input makes them: [1, height, width], 0 to 1
    y = torch.from_numpy(digits)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(12):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    # a program keeps its example, and a slice would keep all that it was cut from
    program = torch.export.export(network.eval(), (x[:2].clone(),), dynamic_shapes=shapes)
    torch.export.save(program, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="images-")))
