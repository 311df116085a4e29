"""A zip read as a stream: its directory entry by entry, its files one by one, in memory that does not grow with either.

zipfile holds the whole directory, in each process that reads: 1 kB a file. The layout is that of PKWARE's APPNOTE.TXT
6.3.10; whatever it cannot mean raises BadZipFile, as zipfile does.
"""

import bz2
import io
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_LZMA, ZIP_STORED, BadZipFile

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_FILE = struct.Struct("<4s5H3L2H")

_FULL = 0xFFFFFFFF
"""A number that stands in a further field, of 64 bits."""

_UTF8 = 0x800
_UNICODE_PATH = 0x7075
"""The flag of a name in UTF-8, and Info-ZIP's extra field that repeats a name in UTF-8 (APPNOTE.TXT 4.4.4, 4.6.9)."""

_UNIX, _WINDOWS = 3, frozenset([0, 10, 11, 14])
"""Systems that an entry may come from; Windows, whose names hold no backslash, is FAT, NTFS, MVS and VFAT."""

_PIECE = 2**20
_SPARE = 256
"""More than the name and the other fields of a file mostly take."""

_XZ = 95
_OTHER_METHODS = {1: "Shrink", 6: "Implode", 9: "Deflate64", 93: "Zstandard", 97: "WavPack", 98: "PPMd"}
_MAX_DICTIONARY = 2**28
"""Bytes of memory that an LZMA stream may ask for; the highest level of 7-Zip takes 2^26."""

_ENDS = "it ends in the middle"
_CHANGED = "its length or its CRC-32 is not the one of the directory"


class UnsupportedZip(BadZipFile):
    """A sound zip that cannot be read here; the text says why and what to do."""


class Entry(NamedTuple):
    """A file of an archive, as its directory describes it.

    packed, size: its bytes before and after unpacking; offset: where its header begins; link: it is a symbolic link.
    """

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    link: bool

    @property
    def end(self) -> int:
        """Where its content ends, at the earliest: its header may hold a longer name and further fields."""
        return self.offset + _FILE.size + self.packed


class Spelling(NamedTuple):
    """How to read the names of an archive.

    encoding: of those that do not say it themselves, of which `guessed` is the first, or None; backslashes: whether
    they separate folders.
    """

    encoding: str
    guessed: str | None
    backslashes: bool


def entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of an archive, in the order of its directory."""
    spelling = read_spelling(path)
    with path.open("rb") as file:
        for raw, system, attributes, flags, method, crc, packed, size, offset, further in _read_directory(file):
            name = _decode(raw, flags, further) or raw.decode(spelling.encoding)
            if spelling.backslashes:
                name = name.replace("\\", "/")
            link = system == _UNIX and attributes >> 28 == 0xA
            yield Entry(name, flags, method, crc, packed, size, offset, link)


def read_spelling(path: Path) -> Spelling:
    """Decide once for the whole archive how its names are encoded and separated.

    A name is UTF-8 where its flag or a Unicode Path field says so. All others are UTF-8 if all of them can be, as
    macOS writes them, or else cp437, the format's default. Backslashes are separators where no other is used, or where
    only Windows has written them.
    """
    status = path.stat()
    return _read_spelling(path, status.st_mtime_ns, status.st_size)


@lru_cache(8)
def _read_spelling(path: Path, _changed: int, _size: int) -> Spelling:
    unmarked, encoding = None, "utf-8"
    slashes = backslashes = foreign = False
    with path.open("rb") as file:
        for name, system, _, flags, *_, further in _read_directory(file):
            if _decode(name, flags, further) is None:
                unmarked = unmarked or name
                encoding = encoding if _is_utf8(name) else "cp437"
            slashes = slashes or b"/" in name
            if b"\\" in name:
                backslashes, foreign = True, foreign or system not in _WINDOWS
    return Spelling(encoding, unmarked and unmarked.decode(encoding), backslashes and not (slashes and foreign))


def unpack(file: IO[bytes], entry: Entry) -> IO[bytes]:
    """Open one file of an archive as a stream to read on, which checks its length and CRC-32 at its end."""
    return io.BufferedReader(_Unpacked(file, entry), _PIECE)


def verify(file: IO[bytes], entry: Entry) -> None:
    """Unpack one file of an archive and forget it, in memory that does not grow with it."""
    if max(entry.packed, entry.size) <= _PIECE:
        read(file, entry)
    else:
        stream = unpack(file, entry)
        while stream.read(_PIECE):
            pass


def read(file: IO[bytes], entry: Entry) -> bytes:
    """Read one file of an archive whole, in half the time that a stream takes for a small one.

    It is read together with the header before it, whose length is guessed: best from a file without a buffer.
    """
    _check_method(entry)
    file.seek(entry.offset)
    found = _exactly(file, _FILE.size) if entry.packed > _PIECE else file.read(_FILE.size + _SPARE + entry.packed)
    begin = _content_begins(found)
    if begin + entry.packed > len(found):
        file.seek(entry.offset + begin)
        begin, found = 0, _exactly(file, entry.packed)
    content = found[begin : begin + entry.packed]
    if decompressor := _decompressor(entry):
        content = _decompress(decompressor, content, entry.size + 1)  # no more than it may have
    if (len(content), zlib.crc32(content)) != (entry.size, entry.crc):
        raise BadZipFile(_CHANGED)
    return content


class _Unpacked(io.RawIOBase):
    """Several may read of one archive by turns: each knows its own place."""

    def __init__(self, file: IO[bytes], entry: Entry) -> None:
        self._place = _find_content(file, entry)
        self._decompressor = _decompressor(entry)
        self._file, self._entry, self._left = file, entry, entry.packed
        self._size = self._crc = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._next(len(buffer))
        buffer[: len(piece)] = piece
        self._size, self._crc = self._size + len(piece), zlib.crc32(piece, self._crc)
        is_over = not piece and (self._size, self._crc) != (self._entry.size, self._entry.crc)
        if is_over or self._size > self._entry.size:
            raise BadZipFile(_CHANGED)
        return len(piece)

    def _next(self, most: int) -> bytes:
        if not self._decompressor:
            return self._pull(most)
        while not self._decompressor.eof:
            needed = self._decompressor.needs_input
            packed = self._pull(_PIECE) if needed else b""
            piece = _decompress(self._decompressor, packed, most)
            if piece or (needed and not packed):
                return piece
        return b""

    def _pull(self, most: int) -> bytes:
        """Take some more of what is packed."""
        self._file.seek(self._place)
        packed = _exactly(self._file, min(most, self._left))
        self._place, self._left = self._place + len(packed), self._left - len(packed)
        return packed


class _Decompressor(Protocol):
    """What the decompressors of bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Inflate:
    """Deflate as one of them."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


class _Lzma:
    """LZMA as a zip holds it: version, length of the properties, the properties, and the raw stream (5.8.8)."""

    _HEADER = struct.Struct("<HHBL")

    def __init__(self, size: int) -> None:
        self._size, self._begin = size, b""
        self._stream: lzma.LZMADecompressor | None = None

    @property
    def eof(self) -> bool:
        return self._stream is not None and self._stream.eof

    @property
    def needs_input(self) -> bool:
        return self._stream is None or self._stream.needs_input

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        if self._stream:
            return self._stream.decompress(data, max_length)
        self._begin += data
        if len(self._begin) < self._HEADER.size:
            return b""
        _, length, packed, dictionary = self._HEADER.unpack_from(self._begin)
        dictionary = min(dictionary, max(self._size, 2**12))  # a longer one is never filled
        if length != 5 or packed >= 225:
            raise lzma.LZMAError("unknown properties of LZMA")
        if dictionary > _MAX_DICTIONARY:
            raise lzma.LZMAError(f"unpacking takes {dictionary:,} bytes of memory, more than {_MAX_DICTIONARY:,}")
        properties = {"lc": packed % 9, "lp": packed // 9 % 5, "pb": packed // 45, "dict_size": dictionary}
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, **properties}])
        return self._stream.decompress(self._begin[self._HEADER.size :], max_length)


_METHODS: dict[int, Callable[[Entry], _Decompressor | None]] = {
    ZIP_STORED: lambda _: None,
    ZIP_DEFLATED: lambda _: _Inflate(),
    ZIP_BZIP2: lambda _: bz2.BZ2Decompressor(),
    ZIP_LZMA: lambda entry: _Lzma(entry.size),
    _XZ: lambda _: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_DICTIONARY),
}


def _decompressor(entry: Entry) -> _Decompressor | None:
    return _METHODS[entry.method](entry)


def _decompress(decompressor: _Decompressor, packed: bytes, most: int) -> bytes:
    try:
        return decompressor.decompress(packed, most)
    except (zlib.error, lzma.LZMAError, OSError) as error:  # bz2 knows no error of its own
        raise BadZipFile(str(error)) from None


def _find_directory(file: IO[bytes]) -> tuple[int, int, int]:
    """Give where the directory begins and ends, and by how much all places are shifted by what lies before the zip."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _END.size - 2**16))  # behind it comes a comment, which may be empty
    tail = file.read()
    at = _find_end(tail)
    _, disk, *_, size, offset, _ = _END.unpack_from(tail, at)
    if 0 < disk < 0xFFFF:
        raise UnsupportedZip(f"it is the last of {disk + 1} parts; join them with `zip -s 0 NAME.zip --out whole.zip`")
    end = length - len(tail) + at
    file.seek(max(0, end - _LOCATOR64.size))
    if (locator := file.read(_LOCATOR64.size)).startswith(b"PK\x06\x07") and len(locator) == _LOCATOR64.size:
        end -= _LOCATOR64.size + _END64.size
        file.seek(max(0, end))
        *_, size, offset = _read(file, _END64, b"PK\x06\x06")
    if (begin := end - size) < 0:
        raise BadZipFile("its directory begins before the file")
    return begin, end, begin - offset


def _find_end(tail: bytes) -> int:
    """Find the end record: the last one whose comment ends with the file, since the comment may hold another."""
    at = last = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _END.size + 4))
    if last < 0:
        raise BadZipFile("it has no directory at its end")
    while at >= 0 and at + _END.size + _END.unpack_from(tail, at)[-1] != len(tail):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    return at if at >= 0 else last


def _find_content(file: IO[bytes], entry: Entry) -> int:
    """Tell where the content of an entry begins, behind its own header."""
    _check_method(entry)
    file.seek(entry.offset)
    return entry.offset + _content_begins(_exactly(file, _FILE.size))


def _check_method(entry: Entry) -> None:
    if entry.method not in _METHODS:
        method = _OTHER_METHODS.get(entry.method, f"method {entry.method}")
        raise UnsupportedZip(
            f"compressed by {method}, expected Deflate, LZMA, XZ or bzip2; unpack the archive and set download.path to "
            "the folder"
        )


def _content_begins(header: bytes) -> int:
    """Tell how long the header of a file is, which may hold other fields than the directory."""
    *_, named, further = _unpacked(header, _FILE, b"PK\x03\x04")
    return _FILE.size + int(named) + int(further)


def _read_directory(file: IO[bytes]) -> Iterator[tuple[Any, ...]]:
    """Yield name, system, attributes, flags, method, CRC, packed, size, offset and further fields of each entry."""
    place, end, shift = _find_directory(file)
    file.seek(place)
    while place < end:
        _, made_by, _, flags, method, _, _, crc, packed, size, *lengths, _, _, attributes, offset = _read(
            file, _ENTRY, b"PK\x01\x02"
        )
        named, further, _ = lengths
        texts = _exactly(file, sum(lengths))
        fields = texts[named : named + further]
        if _FULL in (size, packed, offset):
            wide = _wide_numbers(fields)
            size, packed, offset = (next(wide) if number == _FULL else number for number in (size, packed, offset))
        yield texts[:named], made_by >> 8, attributes, flags, method, crc, packed, size, offset + shift, fields
        place += _ENTRY.size + len(texts)


def _decode(name: bytes, flags: int, further: bytes) -> str | None:
    """Decode a name whose encoding is known."""
    if flags & _UTF8:
        return name.decode()
    if b"up" in further:  # its number in bytes; a Unicode Path field of another name is out of date (4.6.9)
        for kind, content in _fields(further):
            if kind == _UNICODE_PATH and content[:5] == struct.pack("<BL", 1, zlib.crc32(name)):
                return content[5:].decode()
    return name.decode() if name.isascii() else None


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fields(further: bytes) -> Iterator[tuple[int, bytes]]:
    while len(further) >= 4:
        kind, length = struct.unpack_from("<HH", further)
        yield kind, further[4 : 4 + length]
        further = further[4 + length :]


def _wide_numbers(further: bytes) -> Iterator[int]:
    """Yield the numbers of the field that is for those of 64 bits."""
    for kind, content in _fields(further):
        if kind == 1:
            yield from (number for (number,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8]))
    raise BadZipFile("a number of 64 bits is missing in the directory")


def _read(file: IO[bytes], layout: struct.Struct, signature: bytes) -> tuple[Any, ...]:
    return _unpacked(_exactly(file, layout.size), layout, signature)


def _unpacked(data: bytes, layout: struct.Struct, signature: bytes) -> tuple[Any, ...]:
    if len(data) < layout.size:
        raise BadZipFile(_ENDS)
    values = layout.unpack_from(data)
    if values[0] != signature:
        raise BadZipFile("something else stands where its directory, or a file, should begin")
    return values


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise BadZipFile(_ENDS)
    return content
