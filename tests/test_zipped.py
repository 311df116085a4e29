"""How a zip is read: the names and methods that it may use, what it is mistaken for, and the lies that it may tell."""

import bz2
import gzip
import lzma
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src import archive, zipped
from src.archive import Item, Reader
from src.runtime import PipelineError
from tests.helpers import zip_of


def complaint(act: Callable[[], object]) -> str:
    with pytest.raises(PipelineError) as caught:
        act()
    return str(caught.value)


def verdict(folder: Path, data: bytes | bytearray) -> str:
    (folder / "raw.zip").write_bytes(data)
    return complaint(lambda: archive.check(folder / "raw.zip"))


# --- names


def zip_by_hand(
    path: Path,
    names: list[bytes],
    *,
    flags: int = 0,
    system: int = 3,
    fields: dict[bytes, bytes] | None = None,
    comment: bytes = b"",
) -> Path:
    """A zip of small files whose names are these bytes, with a further field for some of them."""
    body = directory = b""
    for name in names:
        field = (fields or {}).get(name, b"")
        sizes = (zlib.crc32(b"pixels"), 6, 6, len(name), len(field))
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", system << 8, 20, flags, 0, 0, 33, *sizes, 0, 0, 0, 0, len(body)
        )
        directory += name + field
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, 0, 0, 33, *sizes) + name + field + b"pixels"
    counts = (len(names), len(names), len(directory), len(body), len(comment))
    path.write_bytes(body + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *counts) + comment)
    return path


def unicode_path(of: bytes, name: str) -> bytes:
    return struct.pack("<HHBL", 0x7075, 5 + len(name.encode()), 1, zlib.crc32(of)) + name.encode()


CAFE, CAT = "café/1.jpg", "кот/1.jpg"
UTF8, CP437 = CAFE.encode(), CAFE.encode("cp437")


@pytest.mark.parametrize(
    ("names", "options", "read", "said"),
    [
        ([UTF8, CAT.encode()], {"flags": 0x800}, [CAFE, CAT], ""),
        ([UTF8, CAT.encode()], {}, [CAFE, CAT], f"they are valid UTF-8 and read as such, for example '{CAFE}'"),
        ([b"dog/1.jpg", CP437], {}, ["dog/1.jpg", CAFE], f"read as cp437, the default of zips, for example '{CAFE}'"),
        ([UTF8, CP437], {}, [UTF8.decode("cp437"), CAFE], "read as cp437"),
        ([b"caf?/1.jpg"], {"fields": {b"caf?/1.jpg": unicode_path(b"caf?/1.jpg", CAFE)}}, [CAFE], ""),
        ([CP437], {"fields": {CP437: unicode_path(CP437, CAFE)}}, [CAFE], ""),
        ([b"cafe/1.jpg"], {"fields": {b"cafe/1.jpg": unicode_path(b"an older name", CAFE)}}, ["cafe/1.jpg"], ""),
        ([b"cat\\1.jpg", b"b\\c\\2.jpg"], {}, ["cat/1.jpg", "b/c/2.jpg"], "separates folders by backslashes"),
        ([b"cat/1.jpg", b"dog\\2.jpg"], {"system": 0}, ["cat/1.jpg", "dog/2.jpg"], "for example 'cat/1.jpg'"),
        ([b"cat/1.jpg", b"cat/a\\b.jpg"], {}, ["cat/1.jpg", "cat/a\\b.jpg"], ""),
    ],
    ids="marked,macOS,DOS,mixed,field,field and DOS,stale field,backslashes,Windows,Unix".split(","),
)
def test_names_are_read_as_the_archive_says_and_a_guess_is_reported_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[bytes],
    options: dict[str, object],
    read: list[str],
    said: str,
) -> None:
    path = zip_by_hand(tmp_path / "raw.zip", names, **options)  # type: ignore[arg-type]
    archive.check(path)
    assert [entry.name for entry in zipped.entries(path)] == read
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == bool(said)


@pytest.mark.parametrize("name", [b"..\\x.jpg", b"a\\..\\x.jpg", b"\\x.jpg", b"C:\\x.jpg"])
def test_a_backslash_that_separates_leads_out_of_no_archive(tmp_path: Path, name: bytes) -> None:
    path = zip_by_hand(tmp_path / "raw.zip", [b"cat\\1.jpg", name])
    assert f"unsafe name {name.decode().replace(chr(92), '/')!r}" in complaint(lambda: archive.check(path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/" * 30_000 + "1.jpg", "a name of 60,005 characters and 30,001 levels, expected at most 1,024 and 32"),
        ("x" * 1025, "a name of 1,025 characters and 1 levels"),
        ("a/" * 32 + "1.jpg", "and 33 levels"),
        ("a/" * 31 + "1.jpg", ""),
    ],
)
def test_a_name_has_a_bound_on_its_length_and_depth(tmp_path: Path, name: str, said: str) -> None:
    path = zip_of(tmp_path / "raw.zip", [("cat/1.jpg", b"x"), (name, b"x")])
    if said:
        assert said in complaint(lambda: archive.check(path))
    else:
        archive.check(path)


def test_a_name_that_is_there_twice_is_told_and_one_in_another_case_is_another(tmp_path: Path) -> None:
    archive.check(zip_by_hand(tmp_path / "raw.zip", [b"a/1.jpg", b"a/1.JPG", b"A/1.jpg"]))
    path = zip_by_hand(tmp_path / "raw.zip", [b"a/1.jpg", b"a/2.jpg", b"a/1.jpg"])
    assert "raw.zip holds 'a/1.jpg' 2 times, expected once" in complaint(lambda: archive.check(path))


def test_a_folder_that_holds_bytes_is_told(tmp_path: Path) -> None:
    path = zip_by_hand(tmp_path / "raw.zip", [b"cat/"])
    assert "is damaged at 'cat/' (a folder that holds bytes)" in complaint(lambda: archive.check(path))


def test_a_symbolic_link_is_no_image(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("cat/1.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as file:
        file.writestr(link, "2.jpg")
    entry = next(zipped.entries(tmp_path / "raw.zip"))
    with Reader(tmp_path / "raw.zip") as reader, pytest.raises(ValueError, match=r"^a symbolic link, not an image$"):
        reader.read(Item(entry.name, "cat", "", entry))


# --- kinds of zips


def with_method(path: Path, method: int, content: bytes, packed: bytes) -> Path:
    """A zip of one file that was packed by a method that zipfile may not know."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cat/1.jpg", packed)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    for begin in (8, at + 10):
        struct.pack_into("<H", data, begin, method)
    for begin in (14, at + 16):
        struct.pack_into("<3L", data, begin, zlib.crc32(content), len(packed), len(content))
    path.write_bytes(data)
    return path


LONG = np.random.default_rng(0).bytes(30_000) * 100  # three pieces
XZ = lzma.compress(LONG)


@pytest.mark.parametrize(
    ("method", "packed"), [(95, XZ), (12, bz2.compress(LONG)), (8, zlib.compress(LONG, wbits=-15))]
)
def test_each_method_is_read_whole_in_pieces_and_its_damage_is_told(tmp_path: Path, method: int, packed: bytes) -> None:
    path = with_method(tmp_path / "raw.zip", method, LONG, packed)
    entry = next(zipped.entries(path))
    with path.open("rb") as file:
        assert zipped.unpack(file, entry).read() == LONG == zipped.read(file, entry)
    for damaged in (packed[: len(packed) // 2], packed[:900] + b"damage" + packed[906:]):
        with_method(path, method, LONG, damaged)
        assert "raw.zip is damaged at 'cat/1.jpg'" in complaint(lambda: archive.check(path))


def test_the_dictionary_of_lzma_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("cat/1.jpg", b"pixels" * 99)
    data = bytearray((tmp_path / "raw.zip").read_bytes())
    data[30 + 9 + 5 : 30 + 9 + 9] = b"\xff" * 4  # behind header, name, version, length and properties
    (tmp_path / "raw.zip").write_bytes(data)
    archive.check(tmp_path / "raw.zip")


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (98, "PPMd"), (77, "method 77")])
def test_a_method_that_is_not_read_is_named(tmp_path: Path, method: int, name: str) -> None:
    path = with_method(tmp_path / "raw.zip", method, b"pixels", b"packed")
    said = complaint(lambda: archive.check(path))
    assert f"holds 'cat/1.jpg', compressed by {name}, expected Deflate, LZMA, XZ or bzip2; unpack" in said


@pytest.mark.parametrize("length", range(2**20, 2**20 + 300, 37))
def test_the_last_bytes_of_a_long_run_are_unpacked(tmp_path: Path, length: int) -> None:
    path = tmp_path / "raw.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/1.bmp", bytes(length))
    with path.open("rb") as stream:
        assert zipped.unpack(stream, next(zipped.entries(path))).read() == bytes(length)


def test_another_kind_of_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    for start, said in [
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive, expected a zip or a tar; unpack it with `7z x -oFOLDER "),
        (b"Rar!\x1a\x07\x01\x00", "is a RAR archive"),
        (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard"),
        (gzip.compress(b"pixels"), "is a gzip file"),
        (b"PK\x07\x08PK\3\4", "is the first part of a zip; join all parts with `zip -s 0 NAME.zip --out whole.zip`"),
    ]:
        assert said in verdict(tmp_path, start + bytes(200))
    data = bytearray(zip_by_hand(tmp_path / "raw.zip", [b"cat/1.jpg"]).read_bytes())
    data[-18:-14] = struct.pack("<HH", 2, 2)
    assert "raw.zip cannot be read: it is the last of 3 parts; join them" in verdict(tmp_path, data)


def test_what_lies_before_or_in_the_comment_of_a_zip_is_not_the_zip(tmp_path: Path) -> None:
    other = zip_by_hand(tmp_path / "other.zip", [b"fox/1.jpg"]).read_bytes()
    path = zip_by_hand(tmp_path / "raw.zip", [b"cat/1.jpg"], comment=other + b"more")
    path.write_bytes(b"MZ a program" * 100 + path.read_bytes())
    archive.check(path)
    assert [entry.name for entry in zipped.entries(path)] == ["cat/1.jpg"]


def test_files_that_share_their_bytes_are_a_bomb_that_is_found_at_once(tmp_path: Path) -> None:
    """Twenty thousand files of half a megabyte each, in one (24 s where each was unpacked)."""
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/1.bmp", bytes(2**19))
        file.filelist *= 20_000
    start = time.perf_counter()
    said = complaint(lambda: archive.check(tmp_path / "raw.zip"))
    assert "holds 'cat/1.bmp' in bytes that also belong to another file: a zip bomb?" in said
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("wide", [2**40, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("number", ["size", "packed", "offset"])
def test_a_number_of_64_bits_that_lies_is_one_sentence(tmp_path: Path, number: str, wide: int) -> None:
    place = {"size": 24, "packed": 20, "offset": 42}[number]
    data = bytearray(
        zip_by_hand(
            tmp_path / "raw.zip", [b"cat/1.jpg"], fields={b"cat/1.jpg": b"\1\0\x08\0" + b"8 bytes!"}
        ).read_bytes()
    )
    at = data.index(b"PK\1\2")
    struct.pack_into("<L", data, at + place, 0xFFFFFFFF)
    data[at + 46 + 9 + 4 : at + 46 + 9 + 12] = struct.pack("<Q", wide)
    assert "raw.zip" in verdict(tmp_path, data)
