"""Samples as a careless or hostile world makes them: whole images of every kind, the same broken, records of any shape.

Each mutant says what must become of it: ``GOOD``, the reason it is refused for, or ``EITHER`` where that depends on
which bytes were hit. Everything is a function of a seed.
"""

import base64
import io
import os
import random
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from data.images import FORMATS

GOOD, EITHER = "", None


class Mutant(NamedTuple):
    """What stands for an image or a line, and what must become of it."""

    name: str
    content: Any
    expected: str | None


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.copy().save(buffer, format, **options)  # a copy: saving leaves settings behind
    return buffer.getvalue()


def noise(mode="RGB", size=(24, 16), seed=0):
    rng = np.random.RandomState(seed)
    depth = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    return Image.fromarray(rng.randint(0, 256, (size[1], size[0], *depth), np.uint8), mode)


def _frames():
    return [noise(seed=i) for i in range(1, 4)]


def whole_images():
    """Images of every kind that must be read: (name, bytes)."""
    rgb = noise()
    grey16 = Image.fromarray(np.random.RandomState(1).randint(0, 65536, (16, 24)).astype(np.uint16))
    palette = rgb.quantize(16)
    found = {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg_progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg_grey": encode(noise("L"), "JPEG"),
        "jpeg_cmyk": encode(noise("CMYK"), "JPEG"),
        "jpeg_icc_garbage": encode(rgb, "JPEG", icc_profile=b"no profile at all" * 9),
        "jpeg_exif_garbage": encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        "jpeg_exif_loop": encode(
            rgb, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\0\0\0\0\x08\0\0\0"
        ),
        "jpeg_appended": encode(rgb, "JPEG") + b"<script>" * 40,
        "mpo": encode(rgb, "MPO", save_all=True, append_images=_frames()),
        "png": encode(rgb, "PNG"),
        "png_1": encode(rgb.convert("1"), "PNG"),
        "png_la": encode(noise("LA"), "PNG"),
        "png_rgba": encode(noise("RGBA"), "PNG"),
        "png_palette": encode(palette, "PNG"),
        "png_palette_transparent": encode(palette, "PNG", transparency=bytes(range(16))),
        "png_16": encode(grey16, "PNG"),
        "png_icc_garbage": encode(rgb, "PNG", icc_profile=b"\xff" * 100),
        "apng": encode(rgb, "PNG", save_all=True, append_images=_frames()),
        "gif": encode(palette, "GIF"),
        "gif_animated": encode(rgb, "GIF", save_all=True, append_images=_frames(), loop=0),
        "bmp": encode(rgb, "BMP"),
        "bmp_palette": encode(palette, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff_lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff_jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff_cmyk": encode(noise("CMYK"), "TIFF"),
        "tiff_lab": encode(Image.fromarray(np.asarray(rgb), "LAB"), "TIFF"),
        "tiff_16": encode(grey16, "TIFF"),
        "tiff_pages": encode(rgb, "TIFF", save_all=True, append_images=_frames()),
        "ppm": encode(rgb, "PPM"),
    }
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"jpeg_exif_{orientation}"] = encode(rgb, "JPEG", exif=exif)
    extras = {
        "WEBP": {
            "webp": {},
            "webp_lossless": {"lossless": True},
            "webp_animated": {"save_all": True, "append_images": _frames()},
        },
        "JPEG2000": {"jp2": {}},
        "AVIF": {"avif": {}},
    }
    for format, kinds in extras.items():
        if format in FORMATS:
            found |= {name: encode(rgb, format, **options) for name, options in kinds.items()}
    return found


def broken(name, content, rng):
    """An image file after an accident; most are refused, some are whole still."""
    data = bytearray(content)
    accident = rng.choice(("cut", "head", "flip", "flips", "zeros", "insert", "drop", "twice"))
    at = rng.randrange(len(data))
    if accident == "cut":
        data = data[:at]
    elif accident == "head":
        data = data[: rng.randrange(40)]
    elif accident in ("flip", "flips"):
        for _ in range(1 if accident == "flip" else 40):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif accident == "zeros":
        data[at : at + 30] = bytes(len(data[at : at + 30]))
    elif accident == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif accident == "drop":
        del data[at : at + rng.randrange(1, 20)]
    else:
        data = data * 2
    return Mutant(f"{name}_{accident}", bytes(data), EITHER if data else "image file is empty")


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *, depth=1, pixels=None, extra=b""):
    """A PNG of one grey channel; its pixels are all zero, or whatever is given, or those of a smaller picture."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    if pixels is None:
        pixels = zlib.compress(bytes(64))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def bombs():
    """Small files that ask for gigabytes, and sizes that nothing can be made of."""
    row = bytes(1 + 20_000 // 8)
    squeezer = zlib.compressobj(9)
    pixels = b"".join(squeezer.compress(row) for _ in range(20_000)) + squeezer.flush()
    text = zlib.compress(bytes(100_000_000), 9)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "x" * 900_000, zip=True)
    narrow = zlib.compress(bytes(1 + 65_535 // 8 + 1))
    bmp, tall = bytearray(encode(noise(), "BMP")), bytearray(encode(noise(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 65_535, 65_535)
    tall[18:26] = struct.pack("<ii", 24, -2_147_483_647)
    gif = bytearray(encode(noise().quantize(8), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    jpeg = bytearray(encode(noise(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    tiff = bytearray(encode(noise(), "TIFF"))
    tiles = encode(noise(size=(64, 64)), "TIFF", compression="tiff_lzw")
    found = [
        Mutant("png_bomb", png(20_000, 20_000, pixels=pixels), "image is too large"),
        Mutant("png_header_65535", png(65_535, 65_535), "image is too large"),
        Mutant("png_header_2_31", png(2**31 - 1, 2**31 - 1), "image is too large"),
        Mutant("png_text_bomb", png(8, 8, extra=_chunk(b"zTXt", b"a\0\0" + text)), EITHER),
        Mutant("png_icc_bomb", png(8, 8, extra=_chunk(b"iCCP", b"a\0\0" + text)), EITHER),
        Mutant("png_long_note", encode(noise(), "PNG", pnginfo=notes), GOOD),
        Mutant("png_65535_wide", png(65_535, 1, pixels=narrow), "image is too narrow"),
        Mutant("png_65535_high", png(1, 65_535, pixels=zlib.compress(bytes(2 * 65_535))), "image is too narrow"),
        Mutant("png_0_0", png(0, 0), EITHER),
        Mutant("png_0_5", png(0, 5), EITHER),
        Mutant("png_larger_than_its_pixels", png(4000, 4000), "image is broken"),
        Mutant("bmp_header", bytes(bmp), "image is too large"),
        Mutant("bmp_upside_down", bytes(tall), "image is too large"),
        Mutant("gif_header", bytes(gif), "image is too large"),
        Mutant("jpeg_header", bytes(jpeg), "image is too large"),
        Mutant("ppm_header", b"P6 65535 65535 255\n", "image is too large"),
        Mutant("ppm_zero", b"P6 0 0 255\n", EITHER),
        Mutant("narrow", encode(Image.new("RGB", (603, 3)), "PNG"), "image is too narrow"),
        Mutant("just_wide_enough", encode(Image.new("RGB", (600, 3)), "PNG"), GOOD),
        Mutant("one_pixel", encode(Image.new("RGB", (1, 1)), "PNG"), GOOD),
        Mutant("floating_point", encode(Image.new("F", (4, 4)), "TIFF"), "image of floating-point values"),
    ]
    for tag, name in ((256, "width"), (257, "length"), (278, "rows_per_strip"), (279, "strip_bytes"), (273, "offsets")):
        for whole, kind in ((tiff, "raw"), (bytearray(tiles), "lzw")):
            changed = bytearray(whole)
            at = changed.find(struct.pack("<H", tag), struct.unpack("<I", changed[4:8])[0])
            changed[at + 8 : at + 12] = struct.pack("<I", 0x7FFFFFF0)
            found.append(Mutant(f"tiff_{kind}_{name}", bytes(changed), EITHER))
    return found


def no_images():
    """What is called an image and is none."""
    texts = {
        "empty": (b"", "image file is empty"),
        "zeros": (bytes(1000), "not an image"),
        "text": (b"hello", "not an image"),
        "html": (b"<html><script>alert(1)</script></html>", "not an image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not an image"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        "pdf": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj", "not an image"),
        "ico": (encode(noise(size=(16, 16)), "ICO"), "not an image"),
        "zip": (b"PK\3\4" + bytes(60), "not an image"),
        "pickle": (b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.", "not an image"),
    }
    return [Mutant(name, content, expected) for name, (content, expected) in texts.items()]


def images(seed, count):
    """``count`` image files: all whole ones, bombs, what is none, then accidents in turn over the whole ones."""
    rng = random.Random(seed)
    whole = whole_images()
    found = [Mutant(name, content, GOOD) for name, content in whole.items()] + bombs() + no_images()
    names = list(whole)
    while len(found) < count:
        name = names[len(found) % len(names)]
        found.append(broken(name, whole[name], rng))
    return found


def paths(inside, outside):
    """Names of images that lead astray, made in ``inside``; ``outside`` is not to be read."""
    picture = encode(noise(), "PNG")
    (outside / "secret.png").write_bytes(picture)
    (inside / "fine.png").write_bytes(picture)
    (inside / "link_inside.png").symlink_to(inside / "fine.png")
    (inside / "link_outside.png").symlink_to(outside / "secret.png")
    (inside / "folder_outside").symlink_to(outside)
    (inside / "link_zero.png").symlink_to("/dev/zero")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "dangling.png").symlink_to(inside / "nowhere.png")
    (inside / "folder.png").mkdir()
    os.mkfifo(inside / "pipe.png")
    missing, beyond, url = "image not found", "image outside the roots", "image is a URL, only local files are read"
    return [
        Mutant("link_inside", "link_inside.png", GOOD),
        Mutant("dots_inside", "folder.png/../fine.png", GOOD),
        Mutant("link_outside", "link_outside.png", beyond),
        Mutant("folder_outside", "folder_outside/secret.png", beyond),
        Mutant("dots", f"../{outside.name}/secret.png", beyond),
        Mutant("absolute", str(outside / "secret.png"), beyond),
        Mutant("passwd", "/etc/passwd", beyond),
        Mutant("device", "/dev/zero", beyond),
        Mutant("link_device", "link_zero.png", beyond),
        Mutant("stdin", "/proc/self/fd/0", beyond),
        Mutant("file_url", f"file://{inside}/fine.png", GOOD),
        Mutant("file_url_outside", f"file://{outside}/secret.png", beyond),
        Mutant("file_url_host", "file://host/fine.png", url),
        Mutant("http", "http://127.0.0.1:1/a.png", url),
        Mutant("https", "HTTPS://x.invalid/a.png", url),
        Mutant("data_url", f"data:image/png;base64,{base64.b64encode(picture).decode()}", GOOD),
        Mutant("data_url_empty", "data:image/png;base64,AAAA", "not an image"),
        Mutant("data_url_broken", "data:image/png;base64,%%", "image is not base64"),
        Mutant("nul", "fine\0.png", missing),
        Mutant("pipe", "pipe.png", missing),
        Mutant("folder", "folder.png", missing),
        Mutant("loop", "loop.png", EITHER),
        Mutant("dangling", "dangling.png", missing),
        Mutant("missing", "nowhere.png", missing),
        Mutant("long", "a" * 5000 + ".png", EITHER),
        Mutant("line_break", "a\nb.png", missing),
        Mutant("surrogate", "a\ud83d.png", EITHER),
        Mutant("right_to_left", "a\u202egnp.exe", missing),
    ]


def chat(question="what color is it ?", answer="red", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def records(seed, count, control):
    """Records, or raw lines, of right and wrong shapes; ``control`` is a token that ends a turn."""
    rng = random.Random(seed)
    deep: Any = "fine.png"
    for _ in range(800):
        deep = [deep]
    shape = "messages are not a list of objects"
    found = [
        Mutant("fine", chat(), GOOD),
        Mutant("fine_image", chat("<image>what color ?", image="fine.png"), GOOD),
        Mutant("markup", chat("<b>what</b> {{ 7*7 }} {% raw %} ${HOME} &lt; <script>alert(1)</script>"), GOOD),
        Mutant("right_to_left", chat("\u202ewhat\u202c \u0645\u0627 color"), GOOD),
        Mutant("nul", chat("what\0color"), GOOD),
        Mutant("bom", chat("\ufeffwhat color"), GOOD),
        Mutant("template", chat("[INST] <<SYS>> ### Assistant: <user> <assistant>"), GOOD),
        Mutant("end_in_question", chat(f"what {control} color"), GOOD),
        Mutant("end_in_answer", chat(answer=f"red {control} blue"), "answer holds a control token"),
        Mutant("private_use", chat("what \U0010fffd"), "text holds a private-use character that marks images"),
        Mutant("placeholder_without_image", chat("what is <image>"), "image count mismatch"),
        Mutant("image_without_place", chat("a <image> b <image>", image="fine.png"), "image count mismatch"),
        Mutant("megabyte", chat("what " * 200_000), "too long"),
        Mutant("megabyte_word", chat("w" * 1_000_000), GOOD),
        Mutant("surrogate", chat("what \ud83d"), "invalid Unicode"),
        Mutant("surrogate_answer", chat(answer="red \udc00"), "invalid Unicode"),
        Mutant("empty_answer", chat(answer="  \n"), "empty answer"),
        Mutant("no_answer", {"messages": [{"role": "user", "content": "what"}]}, "no assistant answer"),
        Mutant("role", {"messages": [{"role": "root", "content": "what"}]}, "unknown role"),
        Mutant("role_list", {"messages": [{"role": ["user"], "content": "what"}]}, "unknown role"),
        Mutant("number", 7, "not a JSON object"),
        Mutant("list", [chat()], "not a JSON object"),
        Mutant("null", None, "not a JSON object"),
        Mutant("nothing", {}, "unknown layout"),
        Mutant("keys", {"k" * 100_000: 1}, "unknown layout"),
        Mutant("messages_text", {"messages": "what"}, shape),
        Mutant("messages_object", {"messages": {"role": "user"}}, shape),
        Mutant("messages_numbers", {"conversations": [1, 2]}, shape),
        Mutant("content_number", {"messages": [{"role": "user", "content": 5}]}, "message without text"),
        Mutant("part", {"messages": [{"role": "user", "content": [{"type": "tool", "x": 1}]}]}, "unknown message part"),
        Mutant(
            "part_text",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "unknown message part",
        ),
        Mutant("image_number", chat(image=5), "unknown kind of image"),
        Mutant("image_bytes_text", chat(image={"bytes": "abc"}), "unknown kind of image"),
        Mutant("image_deep", chat(image=deep), "nested too deeply"),
        Mutant("content_deep", {"messages": [{"role": "user", "content": [deep]}]}, EITHER),
        Mutant("video", chat(video="a.mp4"), "video file"),
        Mutant("audio", chat(audio="a.mp3"), "video and audio are not supported"),
        Mutant("choices", {"question": "q", "choices": ["a"], "answer": 0}, "multiple-choice rows are not supported"),
        Mutant("answer_nan", b'{"question": "what", "answer": NaN}', "answer is not a text"),
        Mutant("answer_infinite", b'{"question": "what", "answer": 1e999}', "answer is not a text"),
        Mutant("answer_bool", {"question": "what", "answer": True}, "answer is not a text"),
        Mutant(
            "answers_of_objects", {"question": "what", "answers": [{"answer": ["red"]}, {}]}, "answer is not a text"
        ),
        Mutant("question_number", {"question": 5, "answer": "red"}, "message without text"),
        Mutant("cut", b'{"conversations": [{"from": "hum', "invalid JSON"),
        Mutant("half_utf8", b'{"question": "\xc3', "invalid UTF-8"),
        Mutant("latin1", '{"question": "é", "answer": "a"}'.encode("latin-1"), "invalid UTF-8"),
        Mutant("utf16", '{"question": "e"}'.encode("utf-16").replace(b"\n", b""), "invalid UTF-8"),
        Mutant("nested", b"[" * 100_000, "invalid JSON"),
        Mutant("digits", b'{"question": ' + b"9" * 10_000 + b"}", "invalid JSON"),
        Mutant("zeros", bytes(100), "invalid JSON"),
        Mutant("with_bom", "\ufeff".encode() + b'{"question": "what", "answer": "red"}', GOOD),
    ]
    values = [None, 0, -1.5, True, "", "x", [], {}, [[]], [None], {"a": {}}, "<image>", "\ud800", "nan", 10**30]
    while len(found) < count:
        record = rng.choice(
            (
                chat("<image>what", image="fine.png"),
                {
                    "images": ["fine.png"],
                    "messages": [
                        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                        {"role": "assistant", "content": "red"},
                    ],
                },
                {"image": "fine.png", "question": "what", "answers": ["red", "red"], "metadata": {"a": 1}},
                {"images": ["fine.png"], "texts": [{"user": "what", "assistant": "red"}]},
                {"conversation": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]},
            )
        )
        found.append(Mutant("mutated", _mutated(record, rng, values), EITHER))
    return found


def _mutated(value, rng, values):
    """The same with one place in it, however deep, put in the place of something else, left out or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.25:
        return rng.choice(values)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    act = rng.random()
    if act < 0.15:
        del value[key]
    elif act < 0.25 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = _mutated(value[key], rng, values)
    return value
