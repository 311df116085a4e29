"""What an archive may hold, what its folders and files mean, and what is turned away."""

import gzip
import random
import struct
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src import archive
from src.archive import Item, Listing, Reader
from src.runtime import PipelineError
from tests.helpers import digits, encode, idx, photos, zip_of


def listing(folder: Path, *names: str, include: str = "*") -> Listing:
    return archive.list_items(zip_of(folder / "raw.zip", [(name, b"pixels") for name in names]), include)


def places(folder: Path, *names: str) -> list[tuple[str, str]]:
    """The class and official split of each."""
    return [(item.label, item.official) for item in listing(folder, *names)]


def told(items: list[Item]) -> list[tuple[str, str, str, str]]:
    return [(item.path, item.label, item.official, item.entry.name) for item in items]


def complaint(act: Callable[[], object]) -> str:
    with pytest.raises(PipelineError) as caught:
        act()
    return str(caught.value)


# --- class folders


@pytest.mark.parametrize("above", ["", "raw-img/", "a/b/c/d/"])
def test_the_folder_that_holds_an_image_is_its_class_at_any_depth(tmp_path: Path, above: str) -> None:
    assert places(tmp_path, f"{above}cat/1.jpg", f"{above}dog/1.JPEG") == [("cat", ""), ("dog", "")]


@pytest.mark.parametrize(
    ("folder", "official"),
    [
        *((name, "train") for name in ("train", "Training", "seg_train", "training_set", "TRAIN", "data-train")),
        *((name, "test") for name in ("test", "Testing", "seg_test", "test_set")),
        *((name, "validation") for name in ("val", "valid", "Validation", "seg_val")),
        *((name, "") for name in ("trains", "contest", "images", "latest", "value")),
    ],
)
def test_a_train_or_test_folder_above_is_an_official_split(tmp_path: Path, folder: str, official: str) -> None:
    assert places(tmp_path, f"{folder}/cat/1.jpg", f"x/{folder}/y/cat/1.jpg") == [("cat", official)] * 2


def test_the_official_folder_nearest_to_the_image_counts(tmp_path: Path) -> None:
    assert places(tmp_path, "train/seg_test/cat/1.jpg") == [("cat", "test")]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert places(tmp_path, "vehicles/train/1.jpg", "vehicles/bus/1.jpg") == [("train", ""), ("bus", "")]


def test_hidden_files_are_left_aside(tmp_path: Path) -> None:
    found = listing(
        tmp_path,
        "cat/1.jpg",
        "cat/.DS_Store",
        "cat/._1.jpg",
        "__MACOSX/cat/._1.jpg",
        "__MACOSX/cat/1.jpg",
        ".git/x.jpg",
        "cat/Icon\r",
    )
    assert [item.path for item in found] == ["cat/1.jpg"]
    assert found.others == []


def test_files_that_are_no_images_are_told(tmp_path: Path) -> None:
    found = listing(tmp_path, "readme.txt", "cat/1.jpg", "cat/Thumbs.db", "LICENSE", "labels.csv", "cat/without_suffix")
    assert found.others == ["readme.txt", "cat/Thumbs.db", "LICENSE", "labels.csv"]
    assert [item.path for item in found] == ["cat/1.jpg", "cat/without_suffix"]


@pytest.mark.parametrize("name", ["big cat/my photo (1).jpg", "a\nb/c\nd.jpg", "猫/写真.jpg", "cat, 'x'/\"1\";#.jpg"])
def test_any_name_is_a_name(tmp_path: Path, name: str) -> None:
    found = list(listing(tmp_path, name))
    assert told(found) == [(name, name.split("/")[0], "", name)]
    with Reader(tmp_path / "raw.zip") as reader:
        assert reader.read(found[0]) == b"pixels"


def test_a_carriage_return_is_shown_but_still_read(tmp_path: Path) -> None:
    found = list(listing(tmp_path, "c\rat/\r1.jpg"))
    assert told(found) == [("c\\rat/\\r1.jpg", "c\\rat", "", "c\rat/\r1.jpg")]
    with Reader(tmp_path / "raw.zip") as reader:
        assert reader.read(found[0]) == b"pixels"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_images_of_any_length_are_read_behind_headers_of_any_length(tmp_path: Path, method: int) -> None:
    lengths, random = {"a": 0, "b" * 400: 10, "c": 2**20, "d": 2**20 + 1, "e": 3}, np.random.default_rng(0)
    files = {f"cat/{name}.jpg": random.bytes(length) for name, length in lengths.items()}
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    with Reader(tmp_path / "raw.zip") as reader:
        assert {item.path: reader.read(item) for item in archive.list_items(tmp_path / "raw.zip")} == files


def test_both_spellings_of_an_accent_are_one_class(tmp_path: Path) -> None:
    spellings = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    assert len(set(spellings)) == 2
    found = listing(tmp_path, *(f"{name}/{number}.jpg" for number, name in enumerate(spellings)))
    assert {item.label for item in found} == {"café"}


# --- select

ANIMALS = ("raw/cane/1.jpg", "raw/cane/2.jpg", "raw/gatto/1.jpg", "raw/ragno/1.jpg")


def labels(found: Listing, **classes: str | None) -> list[str]:
    return [item.label for item in archive.select(found, classes=classes)]


def test_folders_keep_their_name_are_renamed_or_left_out(tmp_path: Path) -> None:
    assert labels(listing(tmp_path, *ANIMALS), cane="dog", ragno=None) == ["dog", "dog", "gatto"]


def test_two_folders_can_be_one_class(tmp_path: Path) -> None:
    assert labels(listing(tmp_path, *ANIMALS), cane="mammal", gatto="mammal") == ["mammal"] * 3 + ["ragno"]


def test_a_pattern_chooses_files_by_their_path(tmp_path: Path) -> None:
    assert labels(listing(tmp_path, *ANIMALS, include="raw/*/1.jpg")) == ["cane", "gatto", "ragno"]


def test_a_pattern_that_nothing_matches_is_told(tmp_path: Path) -> None:
    said = complaint(lambda: labels(listing(tmp_path, *ANIMALS, include="*.png")))
    assert said == "no image of the archive matches prepare.include '*.png', of 4"


def test_an_unknown_folder_is_told_with_those_that_exist(tmp_path: Path) -> None:
    said = complaint(lambda: labels(listing(tmp_path, *ANIMALS), dog="dog"))
    assert said == "prepare.classes names the folder 'dog'; the archive has 'cane', 'gatto', 'ragno'"


def test_an_empty_class_folder_is_an_error_until_it_is_left_out(tmp_path: Path) -> None:
    found = listing(tmp_path, *ANIMALS)
    files = [("raw/", b""), ("raw/cavallo/", b""), ("raw/cavallo/.DS_Store", b""), *((name, b"x") for name in ANIMALS)]
    found = archive.list_items(zip_of(tmp_path / "raw.zip", files))
    assert "the class folder 'raw/cavallo/' is empty" in complaint(lambda: labels(found))
    assert len(labels(found, cavallo=None)) == 4


@pytest.mark.parametrize("names", [("cat/1.jpg",), ("cat/1.jpg", "cover.jpg"), ("1.jpg", "2.jpg")])
def test_one_class_alone_is_an_error(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert "expected at least 2 to tell apart" in complaint(lambda: labels(listing(tmp_path, *names)))


def test_two_folders_renamed_to_one_class_alone_are_an_error(tmp_path: Path) -> None:
    found = listing(tmp_path, "cat/1.jpg", "dog/1.jpg")
    assert "has 1 class ('cat', 'dog')" in complaint(lambda: labels(found, cat="animal", dog="animal"))


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
    found = archive.list_items(path)
    pixels, classes = digits()
    assert [(item.label, item.official) for item in found] == [(str(n), official) for n in classes[:4001:800]]
    assert list(found)[1].path == f"{stem}images{tail.format(3)}#1"
    with Reader(path) as reader:
        for item, image in zip(found, pixels[::800], strict=False):
            assert reader.read(item) == b"P5 28 28 255\n" + image.tobytes()


def test_the_images_of_emnist_are_turned_back(tmp_path: Path) -> None:
    names = ("emnist-digits-test-images-idx3-ubyte", "emnist-digits-test-labels-idx1-ubyte")
    path = idx_zip(tmp_path / "raw.zip", *names, transposed=True)
    found = list(archive.list_items(path))
    with Reader(path) as reader:
        assert reader.read(found[2]) == b"P5 28 28 255\n" + digits()[0][1600].tobytes()
    assert {item.official for item in found} == {"test"}


def test_a_copy_of_an_idx_file_counts_once(tmp_path: Path) -> None:
    """Kaggle's MNIST has each file twice: by itself, and in a folder of its own name."""
    pixels, classes = idx(digits()[0][:6]), idx(digits()[1][:6])
    files = [("train-images.idx3-ubyte", pixels), ("train-labels.idx1-ubyte", classes)]
    copies = [(f"{name.replace('.', '-')}/{name.replace('.', '-')}", data) for name, data in files]
    assert len(list(archive.list_items(zip_of(tmp_path / "raw.zip", [*files, *copies])))) == 6
    assert len(list(archive.list_items(zip_of(tmp_path / "raw.zip", copies)))) == 6


def test_idx_files_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    pixels, classes = digits()
    files = [("train-images-idx3-ubyte", idx(pixels[:6])), ("train-labels-idx1-ubyte", idx(classes[:5]))]
    said = complaint(lambda: archive.list_items(zip_of(tmp_path / "raw.zip", files)))
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
    assert said in complaint(lambda: archive.list_items(zip_of(tmp_path / "raw.zip", files)))


@pytest.mark.parametrize(
    "damage", [lambda data: gzip.compress(data)[: len(gzip.compress(data)) // 2], lambda data: gzip.compress(data[:-1])]
)
def test_half_an_idx_file_is_a_reason_and_not_a_crash(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    pixels, classes = digits()
    files = [("images-idx3-ubyte.gz", damage(idx(pixels[:400]))), ("labels-idx1-ubyte", idx(classes[:400]))]
    path = zip_of(tmp_path / "raw.zip", files)
    items = list(archive.list_items(path))
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
    assert said in complaint(lambda: archive.list_items(zip_of(tmp_path / "raw.zip", files.items())))


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
            archive.list_items(path)
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
