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
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from src.archive import Item, Reader
from src.runtime import PipelineError

Pixels = NDArray[np.uint8]
Shape = tuple[int, int, int]

MAX_PIXELS = 2**27
"""Larger images are rejected before they are decoded: 134 million pixels are 400 MB of RGB."""

# Photographs and scans; Pillow would hand EPS to a Ghostscript that another machine may not have.
_FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM TGA TIFF WEBP".split()

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_CHUNK = 64


@dataclass(frozen=True)
class Prepared:
    """One image of the archive: its pixels and hashes, or the reason why it has none."""

    item: Item
    pixels: Pixels | None = None
    sha256: str = ""
    picture: str = ""
    reason: str = ""


def decode(data: bytes, *, size: int, channels: int) -> Pixels:
    """Decode one encoded image to (size, size, channels) uint8; of an animation the first frame.

    Raises ValueError with the reason where the bytes are no whole image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; neither changes the pixels
            return np.asarray(_square(_convert(_upright(_open(data)), channels), size)).reshape(size, size, channels)
    except UnidentifiedImageError:
        raise ValueError("no image in a known format") from None
    except (Image.DecompressionBombError, ValueError, OSError) as error:
        raise ValueError(str(error)) from None
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes: SyntaxError, struct.error, …
        raise ValueError(f"damaged: {type(error).__name__} while decoding") from None


def picture_hash(pixels: Pixels) -> str:
    """Hash what an image shows, as 16 hexadecimal digits that survive recompression and resizing.

    The signs of the 8x8 lowest frequencies of the 32x32 gray image against their median (pHash, Zauner 2010). The
    cosines are integers, so that every machine gets the same bits. pixels: (S, S, C) uint8.
    """
    gray = Image.fromarray(pixels[..., 0]) if pixels.shape[-1] == 1 else Image.fromarray(pixels).convert("L")
    thumbnail = np.asarray(gray.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.int64)
    frequencies = (_cosines() @ thumbnail @ _cosines().T).ravel()
    bits = frequencies[1:] > np.median(frequencies[1:])  # the first is the mean brightness
    return np.packbits(np.concatenate([[False], bits])).tobytes().hex()


def prepare(
    archive: Path, items: Sequence[Item], *, size: int, channels: int, workers: int | None = None
) -> Iterator[Prepared]:
    """Decode the items of an archive in all cores and yield them in their order, whatever the number of workers.

    Only a few chunks of images are held at a time, so memory does not grow with the number of images.
    """
    workers = workers or _cores()
    context = get_context("spawn")  # a fork would copy the progress bar's thread, which Python 3.12 warns of
    work = partial(_prepare_chunk, archive, size, channels)
    chunks = (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        waiting: deque[Future[list[Prepared]]] = deque()
        try:
            for chunk in chunks:
                with _interrupts_held():
                    waiting.append(pool.submit(work, chunk))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise PipelineError("a decoding process was killed, most likely for want of memory; free some") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def save(
    prepared: Iterable[Prepared], items: Sequence[Item], images: Path, index: Path, shape: Shape
) -> list[Prepared]:
    """Write what `prepare` yields, image by image, and return the rejected ones.

    images: .npy, uint8 (N, size, size, channels), shape = (size, size, channels); index: .csv with a row for each of
    the N images: path, label, official, sha256, picture. Raises PipelineError where a class has lost all its images.
    """
    rejected: list[Prepared] = []
    labels: set[str] = set()
    with images.open("wb") as table, index.open("w", newline="", encoding="utf-8") as rows:
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["path", "label", "official", "sha256", "picture"])
        _write_header(table, (len(items), *shape))
        for image in prepared:
            if image.pixels is None:
                rejected.append(image)
                continue
            labels.add(image.item.label)
            table.write(image.pixels.tobytes())
            writer.writerow([image.item.path, image.item.label, image.item.official, image.sha256, image.picture])
        table.seek(0)
        _write_header(table, (len(items) - len(rejected), *shape))
    if lost := sorted({item.label for item in items if item.label} - labels):
        reason = next(image for image in rejected if image.item.label == lost[0])
        raise PipelineError(f"no image of class {lost[0]!r} can be read, the first is {_tell(reason)}")
    return rejected


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


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write a .npy header, whose length numpy keeps the same for every number of rows."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as EXIF asks for; ImageOps.exif_transpose also rewrites all other tags, and fails at odd ones."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data says nothing about the pixels, which are whole
        return image
    return image if turn is None else image.transpose(turn)


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


def _square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and crop the centre, in one pass over the pixels that are kept.

    The sizes and offsets are those of torchvision's Resize and CenterCrop.
    """
    width, height = image.size
    short = min(width, height)
    wide, high = (int(size * side / short) for side in (width, height))
    left, top = (round((side - size) / 2) for side in (wide, high))
    x, y = width / wide, height / high
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


@cache
def _cosines() -> NDArray[np.int64]:
    """Give the 8 lowest rows of the 32-point DCT-II, as integers."""
    frequency, position = np.arange(8)[:, None], np.arange(32)[None]
    cosines: NDArray[np.int64] = np.rint(4096 * np.cos(np.pi * frequency * (2 * position + 1) / 64)).astype(np.int64)
    return cosines


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


def _prepare_chunk(archive: Path, size: int, channels: int, items: Sequence[Item]) -> list[Prepared]:
    return [_prepare_item(_reader(archive), item, size, channels) for item in items]


def _prepare_item(reader: Reader, item: Item, size: int, channels: int) -> Prepared:
    try:
        if not item.label:
            raise ValueError("lies in no class folder")
        data = reader.read(item)
        pixels = decode(data, size=size, channels=channels)
    except ValueError as error:
        return Prepared(item, reason=str(error))
    return Prepared(item, pixels, hashlib.sha256(data).hexdigest(), picture_hash(pixels))


def _cores() -> int:
    """Count the cores that this process may use, which a container or a batch system can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
