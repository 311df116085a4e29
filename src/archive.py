"""A data set as one zip that is never extracted: what is safe to read, which images it holds, and their bytes.

Two layouts are understood, at any depth: class folders (the folder that holds an image is its class; a train or test
folder above it is an official split), and the idx files of MNIST and its kin (http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import lzma
import re
import shutil
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from src.runtime import PipelineError

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .avif .ppm .pgm .pbm .pnm .tga .jp2".split()
)
OFFICIAL = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation"], "validation"),
    **dict.fromkeys(["test", "testing", "t10k"], "test"),
}

# Photographs hardly deflate, idx files about 1:6, and bombs near deflate's bound of 1:1032.
MAX_RATIO = 200
RATIO_MATTERS_FROM = 2**20
MAX_UNPACKED = 2**40
_TRUST = "get the archive from a source that you trust"

# What reading damaged bytes raises; a name that is no UTF-8 is a ValueError.
_DAMAGE = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError)

_IDX = re.compile(r"^(?P<stem>.*)(?P<kind>images|labels)(?P<tail>[-.]idx[13]-ubyte(\.gz)?)$", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Item:
    """One image: where it lies, its class (at first its folder), and its official split ('' where there is none)."""

    path: str
    label: str
    official: str
    member: str
    row: int | None = None


@dataclass(frozen=True)
class Listing:
    """What an archive holds: its images in its own order, the files that are no images, and folders without files."""

    items: list[Item]
    others: list[str]
    empty: list[str]


def check(path: Path) -> None:
    """Read the whole archive once and raise PipelineError unless it is a sound, safe, unencrypted zip."""
    with _open(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_UNPACKED:
            raise PipelineError(
                f"{path} would unpack to {unpacked:,} bytes, expected at most {MAX_UNPACKED:,}: a zip bomb? {_TRUST}"
            )
        for member in members:
            _check_member(path, member)
        for member in members:
            try:
                with archive.open(member) as stream:
                    while stream.read(2**20):
                        pass
            except (*_DAMAGE, OSError) as error:
                raise PipelineError(
                    f"{path} is damaged at {member.filename!r} ({error}); get the archive again"
                ) from None


def list_items(path: Path) -> Listing:
    """List what an archive holds; an image outside any folder has label ''.

    Raises PipelineError where idx files do not fit together.
    """
    with _open(path) as archive:
        names = [member.filename for member in archive.infolist() if not _hidden(member.filename)]
        files = [name for name in names if not name.endswith("/")]
        idx = _idx_items(archive, [name for name in files if _IDX.match(name)])
    files = [name for name in files if not _IDX.match(name)]
    folders = [_folder_item(name) for name in files if _is_image(name)]
    filled = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    return Listing(
        items=idx + folders,
        others=[name for name in files if not _is_image(name)],
        empty=[name for name in names if name.endswith("/") and name.rstrip("/") not in filled],
    )


def select(listing: Listing, *, include: str, classes: Mapping[str, str | None]) -> list[Item]:
    """Keep the items whose path matches the pattern `include`, and rename their folders to classes or leave them out.

    Raises PipelineError where nothing is kept, a named folder does not exist, or a kept one is empty.
    """
    classes = {unicodedata.normalize("NFC", folder): name for folder, name in classes.items()}
    items = [item for item in listing.items if fnmatchcase(item.path, include)]
    folders = sorted({item.label for item in items})
    if not items:
        raise PipelineError(f"no image of the archive matches prepare.include {include!r}, of {len(listing.items):,}")
    empty = [name for name in listing.empty if fnmatchcase(name, include)]
    names = {name: name.rstrip("/").rpartition("/")[2] for name in empty}
    if unknown := sorted(classes.keys() - set(folders) - set(names.values())):
        raise PipelineError(f"prepare.classes names the folder {unknown[0]!r}; the archive has {_some(folders)}")
    if kept := [name for name in empty if classes.get(names[name], name) is not None]:
        raise PipelineError(
            f"the class folder {kept[0]!r} is empty; put images into it, delete it, or leave it out with "
            f"prepare.classes: {{{names[kept[0]]}: null}}"
        )
    labels = {folder: classes.get(folder, folder) for folder in folders}
    kept_labels = {label for label in labels.values() if label}
    if len(kept_labels) < 2:
        raise PipelineError(
            f"the archive has {len(kept_labels)} class ({_some(folders)}), expected at least 2 to tell apart"
        )
    return [replace(item, label=label) for item in items if (label := labels[item.label]) is not None]


class Reader:
    """The bytes of an archive's images. Each process opens its own; idx files are streamed, never held whole."""

    def __init__(self, path: Path) -> None:
        self._archive = _open(path)
        self._idx: dict[str, tuple[IO[bytes], int, int]] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for stream, _rows, _columns in self._idx.values():
            stream.close()
        self._archive.close()

    def read(self, item: Item) -> bytes:
        """Return one image as an encoded file; an image of an idx file becomes a PGM.

        Raises ValueError where the archive does not hold it whole.
        """
        try:
            if item.row is None:
                return self._archive.read(item.member)
            return self._read_row(item.member, item.row)
        except _DAMAGE as error:
            raise ValueError(f"damaged in the archive: {error}") from None

    def _read_row(self, member: str, row: int) -> bytes:
        if member not in self._idx:
            stream = _open_member(self._archive, member)
            _count, rows, columns = _idx_header(stream, member, 3)
            self._idx[member] = (stream, rows, columns)
        stream, rows, columns = self._idx[member]
        # Rows are asked for in rising order, so that a seek only reads on and no stream is unpacked twice.
        stream.seek(16 + row * rows * columns)
        pixels = stream.read(rows * columns)
        if len(pixels) != rows * columns:
            raise ValueError("the idx file ends in the middle of the image")
        if "emnist" in member.lower():  # EMNIST's files hold each image transposed (Cohen et al. 2017, the data's page)
            pixels = bytes(pixels[column * rows + line] for line in range(columns) for column in range(rows))
            rows, columns = columns, rows
        return b"P5 %d %d 255\n" % (columns, rows) + pixels


def write(path: Path, files: Iterable[tuple[str, Path | bytes]]) -> None:
    """Write a zip, uncompressed, whose bytes depend on names and contents only.

    files: (name, file or bytes); a name that ends with '/' is an empty folder.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            if isinstance(content, bytes):
                archive.writestr(member, content)
            else:
                member.file_size = content.stat().st_size
                with content.open("rb") as source, archive.open(member, "w") as target:
                    shutil.copyfileobj(source, target, 2**20)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing; `dvc repro` makes it") from None
    except _DAMAGE as error:
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
        found = "an HTML page" if start.startswith((b"<!doctype html", b"<html")) else f"no whole zip ({error})"
        raise PipelineError(f"{path} is {found}, expected a zip archive; get it again") from None


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    # zipfile cuts a name at a NUL and turns the backslashes of Windows; the name as stored is what is judged.
    name = member.orig_filename
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"^[A-Za-z]:", name) or "\0" in name:
        raise PipelineError(f"{path} holds the unsafe name {name!r}, expected names that stay inside the archive")
    if member.flag_bits & 0x1:
        raise PipelineError(f"{path} is encrypted (at {name!r}); unlock it and use download.source: folder")
    if member.file_size > RATIO_MATTERS_FROM and member.file_size > MAX_RATIO * member.compress_size:
        raise PipelineError(
            f"{path} holds {name!r}, {member.compress_size:,} bytes that unpack to {member.file_size:,}, expected at "
            f"most {MAX_RATIO} to 1: a zip bomb? {_TRUST}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "Icon\r") for part in name.split("/"))


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES or (path.suffix == "" and len(path.parts) > 1)


def _folder_item(name: str) -> Item:
    path = name.replace("\r", "\\r")  # pandas writes a lone \r as it is, and takes it for a row's end on reading
    *above, folder = PurePosixPath(path).parts[:-1] or ("",)
    official = next((found for part in reversed(above) if (found := _official(part))), "")
    return Item(path=path, label=unicodedata.normalize("NFC", folder), official=official, member=name)


def _official(folder: str) -> str:
    """Seen on Kaggle: train, Training, test_set, seg_train, val."""
    words = re.split(r"[-_. ]", folder.lower())
    return next((OFFICIAL[word] for word in words if word in OFFICIAL), "")


def _idx_items(archive: zipfile.ZipFile, names: list[str]) -> list[Item]:
    """Pair each images file with its labels file; a copy of the same file (the same CRC) counts once."""
    items: list[Item] = []
    seen: set[tuple[int, int]] = set()
    labels = {_idx_key(name): name for name in names if "labels" in PurePosixPath(name).name.lower()}
    for name in names:
        if name in labels.values() or _idx_key(name) not in labels:
            continue
        member = archive.getinfo(name)
        if (member.CRC, member.file_size) in seen:
            continue
        seen.add((member.CRC, member.file_size))
        with _open_member(archive, name) as stream:
            count = _idx_header(stream, name, 3)[0]
        with _open_member(archive, labels[_idx_key(name)]) as stream:
            expected = _idx_header(stream, labels[_idx_key(name)], 1)[0]
            classes = _read_labels(stream, labels[_idx_key(name)], expected)
        if not count == expected == len(classes):
            raise PipelineError(f"{name} has {count:,} images and its labels file {len(classes):,} labels")
        official = _official(PurePosixPath(name).name)
        items += [Item(f"{name}#{row}", str(label), official, name, row) for row, label in enumerate(classes)]
    return items


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


def _open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    stream = archive.open(name)
    return gzip.GzipFile(fileobj=stream) if name.lower().endswith(".gz") else stream  # type: ignore[return-value]


def _idx_header(stream: IO[bytes], name: str, dimensions: int) -> tuple[int, ...]:
    """Read the magic number (0, 0, 8 for unsigned bytes, number of dimensions) and the sizes."""
    try:
        header = stream.read(4 * (1 + dimensions))
    except (OSError, EOFError, zlib.error) as error:
        raise PipelineError(f"{name} is no gzip file, though its name says so ({error})") from None
    if len(header) != 4 * (1 + dimensions) or header[:4] != bytes([0, 0, 8, dimensions]):
        raise PipelineError(f"{name} is no idx file of {dimensions} dimensions of unsigned bytes")
    return struct.unpack(f">{dimensions}I", header[4:])
