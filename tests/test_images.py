"""images.py: every readable image becomes upright 8-bit RGB, every other one a clear error."""

import base64
import io
import struct
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import QuietHandler, served
from fault_inputs import PHOTO, encoded, noise
from PIL import Image

from iclip_hf.data.files import image_files
from iclip_hf.model.images import image_suffixes, load_image


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(noise(6, 9, 3))


def test_heic_is_read_with_its_plugin(tmp_path):
    pytest.importorskip("pillow_heif")
    assert ".heic" in image_suffixes()
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.HEIC", "HEIF")
    assert image_files(tmp_path) == [tmp_path / "a.HEIC"]
    np.testing.assert_allclose(load_image(tmp_path / "a.HEIC").getpixel((20, 15)), (200, 30, 60), atol=6)


def test_without_its_plugin_heic_is_counted_with_the_cure(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "EXTENSION", {end: form for end, form in Image.EXTENSION.items() if form != "HEIF"})
    image_suffixes.cache_clear()
    try:
        for name in ("a.HEIC", "sub/b.pdf", "c.png", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
        assert image_files(tmp_path) == [tmp_path / "c.png"]
        (message,) = caplog.messages
        assert f"{tmp_path}: left out 2 files such as 'a.HEIC'" in message and "pip install pillow-heif" in message
        with pytest.raises(ValueError, match=r"a\.HEIC'.*`pip install pillow-heif`"):
            load_image(tmp_path / "a.HEIC")
    finally:
        monkeypatch.undo()
        image_suffixes.cache_clear()


def test_grayscale():
    gray = noise(4, 5)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(gray))), np.repeat(gray[..., None], 3, axis=2))


def test_transparency_is_composited_on_white():
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 51]]], np.uint8)
    # 51 / 255 = 0.2 of the colour and 0.8 of white
    expected = [[[255, 255, 255], [10, 20, 30], [206, 208, 210]]]
    np.testing.assert_allclose(load_image(encoded(Image.fromarray(pixels))), expected, atol=1)
    gray = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8))
    np.testing.assert_array_equal(np.asarray(load_image(encoded(gray)))[0, :, 0], [255, 100])
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(load_image(encoded(palette, transparency=0)), [[[255, 255, 255], [4, 5, 6]]])
    keyed = Image.fromarray(np.array([[[9, 9, 9], [8, 9, 9]]], np.uint8))
    np.testing.assert_array_equal(load_image(encoded(keyed, transparency=(9, 9, 9))), [[[255, 255, 255], [8, 9, 9]]])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(format):
    values = np.array([[0, 128, 129, 257, 40000, 65535]], np.uint16)
    image = load_image(encoded(Image.fromarray(values), format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 1, 156, 255]  # values / 257, rounded
    wide = Image.fromarray(values.astype(np.int32))  # mode "I", as older Pillow opens 16-bit PNG
    assert np.asarray(load_image(wide))[0, :, 0].tolist() == [0, 0, 1, 1, 156, 255]


def test_wide_integers_of_8_bits_are_not_black():
    values = np.array([[0, 1, 128, 255]], np.int32)
    for image in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):  # mode "I"
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 1, 128, 255]
    dark = encoded(Image.fromarray(values.astype(np.uint16)))  # a dark image of 16 bits
    assert np.asarray(load_image(dark)).max() == 1


def test_a_transparent_colour_of_16_bits_is_white():
    values = np.array([[0, 1000, 1001, 40000]], np.uint16)
    image = load_image(encoded(Image.fromarray(values), transparency=1000))
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 255, 4, 156)]


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", ">i4", "uint8", "bool", "float16", ">f8"])
def test_arrays(dtype):
    white = {"bool": 1, "float16": 1, ">f8": 1}.get(dtype, 255)
    pixels = np.array([[0, white]]).astype(dtype)[..., None].repeat(3, 2)
    for image in (pixels, pixels.transpose(2, 0, 1), pixels[..., 0]):
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 255]
    assert np.asarray(load_image(pixels[:, ::-1, ::-1]))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("shape", [(1, 40, 3), (3, 40, 3), (3, 1, 3)])
def test_channels_of_an_array_are_last_and_of_a_tensor_first(shape):
    """Where both ends of the shape could be channels."""
    array = noise(*shape)
    for image in (array, torch.from_numpy(array).movedim(-1, 0)):
        np.testing.assert_array_equal(load_image(image), array)


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (np.full((4, 5, 3), 256), ValueError),
        (np.full((4, 5, 3), -1, np.int32), ValueError),
        (np.full((4, 5, 3), 255.0), ValueError),
        (np.full((4, 5, 3), np.nan), ValueError),
        (np.zeros((4, 5, 2)), ValueError),
        (np.zeros((0, 5, 3)), ValueError),
        (["dog.jpg"], TypeError),
        (None, TypeError),
        (Image.new("RGB", (0, 5)), ValueError),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(pixels, error):
    with pytest.raises(error, match=r"^[^\n]+$"):
        load_image(pixels)


def test_exif_orientation():
    upright, exif = noise(3, 5, 3), Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(upright))
    image = load_image(encoded(Image.fromarray(stored), exif=exif))
    np.testing.assert_array_equal(np.asarray(image), upright)
    np.testing.assert_array_equal(np.asarray(load_image(image)), upright)  # not turned twice


@pytest.mark.parametrize("format", ["JPEG", "PNG", "AVIF", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000"])
def test_every_format_with_its_orientation(format):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {format}")
    turned, has_exif = Image.Exif(), format not in ("GIF", "BMP", "JPEG2000")
    turned[0x0112] = 6
    # As bytes, because saving an AVIF file takes the orientation out of `Image.Exif`.
    options = {"exif": turned.tobytes()} if has_exif else {}
    data = encoded(Image.new("RGB", (40, 20), (200, 30, 60)), format, **options)
    for image in (load_image(data), load_image(Image.open(io.BytesIO(data)))):
        assert image.size == ((20, 40) if has_exif else (40, 20))
        np.testing.assert_allclose(image.getpixel((10, 10)), (200, 30, 60), atol=6)


@pytest.mark.filterwarnings("ignore:.*EXIF.*")
@pytest.mark.parametrize("entries", [b"rubbish", struct.pack("<HHIIHHII", 0x0112, 3, 1, 6, 0x010E, 11, 1, 0)])
def test_damaged_exif_does_not_matter(entries):
    """Such as a description that is a number, beside an orientation."""
    data = encoded(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4))
    assert load_image(data).size == PHOTO.size


def test_given_image_is_not_changed():
    image = Image.fromarray(noise(3, 5, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.tobytes()
    assert load_image(image).size == (3, 5)
    assert (image.mode, image.size, image.tobytes(), image.getexif()[0x0112]) == ("RGBA", (5, 3), before, 6)


def test_pixel_limit(monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (300, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14_999)  # half of what Pillow reads
    with pytest.raises(ValueError, match=r"bomb\.png.*more than 29,998 pixels"):
        load_image(path)


def test_an_unreadable_image_has_the_name_that_is_given():
    with pytest.raises(ValueError, match=r"^shard\.tar: key\.jpg: .* content is none of JPEG, PNG"):
        load_image(b"text", name="shard.tar: key.jpg")


def test_the_death_of_a_worker_is_no_damaged_image(photo, monkeypatch):
    def interrupted(*arguments, **options):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(Image, "open", interrupted)
    with pytest.raises(RuntimeError, match="worker"):
        load_image(encoded(photo))


def test_base64_text(photo):
    text = f"data:image/png;base64,{base64.b64encode(encoded(photo)).decode()}"
    for form in (text, "\n".join([text[:60], text[60:]])):
        np.testing.assert_array_equal(np.asarray(load_image(form)), np.asarray(photo))
    with pytest.raises(ValueError, match="data:image/png"):
        load_image("data:image/png;base64,bm8gaW1hZ2U=")


def test_a_scheme_in_capitals_is_one(world):
    with served(partial(QuietHandler, directory=world.folder)) as server:
        name = f"HTTP://127.0.0.1:{server.server_port}/photo.png"
        assert load_image(name).tobytes() == load_image(world.photo).tobytes()
