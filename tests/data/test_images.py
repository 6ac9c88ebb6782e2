"""Every kind of image file reads as a person sees it, and an image that cannot be read says why."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from data.errors import BadSample
from data.images import load_image


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source, **options):
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def row(*colours, mode="RGB"):
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def test_path_bytes_and_image_are_the_same(tmp_path):
    image = row((255, 0, 0), (0, 0, 255))
    path = tmp_path / "a.png"
    image.save(path)
    assert pixels(str(path)) == pixels(path.read_bytes()) == pixels(image) == [[RED, BLUE]]


def test_a_given_image_is_left_alone():
    image = row((255, 0, 0))
    load_image(image).putpixel((0, 0), (0, 0, 0))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_alpha_is_composited_on_white():
    assert pixels(encoded(row((255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128), mode="RGBA"))) == [
        [RED, WHITE, [127] * 3]
    ]
    assert pixels(encoded(row((0, 255), (0, 0), mode="LA"))) == [[[0] * 3, WHITE]]
    assert pixels(row((0, 255), (0, 0), mode="La")) == [[[0] * 3, WHITE]]


def test_palette():
    image = row((255, 0, 0), (0, 0, 255)).quantize(2)
    assert pixels(encoded(image)) == [[RED, BLUE]]
    assert pixels(encoded(image, transparency=image.getpixel((0, 0)))) == [[WHITE, BLUE]]
    # The opacity of each palette entry, as PNG stores it.
    opacity = bytes([0, 255] if image.getpixel((0, 0)) == 0 else [255, 0])
    assert pixels(encoded(image, transparency=opacity)) == [[WHITE, BLUE]]


def test_one_transparent_colour_of_rgb_and_grey():
    assert pixels(encoded(row((255, 0, 0), (0, 0, 255)), transparency=(0, 0, 255))) == [[RED, WHITE]]
    assert pixels(encoded(row(7, 9, mode="L"), transparency=7)) == [[WHITE, [9] * 3]]


def test_one_bit():
    assert pixels(encoded(row(1, 0, mode="1"))) == [[WHITE, [0] * 3]]


def test_cmyk():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(np.asarray(load_image(encoded(cyan, "JPEG"))).astype(int) - [0, 255, 255]).max() <= 4
    assert pixels(encoded(cyan.crop((0, 0, 1, 1)), "TIFF")) == [[[0, 255, 255]]]


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32_768, 65_535]], np.uint16)
    expected = [[[0] * 3, [1] * 3, [128] * 3, WHITE]]
    assert pixels(encoded(Image.fromarray(values))) == expected
    assert pixels(encoded(Image.fromarray(values), "TIFF")) == expected
    assert pixels(b"P5 4 1 65535\n" + values.byteswap().tobytes()) == expected
    assert pixels(encoded(Image.fromarray(values), transparency=257)) == [[[0] * 3, WHITE, [128] * 3, WHITE]]


def test_values_of_unknown_range_are_refused():
    for values in (np.array([[70_000]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)):
        with pytest.raises(BadSample, match=r"32-bit values|floating-point"):
            load_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    animation = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert pixels(animation) == [[RED] * 2] * 2


# Where the eye sees red, blue above green, white, each orientation stores it turned or mirrored (EXIF 2.32, tag 274).
UPRIGHT = np.array([[RED, BLUE], [[0, 255, 0], WHITE]], np.uint8)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: np.rot90(UPRIGHT.transpose(1, 0, 2), 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation(orientation, format):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(encoded(image, format, exif=exif)) == UPRIGHT.tolist()


def test_broken_exif_is_no_broken_image():
    assert pixels(encoded(row((255, 0, 0)), exif=b"Exif\0\0MM\0*\0\0\0")) == [[RED]]


def test_the_size_is_checked_before_decoding():
    # There is only a header: decoding it would fail with another error.
    bomb = encoded(Image.new("1", (3000, 3000)))[:100]
    with pytest.raises(BadSample, match=r"too large: 100 bytes: 3000 x 3000 pixels, limit 8999999"):
        load_image(bomb, max_pixels=8_999_999)
    with pytest.raises(BadSample, match="image is broken"):
        load_image(bomb, max_pixels=9_000_000)
    with pytest.raises(BadSample, match="too large"):
        load_image(Image.new("1", (3, 3)), max_pixels=8)


def test_pillow_neither_warns_nor_forbids():
    header = bytearray(encoded(Image.new("1", (1, 1)), "BMP"))
    header[18:26] = (20_000).to_bytes(4, "little") * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match="too large"):
            load_image(bytes(header))
        with pytest.raises(BadSample, match="image is broken"):
            load_image(bytes(header), max_pixels=500_000_000)


def test_truncated():
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        whole = encoded(Image.fromarray(noise), format)
        with pytest.raises(BadSample, match=r"image is broken|not an image"):
            load_image(whole[: len(whole) // 2])


def test_what_is_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe.png")
    for source, reason in [
        (b"", "image file is empty"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (str(tmp_path / "empty.png"), "image file is empty"),
        (str(tmp_path / "text.png"), "not an image"),
        (str(tmp_path / "pipe.png"), "image not found"),
        (str(tmp_path / "missing.png"), "image not found"),
        (str(tmp_path), "image not found"),
        ("a\0b.png", "image not found"),
    ]:
        with pytest.raises(BadSample) as caught:
            load_image(source)
        assert caught.value.reason == reason
        assert caught.value.detail


@pytest.mark.parametrize(
    "url", ["https://x.org/a.png", "file:///etc/passwd", "s3://b/a.png", "data:image/png;base64,AA"]
)
def test_urls_are_refused(url):
    with pytest.raises(BadSample, match="only local files"):
        load_image(url)


def test_roots(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        row((255, 0, 0)).save(folder / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    (tmp_path / "alias").symlink_to(inside)
    roots = [tmp_path / "alias"]
    assert pixels(str(inside / "a.png"), roots=roots) == [[RED]]
    assert pixels(str(tmp_path / "alias" / "a.png"), roots=roots) == [[RED]]
    assert pixels(str(inside / "link.png")) == [[RED]]
    for path in (outside / "a.png", inside / "link.png", inside / ".." / "in-not" / "a.png", outside / "missing.png"):
        with pytest.raises(BadSample, match="outside the roots"):
            load_image(str(path), roots=roots)
