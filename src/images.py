"""The one preprocessing contract: an encoded image becomes upright, square, 8-bit pixels, and every image does so once.

An image is turned upright (EXIF), its alpha laid over white, converted to gray or RGB, its short side resized to `size`
(bilinear with antialiasing, as Pillow, torch and ONNX's Resize(antialias=1) do it), and its centre cropped.
"""

import csv
import hashlib
import io
import math
import os
import signal
import struct
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import islice, pairwise, product
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from src.archive import Item, Reader
from src.runtime import PipelineError

Pixels = NDArray[np.uint8]
Extent = tuple[float, float]
"""Width and height, in pixels and parts of them."""

MAX_PIXELS = 2**27
"""Larger images are rejected before they are decoded: 134 million pixels are 400 MB of RGB."""

# Photographs and scans; Pillow would hand EPS to a Ghostscript that another machine may not have.
_FORMATS = "JPEG PNG AVIF BMP DIB GIF ICO JPEG2000 PPM TGA TIFF WEBP".split()

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FRAMES = {b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"}
_HARMLESS = {b"\xff" + bytes([kind]) for kind in (0xC4, 0xDB, 0xDD, 0xE0, 0xED, 0xEE, 0xFE)}
"""Segments of a JPEG: its frame (baseline, extended, progressive), and those that libjpeg needs or nobody does."""

_SCAN, _END = b"\xff\xda", b"\xff\xd9"

_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATIONS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Chunks of a PNG with texts and colour profiles, and what the ones begin with that may hold an orientation."""

_FULL_RANGE = 14
"""Bits: 16-bit images of which none uses more are of another range; at 14, 64 of 256 levels would be left."""

_PHOTOGRAPH = 128
"""A side, in pixels, at which a photograph can be recognised by a network of ours."""

_LOOK = 4
"""Of so many images one is looked at for colour, which takes 14 us, a twentieth of what a small photograph takes."""

_CHUNK, _CHUNK_BYTES = 128, 2**21
"""What a process works on at once, at most: images, and their pixels."""


class Prepared(NamedTuple):
    """One image of the archive: the hashes of its bytes and of its picture, or the reason why it cannot be used.

    width, height: of the original, in pixels; bits: as in Decoded; colour: whether it is more than shades of gray, None
    where nobody looked.
    """

    item: Item
    sha256: str = ""
    picture: str = ""
    reason: str = ""
    bits: int = 0
    width: int = 0
    height: int = 0
    colour: bool | None = None


class Decoded(NamedTuple):
    """An image's pixels, the image as it was decoded, and how many bits its values need if it stores 16, or else 0.

    Nothing but its scale, where it is a JPEG, was changed in `image`.
    """

    pixels: Pixels
    image: Image.Image
    bits: int


class SizeError(ValueError):
    """An image of more pixels than are allowed."""


Outcome = tuple[str, str, str, int, int, int, bool | None]
"""What a process sends back of an image: all that is Prepared but the item, which is there already."""


def decode(data: bytes, *, size: int, channels: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode one encoded image to (size, size, channels) uint8, as `examine` does."""
    return examine(data, size=size, channels=channels, max_pixels=max_pixels).pixels


def examine(data: bytes, *, size: int, channels: int, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode one encoded image to (size, size, channels) uint8; of an animation the first frame.

    Raises ValueError with the reason where the bytes are no whole image, and SizeError, which is one, before decoding.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; neither changes the pixels
            image, turn, extent, bits = _open(data, size, max_pixels)
            upright = _convert(image if turn is None else image.transpose(turn), channels)
            extent = extent if upright.size == image.size else extent[::-1]
            pixels = np.asarray(_square(upright, size, extent)).reshape(size, size, channels)
            return Decoded(pixels, image, bits)
    except UnidentifiedImageError:
        raise ValueError("no image in a known format") from None
    except SizeError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, of 179 million pixels
        raise SizeError(str(error)) from None
    except (ValueError, OSError) as error:
        raise ValueError(str(error)) from None
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes: SyntaxError, struct.error, …
        raise ValueError(f"damaged: {type(error).__name__} while decoding") from None


def picture_hashes(pixels: Pixels) -> list[str]:
    """Hash what each image shows, as 16 hexadecimal digits that survive recompression and resizing.

    The signs of the 8x8 lowest frequencies of the gray image against their median (pHash, Zauner 2010), here of all
    pixels instead of a thumbnail. pixels: (N, S, S, C) uint8.
    """
    some = max(1, 2**20 // pixels[0].size)  # few large images at once, since each takes four times its memory
    frequencies = np.concatenate([_frequencies(pixels[at : at + some]) for at in range(0, len(pixels), some)])
    bits = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean brightness
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


@contextmanager
def decoders(workers: int | None = None) -> Iterator[Executor]:
    """Start a process a core for `prepare`. They come up while the archive is still being listed."""
    workers = workers or cores()
    context = get_context("spawn")  # a fork would copy threads, such as numpy's, which Python 3.12 warns of
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        with _interrupts_held():
            for _ in range(workers):  # the pool starts a process with a call for which none is idle
                pool.submit(os.getpid)
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prepare(
    pool: Executor,
    archive: Path,
    items: Iterable[Item],
    images: Path,
    index: Path,
    *,
    count: int,
    size: int,
    channels: int,
) -> Iterator[Prepared]:
    """Decode `count` items of an archive in the processes of `decoders`, and yield what became of each, in their order.

    Writes images, .npy, uint8 (N, size, size, channels), and index, .csv with a row for each of the N images: path,
    label, official, sha256, picture. They are whole when all is yielded, and the same bytes for any number of workers.
    A few chunks of images are held at a time, so memory does not grow with the number of images. Raises PipelineError
    where a class has lost all its images, or where 16-bit images hold fewer bits.
    """
    row = size * size * channels
    broken: list[int] = []
    sound: set[str] = set()
    failed: dict[str, Prepared] = {}
    deepest: Prepared | None = None
    with images.open("w+b") as table, index.open("w", newline="", encoding="utf-8") as rows:
        _write_header(table, (count, size, size, channels))
        begin = table.tell()
        table.truncate(begin + count * row)
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["path", "label", "official", "sha256", "picture"])
        work = partial(_prepare_chunk, archive, images, begin, size, channels)
        for number, image in enumerate(_in_order(pool, work, _chunks(items, row))):
            if image.reason:
                broken.append(number)
                failed.setdefault(image.item.label, image)
            else:
                sound.add(image.item.label)
                if image.bits > (deepest.bits if deepest else 0):
                    deepest = image
                writer.writerow([image.item.path, image.item.label, image.item.official, image.sha256, image.picture])
            yield image
        _close_gaps(table, begin, row, broken, count)
        _write_header(table, (count - len(broken), size, size, channels))
    if lost := sorted(failed.keys() - sound):
        raise PipelineError(f"no image of class {lost[0]!r} can be read, the first is {_tell(failed[lost[0]])}")
    if deepest and deepest.bits <= _FULL_RANGE:
        raise PipelineError(
            f"no 16-bit image has a value above {2**deepest.bits - 1:,} (the largest is in {deepest.item.path!r}), so "
            f"they hold {deepest.bits} bits and would become nearly black; multiply their pixels by "
            f"{2 ** (16 - deepest.bits):,}"
        )


def _in_order(
    pool: Executor, work: Callable[[int, list[Item]], list[Outcome]], chunks: Iterable[list[Item]]
) -> Iterator[Prepared]:
    """Run chunks of items through the pool, some ahead, and yield the results in their order."""
    waiting: deque[tuple[list[Item], Future[list[Outcome]]]] = deque()
    first = 0
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(work, first, chunk)))
            first += len(chunk)
            if len(waiting) > 2 * cores():
                yield from _gather(*waiting.popleft())
        while waiting:
            yield from _gather(*waiting.popleft())
    except BrokenProcessPool:
        raise PipelineError("a decoding process was killed, most likely for want of memory; free some") from None


def _gather(items: list[Item], work: Future[list[Outcome]]) -> Iterator[Prepared]:
    return (Prepared(item, *outcome) for item, outcome in zip(items, work.result(), strict=True))


class Originals:
    """What the images of an archive are before they are prepared: their sizes, and how many of them are in colour."""

    def __init__(self) -> None:
        self._count = self._looked = self._colour = 0
        self._widths, self._heights = Counter[int](), Counter[int]()
        self._smallest = self._largest = (0, 0)

    def watch(self, prepared: Iterable[Prepared]) -> Iterator[Prepared]:
        """Pass images on, and count the sound ones."""
        for image in prepared:
            if not image.reason:
                self._add(image.width, image.height, image.colour)
            yield image

    def _add(self, width: int, height: int, colour: bool | None) -> None:
        size = width, height
        self._smallest = min(self._smallest, size, key=math.prod) if self._count else size
        self._largest = max(self._largest, size, key=math.prod)
        self._widths[width] += 1
        self._heights[height] += 1
        self._count += 1
        self._looked += colour is not None
        self._colour += colour is True

    def __str__(self) -> str:
        sizes = {
            "median": (_median(self._widths), _median(self._heights)),
            "smallest": self._smallest,
            "largest": self._largest,
        }
        told = ", ".join(f"{name} {width:,} x {height:,}" for name, (width, height) in sizes.items())
        return f"originals: {self._colour / max(1, self._looked):.0%} in colour; {told} px"

    def advice(self, *, size: int, channels: int) -> str:
        """Say that photographs are prepared as if they were digits, and with which params they are not; or ''."""
        short = min(_median(self._widths), _median(self._heights))
        gray, small = channels == 1 and self._colour > self._looked / 2, short > 4 * size and size < _PHOTOGRAPH
        found = " and ".join(["in colour"] * gray + [f"{short:,} px wide or high"] * small)
        change = " ".join(["-S prepare.channels=3"] * gray + [f"-S prepare.image_size={_PHOTOGRAPH}"] * small)
        return found and (
            f"most images are {found}, but prepare.channels is {channels} and prepare.image_size is {size}, as for "
            f"digits; for photographs use {change}"
        )


def _median(sides: Counter[int]) -> int:
    left = sides.total() / 2
    for side in sorted(sides):
        left -= sides[side]
        if left <= 0:
            return side
    return 0


def check_rejected(rejected: Sequence[Prepared], count: int, max_rejected: float) -> None:
    """Raise PipelineError where more than the share `max_rejected` of `count` images is broken."""
    if len(rejected) > max_rejected * count:
        share = math.ceil(1e4 * len(rejected) / count) / 1e4
        raise PipelineError(
            f"{len(rejected):,} of {count:,} images are broken, more than prepare.max_rejected {max_rejected:g} allows"
            f"; the first is {_tell(rejected[0])}; mend them, or accept with prepare.max_rejected: {share:g}"
        )


def _tell(image: Prepared) -> str:
    return f"{image.item.path!r}: {image.reason}"


def _chunks(items: Iterable[Item], row: int) -> Iterator[list[Item]]:
    left, length = iter(items), max(1, min(_CHUNK, _CHUNK_BYTES // row))
    while chunk := list(islice(left, length)):
        yield chunk


def _close_gaps(table: BinaryIO, begin: int, row: int, broken: Sequence[int], count: int) -> None:
    """Move each row to where it belongs when the broken ones are gone, and cut off what is left over."""
    target = begin + row * min(broken, default=count)
    for gap, following in pairwise([*broken, count]):
        for source in range(begin + row * (gap + 1), begin + row * following, row):
            table.seek(source)
            content = table.read(row)
            table.seek(target)
            table.write(content)
            target += row
    table.truncate(target)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write a .npy header, whose length numpy keeps the same for every number of rows."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


class _Opened(NamedTuple):
    """A decoded image of 8 bits, how to turn it, its extent, and the bits of a 16-bit one, as in Decoded."""

    image: Image.Image
    turn: Image.Transpose | None
    extent: Extent
    bits: int = 0


def _open(data: bytes, size: int, max_pixels: int) -> _Opened:
    """Decode an image.

    A JPEG is decoded at the smallest scale of 1, 1/2, 1/4 and 1/8 that leaves both sides at least `size` long. A side
    of 225 pixels at half the scale is 113 pixels, of which the last one is half covered: 112.5.
    """
    if not data:
        raise ValueError("the file is empty")
    with suppress(ValueError, IndexError, struct.error):  # whether an odd file can be used is for Pillow to say
        return _open_jpeg(data, size, max_pixels)
    image = Image.open(io.BytesIO(_without_texts(data)), formats=_formats(data))
    if image.width * image.height > max_pixels:
        raise SizeError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    drafted = image.draft(None, (size, size)) if image.format == "JPEG" else None
    stored = str(getattr(image, "tile", ""))  # how, which Pillow forgets on loading
    try:
        image.load()
    except OSError:
        if image.format in ("JPEG", "MPO") and not data.endswith(_END) and _lacks_only_its_end(data):
            return _open(data + _END, size, max_pixels)
        raise
    shallow, bits = _eight_bits(image, stored)
    return _Opened(shallow, _turn(image.getexif), drafted[1][2:] if drafted else image.size, bits)


def _formats(data: bytes) -> list[str]:
    """Name the formats to try. HEIC takes a library of its own, which is loaded at the first such file."""
    if data[4:8] != b"ftyp":
        return _FORMATS
    _check_boxes(data)
    _register_heif()
    return [*_FORMATS, "HEIF"]


@cache
def _register_heif() -> None:
    from pillow_heif import register_heif_opener

    # One thread, since a process a core decodes already. libheif turns the image itself, and resets EXIF's orientation.
    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)


def _check_boxes(data: bytes) -> None:
    """Raise ValueError where a HEIC is cut off: libheif leaves the missing tiles black (boxes: ISO 14496-12, 4.2)."""
    place = 0
    while place + 16 <= len(data):
        length, kind, long_length = struct.unpack_from(">L4sQ", data, place)
        length = long_length if length == 1 else length
        if length < 8:  # 0 is the rest of the file
            break
        place += length
        if kind == b"mdat" and place > len(data):
            raise ValueError("image file is truncated")


def _without_texts(data: bytes) -> bytes:
    """Leave out a PNG's texts and colour profiles: they change no pixel, and Pillow rejects large ones."""
    if not data.startswith(b"\x89PNG"):
        return data
    kept, place = [data[:8]], 8
    while place < len(data):
        length, kind = struct.unpack_from(">L4s", data.ljust(place + 8), place)
        if kind not in _TEXTS or data.startswith(_ORIENTATIONS, place + 8):
            kept.append(data[place : place + 12 + length])
        place += 12 + length
    return b"".join(kept)


def _lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG without its end marker has all its pixels: each scan, which libjpeg decodes without a warning."""
    with suppress(ValueError, IndexError, struct.error):
        colours = simplejpeg.decode_jpeg_header(data + _END)[2]
        simplejpeg.decode_jpeg(data + _END, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")
        return _has_all_scans(data)
    return False


def _has_all_scans(data: bytes) -> bool:
    """Whether a JPEG has each coefficient of each component in full; a progressive one may end between two scans.

    A scan names its components, the first and last coefficient of the 64, and how many bits are left to later scans
    (ITU-T T.81, B.2.3 and G.1.1.1).
    """
    place, components, whole = 2, 0, set[tuple[int, int]]()
    while (marker := data[place : place + 2]) != _SCAN:
        components = data[place + 9] if marker in _FRAMES else components
        place += 2 + int(struct.unpack_from(">H", data, place + 2)[0])
    while place >= 0:
        begin = place + 5 + 2 * data[place + 4]
        first, last, bits_left = data[begin : begin + 3]
        if bits_left & 0xF == 0:
            whole.update(product(data[place + 5 : begin : 2], range(first, last + 1)))
        place = data.find(_SCAN, place + 2)
    return len(whole) == 64 * components


def _open_jpeg(data: bytes, size: int, max_pixels: int) -> _Opened:
    """Do the same for a sound JPEG in colour without Pillow: the same pixels, in four fifths of the time.

    Both decode by libjpeg-turbo; Pillow reads headers and unpacks pixels more slowly. Raises ValueError, IndexError or
    struct.error for any other file.
    """
    width, height, exif = _scan_jpeg(data)
    if not 0 < width * height <= max_pixels:
        raise ValueError("no size, or too large")
    scale = next((scale for scale in (8, 4, 2) if min(width, height) >= scale * size), 1)
    wide, high = -(-width // scale), -(-height // scale)
    pixels = simplejpeg.decode_jpeg(data, min_height=high, min_width=wide)
    if pixels.shape != (high, wide, 3):
        raise ValueError("another scale")
    image = Image.frombuffer("RGB", (wide, high), pixels, "raw", "RGB", 0, 1)
    return _Opened(image, _turn(partial(_read_exif, exif)) if exif else None, (width / scale, height / scale))


def _scan_jpeg(data: bytes) -> tuple[int, int, bytes]:
    """Read the segments of a JPEG up to its pixels: give width, height, and EXIF data, or b'' (ITU-T T.81, annex B).

    Raises ValueError, IndexError or struct.error for what is no JPEG of three colours, and for what may change its
    pixels or its turn in other ways, such as XMP.
    """
    if not data.startswith(b"\xff\xd8"):
        raise ValueError("no JPEG")
    place, width, height, exif = 2, 0, 0, b""
    while (marker := data[place : place + 2]) != _SCAN:
        (length,) = struct.unpack_from(">H", data, place + 2)
        if marker in _FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", data, place + 4)
            if (bits, colours) != (8, 3):
                raise ValueError("no three colours of 8 bits")
        elif marker == b"\xff\xe1" and not exif and data.startswith(b"Exif\0\0", place + 4):
            exif = data[place + 4 : place + 2 + length]
        elif marker not in _HARMLESS:
            raise ValueError("something that Pillow should see")
        place += 2 + length
    return width, height, exif


def _read_exif(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    return exif


def _turn(read: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """Tell what EXIF asks for; ImageOps.exif_transpose also rewrites all other tags, and fails at odd ones."""
    try:
        return _TURNS.get(read().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data says nothing about the pixels, which are whole
        return None


def _eight_bits(image: Image.Image, stored: str) -> tuple[Image.Image, int]:
    """Reduce an image to 8 bits where it has more, and count the bits that its values need of 16.

    stored: how Pillow finds its pixels in the file. Of 16 bits, Pillow keeps the upper 8 in colour, and in gray clips
    at 255 and forgets that a TIFF counts from white. PGM and JPEG 2000 come scaled to 16 bits, a TIFF of 12 does not.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode == "I" and image.format != "PPM":
        raise ValueError("signed or 32-bit pixels, whose range is unknown")
    if not image.mode.startswith("I"):
        if ";16" not in stored and ", 65535)" not in stored:
            return image, 0
        brightest = int(np.asarray(image)[..., : 1 if image.mode == "LA" else 3].max())
        return image, brightest.bit_length() + 8 if brightest else 0
    pixels = np.asarray(image).astype(np.int64)
    most = 0xFFF if "I;12" in stored else 0xFFFF
    gray = ((pixels * 255 + most // 2) // most).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:
        gray = 255 - gray
    if (clear := image.info.get("transparency")) is not None:
        gray[pixels == clear] = 255
    return Image.fromarray(gray), int(pixels.max()).bit_length() if most == 0xFFFF else 0


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Convert any mode of 8 bits to L or RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _original_size(data: bytes, image: Image.Image) -> tuple[int, int]:
    """Give the width and height of a decoded image as the file has them: a JPEG may be decoded at a smaller scale."""
    if not data.startswith(b"\xff\xd8"):
        return image.size
    with suppress(ValueError, IndexError, struct.error):
        return _scan_jpeg(data)[:2]
    return Image.open(io.BytesIO(data)).size


def _is_colour(image: Image.Image) -> bool:
    """Tell whether the channels of an image differ, by more than a JPEG's noise, in 1 % of 256 pixels across it."""
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return False
    some = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST).convert("RGB"), np.int16)
    red, green, blue = some.reshape(256, 3).T
    return int(np.count_nonzero(np.maximum(np.abs(red - green), np.abs(green - blue)) > 16)) > 0.01 * 256


def _square(image: Image.Image, size: int, extent: Extent) -> Image.Image:
    """Resize the short side to `size` and crop the centre, in one pass over the pixels that are kept.

    The sizes and offsets are those of torchvision's Resize and CenterCrop.
    """
    width, height = extent
    short = min(width, height)
    wide, high = (int(size * side / short) for side in (width, height))
    left, top = (round((side - size) / 2) for side in (wide, high))
    x, y = width / wide, height / high
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _frequencies(pixels: Pixels) -> NDArray[np.float64]:
    """Give the 64 lowest frequencies of images, (N, S, S, C) -> (N, 64), as the same bits on every machine.

    The cosines are whole, and so small that all sums are below 2^24 downwards and below 2^53 across: none is rounded.
    """
    count, size, _, channels = pixels.shape
    down, across = _cosines(size, channels)
    rows: NDArray[np.float64] = (down @ pixels.reshape(count, size, -1).astype(np.float32)).astype(np.float64)
    return (rows @ across).reshape(count, 64)


@cache
def _cosines(size: int, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Give the 8 lowest rows of the DCT-II of `size` points, and the same where channels lie side by side."""
    frequency, position = np.arange(8)[:, None], np.arange(size)[None]
    cosines = 2**16 // size * np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    cosines = np.rint(cosines.round(8))  # half of 661 is 330.5 in any library's last bit
    # But for the first, each sums to none, so that a blank image has no other frequency than its mean.
    cosines[1:, size // 2] -= cosines[1:].sum(1)
    return cosines.astype(np.float32), np.repeat(cosines, channels, axis=1).T.copy()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: they inherit this and never get it, the parent gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    caught: list[int] = []
    # Blocked, for the processes that begin here; and caught, since another thread may be the one that is interrupted.
    former = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, former)
    if caught:
        raise KeyboardInterrupt


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@cache
def _reader(archive: Path) -> Reader:
    return Reader(archive)


@cache
def _table(images: Path) -> BinaryIO:
    return images.open("r+b")


def _prepare_chunk(
    archive: Path, images: Path, begin: int, size: int, channels: int, first: int, items: Sequence[Item]
) -> list[Outcome]:
    """Decode some images into their rows of the table, from row `first` on."""
    pixels = np.zeros((len(items), size, size, channels), np.uint8)
    reader = _reader(archive)
    found = [_prepare_item(reader, item, pixels[row], (first + row) % _LOOK == 0) for row, item in enumerate(items)]
    table = _table(images)
    table.seek(begin + first * pixels[0].nbytes)
    table.write(pixels.data)
    table.flush()
    pairs = zip(found, picture_hashes(pixels), strict=True)
    return [(image if image.reason else image._replace(picture=picture))[1:] for image, picture in pairs]


def _prepare_item(reader: Reader, item: Item, pixels: Pixels, look: bool) -> Prepared:
    """Decode one image, and give the hash of its bytes, or the reason why it cannot be used."""
    try:
        data = reader.read(item)
        decoded = examine(data, size=len(pixels), channels=pixels.shape[2])
    except ValueError as error:
        return Prepared(item, reason=str(error))
    pixels[...] = decoded.pixels
    size, colour = _original_size(data, decoded.image), _is_colour(decoded.image) if look else None
    return Prepared(item, hashlib.sha256(data).hexdigest(), "", "", decoded.bits, *size, colour)


def cores() -> int:
    """Count the cores that this process may use, which a container or a batch system can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
