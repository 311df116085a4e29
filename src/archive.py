"""A data set as one zip that is never extracted: what is safe to read, which files are images, and their bytes.

An image is a file of its own, or a row of an idx file (MNIST and its kin, http://yann.lecun.com/exdb/mnist/). What the
names of files and folders mean is for src/layout.py to say.
"""

import gzip
import math
import os
import re
import shutil
import struct
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from src.runtime import PipelineError, say
from src.zipped import Entry, UnsupportedZip, entries, read, read_spelling, unpack, verify

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .avif .heic .heif .hif "
        ".ppm .pgm .pbm .pnm .tga .jp2"
    ).split()
)
Kind = Literal["folder", "image", "idx", "hidden", "other"]

# Photographs hardly deflate, idx files about 1:6, and bombs near deflate's bound of 1:1032.
MAX_RATIO = 200
RATIO_MATTERS_FROM = 2**20
MAX_UNPACKED = 2**40
MAX_NAME, MAX_DEPTH = 1024, 32
"""Characters of a path and its folders; Windows allows 260 characters, Linux 4,096, neither has a bound on folders."""
_TRUST = "get the archive from a source that you trust"

_UNPACK = "unpack it with `7z x -oFOLDER {path}` and use download.source: folder with download.path: FOLDER"
_OTHER_FILES = {
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive, expected a zip or a tar; {_UNPACK}",
    b"rar!\x1a\x07": f"a RAR archive, expected a zip or a tar; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard, expected a zip or a tar; unpack it with `zstd -d {path}`",
    b"\x1f\x8b": "a gzip file, expected a zip or a tar; unpack it with `gzip -d {path}`",
    b"pk\x07\x08": "the first part of a zip; join all parts with `zip -s 0 NAME.zip --out whole.zip`",
    **dict.fromkeys([b"<!doctype html", b"<html"], "an HTML page, expected a zip archive; get it again"),
}
"""What a file is that begins so, in lower case, and what to do."""

# What reading damaged bytes raises; a name that is no UTF-8 is a ValueError.
_DAMAGE = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, ValueError)

_IDX = re.compile(
    r"^(?P<stem>.*)(?P<kind>images|labels)(?P<tail>[-.]idx[1-9]-ubyte(\.gz)?)$", re.IGNORECASE | re.DOTALL
)


# How the formats of IMAGE_SUFFIXES begin, for files without a suffix; TGA has no such mark.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP|II\*\0|MM\0\*|\0\0\0\x0cjP  |"
    rb".{4}ftyp(avi|hei|hev|mif|msf)|P[1-6]\s",
    re.DOTALL,
)
_SUFFIX = re.compile(r"[a-z]\w{0,11}")

# What systems and devices leave behind: macOS, Windows, Linux, the NAS of Synology and QNAP, Picasa, Python.
_HIDDEN = frozenset(
    (
        "__macosx|icon\r|network trash folder|temporary items|thevolumesettingsfolder|$recycle.bin|lost+found|"
        "system volume information|thumbs.db|thumbs.db:encryptable|ehthumbs.db|ehthumbs_vista.db|desktop.ini|found.000|"
        "@eadir|@tmp|@recycle|@recently-snapshot|@__thumb|#recycle|#snapshot|picasa.ini|zbthumbnail.info|__pycache__"
    ).split("|")
)


class Item(NamedTuple):
    """One image: where it lies, its class, and its official split ('' where there is none).

    entry: the file of the archive that holds it; row: its place there, where that is an idx file.
    """

    path: str
    label: str
    official: str
    entry: Entry
    row: int | None = None


@dataclass(frozen=True)
class Idx:
    """A pair of idx files: that of the images, and the label of each."""

    images: Entry
    labels: bytes


def check(path: Path) -> None:
    """Read the whole archive once and raise PipelineError unless it is a sound, safe, unencrypted zip.

    A guess at how its names are to be read is reported on stderr.
    """
    if (unpacked := sum(entry.size for entry in _entries(path))) > MAX_UNPACKED:
        raise PipelineError(
            f"{path} would unpack to {unpacked:,} bytes, expected at most {MAX_UNPACKED:,}: a zip bomb? {_TRUST}"
        )
    _check_directory(path)
    with path.open("rb", buffering=0) as file:
        for entry in _entries(path):
            try:
                verify(file, entry)
            except UnsupportedZip as error:
                raise PipelineError(f"{path} holds {entry.name!r}, {error}") from None
            except (*_DAMAGE, OSError) as error:
                raise PipelineError(f"{path} is damaged at {entry.name!r} ({error}); get the archive again") from None
    _report_guesses(path)


def contents(path: Path) -> Iterator[tuple[Kind, Entry]]:
    """Yield each entry of an archive, in its own order, with what it is by its name.

    A file without a suffix is an image only if its first bytes say so.
    """
    for entry in _entries(path):
        yield _kind(entry.name) or ("image" if _begins_as_image(path, entry) else "other"), entry


def is_hidden(name: str) -> bool:
    """Whether a path names, or lies in, something that a system or device left behind."""
    parts = name.lower().split("/")
    begins_with_dot = "/." in f"/{name}" and any(part.startswith(".") and part.strip(".") for part in parts)
    return begins_with_dot or not _HIDDEN.isdisjoint(parts) or name.endswith(":Zone.Identifier")


class Reader:
    """The bytes of an archive's images. Each process opens its own; idx files are streamed, never held whole."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._idx: dict[Entry, _Rows] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, item: Item) -> bytes:
        """Return one image as an encoded file; an image of an idx file becomes a PGM.

        Raises ValueError where the archive does not hold it whole.
        """
        if item.entry.link:
            raise ValueError("a symbolic link, not an image")
        try:
            if item.row is None:
                return read(self._file, item.entry)
            return self._read_row(item.entry, item.row)
        except _DAMAGE as error:
            raise ValueError(f"damaged in the archive: {error}") from None

    def _read_row(self, entry: Entry, row: int) -> bytes:
        # Rows are asked for in rising order, so that the file is unpacked once.
        if entry not in self._idx or row < self._idx[entry].next:
            self._idx[entry] = _Rows(self._file, entry)
        return self._idx[entry].read(row)


class _Rows:
    """An idx file of images that is unpacked as far as the row that is asked for."""

    def __init__(self, file: IO[bytes], entry: Entry) -> None:
        self._stream, self._name, self.next = _unpacked(file, entry), entry.name, 0
        _, self._rows, self._columns = _idx_header(self._stream, entry, 3)

    def read(self, row: int) -> bytes:
        """Give one image as a PGM."""
        rows, columns = self._rows, self._columns
        while self.next <= row:
            pixels = self._stream.read(rows * columns)
            self.next += 1
        if len(pixels) != rows * columns:
            raise ValueError("the idx file ends in the middle of the image")
        if "emnist" in self._name.lower():  # EMNIST's images lie transposed (Cohen et al. 2017, the data's page)
            pixels = bytes(pixels[column * rows + line] for line in range(columns) for column in range(rows))
            rows, columns = columns, rows
        return b"P5 %d %d 255\n" % (columns, rows) + pixels


def write(path: Path, files: Iterable[tuple[str, Path | bytes | IO[bytes]]]) -> None:
    """Write a zip, uncompressed, whose bytes depend on names and contents only.

    files: (name, content as a file, bytes or a stream); a name that ends with '/' is an empty folder.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            if name in archive.NameToInfo:
                if name.endswith("/"):
                    continue
                raise PipelineError(f"the file {name!r} is there twice, expected once; pack it again from its files")
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            if isinstance(content, bytes):
                archive.writestr(member, content)
            else:
                with content.open("rb") if isinstance(content, Path) else content as source:
                    member.file_size = source.seek(0, os.SEEK_END)
                    source.seek(0)
                    with archive.open(member, "w") as target:
                        shutil.copyfileobj(source, target, 2**20)


def _entries(path: Path) -> Iterator[Entry]:
    try:
        yield from entries(path)
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing; `dvc repro` makes it") from None
    except UnsupportedZip as error:
        raise PipelineError(f"{path} cannot be read: {error}") from None
    except _DAMAGE as error:
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
        other = next((other for magic, other in _OTHER_FILES.items() if start.startswith(magic)), None)
        found = other or f"no whole zip ({error}), expected a zip archive; get it again"
        raise PipelineError(f"{path} is {found.replace('{path}', str(path))}") from None


def _check_directory(path: Path) -> None:
    """Raise PipelineError unless each entry is safe, has a name of its own, and bytes of its own.

    Of a bomb, many share the same bytes (Fifield 2019). Spans are apart if and only if, each sorted by itself, no end
    lies behind the next start.
    """
    length = path.stat().st_size
    starts, ends, names = array("q"), array("q"), array("q")  # 24 bytes an entry
    for entry in _entries(path):
        _check_entry(path, entry, length)
        starts.append(entry.offset)
        ends.append(entry.end)
        if not entry.name.endswith("/"):
            names.append(hash(entry.name))
    overlap = next((start for start, end in zip(sorted(starts)[1:], sorted(ends), strict=False) if end > start), None)
    if overlap is not None:
        name = next(entry.name for entry in _entries(path) if entry.offset == overlap)
        raise PipelineError(f"{path} holds {name!r} in bytes that also belong to another file: a zip bomb? {_TRUST}")
    if repeated := {one for one, other in pairwise(sorted(names)) if one == other}:
        counts = Counter(entry.name for entry in _entries(path) if hash(entry.name) in repeated)
        name, count = counts.most_common(1)[0]
        if count > 1:  # else two names have the same hash
            raise PipelineError(f"{path} holds {name!r} {count} times, expected once; pack it again from its files")


def _report_guesses(path: Path) -> None:
    spelling = read_spelling(path)
    if spelling.guessed is not None:
        how = "valid UTF-8 and read as such" if spelling.encoding == "utf-8" else "read as cp437, the default of zips"
        say(f"{path} does not say how its names are encoded; they are {how}, for example {spelling.guessed!r}")
    if spelling.backslashes:
        name = next(entry.name for entry in _entries(path) if "/" in entry.name)
        say(f"{path} separates folders by backslashes; they are read as slashes, for example {name!r}")


def _check_entry(path: Path, entry: Entry, length: int) -> None:
    name = entry.name
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"^[A-Za-z]:", name) or "\0" in name:
        raise PipelineError(f"{path} holds the unsafe name {name!r}, expected names that stay inside the archive")
    if len(name) > MAX_NAME or len(parts) > MAX_DEPTH:
        raise PipelineError(
            f"{path} holds {name[:40]!r}…, a name of {len(name):,} characters and {len(parts):,} levels, expected at "
            f"most {MAX_NAME:,} and {MAX_DEPTH}"
        )
    if not 0 <= entry.offset <= entry.end <= length:
        raise PipelineError(f"{path} is damaged at {name!r} (it lies outside of the file); get the archive again")
    if name.endswith("/") and entry.size:
        raise PipelineError(f"{path} is damaged at {name!r} (a folder that holds bytes); get the archive again")
    if entry.flags & 0x1:
        raise PipelineError(f"{path} is encrypted (at {name!r}); unlock it and use download.source: folder")
    if entry.size > RATIO_MATTERS_FROM and entry.size > MAX_RATIO * entry.packed:
        raise PipelineError(
            f"{path} holds {name!r}, {entry.packed:,} bytes that unpack to {entry.size:,}, expected at most "
            f"{MAX_RATIO} to 1: a zip bomb? {_TRUST}"
        )


def _kind(name: str) -> Kind | None:
    """Tell what an entry is by its name; None where a file has no suffix."""
    if is_hidden(name):
        return "hidden"
    if name.endswith("/"):
        return "folder"
    stem, _, suffix = name.rpartition("/")[2].lower().rpartition(".")
    if stem and f".{suffix}" in IMAGE_SUFFIXES:
        return "image"
    if _IDX.match(name):
        return "idx"
    return "other" if stem and _SUFFIX.fullmatch(suffix) else None


def _begins_as_image(path: Path, entry: Entry) -> bool:
    try:
        with path.open("rb") as file:
            return _MAGIC.match(unpack(file, entry).read(16)) is not None
    except _DAMAGE:
        return False


def pair_idx(path: Path, files: list[Entry]) -> list[Idx]:
    """Pair each images file with its labels file; a copy of the same file (the same CRC) counts once.

    Raises PipelineError where the two do not fit together.
    """
    pairs: dict[tuple[int, int], Idx] = {}
    labels = {_idx_key(entry.name): entry for entry in files if "labels" in PurePosixPath(entry.name).name.lower()}
    for images in files:
        if images in labels.values() or _idx_key(images.name) not in labels or (images.crc, images.size) in pairs:
            continue
        named = labels[_idx_key(images.name)]
        with path.open("rb") as file:
            count = _idx_header(_unpacked(file, images), images, 3)[0]
            stream = _unpacked(file, named)
            expected = _idx_header(stream, named, 1)[0]
            classes = _read_labels(stream, named.name, expected)
        if not count == expected == len(classes):
            raise PipelineError(f"{images.name} has {count:,} images and its labels file {len(classes):,} labels")
        pairs[images.crc, images.size] = Idx(images, classes)
    return list(pairs.values())


def _read_labels(stream: IO[bytes], name: str, count: int) -> bytes:
    try:
        return stream.read(count + 1)  # one more than there should be, since only the end tests gzip's checksum
    except _DAMAGE as error:
        raise PipelineError(f"{name} is damaged ({error}); get the archive again") from None


def _idx_key(name: str) -> str:
    """What an images file and its labels file have in common: folder and stem."""
    found = _IDX.match(name)
    assert found is not None
    folder = name.rpartition("/")[0]
    # Some archives hold each file in a folder of the file's own name.
    if _IDX.match(folder):
        folder = folder.rpartition("/")[0] + "/*"
    return f"{folder}/{found['stem'].rpartition('/')[2]}".lower()


def _unpacked(file: IO[bytes], entry: Entry) -> IO[bytes]:
    stream = unpack(file, entry)
    return gzip.GzipFile(fileobj=stream) if entry.name.lower().endswith(".gz") else stream  # type: ignore[return-value]


def _idx_header(stream: IO[bytes], entry: Entry, dimensions: int) -> tuple[int, ...]:
    """Read the magic number (0, 0, 8 for unsigned bytes, number of dimensions) and the sizes, and test their product.

    A file promises its length here, before anything is allocated for it.
    """
    length = 4 * (1 + dimensions)
    try:
        header = stream.read(length)
    except (OSError, EOFError, zlib.error) as error:
        raise PipelineError(f"{entry.name} is no gzip file, though its name says so ({error})") from None
    if len(header) != length or header[:4] != bytes([0, 0, 8, dimensions]):
        raise PipelineError(
            f"{entry.name} is no idx file of {dimensions} dimensions of unsigned bytes: it begins with "
            f"{header[:4].hex(' ')}, expected 00 00 08 0{dimensions}"
        )
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    promised = length + math.prod(sizes)
    packed = entry.name.lower().endswith(".gz")
    if promised > max(RATIO_MATTERS_FROM, MAX_RATIO * entry.size) if packed else promised != entry.size:
        raise PipelineError(
            f"{entry.name} promises {' x '.join(f'{size:,}' for size in sizes)} bytes in its header and is "
            f"{entry.size:,} bytes long{' as gzip' if packed else ''}; get the archive again"
        )
    return sizes
