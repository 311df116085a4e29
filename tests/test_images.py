"""How an image becomes pixels, whatever its format or damage, and how the stage prepare does it to all of them."""

import csv
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from pillow_heif import from_bytes
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from src import archive, images
from src.layout import read_layout
from src.runtime import PipelineError
from tests.helpers import (
    SMALL,
    assert_fails,
    contents,
    crops,
    digits,
    encode,
    environment,
    idx,
    is_one_sentence,
    photos,
    run_stage,
    shared,
    stage_command,
    succeed,
    zip_of,
)

Pixels = NDArray[np.uint8]


def decode(data: bytes, size: int = 32, channels: int = 3) -> Pixels:
    return images.decode(data, size=size, channels=channels)


def reason(data: bytes) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        decode(data)
    assert type(caught.value) in (ValueError, images.SizeError)
    return str(caught.value)


def picture_hash(pixels: Pixels) -> str:
    return images.picture_hashes(pixels[None])[0]


def distance(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def plain(color: object, mode: str = "RGB", side: int = 16) -> Image.Image:
    return Image.new(mode, (side, side), color)  # type: ignore[arg-type]


# --- size and place


def difference_from_torchvision(image: Image.Image, size: int) -> NDArray[np.int64]:
    theirs = CenterCrop(size)(Resize(size, InterpolationMode.BILINEAR)(image))
    ours = decode(encode(image, compress_level=0), size)
    return np.abs(ours.astype(int) - np.asarray(theirs).astype(int))


@pytest.mark.parametrize("size", [28, 64, 150, 224])
def test_photographs_become_what_torchvision_makes_of_them(size: int) -> None:
    """At most one level, in less than one value of a hundred (measured: 0 to 0.5 %), where Pillow rounds otherwise."""
    for photo in photos():
        found = difference_from_torchvision(photo, size)
        assert found.max() <= 1
        assert (found > 0).mean() < 0.01


SHAPES = [(639, 427), (427, 640), (639, 425), (333, 251), (101, 101), (17, 23), (400, 41), (40, 400), (3, 300), (1, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_becomes_what_torchvision_makes_of_it(shape: tuple[int, int]) -> None:
    """At most one level; in tall images in up to a quarter of the values, since Pillow then turns its passes round."""
    image = photos()[0].rotate(90, expand=True) if shape[1] > 427 else photos()[0]
    for size in (28, 65, 224):
        found = difference_from_torchvision(image.crop((0, 0, *shape)), size)
        assert found.max() <= 1
        assert (found > 0).mean() < (0.02 if shape[0] >= shape[1] else 0.25)


def test_an_image_of_the_wanted_size_keeps_its_pixels() -> None:
    digit = digits()[0][7]
    assert (decode(encode(Image.fromarray(digit)), 28, 1)[..., 0] == digit).all()


def test_one_pixel_is_an_image() -> None:
    assert (decode(encode(plain((1, 2, 3), side=1))) == [1, 2, 3]).all()


# --- orientation


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What each value of EXIF's Orientation asks for (CIPA DC-008, 4.6.4)."""


BEST: dict[str, dict[str, Any]] = {
    **{"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}},
    **{"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "HEIF": {"quality": 100, "chroma": 444}},
}
"""How a format keeps an image best."""


@pytest.mark.parametrize("kind", BEST)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_each_orientation_is_turned_upright(orientation: int, kind: str) -> None:
    stored = photos()[0].resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](np.asarray(stored))))
    found = decode(encode(stored, kind, exif=exif.tobytes(), **BEST[kind]))
    assert distance(found, decode(encode(upright))) <= (8 if kind in ("JPEG", "AVIF", "HEIF") else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(200)), b"no"]
)
def test_damaged_exif_data_leaves_the_pixels(exif: bytes) -> None:
    photo = photos()[0].resize((60, 40))
    plain_jpeg = encode(photo, "JPEG")
    damaged = plain_jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain_jpeg[2:]
    assert (decode(damaged) == decode(plain_jpeg)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_data_without_a_header_leaves_the_pixels(kind: str) -> None:
    """Pillow raises SyntaxError there."""
    photo = photos()[0].resize((60, 40))
    assert (decode(encode(photo, kind, exif=b"no header")) == decode(encode(photo, kind))).all()


@pytest.mark.parametrize("damage", [(17, 1), (17, 0x1F)])
def test_another_odd_tag_does_not_hide_the_orientation(damage: tuple[int, int]) -> None:
    """A tag of a wrong type, which Pillow reads, but cannot write again."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "make", {0x9003: "2020"}
    photo = photos()[0].resize((60, 40))
    data = encode(photo, "JPEG", exif=exif)
    at = data.index(b"Exif") + damage[0]
    damaged = data[:at] + bytes([damage[1]]) + data[at + 1 :]
    assert (decode(damaged) == np.rot90(decode(encode(photo, "JPEG")), -1)).all()


def test_an_orientation_that_does_not_exist_leaves_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    photo = photos()[0].resize((60, 40))
    assert (decode(encode(photo, exif=exif)) == decode(encode(photo))).all()


# --- modes


def test_gray_becomes_rgb_and_rgb_becomes_gray() -> None:
    assert (decode(encode(plain(77, "L"))) == 77).all()
    # ITU-R 601: 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert (decode(encode(plain((200, 100, 50))), channels=1) == 124).all()


def test_alpha_is_laid_over_white() -> None:
    assert (decode(encode(plain((255, 0, 0, 0), "RGBA"))) == 255).all()
    assert distance(decode(encode(plain((100, 0, 200, 128), "RGBA"))), np.array([177, 127, 227], np.uint8)) <= 1
    assert (decode(encode(plain((0, 0), "LA")), channels=1) == 255).all()
    assert (decode(encode(plain((9, 255), "LA"))) == 9).all()
    assert (decode(encode(plain((255, 0, 0, 0), "RGBA"), "HEIF", quality=100)) == 255).all()


def test_the_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 16, 8))
    found = decode(encode(image, transparency=0), 16)
    assert (found[:8] == [200, 0, 0]).all()
    assert (found[8:] == 255).all()
    assert (decode(encode(image), 16)[8:] == [10, 20, 30]).all()


@pytest.mark.parametrize(("mode", "color"), [("L", 5), ("RGB", (1, 2, 3)), ("1", 0)])
def test_the_transparent_colour_of_a_png_becomes_white(mode: str, color: object) -> None:
    assert (decode(encode(plain(color, mode), transparency=color)) == 255).all()


@pytest.mark.parametrize(("cmyk", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))])
def test_the_inks_of_a_cmyk_jpeg_become_colours(cmyk: object, rgb: object) -> None:
    assert distance(decode(encode(plain(cmyk, "CMYK"), "JPEG", quality=100)), np.array(rgb, np.uint8)) <= 3


@pytest.mark.parametrize(("deep", "shallow"), [(0, 0), (128, 0), (32768, 128), (65535, 255), (65280, 254)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(deep: int, shallow: int, kind: str) -> None:
    data = encode(Image.fromarray(np.full((16, 16), deep, np.uint16)), kind)
    assert (decode(data) == shallow).all()
    assert (decode(data, channels=1) == shallow).all()


def test_one_bit_is_black_and_white() -> None:
    checks = Image.fromarray((np.indices((16, 16)).sum(axis=0) % 2).astype(bool))
    assert set(np.unique(decode(encode(checks), 16))) == {0, 255}


@pytest.mark.parametrize(("mode", "gray"), [("F", 70000), ("I", 70000), ("I", 4095), ("I", -1)])
def test_pixels_of_unknown_range_are_a_reason(mode: str, gray: int) -> None:
    assert "range is unknown" in reason(encode(plain(gray, mode), "TIFF"))


def deep(gray: int, mode: str = "L", *, alpha: int = 0xFFFF) -> bytes:
    """A PNG of 16 bits, which Pillow writes in gray only."""
    kind, values = {
        "L": (0, [gray]),
        "LA": (4, [gray, alpha]),
        "RGB": (2, [gray] * 3),
        "RGBA": (6, [gray] * 3 + [alpha]),
    }[mode]
    row = b"\0" + struct.pack(f">{len(values)}H", *values) * 16
    return png((b"IHDR", struct.pack(">II5B", 16, 16, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(row * 16)))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (*chunks, (b"IEND", b""))
    )


def tiff(bits: int, photometric: int, pixels: bytes) -> bytes:
    """A TIFF of 16 x 16 pixels in one strip, which counts from black (photometric 1) or from white (0)."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 16, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHL", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("data", "gray", "bits"),
    [
        (deep(4095), 16, 12),
        (deep(255), 1, 8),
        (deep(0x3FFF, "RGB"), 63, 14),
        (deep(0x4000, "RGB"), 64, 15),
        (deep(4095, "RGBA"), 15, 12),
        (deep(4095, "LA"), 15, 12),
        (deep(0), 0, 0),
        (deep(0, "RGB"), 0, 0),
        (b"P5 16 16 65535\n" + b"\x0f\xff" * 256, 16, 12),
        (b"P6 16 16 65535\n" + b"\x0f\xff" * 768, 16, 13),
        (b"P5 16 16 4095\n" + b"\x08\x00" * 256, 128, 16),
        (b"P6 16 16 4095\n" + b"\x08\x00" * 768, 128, 0),
        (b"P2 16 16 1023\n" + b"512 " * 256, 128, 16),
        (tiff(12, 1, b"\x80\x08\x00" * 128), 128, 0),
        (tiff(16, 1, b"\x00\x0a" * 256), 10, 12),
        (tiff(16, 0, b"\x00\x0a" * 256), 245, 12),
        (tiff(8, 0, b"\x0a" * 256), 245, 0),
        (encode(Image.fromarray(np.full((16, 16), 0x8000, np.uint16)), "JPEG2000"), 128, 16),
        (encode(plain(77, "L")), 77, 0),
    ],
)
def test_the_range_of_more_than_8_bits_is_that_of_the_file_and_how_much_of_it_is_used_is_counted(
    data: bytes, gray: int, bits: int
) -> None:
    found = images.examine(data, size=16, channels=1)
    assert (found.pixels == gray).all()
    assert found.bits == bits


def test_the_transparent_gray_of_16_bits_becomes_white() -> None:
    header, rest = deep(1000)[:33], deep(1000)[33:]
    for gray, expected in ((1000, 255), (1001, 4)):
        clear = png((b"tRNS", struct.pack(">H", gray)))[8:-12]
        assert (decode(header + clear + rest) == expected).all()


class Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *words: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*words, **options))
        return done


def prepare_here(folder: Path, *files: tuple[str, bytes]) -> list[images.Prepared]:
    layout = read_layout(zip_of(folder / "raw.zip", files))
    table, index = folder / "images.npy", folder / "index.csv"
    return list(
        images.prepare(Here(), folder / "raw.zip", layout, table, index, count=len(layout), size=16, channels=1)
    )


def test_a_data_set_of_12_bits_in_16_stops_and_a_dark_image_among_others_does_not(tmp_path: Path) -> None:
    dark = [("a/1.png", deep(900)), ("a/2.png", deep(0)), ("b/1.png", deep(4080)), ("b/2.png", encode(plain(9, "L")))]
    with pytest.raises(PipelineError) as caught:
        prepare_here(tmp_path / "dark", *dark)
    assert str(caught.value) == (
        "no 16-bit image has a value above 4,095 (the largest is in 'b/1.png'), so they hold 12 bits and would become "
        "nearly black; multiply their pixels by 16"
    )
    assert len(prepare_here(tmp_path / "bright", *dark, ("b/3.png", deep(50_000)))) == 5


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [plain((255, 0, 0)), plain((0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data) == [255, 0, 0]).all()


FORMATS = "AVIF BMP DIB GIF HEIF JPEG JPEG2000 PNG PPM TGA TIFF WEBP".split()


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_of_photographs_is_read(kind: str) -> None:
    photo = photos()[0].resize((60, 40))
    error = decode(encode(photo, kind)).astype(int) - decode(encode(photo))
    assert np.sqrt((error**2).mean()) < 20


# --- damage


PHOTO = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "HEIF")


def test_an_empty_file_and_a_text_are_told() -> None:
    assert reason(b"") == "the file is empty"
    assert reason(b"Not Found") == "no image in a known format"


def test_a_program_for_a_printer_is_not_run() -> None:
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n") == "no image in a known format"


@pytest.mark.parametrize("kind", PHOTO)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_half_an_image_is_told(kind: str, share: float) -> None:
    data = encode(photos()[0].resize((120, 80)), kind)
    assert reason(data[: int(share * len(data))])


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_giant_is_told_before_it_is_unpacked(side: int) -> None:
    """A PNG of 400 million white pixels is 60 kB; RGB, it would be 1.2 GB."""
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    data = png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1_000_000))))
    memory = psutil.Process().memory_info().vms
    start = time.perf_counter()
    assert f"{side * side}" in (told := reason(data)) or f"{side} x {side} pixels" in told
    assert time.perf_counter() - start < 0.5
    assert psutil.Process().memory_info().vms - memory < 100e6


@pytest.mark.parametrize("kind", PHOTO)
def test_any_damage_gives_pixels_or_the_same_reason_each_time(kind: str) -> None:
    data, dice = encode(photos()[0].resize((120, 80)), kind), random.Random(0)
    reasons = []
    for number in range(250):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 2, 8])):
            damaged[dice.randrange(len(data) if number % 2 else 200)] = dice.randrange(256)
        outcomes: list[object] = []
        for _ in range(2):
            try:
                pixels = decode(bytes(damaged))
                assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
                outcomes.append(pixels.tobytes())
            except ValueError as error:
                outcomes.append(str(error))
                reasons.append(str(error))
        assert outcomes[0] == outcomes[1]
    assert reasons
    assert all(reasons)
    assert not [text for text in reasons if " at 0x" in text]


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


SOONER = (
    *({"subsampling": kind, "quality": quality} for kind in (0, 1, 2) for quality in (30, 95)),
    *({"exif": exif_of(orientation)} for orientation in range(9)),
    {"progressive": True},
    {"keep_rgb": True},
    {"restart_marker_blocks": 3},
    {"comment": b"of a cat"},
)
BY_PILLOW = ({"xmp": b"<x:xmpmeta/>"}, {"icc_profile": b"colours"})


def test_a_jpeg_that_is_read_without_pillow_has_the_pixels_and_the_damage_that_pillow_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dice, read, theirs = random.Random(0), [], images._open_jpeg

    def sooner(data: bytes, size: int, max_pixels: int) -> object:
        read.append(theirs(data, size, max_pixels))
        return read[-1]

    def refuse(*_: object) -> None:
        raise ValueError

    def outcome(data: bytes, way: object) -> bytes | str:
        monkeypatch.setattr(images, "_open_jpeg", way)
        try:
            return decode(data).tobytes()
        except ValueError as error:
            return str(error)

    widths = (1, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257)
    resized = [photo.resize((width, dice.randrange(1, 300))) for photo in photos() for width in widths]
    whole = [encode(photo, "JPEG", **options) for photo in resized for options in (*SOONER, *BY_PILLOW)]
    assert [outcome(data, sooner) for data in whole] == [outcome(data, refuse) for data in whole]
    assert len(read) == len(resized) * len(SOONER)
    assert [outcome(data[:-2], sooner) for data in whole] == [outcome(data[:-2], refuse) for data in whole]
    read.clear()
    for data in whole:
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 2, 8])):
            damaged[dice.randrange(len(data) if dice.random() < 0.5 else min(700, len(data)))] = dice.randrange(256)
        cut = bytes(damaged[: dice.choice([len(data), dice.randrange(len(data))])])
        assert outcome(cut, sooner) == outcome(cut, refuse)
    assert 0 < len(read) < len(whole)  # some of the damaged ones were refused


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"icc_profile": b"colours"}]
)
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole_and_one_that_lacks_more_is_not(
    kind: str, options: dict[str, Any]
) -> None:
    data = encode(photos()[0].resize((120, 80)).convert(kind), "JPEG", **options)
    whole = decode(data, 64)
    assert (decode(data[:-2], 64) == decode(data[:-1], 64)).all()
    assert (decode(data[:-2], 64) == whole).all()
    scans = [place for place in range(600, len(data)) if data.startswith((b"\xff\xda", b"\xff\xc4"), place)]
    for end in (*range(len(data) - 40, len(data) - 2), *scans[1:], *range(700, len(data) - 40, len(data) // 20)):
        try:
            found = decode(data[:end], 64)
        except ValueError:
            continue
        assert end > len(data) - 40  # the last bytes may be padding
        assert (found == whole).all()


def text(keyword: bytes, body: bytes, kind: bytes = b"zTXt") -> tuple[bytes, bytes]:
    return kind, keyword + b"\0\0" + zlib.compress(body)


@pytest.mark.parametrize(
    "chunks",
    [
        [text(b"Comment", bytes(3_000_000))],
        [text(b"icc", bytes(3_000_000), b"iCCP")],
        [(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))],
        [(b"tEXt", b"Comment\0" + b"x" * 900_000)] * 80,
        [(b"zTXt", b"Comment\0\0damaged")],
    ],
    ids=["zTXt", "iCCP", "iTXt", "tEXt", "damaged"],
)
def test_texts_and_colour_profiles_of_any_length_leave_the_pixels_of_a_png(chunks: list[tuple[bytes, bytes]]) -> None:
    """Pillow rejects those above 1 MB each, or 64 MB in all."""
    data = encode(photos()[0].resize((60, 40)))
    end = data.rindex(b"IDAT") - 4
    assert (decode(data[:33] + png(*chunks)[8:-12] + data[33:]) == decode(data)).all()
    assert (decode(data[:end] + png(*chunks)[8:-12] + data[end:]) == decode(data)).all()


def test_the_orientation_in_a_text_of_a_png_is_kept() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(photos()[0].resize((60, 40)))
    chunk = png((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))[8:-12]
    assert (decode(data[:33] + chunk + data[33:]) == np.rot90(decode(data), -1)).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_half_a_picture_in_tiles_is_told(share: float) -> None:
    """As telephones write them; libheif leaves the missing tiles black."""
    data = encode(photos()[0].resize((300, 200)), "HEIF", tile_size=64)
    assert reason(data[: int(share * len(data))])
    assert distance(decode(data), decode(encode(photos()[0].resize((300, 200))))) < 40


def test_ten_bits_of_a_heic_become_eight() -> None:
    data = io.BytesIO()
    from_bytes("RGB;16", (64, 64), np.full((64, 64, 3), 0x8000, "<u2").tobytes()).save(data, quality=-1, chroma=444)
    found = images.examine(data.getvalue(), size=16, channels=3)
    assert distance(found.pixels, np.full((16, 16, 3), 128, np.uint8)) <= 1
    assert found.bits == 0


def test_the_library_of_heic_is_loaded_at_the_first_such_file() -> None:
    code = "import sys; from src import images; assert 'pillow_heif' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_a_picture_of_extreme_shape_is_a_picture() -> None:
    for shape in ((1, 50_000), (50_000, 1)):
        assert (decode(encode(Image.new("RGB", shape, (9, 8, 7)))) == [9, 8, 7]).all()


def test_the_content_and_not_the_name_is_decoded_and_a_drawing_is_no_photograph() -> None:
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "no image in a known format"
    assert reason(b"P5 0 5 255\n") == "no image in a known format"
    assert reason(png((b"IHDR", struct.pack(">II5B", 0, 5, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))))


def test_pillow_does_not_warn_a_user_of_odd_metadata() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encode(Image.new("L", (10_000, 9_000)), "PNG")).shape == (32, 32, 3)


# --- hashes of pictures


def bits_apart(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_the_hash_of_a_picture_is_the_same_on_every_machine() -> None:
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    picture = ((x * x + 3 * y * y + x * y) // 97 % 256).astype(np.uint8)[..., None]
    assert picture_hash(picture) == "2a5de4759c599056"
    assert picture_hash(np.dstack([picture, picture[::-1], picture.swapaxes(0, 1)])) == "2a55ec57bc719250"


def test_no_last_bit_of_a_cosine_changes_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a side of 33, half of 1,985 is rounded: 992.5, or a little more or less in another library."""
    cosines, cos = images._cosines.__wrapped__, np.cos
    expected = cosines(33, 1)[0]
    for towards in (-2, 2):
        monkeypatch.setattr(np, "cos", lambda x, towards=towards: np.nextafter(cos(x), towards))
        assert np.array_equal(cosines(33, 1)[0], expected)


def test_the_hash_of_a_blank_picture_exists() -> None:
    assert {picture_hash(np.full((28, 28, 1), gray, np.uint8)) for gray in (0, 9, 255)} == {"0" * 16}


def test_recompressed_and_resized_photographs_keep_their_hash() -> None:
    """Most of them: of these overlapping parts, measured, all at quality 60 and 87 % at half size."""
    found: dict[str, list[int]] = {"quality": [], "half": []}
    hashes = []
    for photo in crops(60, smallest=200):
        hashes.append(picture_hash(decode(encode(photo), 64)))
        half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
        found["quality"].append(bits_apart(hashes[-1], picture_hash(decode(encode(photo, "JPEG", quality=60), 64))))
        found["half"].append(bits_apart(hashes[-1], picture_hash(decode(encode(half, "JPEG", quality=90), 64))))
    assert np.mean(np.array(found["quality"]) <= 2) >= 0.9
    assert np.mean(np.array(found["half"]) <= 2) >= 0.85
    # The first parts of the three photographs are three pictures.
    assert min(bits_apart(hashes[a], hashes[b]) for a, b in [(0, 1), (0, 2), (1, 2)]) > 8


# --- the stage


def save_some(folder: Path, raw: Path, workers: int) -> dict[str, bytes]:
    """What the stage does, with a chosen number of workers."""
    folder.mkdir()
    items = read_layout(raw)
    table, index = folder / "images.npy", folder / "index.csv"
    with images.decoders(workers) as pool:
        prepared = images.prepare(pool, raw, items, table, index, count=len(items), size=32, channels=3)
        rejected = [image for image in prepared if image.reason]
    (folder / "rejected.txt").write_text("\n".join(f"{image.item.path} {image.reason}" for image in rejected))
    return contents(folder)


BROKEN = {
    "cat/broken.jpg": "image file is truncated",
    "cat/empty.png": "the file is empty",
    "dog/page.jpg": "no image in a known format",
    "dog/gray, 32 bits.tif": "signed or 32-bit pixels, whose range is unknown",
    "dog/no bytes.gif": "the file is empty",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred and fifty photographs of two classes, so that there are several chunks, and five broken files."""
    files = [(f"{('cat', 'dog')[n % 2]}/{n:03}.jpg", encode(photo, "JPEG")) for n, photo in enumerate(crops(150))]
    broken = [
        encode(photos()[0], "JPEG")[:5000],
        b"",
        b"<html>Not found</html>",
        encode(plain(70000, "I"), "TIFF"),
        b"",
    ]
    files[70:70] = zip(BROKEN, broken, strict=True)
    return zip_of(tmp_path_factory.mktemp("mixed") / "data/raw.zip", files)


@pytest.fixture(scope="module")
def prepared(mixed: Path) -> Path:
    """The folder in which the stage has prepared them."""
    printed = succeed(mixed.parents[1], "prepare", prepare=SMALL | {"max_rejected": 0.1})
    assert printed.endswith("prepared 150 images of 32 px, rejected 5\n")
    return mixed.parents[1]


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    """A folder with the archive and the outputs of an earlier run."""
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


def test_each_broken_file_is_named_with_its_reason(prepared: Path) -> None:
    with (prepared / "data/rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(BROKEN)
    assert all(row["reason"].startswith(BROKEN[row["path"]]) for row in rows)


def test_the_table_is_plain_numpy_and_its_rows_are_those_of_the_index(prepared: Path, mixed: Path) -> None:
    table = np.load(prepared / "data/images.npy")
    assert (table.shape, table.dtype) == ((150, 32, 32, 3), np.uint8)
    with (prepared / "data/index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 150
    items = {item.path: item for item in read_layout(mixed)}
    with archive.Reader(mixed) as reader:
        for number in (0, 69, 70, 149):
            row = rows[number]
            assert (row["path"], row["label"]) == (f"{row['label']}/{number:03}.jpg", ("cat", "dog")[number % 2])
            assert (table[number] == decode(reader.read(items[row["path"]]))).all()
            assert row["picture"] == picture_hash(table[number])


def test_the_number_of_workers_changes_no_byte(prepared: Path, mixed: Path, tmp_path: Path) -> None:
    one, eight = (save_some(tmp_path / str(workers), mixed, workers) for workers in (1, 8))
    assert one == eight
    for name in ("images.npy", "index.csv"):
        assert one[name] == (prepared / "data" / name).read_bytes()


def test_too_many_broken_files_stop_the_stage(home: Path) -> None:
    words = ("5 of 155 images are broken", "prepare.max_rejected 0 allows", "'cat/broken.jpg'", "max_rejected: 0.0323")
    assert_fails(home, "prepare", *words, prepare=SMALL | {"max_rejected": 0.0})
    assert_fails(home, "prepare", prepare=SMALL | {"max_rejected": 0.0322})
    succeed(home, "prepare", prepare=SMALL | {"max_rejected": 0.0323})


def test_a_class_that_loses_all_its_images_stops_the_stage(home: Path) -> None:
    words = ("no image of class 'fox' can be read", "'fox/1.jpg': no image in a known format")
    files = [
        *((f"cat/{n}.png", encode(plain(0))) for n in range(9)),
        ("dog/1.png", encode(plain(9))),
        ("fox/1.jpg", b"x"),
    ]
    zip_of(home / "data/raw.zip", files)
    assert_fails(home, "prepare", *words, prepare=SMALL | {"max_rejected": 0.5})


def test_a_missing_archive_stops_the_stage(tmp_path: Path) -> None:
    assert_fails(tmp_path, "prepare", "data/raw.zip is missing; `dvc repro` makes it")


def test_a_limit_on_files_stops_the_stage_in_one_sentence(home: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    assert_fails(home, "prepare", "allows no larger file", before=limit, prepare=SMALL | {"max_rejected": 0.1})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, which only root can mount."""
    folder = tmp_path / "disk"
    (folder / "data").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder / "data")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder / "data")], check=True)


def test_a_full_disk_stops_the_stage_in_one_sentence(small_disk: Path) -> None:
    zip_of(
        small_disk / "data/raw.zip",
        [("images-idx3-ubyte", idx(digits()[0][::10])), ("labels-idx1-ubyte", idx(digits()[1][::10]))],
    )
    (small_disk / "data/images.npy").write_bytes(b"older")
    assert_fails(small_disk, "prepare", "the disk is full", prepare={"image_size": 64, "channels": 3})


# --- interruption


@pytest.fixture(scope="module")
def long_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive whose decoding takes some 15 s of a core, and the outputs of an earlier run."""
    large = encode(photos()[0].resize((1000, 750)), "JPEG", quality=10)
    folder = tmp_path_factory.mktemp("long")
    zip_of(folder / "data/raw.zip", [(f"{'cat' if n % 2 else 'dog'}/{n}.jpg", large) for n in range(1600)])
    for name in ("images.npy", "index.csv", "rejected.csv"):
        (folder / "data" / name).write_text("older")
    return folder


def start(folder: Path) -> "subprocess.Popen[str]":
    command = stage_command(folder, "prepare", prepare=SMALL)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(part: Path, size: int) -> None:
    """Wait until so much was written; the table has its full length from the start."""
    deadline = time.monotonic() + 60
    while not (part.exists() and 512 * part.stat().st_blocks >= size):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.parametrize(("moment", "delay"), [(0, 0.05), (0, 0.3), (130_000, 0.0)])
def test_ctrl_c_ends_in_one_sentence_and_leaves_the_older_outputs(long_work: Path, moment: int, delay: float) -> None:
    """As the workers start, as they import, and in the middle."""
    former = contents(long_work)
    stage = start(long_work)
    wait_until(long_work / "data/.images.npy.part", moment)
    time.sleep(delay)
    workers = psutil.Process(stage.pid).children(recursive=True)
    os.killpg(stage.pid, signal.SIGINT)
    printed, told = stage.communicate(timeout=30)
    assert "prepared" not in printed
    assert is_one_sentence("prepare", stage.returncode, told, "interrupted")
    assert contents(long_work) == former
    assert gone(workers)


def test_no_worker_outlives_a_stage_that_was_killed(long_work: Path, tmp_path: Path) -> None:
    home = shutil.copytree(long_work, tmp_path / "home")
    stage = start(home)
    wait_until(home / "data/.images.npy.part", 130_000)
    workers = psutil.Process(stage.pid).children(recursive=True)
    assert workers
    stage.kill()
    stage.communicate(timeout=30)
    assert gone(workers)
    assert (home / "data/images.npy").read_text() == "older"
    # What it left half-written goes with the next run.
    assert (home / "data/.images.npy.part").exists()
    zip_of(home / "data/raw.zip", [(f"{name}/1.png", encode(plain(0))) for name in ("cat", "dog")])
    succeed(home, "prepare", prepare=SMALL)
    assert not list((home / "data").glob(".*.part"))


# --- memory


MEASURE = """
import atexit, pathlib, re, resource
def tell():
    own = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    pathlib.Path("memory.txt").write_text(f"{own} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
atexit.register(tell)
"""


def memory(folder: Path, raw: Path) -> tuple[float, float]:
    """The largest memory of the stage itself and of one worker, in MB."""
    (folder / "data").mkdir(parents=True)
    (folder / "data/raw.zip").symlink_to(raw)
    done = run_stage(folder, "prepare", MEASURE.replace("\\\\", "\\"), prepare={"image_size": 64, "channels": 3})
    assert done.returncode == 0, done.stderr
    own, worker = (int(kilobytes) / 1e3 for kilobytes in (folder / "memory.txt").read_text().split())
    return own, worker


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_small_and_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """The full 10,450 photographs (128 MB of pixels) take some 6 s; fewer would not show what grows."""
    every = shared("animals64.zip")
    with zipfile.ZipFile(every) as source:
        names = [name for name in source.namelist() if name.endswith(".jpeg")]
        quarter = zip_of(tmp_path / "quarter.zip", [(name, source.read(name)) for name in names[::4]])
    small, large = memory(tmp_path / "quarter", quarter), memory(tmp_path / "every", every)
    assert large[0] + 2 * large[1] < 1000
    # An entry of the list of files is 1 kB, an image 12 kB.
    assert large[0] - small[0] < 2e-3 * len(names)
    assert large[1] < 1.1 * small[1]
