"""What the names in an archive mean: which folders are classes and splits, and where that has to be asked."""

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.archive import Reader
from src.layout import Layout, describe, official, read_layout
from src.runtime import PipelineError
from tests.helpers import SMALL, assert_fails, crops, digits, encode, idx, run_stage, shared, zip_of


def read(folder: Path, *names: str, **params: Any) -> Layout:
    """The layout of an archive in which each file holds its own name."""
    return read_layout(zip_of(folder / "raw.zip", [(name, name.encode()) for name in names]), **params)


def classes(layout: Layout) -> dict[str, int]:
    """How many images each class has, with its split where it has one: 'cat' or 'train:cat'."""
    found = Counter(f"{item.official}:{item.label}".removeprefix(":") for item in layout)
    assert found.total() == len(layout)
    assert {":".join(filter(None, pair[::-1])): count for pair, count in layout.counts.items()} == found
    return dict(found)


def question(folder: Path, *names: str, **params: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        read(folder, *names, **params)
    return str(caught.value)


def files(*folders: str, count: int = 2, suffix: str = ".jpg") -> list[str]:
    return [f"{folder}/{number}{suffix}" for folder in folders for number in range(count)]


def product(*levels: str) -> list[str]:
    """All paths through words: product('train test', 'cat dog') -> train/cat, train/dog, test/cat, test/dog."""
    paths = [""]
    for words in levels:
        paths = [f"{path}/{word}".strip("/") for path in paths for word in words.split()]
    return paths


SPLIT = {"train:cat": 2, "train:dog": 2, "test:cat": 2, "test:dog": 2}


# --- one reading


@pytest.mark.parametrize("above", ["", "raw-img/", "a/b/c/d/", "./"])
def test_folders_above_all_others_mean_nothing(tmp_path: Path, above: str) -> None:
    assert classes(read(tmp_path, f"{above}cat/1.jpg", f"{above}dog/1.JPEG")) == {"cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (product("train test", "cat dog"), SPLIT),
        (product("a b", "c"), {"a": 2, "b": 2}),  # c alone tells nothing apart
        (product("chest_xray", "train test", "cat dog"), SPLIT),
        (
            ["seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/seg_test/cat", "seg_test/seg_test/dog"],
            SPLIT,
        ),
        (["train/animals/cat", "train/animals/dog", "test/cat", "test/dog"], SPLIT),
        (product("cat dog", "train test"), SPLIT),  # splits below the classes
        (["train/seg_test/cat", "train/seg_test/dog"], {"test:cat": 2, "test:dog": 2}),  # the nearest one counts
        (["train", "bus", "plane"], {"train": 2, "bus": 2, "plane": 2}),  # vehicles
        (product("train test", "train bus"), {"train:train": 2, "train:bus": 2, "test:train": 2, "test:bus": 2}),
        (
            product("train validation", "cat dog"),
            {f"{s}:{c}": 2 for s in ("train", "validation") for c in ("cat", "dog")},
        ),
        (product("train", "valid invalid"), {"train:valid": 2, "train:invalid": 2}),
        (["cat/cat", "dog/dogs"], {"cat": 2, "dog": 2}),  # both levels divide alike
        ([*product("train test", "cat dog"), "train/owl"], SPLIT | {"train:owl": 2}),  # a class that test lacks
        ([*product("train test", "cat dog"), "test/owl"], SPLIT | {"test:owl": 2}),
        (["mask", "no_mask"], {"mask": 2, "no_mask": 2}),
    ],
)
def test_where_one_reading_is_possible_it_is_found(
    tmp_path: Path, folders: list[str], expected: dict[str, int]
) -> None:
    assert classes(read(tmp_path, *files(*folders))) == expected


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Training seg_train training_set TRAIN data-train trainingSet train2017 train_images traindata",
        ),
        ("test", "test Testing seg_test test_set testSet test1 testset t10k-images"),
        ("validation", "val valid Validation seg_val val2017 valid-images"),
        ("", "trains contest images latest value tested invalid detest protest 1"),
    ],
)
def test_a_split_is_known_by_its_name(split: str, names: str) -> None:
    assert {name: official(name) for name in names.split()} == dict.fromkeys(names.split(), split)


@pytest.mark.parametrize("name", ["big cat/my photo (1).jpg", "a\nb/c\nd.jpg", "猫/写真.jpg", "cat, 'x'/\"1\";#.jpg"])
def test_any_name_is_a_name(tmp_path: Path, name: str) -> None:
    item = next(iter(read(tmp_path, name, "dog/1.jpg")))
    assert (item.path, item.label, item.entry.name) == (name, name.split("/")[0], name)


def test_a_carriage_return_is_shown_but_still_read(tmp_path: Path) -> None:
    item = next(iter(read(tmp_path, "c\rat/\r1.jpg", "dog/1.jpg")))
    assert (item.path, item.label) == ("c\\rat/\\r1.jpg", "c\\rat")
    with Reader(tmp_path / "raw.zip") as reader:
        assert reader.read(item) == b"c\rat/\r1.jpg"


def test_both_spellings_of_an_accent_are_one_class(tmp_path: Path) -> None:
    spellings = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    assert len(set(spellings)) == 2
    names = [*(f"{name}/{number}.jpg" for number, name in enumerate(spellings)), "tea/1.jpg"]
    assert classes(read(tmp_path, *names)) == {"café": 2, "tea": 1}
    assert classes(read(tmp_path, *names, classes={spellings[1]: "coffee"})) == {"coffee": 2, "tea": 1}


# --- several readings: a question, and what answers it

DOGS_VS_CATS = [f"train/{name}.{n}.jpg" for name in ("cat", "dog") for n in range(3)] + files("test1", count=4)
INTEL = files(*(f"seg_{split}/seg_{split}/{name}" for split in ("train", "test") for name in ("sea", "forest")))
PRED = files("seg_pred/seg_pred", count=5)
LABELLED = files(*product("train test", "cat dog"))
COVID = files(*product("COVID Normal", "images masks"))

QUESTIONS: dict[str, tuple[list[str], list[str], list[tuple[dict[str, Any], dict[str, int]]]]] = {
    "no class folder, numbered names": (
        DOGS_VS_CATS,
        ["'test1', 'train', which by their names are no classes", "('cat', 'dog', as in 'train/cat.0.jpg')"],
        [({"classes": {"train": "train", "test1": "test1"}}, {"train": 6, "test1": 4})],
    ),
    "no class folder, a table": (
        ["train_images/1a.jpg", "train_images/1b.jpg", "test_images/7f.jpg", "train.csv"],
        ["no classes", "the table 'train.csv', which is not supported yet", "sort the images into class folders"],
        [({"classes": {"train_images": "a", "test_images": "b"}}, {"a": 2, "b": 1})],
    ),
    "doubled folders": (
        [*files("train/train", "test/test"), "sampleSubmission.csv"],
        ["'test', 'train'", "'sampleSubmission.csv'"],
        [({"classes": {"train": "x", "test": "y"}}, {"train:x": 2, "test:y": 2})],
    ),
    "splits and a sample": (files("train", "test", "sample"), ["of which 'test', 'train'"], []),
    "COCO": (files(*product("images", "train2017 val2017")), ["no classes"], []),
    "YOLO": (files(*product("train valid", "images")) + files("train/labels", suffix=".txt"), ["'images', which"], []),
    "segmentation": (
        files("images", "masks", suffix=".png"),
        ["'images', 'masks', which by their names are no classes", "{images: images, masks: masks}"],
        [({"classes": {"images": "images", "masks": "masks"}}, {"images": 2, "masks": 2})],
    ),
    "no folder": (["1.jpg", "2.jpg"], ["lie in no folder"], []),
    "flat images beside splits": (
        INTEL + PRED,
        ["5 images, such as 'seg_pred/", "{seg_pred: null}", "{seg_pred: seg_pred}"],
        [
            ({"classes": {"seg_pred": None}}, {f"{s}:{c}": 2 for s in ("train", "test") for c in ("sea", "forest")}),
            (
                {"classes": {"seg_pred": "seg_pred"}},
                {f"{s}:{c}": 2 for s in ("train", "test") for c in ("sea", "forest")} | {"seg_pred": 5},
            ),
        ],
    ),
    "a flat test folder": (
        files("train/cat", "train/dog", "test"),
        ["{test: null}", "{test: test}"],
        [
            ({"classes": {"test": None}}, {"train:cat": 2, "train:dog": 2}),
            ({"classes": {"test": "test"}}, {"train:cat": 2, "train:dog": 2, "test": 2}),
        ],
    ),
    "a test folder with one folder, as Keras wants it": (
        files("train/cat", "train/dog", "test/unknown"),
        ["{test: null}", "{unknown: unknown}"],
        [
            ({"classes": {"test": None}}, {"train:cat": 2, "train:dog": 2}),
            ({"classes": {"unknown": "unknown"}}, {"train:cat": 2, "train:dog": 2, "test:unknown": 2}),
        ],
    ),
    "MNIST as JPEG": (files("trainingSet/0", "trainingSet/1", "testSet"), ["{testSet: null}"], []),
    "images at the top": (
        ["cover.jpg", *LABELLED],
        ["1 image, such as 'cover.jpg'", "in none of them", "prepare.include: '*/*'"],
        [({"include": "*/*"}, SPLIT)],
    ),
    "images in the folder of all": (
        [f"raw/{name}" for name in ("cover.jpg", "cat/1.jpg", "dog/1.jpg")],
        ["'raw/cover.jpg'", "prepare.include: '*/*/*'"],
        [({"include": "*/*/*"}, {"cat": 1, "dog": 1})],
    ),
    "two levels": (
        files(*product("cat dog", "indoor outdoor")),
        ["'cat', 'dog' (prepare.class_level: 1), or as 'indoor', 'outdoor' (prepare.class_level: 2)"],
        [
            ({"class_level": 1}, {"cat": 4, "dog": 4}),
            ({"class_level": 2}, {"indoor": 4, "outdoor": 4}),
            ({"classes": {"indoor": "in"}}, {"in": 4, "outdoor": 4}),
            ({"classes": {"outdoor": None}}, {"cat": 2, "dog": 2}),
        ],
    ),
    "kinds and kinds of kinds": (
        files("animals/mammals/dog", "animals/mammals/cat", "animals/birds/hen"),
        ["'birds', 'mammals' (prepare.class_level: 1)", "'cat', 'dog', 'hen' (prepare.class_level: 2)"],
        [({"class_level": 2}, {"dog": 2, "cat": 2, "hen": 2})],
    ),
    "images beside a folder of the class": (
        files("cat", "cat/more", "dog"),
        ["'cat', 'dog' (prepare.class_level: 1)", "'cat', 'dog', 'more' (prepare.class_level: 2)"],
        [({"class_level": 1}, {"cat": 4, "dog": 2}), ({"classes": {"more": "cat"}}, {"cat": 4, "dog": 2})],
    ),
    "levels below splits": (
        files(*product("train test", "cat dog", "a b")),
        ["prepare.class_level: 2"],
        [({"class_level": 1}, dict.fromkeys(SPLIT, 4))],
    ),
    "pictures and masks of each class": (
        COVID,
        ["'COVID', 'Normal' (prepare.class_level: 1)", "'images', 'masks'"],
        [({"classes": {"masks": None}}, {"COVID": 2, "Normal": 2})],
    ),
    "other photographs beside": (
        files("raw/cat", "raw/dog", "figures"),
        ["prepare.class_level"],
        [({"classes": {"figures": None}}, {"cat": 2, "dog": 2})],
    ),
    "raw camera files": (
        [*files("cat", "dog"), *files("bird", count=3, suffix=".CR2")],
        ["the class folder 'bird' holds no image that can be read, but 3 .cr2", "{bird: null}"],
        [({"classes": {"bird": None}}, {"cat": 2, "dog": 2})],
    ),
    "scans without a suffix": (
        [*files("cat", "dog"), *files("bird", suffix="")],
        ["'bird' holds no image that can be read, but 2 without a suffix"],
        [({"classes": {"bird": None}}, {"cat": 2, "dog": 2})],
    ),
    "videos in one split": (
        [*files(*product("train test", "cat dog"), "train/fox"), *files("test/fox", suffix=".mp4")],
        ["'test/fox' holds no image that can be read, but 2 .mp4"],
        [({"classes": {"fox": None}}, SPLIT)],
    ),
    "an empty folder": (
        [*files("raw/cat", "raw/dog"), "raw/fox/", "raw/fox/.DS_Store", "raw/"],
        ["the class folder 'raw/fox' is empty", "{fox: null}"],
        [({"classes": {"fox": None}}, {"cat": 2, "dog": 2})],
    ),
    "case": (
        files("Cat", "cat", "dog"),
        ["'Cat', 'cat' differ only in case", "{cat: Cat} if", "{Cat: Cat, cat: cat} if"],
        [
            ({"classes": {"cat": "Cat"}}, {"Cat": 4, "dog": 2}),
            ({"classes": {"Cat": "Cat", "cat": "cat"}}, {"Cat": 2, "cat": 2, "dog": 2}),
        ],
    ),
    "spaces": (files("cat ", "cat", "dog"), ["'cat', 'cat '", "{'cat ': cat}"], []),
    "wide letters": (files("ｃａｔ", "cat"), ["differ only"], []),
    "case between splits": (
        files("train/Cat", "train/Dog", "test/cat", "test/dog"),
        ["{cat: Cat, dog: Dog} if they are the same"],
        [({"classes": {"Cat": "cat", "Dog": "dog"}}, SPLIT)],
    ),
    "one class": (files("cat"), ["lie in 'cat', expected at least 2 class folders"], []),
}


@pytest.mark.parametrize(("names", "words", "answers"), QUESTIONS.values(), ids=QUESTIONS)
def test_where_no_reading_is_sure_it_is_asked_and_can_be_answered(
    tmp_path: Path, names: list[str], words: list[str], answers: list[tuple[dict[str, Any], dict[str, int]]]
) -> None:
    said = question(tmp_path, *names)
    assert [word for word in words if word not in said] == [], said
    for params, expected in answers:
        assert classes(read(tmp_path, *names, **params)) == expected


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"classes": {"wolf": "dog"}}, "prepare.classes names the folder 'wolf'; the archive has 'cat', 'dog'"),
        ({"classes": {"raw": "pets"}}, "prepare.classes names the folder 'raw'; the archive has 'cat', 'dog'"),
        (
            {"classes": {"raw": None}},
            "no image of the archive is left: 4 by prepare.classes: {raw: null}, such as raw/",
        ),
        ({"classes": {"cat": "pet", "dog": "pet"}}, "prepare.classes and prepare.include leave 1 class ('pet')"),
        ({"classes": {"cat": None}}, "the images of the archive lie in 'dog', expected at least 2"),
        ({"include": "*.png"}, "no image of the archive is left: 4 not matched by prepare.include, such as raw/"),
        ({"class_level": 2}, "prepare.class_level is 2, but the folders are 1 deep"),
    ],
)
def test_params_that_leave_no_two_classes_are_told(tmp_path: Path, params: dict[str, Any], said: str) -> None:
    assert question(tmp_path, *files("raw/cat", "raw/dog"), **params).startswith(said)


def test_a_level_that_tells_nothing_apart_is_told(tmp_path: Path) -> None:
    said = question(tmp_path, *files("cat/x", "dog/x"), class_level=2)
    assert said.startswith("prepare.class_level is 2, but all lie in 'x' there")


def test_two_folders_can_be_one_class(tmp_path: Path) -> None:
    found = read(tmp_path, *files("raw/cane", "raw/gatto", "raw/ragno"), classes={"cane": "mammal", "gatto": "mammal"})
    assert classes(found) == {"mammal": 4, "ragno": 2}


def test_a_path_of_thousands_of_folders_takes_little(tmp_path: Path) -> None:
    deep = "a/" * 5_000
    assert "prepare.class_level" in question(tmp_path, f"{deep}1.jpg", f"b/{deep}1.jpg", "c/1.jpg")


# --- what is left out


def left_out(layout: Layout) -> list[str]:
    return [line.removeprefix("left out: ") for line in describe(layout).splitlines() if line.startswith("left out: ")]


def test_all_that_is_left_out_is_counted_with_the_reason(tmp_path: Path) -> None:
    hidden = ["cat/.DS_Store", "@eaDir/cat/1.jpg", "__MACOSX/"]
    names = [*files("cat", "dog", "fox"), *hidden, "notes.txt", "cat/LICENSE", "dog/a.svg", "dog/b.svg", "dog/3.PNG"]
    found = read(tmp_path, *names, include="*.jpg", classes={"fox": None})
    assert classes(found) == {"cat": 2, "dog": 2}
    assert left_out(found) == [
        "2 hidden by systems and devices, such as cat/.DS_Store",
        "1 not matched by prepare.include, such as dog/3.PNG",
        "4 not images by their names (2 .svg, 1 .txt, 1 without a suffix), such as notes.txt",
        "2 by prepare.classes: {fox: null}, such as fox/0.jpg",
    ]


@pytest.mark.parametrize("include", ["*.jpg", "*.JPG", "CAT/*.jpg", "*/*.jP?"])
def test_a_pattern_knows_no_case_and_counts_what_it_leaves_out(tmp_path: Path, include: str) -> None:
    found = read(tmp_path, "cat/1.JPG", "cat/2.jpg", "cat/0.png", "CAT/dog/1.Jpg", include=include, class_level=2)
    assert classes(found) == {"cat": 2, "dog": 1}
    assert left_out(found) == ["1 not matched by prepare.include, such as cat/0.png"]


def test_a_pattern_knows_both_spellings_of_an_accent(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFD", name) for name in ("é/cat/1.jpg", "é/dog/1.jpg", "e/cat/2.jpg")]
    assert classes(read(tmp_path, *names, include=unicodedata.normalize("NFC", "É/*"))) == {"cat": 1, "dog": 1}


def test_a_folder_that_only_documents_the_data_is_no_class(tmp_path: Path) -> None:
    found = read(tmp_path, *files("cat", "dog"), "docs/readme.md", "docs/LICENSE", "labels/1.txt")
    assert classes(found) == {"cat": 2, "dog": 2}
    assert left_out(found)[0].startswith("3 not images by their names (1 .md, 1 without a suffix, 1 .txt)")


def test_a_class_of_which_the_pattern_leaves_nothing_is_no_error(tmp_path: Path) -> None:
    found = read(tmp_path, *files("cat", "dog"), *files("fox", suffix=".png"), include="*.jpg")
    assert (classes(found), left_out(found)[0][:1]) == ({"cat": 2, "dog": 2}, "2")


@pytest.mark.parametrize("above", [("", "again/"), ("cells/", "cells/cells/"), ("Village/", "village/Village/")])
def test_a_data_set_that_is_there_twice_counts_once(tmp_path: Path, above: tuple[str, str]) -> None:
    """As iarunava/cell-images-for-detecting-malaria has it."""
    members = [(f"{top}{name}", name.encode()) for top in above for name in files("train/sick", "train/well")]
    members += [(f"{above[0]}test/{name}", name.encode()) for name in files("sick", "well")]
    found = read_layout(zip_of(tmp_path / "raw.zip", members))
    assert classes(found) == {"train:sick": 2, "train:well": 2, "test:sick": 2, "test:well": 2}
    assert left_out(found)[0].startswith("4 copies of the same files in another folder")


def test_the_same_picture_in_two_classes_is_no_copy_of_a_folder(tmp_path: Path) -> None:
    members = [(f"{name}/in/1.jpg", b"same") for name in ("cat", "dog")] + [
        ("cat/out/1.jpg", b"1"),
        ("dog/out/1.jpg", b"2"),
    ]
    assert classes(read_layout(zip_of(tmp_path / "raw.zip", members), class_level=1)) == {"cat": 2, "dog": 2}


# --- idx files


def idx_files(*stems: str) -> list[tuple[str, bytes]]:
    pixels, labels = (np.ascontiguousarray(array[::800]) for array in digits())
    return [
        (f"{stem}{kind}-ubyte", idx(data))
        for stem in stems
        for kind, data in (("images-idx3", pixels), ("labels-idx1", labels))
    ]


def test_idx_files_beside_other_images_are_a_question(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "raw.zip", [*idx_files("digits/"), ("cat/1.jpg", b"1"), ("dog/1.jpg", b"2")])
    with pytest.raises(PipelineError, match=r"choose by prepare.include: '\*ubyte\*' or '\*.jpg'"):
        read_layout(path)
    assert len(read_layout(path, include="*ubyte*").examples) > 4
    assert classes(read_layout(path, include="*.jpg")) == {"cat": 1, "dog": 1}


def test_the_digits_of_idx_files_are_chosen_as_folders_are(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "raw.zip", [*idx_files("train-"), ("t10k-images-idx3-ubyte", b"")])
    found = read_layout(path, classes={"0": None, "1": "one"})
    assert classes(found) == {f"train:{digit}": 1 for digit in ("one", "3", "4", "6", "8", "9")}
    assert left_out(found) == [
        "1 idx files that are copies, or lack their images or labels, such as t10k-images-idx3-ubyte",
        "1 not matched by prepare.include, or by prepare.classes, such as train-images-idx3-ubyte",
    ]


# --- the table


def test_the_table_shows_classes_splits_and_an_example(tmp_path: Path) -> None:
    found = read(tmp_path, *files("train/cat", "train/dog", count=1100), *files("test/dog", "more/cat"), class_level=2)
    assert describe(found).splitlines() == [
        "class  train  test  without  images  example",
        "cat    1,100     0        2   1,102  train/cat/0.jpg",
        "dog    1,100     2        0   1,102  train/dog/0.jpg",
    ]


def test_a_table_is_never_long_and_never_broken(tmp_path: Path) -> None:
    names = [f"{n:02}/{n}.jpg" for n in range(100)] + ["00/" + 80 * "x" + ".jpg", "0\n0/" + 80 * "y" + ".jpg"]
    lines = describe(read(tmp_path, *names)).splitlines()
    assert len(lines) == 22
    assert lines[1].startswith("0\\n0 ")
    assert lines[-1] == "… and 81 more"
    assert max(map(len, lines)) < 80


# --- the stage


def test_prepare_shows_what_it_read_and_that_photographs_are_no_digits(tmp_path: Path) -> None:
    gray = [(f"cat/{n}.JPG", encode(photo.convert("L").convert("RGB"), "JPEG")) for n, photo in enumerate(crops(9))]
    photographs = [(f"dog/{n}", encode(photo, "JPEG")) for n, photo in enumerate(crops(15, seed=1))]
    zip_of(tmp_path / "data/raw.zip", [*photographs, *gray, ("dog/LICENSE", b"text"), ("cat/.DS_Store", b"")])
    done = run_stage(tmp_path, "prepare")
    assert done.returncode == 0, done.stderr
    sizes = sorted((photo.size for photo in (*crops(9), *crops(15, seed=1))), key=lambda size: size[0] * size[1])
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "class  images  example",
        "cat         9  cat/0.JPG",
        "dog        15  dog/0",
        "left out: 1 hidden by systems and devices, such as cat/.DS_Store",
        "left out: 1 not images by their names (1 without a suffix), such as dog/LICENSE",
    ]
    assert lines[5].startswith("originals: 67% in colour; median ")
    assert f"smallest {sizes[0][0]} x {sizes[0][1]}, largest {sizes[-1][0]} x {sizes[-1][1]} px" in lines[5]
    assert lines[6:] == ["prepared 24 images of 28 px, rejected 0"]
    assert "prepare.channels is 1 and prepare.image_size is 28" in done.stderr
    assert done.stderr.endswith("use -S prepare.channels=3 -S prepare.image_size=128\n")
    assert run_stage(tmp_path, "prepare", prepare={"image_size": 128, "channels": 3}).stderr == ""


def test_prepare_stops_in_one_sentence_where_it_has_to_ask(tmp_path: Path) -> None:
    photographs = [(name, encode(photo.resize((40, 30)))) for name, photo in zip(DOGS_VS_CATS, crops(10), strict=True)]
    zip_of(tmp_path / "data/raw.zip", photographs)
    assert_fails(
        tmp_path, "prepare", "'test1', 'train'", "prepare.classes: {test1: test1, train: train}", prepare=SMALL
    )


def test_real_archives_are_read_as_people_mean_them() -> None:
    cifar = read_layout(shared("cifar-duplicates.zip"))
    assert (len(cifar.examples), {split for _, split in cifar.counts}, len(cifar)) == (10, {"train", "test"}, 14_000)
    assert sorted(read_layout(shared("dogs-vs-cats-1000.zip")).examples) == ["Cat", "Dog"]
    with pytest.raises(PipelineError, match=r"'test', 'train', which .* the table 'labels.csv'"):
        read_layout(shared("dog-breeds-csv.zip"))
