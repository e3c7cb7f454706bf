"""Images of every depth and mode, the right way up."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from distilbeam.inputs.config import InputConfig, InputError, make_input
from distilbeam.inputs.images import read_bytes_image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def made(*images: bytes, **options: Any) -> np.ndarray:
    config = InputConfig(**{"kind": "image", "columns": ("x",), **options})
    array: np.ndarray = make_input(config)(pa.record_batch({"x": pa.array(images, pa.binary())}))
    return array


DEEP = np.array([[0, 257, 1000], [32768, 65279, 65535]], np.uint16)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_a_fraction_of_its_range(form: str, order: str) -> None:
    data = encoded(Image.fromarray(DEEP.astype(order)), form)
    np.testing.assert_allclose(made(data, mode="L")[0, 0], DEEP / 65535, rtol=1e-6)
    colour = made(data)
    assert colour.shape == (1, 3, 2, 3)
    np.testing.assert_allclose(colour, np.broadcast_to(DEEP / 65535, (1, 3, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(made(data, mode="L", scale=1.0)[0, 0], DEEP / 257, rtol=1e-6)  # in units of 8 bits


def test_whole_numbers_of_32_bits_are_read_up_to_16() -> None:
    data = encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF")
    np.testing.assert_allclose(made(data, mode="L")[0, 0], DEEP / 65535, rtol=1e-6)
    for wrong in (-1, 65536):
        with pytest.raises(
            InputError, match="column x, row 0: the pixels of an image of mode I must lie between 0 and 65,535"
        ):
            made(encoded(Image.fromarray(np.array([[0, wrong]], np.int32)), "TIFF"))


def test_floats_are_fractions_or_refused() -> None:
    values = np.array([[0, 0.25], [0.5, 1]], np.float32)
    np.testing.assert_allclose(made(encoded(Image.fromarray(values), "TIFF"), mode="L")[0, 0], values, rtol=1e-6)
    for wrong in (-0.5, 1.5, 255.0, np.nan):
        data = encoded(Image.fromarray(np.array([[0, wrong]], np.float32)), "TIFF")
        with pytest.raises(InputError, match="row 0: the pixels of an image of mode F must lie between 0 and 1, got"):
            made(data)


def test_deep_images_are_resized_without_losing_their_depth() -> None:
    data = encoded(Image.fromarray(np.full((8, 8), 1000, np.uint16)), "PNG")
    for resize in ("stretch", "crop"):
        np.testing.assert_allclose(made(data, size=(4, 2), resize=resize), 1000 / 65535, rtol=1e-5)


def test_depths_and_modes_mix_in_a_batch() -> None:
    grey = encoded(Image.fromarray(np.full((2, 2), 128, np.uint8)), "PNG")
    deep = encoded(Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)), "PNG")
    np.testing.assert_allclose(made(grey, deep), 128 / 255, rtol=1e-6)


RGB = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_become_the_colours_that_they_stand_for(mode: str, recwarn: pytest.WarningsRecorder) -> None:
    image = RGB.convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.asarray(image.convert("RGB"), np.float32) / 255
    np.testing.assert_allclose(made(data, layout="hwc")[0], expected, rtol=1e-6)
    assert not recwarn.list


def test_one_bit_is_black_and_white() -> None:
    data = encoded(Image.fromarray(np.array([[True, False]])), "PNG")
    assert made(data, mode="L").tolist() == [[[[1.0, 0.0]]]]


def test_transparency_is_left_out_and_the_stored_colour_stays(recwarn: pytest.WarningsRecorder) -> None:
    pixel = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    np.testing.assert_allclose(made(encoded(pixel, "PNG"))[0, :, 0, 0], np.array([10, 20, 30]) / 255, rtol=1e-6)
    palette = RGB.quantize(16)
    data = encoded(palette, "PNG", transparency=bytes(range(16)))
    np.testing.assert_allclose(made(data, layout="hwc")[0], np.asarray(palette.convert("RGB")) / 255, rtol=1e-6)
    assert not recwarn.list


UP = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)  # as it is to be seen
STORED = {
    1: UP,
    2: UP[:, ::-1],
    3: UP[::-1, ::-1],
    4: UP[::-1],
    5: UP.T,
    6: UP.T[::-1],
    7: UP.T[::-1, ::-1],
    8: UP.T[:, ::-1],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_stand_as_the_camera_was_held(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), form, exif=exif)
    np.testing.assert_allclose(made(data, mode="L")[0, 0], UP / 255, rtol=1e-6)


def test_deep_images_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(np.ascontiguousarray(UP.T[::-1].astype(np.uint16) * 257)), "PNG", exif=exif)
    np.testing.assert_allclose(made(data, mode="L")[0, 0], UP / 255, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*EXIF data:UserWarning")
@pytest.mark.parametrize(
    "junk",
    [b"", b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff"],
)
def test_broken_exif_data_take_nothing_from_the_image(junk: bytes) -> None:
    data = encoded(Image.new("RGB", (2, 2), (90, 90, 90)), "JPEG", exif=junk)
    np.testing.assert_allclose(made(data), 90 / 255, atol=2 / 255)


def test_images_in_structs_and_categories() -> None:
    data = [encoded(Image.new("L", (1, 1), value), "PNG") for value in (0, 255)]
    make = make_input(InputConfig(kind="image", columns=("x",), mode="L"))
    structs = pa.array([{"bytes": data[0], "path": ""}, {"bytes": data[1], "path": ""}])
    assert make(pa.record_batch({"x": structs.slice(1)})).ravel().tolist() == [1.0]
    assert make(pa.record_batch({"x": pa.array(data).dictionary_encode()})).ravel().tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="column x must not have missing values, row 1 is missing"):
        make(pa.record_batch({"x": pa.array([{"bytes": data[0]}, None])}))


def test_three_bytes_a_pixel_for_those_that_want_them() -> None:
    image = read_bytes_image(encoded(Image.fromarray(DEEP), "PNG"))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[:, :, 0], np.rint(DEEP / 257))
