"""A zip read as a stream: its directory entry by entry, its files one by one, in memory that does not grow with either.

zipfile holds the whole directory, in each process that reads: 1 kB a file. The layout is that of PKWARE's APPNOTE.TXT
6.3.10; whatever it cannot mean raises BadZipFile, as zipfile does.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_FILE = struct.Struct("<4s5H3L2H")

_FULL = 0xFFFFFFFF
"""A number that stands in a further field, of 64 bits."""

_PIECE = 2**20
_SPARE = 256
"""More than the name and the other fields of a file mostly take."""

_ENDS = "it ends in the middle"
_CHANGED = "its length or its CRC-32 is not the one of the directory"


class Entry(NamedTuple):
    """A file of an archive, as the directory tells it. packed, size: its bytes before and after unpacking."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


def entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of an archive, in the order of its directory."""
    with path.open("rb") as file:
        place, end, shift = _find_directory(file)
        file.seek(place)
        while place < end:
            entry, length = _read_entry(file, shift)
            place += length
            yield entry


def unpack(file: IO[bytes], entry: Entry) -> IO[bytes]:
    """Open one file of an archive as a stream to read on, which checks its length and CRC-32 at its end."""
    return io.BufferedReader(_Unpacked(file, entry), _PIECE)


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
    if entry.method == ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, entry.size + 1)  # no more than it may have
    if (len(content), zlib.crc32(content)) != (entry.size, entry.crc):
        raise BadZipFile(_CHANGED)
    return content


class _Unpacked(io.RawIOBase):
    """Several may read of one archive by turns: each knows its own place."""

    def __init__(self, file: IO[bytes], entry: Entry) -> None:
        self._place = _find_content(file, entry)
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if entry.method == ZIP_DEFLATED else None
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
        if not self._inflate:
            return self._pull(most)
        piece = b""
        while not piece and (packed := self._inflate.unconsumed_tail or self._pull(_PIECE)):
            piece = self._inflate.decompress(packed, most)
        return piece

    def _pull(self, most: int) -> bytes:
        """Take some more of what is packed."""
        self._file.seek(self._place)
        packed = _exactly(self._file, min(most, self._left))
        self._place, self._left = self._place + len(packed), self._left - len(packed)
        return packed


def _find_directory(file: IO[bytes]) -> tuple[int, int, int]:
    """Give where the directory begins and ends, and by how much all places are shifted by what lies before the zip."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _END.size - 2**16))  # behind it comes a comment, which may be empty
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise BadZipFile("it has no directory at its end")
    *_, size, offset, _ = _END.unpack_from(tail, at)
    end = length - len(tail) + at
    file.seek(max(0, end - _LOCATOR64.size))
    if (locator := file.read(_LOCATOR64.size)).startswith(b"PK\x06\x07") and len(locator) == _LOCATOR64.size:
        end -= _LOCATOR64.size + _END64.size
        file.seek(max(0, end))
        *_, size, offset = _read(file, _END64, b"PK\x06\x06")
    if (begin := end - size) < 0:
        raise BadZipFile("its directory begins before the file")
    return begin, end, begin - offset


def _find_content(file: IO[bytes], entry: Entry) -> int:
    """Tell where the content of an entry begins, behind its own header."""
    _check_method(entry)
    file.seek(entry.offset)
    return entry.offset + _content_begins(_exactly(file, _FILE.size))


def _check_method(entry: Entry) -> None:
    if entry.method not in (ZIP_STORED, ZIP_DEFLATED):
        raise BadZipFile(f"packed by method {entry.method}, expected stored or deflated")


def _content_begins(header: bytes) -> int:
    """Tell how long the header of a file is, which may hold other fields than the directory."""
    *_, named, further = _unpacked(header, _FILE, b"PK\x03\x04")
    return _FILE.size + int(named) + int(further)


def _read_entry(file: IO[bytes], shift: int) -> tuple[Entry, int]:
    """Read the next entry of the directory, and tell how many bytes it takes there."""
    _, _, _, flags, method, _, _, crc, packed, size, named, further, comment, _, _, _, offset = _read(
        file, _ENTRY, b"PK\x01\x02"
    )
    texts = _exactly(file, named + further + comment)
    name = texts[:named].decode("utf-8" if flags & 0x800 else "cp437")
    if _FULL in (size, packed, offset):
        wide = _wide_numbers(texts[named : named + further])
        size, packed, offset = (next(wide) if number == _FULL else number for number in (size, packed, offset))
    entry = Entry(name, flags, method, crc, packed, size, offset + shift)
    return entry, _ENTRY.size + named + further + comment


def _wide_numbers(fields: bytes) -> Iterator[int]:
    """Yield the numbers of the field that is for those of 64 bits."""
    while len(fields) >= 4:
        kind, length = struct.unpack_from("<HH", fields)
        content, fields = fields[4 : 4 + length], fields[4 + length :]
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
