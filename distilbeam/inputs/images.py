"""Encoded images (JPEG, PNG, TIFF, WebP and whatever else Pillow reads) as arrays.

What becomes of a file whose pixels are no three bytes, before `scale`, `mean` and `std`:

* grey of 16 bits (modes I;16 and I): 0 to 65,535 becomes 0 to 255, with its fractions; other whole numbers are refused;
* grey in floating point (mode F): 0 to 1 becomes 0 to 255; other numbers are refused, for nobody knows their range;
* one bit, palettes, CMYK and YCbCr: the colours that they stand for; colour of 16 bits: its upper 8 (Pillow reads no more);
* transparency (LA, RGBA, palettes): left out; the colour is what is stored under it;
* an orientation in the EXIF data: the image is turned as it says;
* several frames: the first.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from distilbeam.inputs.columns import is_bytes, plain
from distilbeam.inputs.config import InputConfig, InputError, normalised, require_columns

_UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageInput:
    """Decodes, resizes and normalises a column of image bytes, or of structs with a field `bytes`."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Decode a batch to [n, 3 or 1, height, width], or [n, height, width, 3 or 1]; see `make_input`."""
        require_columns(batch, self.config.columns)
        name = self.config.columns[0]
        column = plain(batch.column(name))
        if pa.types.is_struct(column.type) and (field := column.type.get_field_index("bytes")) >= 0:
            column = plain(column.flatten()[field])  # as Hugging Face datasets stores images
        if not is_bytes(column.type):
            raise InputError(f"column {name} must hold the bytes of encoded images, got {column.type}")
        images = [self._decode(value, name, row) for row, value in enumerate(column.to_pylist())]
        channels = 3 if self.config.mode == "RGB" else 1
        if not images:
            height, width = self.config.size or (0, 0)
            images_NHWC = np.empty((0, height, width, channels), np.uint8)
        else:
            images_NHWC = _stacked(images, name)
        values = normalised(images_NHWC, self.config, 1 / 255, "channel", channels)
        return np.ascontiguousarray(values if self.config.layout == "hwc" else values.transpose(0, 3, 1, 2))

    def _decode(self, data: bytes | None, name: str, row: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
        if data is None:
            raise InputError(f"column {name} must not have missing values, row {row:,} is missing")
        try:
            image = read_image(data, self.config.mode)
        except InputError as e:
            raise InputError(f"column {name}, row {row:,}: {e}") from e
        except _UNREADABLE as e:
            raise InputError(f"column {name} must hold encoded images, row {row:,} is none: {e}") from e
        if self.config.size is not None:
            height, width = self.config.size
            resize: Any = ImageOps.fit if self.config.resize == "crop" else Image.Image.resize
            image = resize(image, (width, height), Image.Resampling.BILINEAR)
        pixels: npt.NDArray[Any] = np.asarray(image)
        if pixels.ndim == 3:
            return pixels
        return np.repeat(pixels[:, :, None], 3 if self.config.mode == "RGB" else 1, axis=2)


def read_image(data: bytes, mode: str) -> Image.Image:
    """Decode an image; see the module for what becomes of its pixels.

    Args:
      data: the file.
      mode: RGB, or L for grey.

    Returns:
      An image of that mode, or of mode F with numbers from 0 to 255 where the file is grey and deeper than 8 bits.

    Raises:
      InputError: its pixels are numbers of an unknown range. Pillow raises errors of its own where the bytes are no image.
    """
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        turn = _TURNS.get(_orientation(opened))
        if opened.mode == "F" or opened.mode.startswith("I"):
            image = Image.fromarray(_deep_pixels(opened))
        elif opened.mode == "P" and "transparency" in opened.info:
            image = opened.convert("RGBA").convert(mode)  # Pillow warns where it has to leave transparency out
        else:
            image = opened.convert(mode)
    return image if turn is None else image.transpose(turn)


def read_bytes_image(data: bytes) -> Image.Image:
    """Decode an image to three bytes a pixel, whatever its depth; see `read_image`."""
    image = read_image(data, "RGB")
    if image.mode != "F":
        return image
    return Image.fromarray(np.rint(np.asarray(image)).astype(np.uint8)).convert("RGB")


def _deep_pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """Bring grey pixels of more than 8 bits to numbers from 0 to 255."""
    pixels = np.asarray(image)
    if not pixels.size:
        return pixels.astype(np.float32)
    least, most, end = pixels.min(), pixels.max(), 1 if image.mode == "F" else 65535
    if not (least >= 0 and most <= end):
        raise InputError(
            f"the pixels of an image of mode {image.mode} must lie between 0 and {end:,}, got {least} to {most}; store them "
            "so, or read them with an input of kind 'function'"
        )
    return (pixels * np.float64(255 / end)).astype(np.float32)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, ValueError, TypeError, SyntaxError, struct.error):  # broken EXIF data take nothing from the image
        return 1


def _stacked(images: list[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    for row, image in enumerate(images):
        if image.shape != images[0].shape:
            raise InputError(
                f"column {name} has images of different sizes, {list(images[0].shape[:2])} in row 0 and "
                f"{list(image.shape[:2])} in row {row:,}; set size to bring them to one"
            )
    return np.stack(images)
