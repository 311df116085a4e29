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
from itertools import islice, pairwise
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

_PHOTOGRAPH = 128
"""A side, in pixels, at which a photograph can be recognised by a network of ours."""

_LOOK = 4
"""Of so many images one is looked at for colour, which takes 14 us, a twentieth of what a small photograph takes."""

_CHUNK, _CHUNK_BYTES = 128, 2**21
"""What a process works on at once, at most: images, and their pixels."""


class Prepared(NamedTuple):
    """One image of the archive: the hashes of its bytes and of its picture, or the reason why it cannot be used.

    width, height: of the original, in pixels; colour: whether it is more than shades of gray, None where nobody looked.
    """

    item: Item
    sha256: str = ""
    picture: str = ""
    reason: str = ""
    width: int = 0
    height: int = 0
    colour: bool | None = None


class SizeError(ValueError):
    """An image of more pixels than are allowed."""


Outcome = tuple[str, str, str, int, int, bool | None]
"""What a process sends back of an image: all that is Prepared but the item, which is there already."""


def decode(data: bytes, *, size: int, channels: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode one encoded image to (size, size, channels) uint8; of an animation the first frame.

    Raises ValueError with the reason where the bytes are no whole image, and SizeError, which is one, before decoding.
    """
    return _decode(data, size, channels, max_pixels)[0]


def _decode(data: bytes, size: int, channels: int, max_pixels: int) -> tuple[Pixels, Image.Image]:
    """Do what `decode` does, and give also the image that was decoded, before all but its scale was changed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; neither changes the pixels
            image, turn, extent = _open(data, size, max_pixels)
            upright = _convert(image if turn is None else image.transpose(turn), channels)
            extent = extent if upright.size == image.size else extent[::-1]
            pixels = np.asarray(_square(upright, size, extent)).reshape(size, size, channels)
            return pixels, image
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
    where a class has lost all its images.
    """
    row = size * size * channels
    broken: list[int] = []
    sound: set[str] = set()
    failed: dict[str, Prepared] = {}
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
                writer.writerow([image.item.path, image.item.label, image.item.official, image.sha256, image.picture])
            yield image
        _close_gaps(table, begin, row, broken, count)
        _write_header(table, (count - len(broken), size, size, channels))
    if lost := sorted(failed.keys() - sound):
        raise PipelineError(f"no image of class {lost[0]!r} can be read, the first is {_tell(failed[lost[0]])}")


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


def _open(data: bytes, size: int, max_pixels: int) -> tuple[Image.Image, Image.Transpose | None, Extent]:
    """Decode an image, and give how it has to be turned, and its extent.

    A JPEG is decoded at the smallest scale of 1, 1/2, 1/4 and 1/8 that leaves both sides at least `size` long. A side
    of 225 pixels at half the scale is 113 pixels, of which the last one is half covered: 112.5.
    """
    if not data:
        raise ValueError("the file is empty")
    with suppress(ValueError, IndexError, struct.error):  # whether an odd file can be used is for Pillow to say
        return _open_jpeg(data, size, max_pixels)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > max_pixels:
        raise SizeError(f"{image.width} x {image.height} pixels, more than {max_pixels:,}")
    drafted = image.draft(None, (size, size)) if image.format == "JPEG" else None
    image.load()
    return image, _turn(image.getexif), drafted[1][2:] if drafted else image.size


def _open_jpeg(data: bytes, size: int, max_pixels: int) -> tuple[Image.Image, Image.Transpose | None, Extent]:
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
    return image, _turn(partial(_read_exif, exif)) if exif else None, (width / scale, height / scale)


def _scan_jpeg(data: bytes) -> tuple[int, int, bytes]:
    """Read the segments of a JPEG up to its pixels: give width, height, and EXIF data, or b'' (ITU-T T.81, annex B).

    Raises ValueError, IndexError or struct.error for what is no JPEG of three colours, and for what may change its
    pixels or its turn in other ways, such as XMP.
    """
    if not data.startswith(b"\xff\xd8"):
        raise ValueError("no JPEG")
    place, width, height, exif = 2, 0, 0, b""
    while (marker := data[place : place + 2]) != b"\xff\xda":
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


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Convert any mode to L or RGB."""
    if image.mode.startswith("I"):
        image = _sixteen_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8; Pillow's own conversion clips them at 255 instead."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("32-bit pixels, whose range is unknown")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


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
    cosines = np.rint(2**16 // size * np.cos(np.pi * frequency * (2 * position + 1) / (2 * size)))
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
    hashes = picture_hashes(pixels)
    return [outcome if outcome[2] else (outcome[0], hashes[row], *outcome[2:]) for row, outcome in enumerate(found)]


def _prepare_item(reader: Reader, item: Item, pixels: Pixels, look: bool) -> Outcome:
    """Decode one image, and give the hash of its bytes, or the reason why it cannot be used."""
    try:
        data = reader.read(item)
        pixels[...], image = _decode(data, len(pixels), pixels.shape[2], MAX_PIXELS)
    except ValueError as error:
        return "", "", str(error), 0, 0, None
    return hashlib.sha256(data).hexdigest(), "", "", *_original_size(data, image), _is_colour(image) if look else None


def cores() -> int:
    """Count the cores that this process may use, which a container or a batch system can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
