"""What an archive may hold, how its files are read, and what is turned away."""

import gzip
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src import archive
from src.archive import Reader
from src.layout import read_layout
from src.runtime import PipelineError
from tests.helpers import digits, encode, idx, photos, zip_of


def complaint(act: Callable[[], object]) -> str:
    with pytest.raises(PipelineError) as caught:
        act()
    return str(caught.value)


def kinds(folder: Path, *files: tuple[str, bytes]) -> dict[str, list[str]]:
    """The names of each kind."""
    found: dict[str, list[str]] = {}
    for kind, entry in archive.contents(zip_of(folder / "raw.zip", files)):
        found.setdefault(kind, []).append(entry.name)
    return found


# --- files

LEFT_BEHIND = (
    *("cat/.DS_Store", "cat/._1.jpg", "__MACOSX/cat/._1.jpg", "__MACOSX/cat/1.jpg", ".git/x.jpg", "cat/Icon\r"),
    *("cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/dog/1.jpg", "a/#snapshot/1.jpg", "@Recycle/1.jpg"),
    *("$RECYCLE.BIN/S-1-5/$R1.jpg", "$Recycle.Bin/1.jpg", "System Volume Information/x.jpg", "cat/Thumbs.db"),
    *("cat/THUMBS.DB", "desktop.ini", "lost+found/1.jpg", "cat/1.jpg:Zone.Identifier", "x/__pycache__/y.png"),
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_systems_and_devices_leave_behind_is_hidden(tmp_path: Path, name: str) -> None:
    assert kinds(tmp_path, (name, b"x")) == {"hidden": [name]}


@pytest.mark.parametrize("name", ["./cat/1.jpg", "cat/a.b.jpg", "recycled/1.jpg", "cat/thumbs/1.jpg", "lost/found.jpg"])
def test_what_only_looks_like_it_is_not(tmp_path: Path, name: str) -> None:
    assert kinds(tmp_path, (name, b"x")) == {"image": [name]}


@pytest.mark.parametrize(
    "name", ["cat/1.jpg", "1.JPEG", "cat/a b.PnG", "cat/IMG_0.HEIC", "cat/x.heif", "cat/1.tar.jpg"]
)
def test_a_suffix_says_that_a_file_is_an_image(tmp_path: Path, name: str) -> None:
    assert kinds(tmp_path, (name, b"")) == {"image": [name]}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_without_a_suffix_is_an_image_if_it_begins_as_one(tmp_path: Path, kind: str, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", method) as file:
        for name in ("cat/photo", "cat/photo.0001", "cat/Dr. No at 7"):
            file.writestr(name, encode(photos()[0].resize((60, 40)), kind))
    assert [kind for kind, _ in archive.contents(tmp_path / "raw.zip")] == ["image"] * 3


def test_a_licence_is_no_image(tmp_path: Path) -> None:
    texts = [(name, b"BMW, MIT, P3: all rights") for name in ("cat/LICENSE", "Makefile", "cat/README", "dog/empty.7")]
    assert kinds(tmp_path, *texts, ("a.txt", b""), ("b", b"")) == {
        "other": [*(name for name, _ in texts), "a.txt", "b"]
    }


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_images_of_any_length_are_read_behind_headers_of_any_length(tmp_path: Path, method: int) -> None:
    lengths, random = {"a": 0, "b" * 400: 10, "c": 2**20, "d": 2**20 + 1, "e": 3}, np.random.default_rng(0)
    files = {f"{name}/1.jpg": random.bytes(length) for name, length in lengths.items()}
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    with Reader(tmp_path / "raw.zip") as reader:
        assert {item.path: reader.read(item) for item in read_layout(tmp_path / "raw.zip")} == files


# --- idx files


def idx_zip(path: Path, images: str, names: str, *, count: int = 6, transposed: bool = False) -> Path:
    pixels, classes = digits()
    table = np.ascontiguousarray(pixels[::800].transpose(0, 2, 1) if transposed else pixels[::800])[:count]
    files = {images: idx(table), names: idx(classes[::800][:count])}
    packed = {name: gzip.compress(data) if name.endswith(".gz") else data for name, data in files.items()}
    return zip_of(path, packed.items())


@pytest.mark.parametrize("tail", ["-idx{}-ubyte", ".idx{}-ubyte", "-idx{}-ubyte.gz", ".idx{}-ubyte.gz"])
@pytest.mark.parametrize(("stem", "official"), [("train-", "train"), ("a/t10k-", "test"), ("", "")])
def test_idx_files_are_read_in_each_spelling(tmp_path: Path, stem: str, official: str, tail: str) -> None:
    path = idx_zip(tmp_path / "raw.zip", f"{stem}images{tail.format(3)}", f"{stem}labels{tail.format(1)}")
    found = read_layout(path)
    pixels, classes = digits()
    assert [(item.label, item.official) for item in found] == [(str(n), official) for n in classes[:4001:800]]
    assert list(found)[1].path == f"{stem}images{tail.format(3)}#1"
    with Reader(path) as reader:
        for item, image in zip(found, pixels[::800], strict=False):
            assert reader.read(item) == b"P5 28 28 255\n" + image.tobytes()


def test_the_images_of_emnist_are_turned_back(tmp_path: Path) -> None:
    names = ("emnist-digits-test-images-idx3-ubyte", "emnist-digits-test-labels-idx1-ubyte")
    path = idx_zip(tmp_path / "raw.zip", *names, transposed=True)
    found = list(read_layout(path))
    with Reader(path) as reader:
        assert reader.read(found[2]) == b"P5 28 28 255\n" + digits()[0][1600].tobytes()
    assert {item.official for item in found} == {"test"}


def test_a_copy_of_an_idx_file_counts_once(tmp_path: Path) -> None:
    """Kaggle's MNIST has each file twice: by itself, and in a folder of its own name."""
    pixels, classes = (idx(np.ascontiguousarray(array[::800][:6])) for array in digits())
    files = [("train-images.idx3-ubyte", pixels), ("train-labels.idx1-ubyte", classes)]
    copies = [(f"{name.replace('.', '-')}/{name.replace('.', '-')}", data) for name, data in files]
    assert len(list(read_layout(zip_of(tmp_path / "raw.zip", [*files, *copies])))) == 6
    assert len(list(read_layout(zip_of(tmp_path / "raw.zip", copies)))) == 6


def test_idx_files_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    pixels, classes = digits()
    files = [("train-images-idx3-ubyte", idx(pixels[:6])), ("train-labels-idx1-ubyte", idx(classes[:5]))]
    said = complaint(lambda: read_layout(zip_of(tmp_path / "raw.zip", files)))
    assert said == "train-images-idx3-ubyte has 6 images and its labels file 5 labels"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda _: b"hello", "labels-idx1-ubyte.gz is no gzip file, though its name says so"),
        (lambda _: gzip.compress(b"hello"), "labels-idx1-ubyte.gz is no idx file of 1 dimensions of unsigned bytes"),
        (lambda data: gzip.compress(gzip.decompress(data)[:20]), "has 5,000 images and its labels file 12 labels"),
        (lambda data: data[:-100], "labels-idx1-ubyte.gz is damaged"),
        (lambda data: data[:-6] + b"\0" * 6, "labels-idx1-ubyte.gz is damaged"),
    ],
)
def test_a_damaged_labels_file_is_told(tmp_path: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    classes = np.random.default_rng(0).permutation(digits()[1])
    packed = damage(gzip.compress(idx(classes)))
    files = [("images-idx3-ubyte", idx(np.zeros((5000, 1, 1), np.uint8))), ("labels-idx1-ubyte.gz", packed)]
    assert said in complaint(lambda: read_layout(zip_of(tmp_path / "raw.zip", files)))


@pytest.mark.parametrize(
    "damage", [lambda data: gzip.compress(data)[: len(gzip.compress(data)) // 2], lambda data: gzip.compress(data[:-1])]
)
def test_half_an_idx_file_is_a_reason_and_not_a_crash(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    pixels, classes = (np.ascontiguousarray(array[::12][:400]) for array in digits())
    files = [("images-idx3-ubyte.gz", damage(idx(pixels))), ("labels-idx1-ubyte", idx(classes))]
    path = zip_of(tmp_path / "raw.zip", files)
    items = list(read_layout(path))
    with Reader(path) as reader:
        assert reader.read(items[0]).endswith(pixels[0].tobytes())
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged in the archive: "):
                reader.read(items[399])


LIES = [
    ((0x803, 2**32 - 1, 2, 2), "promises 4,294,967,295 x 2 x 2 bytes in its header and is "),
    ((0x803, 4, 2**32 - 1, 2**32 - 1), "promises 4 x 4,294,967,295 x 4,294,967,295 bytes"),
    ((0xD03, 4, 2, 2), "is no idx file of 3 dimensions of unsigned bytes: it begins with 00 00 0d 03"),
    ((0x804, 4, 2, 2, 3), "begins with 00 00 08 04, expected 00 00 08 03"),
]


@pytest.mark.parametrize(
    ("header", "packed", "said"),
    [
        *((header, packed, said) for header, said in LIES for packed in (False, True)),
        ((0x803, 4, 2, 1), False, "promises 4 x 2 x 1 bytes in its header and is 32 bytes long"),
    ],
)
def test_an_idx_header_is_compared_with_the_file_before_memory_is_taken(
    tmp_path: Path, header: tuple[int, ...], packed: bool, said: str
) -> None:
    images, labels = struct.pack(f">{len(header)}I", *header) + bytes(16), idx(np.arange(4, dtype=np.uint8) % 2)
    files = {"images-idx3-ubyte": images, "labels-idx1-ubyte": labels}
    files = {f"{name}.gz": gzip.compress(data) for name, data in files.items()} if packed else files
    assert said in complaint(lambda: read_layout(zip_of(tmp_path / "raw.zip", files.items())))


# --- write


def test_a_written_archive_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    file = tmp_path / "1.jpg"
    file.write_bytes(b"pixels")
    files: list[tuple[str, Path | bytes]] = [("cat/1.jpg", file), ("dog/", b""), ("é/2.jpg", b"2")]
    first = zip_of(tmp_path / "a.zip", files).read_bytes()
    file.touch()
    file.chmod(0o600)
    assert zip_of(tmp_path / "b.zip", files).read_bytes() == first
    archive.check(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "b.zip") as written:
        assert written.namelist() == ["cat/1.jpg", "dog/", "é/2.jpg"]
        assert written.read("cat/1.jpg") == b"pixels"


# --- check


def sound(folder: Path) -> bytearray:
    path = folder / "raw.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/é 1.jpg", encode(photos()[0].resize((80, 60)), "JPEG"))
        file.writestr("dog/1_1.jpg", b"pixels" * 50)
    return bytearray(path.read_bytes())


def verdict(folder: Path, data: bytes) -> str:
    (folder / "raw.zip").write_bytes(data)
    return complaint(lambda: archive.check(folder / "raw.zip"))


def test_a_sound_archive_passes(tmp_path: Path) -> None:
    sound(tmp_path)
    archive.check(tmp_path / "raw.zip")


def test_a_missing_archive_is_told(tmp_path: Path) -> None:
    assert complaint(lambda: archive.check(tmp_path / "no.zip")).endswith("no.zip is missing; `dvc repro` makes it")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>Sign in</title>", b"\n  <html><body>", b"<HTML>"])
def test_a_web_page_is_told(tmp_path: Path, page: bytes) -> None:
    assert "raw.zip is an HTML page, expected a zip archive" in verdict(tmp_path, page)


def test_half_an_archive_is_told(tmp_path: Path) -> None:
    data = sound(tmp_path)
    for length in (0, 1, 100, len(data) // 2, len(data) - 30):
        assert "is no whole zip" in verdict(tmp_path, data[:length])


def test_a_changed_byte_is_told_with_its_file(tmp_path: Path) -> None:
    data = sound(tmp_path)
    data[200] ^= 1
    assert "raw.zip is damaged at 'cat/é 1.jpg'" in verdict(tmp_path, data)


def test_any_damage_is_one_sentence_and_never_another_error(tmp_path: Path) -> None:
    data, dice = sound(tmp_path), random.Random(0)
    path = tmp_path / "raw.zip"
    found = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 2, 4])):
            # Half of the blows hit the directory at the end, where the structure is.
            damaged[dice.randrange(len(data) if dice.random() < 0.5 else 250) * -1 - 1] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            archive.check(path)
            read_layout(path)
        except PipelineError:
            found += 1
    assert found > 1000


def test_an_encrypted_archive_is_told(tmp_path: Path) -> None:
    data = sound(tmp_path)
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    assert "is encrypted (at 'cat/é 1.jpg')" in verdict(tmp_path, data)


@pytest.mark.parametrize(
    "name",
    ["../x.jpg", "cat/../../x.jpg", "/etc/x.jpg", "cat\\..\\x.jpg", "..\\x.jpg", "\\x.jpg", "C:\\x.jpg", "c:x.jpg"],
)
def test_a_name_that_leaves_the_archive_is_told(tmp_path: Path, name: str) -> None:
    zip_of(tmp_path / "raw.zip", [("cat/1.jpg", b"x"), (name, b"x")])
    assert f"holds the unsafe name {name!r}" in complaint(lambda: archive.check(tmp_path / "raw.zip"))


def test_a_name_with_a_zero_byte_is_told(tmp_path: Path) -> None:
    data = bytes(sound(tmp_path)).replace(b"1_1.jpg", b"1\x001.jpg")
    assert "holds the unsafe name 'dog/1\\x001.jpg'" in verdict(tmp_path, data)


@pytest.mark.parametrize("name", ["cat/..jpg", "cat/a..b.jpg", "cat/...", "ab:c/1.jpg"])
def test_dots_and_colons_inside_a_name_are_harmless(tmp_path: Path, name: str) -> None:
    archive.check(zip_of(tmp_path / "raw.zip", [(name, b"x")]))


def test_a_file_that_grows_a_thousandfold_is_a_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/1.bmp", bytes(2**21))
    said = complaint(lambda: archive.check(tmp_path / "raw.zip"))
    assert "holds 'cat/1.bmp'" in said
    assert "unpack to 2,097,152, expected at most 200 to 1: a zip bomb?" in said


def test_a_small_file_may_deflate_well(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("cat/1.bmp", bytes(2**20))
    archive.check(tmp_path / "raw.zip")


def test_an_archive_that_unpacks_to_more_than_a_terabyte_is_a_bomb(tmp_path: Path) -> None:
    data = bytearray(zip_of(tmp_path / "raw.zip", [(f"cat/{n}.jpg", b"x") for n in range(300)]).read_bytes())
    entry = data.index(b"PK\1\2")
    while entry >= 0:
        data[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFFFFFE)
        entry = data.find(b"PK\1\2", entry + 1)
    assert f"would unpack to {300 * 0xFFFFFFFE:,} bytes" in verdict(tmp_path, data)
