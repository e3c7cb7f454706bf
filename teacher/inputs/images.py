"""Encoded images (JPEG, PNG, WebP and whatever else Pillow reads) as arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from distilbeam.teacher.preprocess import InputConfig, InputError, normalised, require_columns


@dataclass(frozen=True)
class ImageInput:
    """Decodes, resizes and normalises a column of image bytes, or of structs with a field `bytes`."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Decode a batch to [n, 3 or 1, height, width], or [n, height, width, 3 or 1]; see `make_input`."""
        require_columns(batch, self.config.columns)
        name = self.config.columns[0]
        column = batch.column(name)
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = column.field("bytes")  # as Hugging Face datasets stores images
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise InputError(f"column {name} must hold the bytes of encoded images, got {column.type}")
        images = [self._decode(value, name, row) for row, value in enumerate(column.to_pylist())]
        channels = 3 if self.config.mode == "RGB" else 1
        if not images:
            height, width = self.config.size or (0, 0)
            images_NHWC = np.empty((0, height, width, channels), np.uint8)
        else:
            stacked = _stacked(images, name)
            images_NHWC = stacked.reshape(*stacked.shape[:3], channels)
        values = normalised(images_NHWC, self.config, 1 / 255, "channel", channels)
        return np.ascontiguousarray(values if self.config.layout == "hwc" else values.transpose(0, 3, 1, 2))

    def _decode(self, data: bytes | None, name: str, row: int) -> npt.NDArray[np.uint8]:
        if data is None:
            raise InputError(f"column {name} must not have missing values, row {row:,} is missing")
        try:
            with Image.open(io.BytesIO(data)) as opened:
                image: Image.Image = opened.convert(self.config.mode)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise InputError(f"column {name} must hold encoded images, row {row:,} is none: {e}") from e
        if self.config.size is not None:
            height, width = self.config.size
            resize: Any = ImageOps.fit if self.config.resize == "crop" else Image.Image.resize
            image = resize(image, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, np.uint8)


def _stacked(images: list[npt.NDArray[np.uint8]], name: str) -> npt.NDArray[np.uint8]:
    for row, image in enumerate(images):
        if image.shape != images[0].shape:
            raise InputError(
                f"column {name} has images of different sizes, {list(images[0].shape[:2])} in row 0 and "
                f"{list(image.shape[:2])} in row {row:,}; set size to bring them to one"
            )
    return np.stack(images)
