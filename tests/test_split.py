"""Which images train, choose and judge: places are stable, duplicates stay together, official splits are kept."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from src import archive, images
from src.layout import read_layout
from src.params import Split
from src.runtime import PipelineError
from src.split import _covariance, _thumbnails, assign, cautions, draws, find_groups, summarize
from tests.helpers import SMALL, assert_fails, crops, digits, encode, idx, photos, run_stage, shared, succeed, zip_of

BLANK = np.zeros((0, 8, 8, 1), np.uint8)
"""Pixels for an index whose pictures are all far apart, so that no pixel is looked at."""

ORDER = {"train": 0, "validation": 1, "test": 2}


def params(**changes: Any) -> Split:
    return Split(**{"seed": 0, "validation": 0.1, "test": 0.2, "official": False} | changes)


def made_up(count: int, classes: int = 2, official: Sequence[str] = ("",)) -> pd.DataFrame:
    """An index of images that never were: their hashes are drawn, their pictures all differ."""
    pictures = np.random.default_rng(0).permutation(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return pd.DataFrame(
        {
            "path": [f"{n:06}.jpg" for n in range(count)],
            "label": [f"class {n % classes}" for n in range(count)],
            "official": [official[n // classes % len(official)] for n in range(count)],
            "sha256": [f"{n:064x}" for n in range(count)],
            "picture": [f"{picture:016x}" for picture in pictures],
        }
    )


def index_of(encoded: Sequence[bytes], labels: Sequence[str] | None = None) -> tuple[pd.DataFrame, NDArray[np.uint8]]:
    """The index and table that the stage prepare makes of encoded images."""
    table = np.stack([images.decode(data, size=64, channels=3) for data in encoded])
    index = pd.DataFrame(
        {
            "path": [f"{n}.jpg" for n in range(len(encoded))],
            "label": labels or ["cat"] * len(encoded),
            "official": "",
            "sha256": [hashlib.sha256(data).hexdigest() for data in encoded],
            "picture": images.picture_hashes(table),
        }
    )
    return index, table


def places(index: pd.DataFrame, **changes: Any) -> "pd.Series[str]":
    """The split of each path; pictures are the same where their hashes are, since all pixels are."""
    same = np.zeros((len(index), 8, 8, 1), np.uint8)
    return assign(index, same, params(**changes)).set_index("path")["split"]


def complaint(index: pd.DataFrame, **changes: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        places(index, **changes)
    return str(caught.value)


# --- stability


def test_a_draw_is_the_same_on_every_machine() -> None:
    names = pd.Series(["a", "b", "a", "é"])
    assert draws(names, 0).round(9).tolist() == [0.617000936, 0.875512301, 0.617000936, 0.899123017]
    assert draws(names, 1).round(9).tolist() == [0.255416743, 0.433679791, 0.255416743, 0.101680791]


def test_the_order_of_the_files_changes_no_place() -> None:
    index = made_up(2000, 5)
    expected = places(index)
    for seed in range(3):
        shuffled = index.sample(frac=1, random_state=seed).reset_index(drop=True)
        pd.testing.assert_series_equal(places(shuffled).sort_index(), expected.sort_index())


def test_the_order_of_duplicates_changes_no_place() -> None:
    index = made_up(900)
    index["sha256"], index["label"] = (
        [f"{n // 3:064x}" for n in range(900)],
        [f"class {n // 3 % 3}" for n in range(900)],
    )
    expected = places(index)
    shuffled = index.sample(frac=1, random_state=0).reset_index(drop=True)
    pd.testing.assert_series_equal(places(shuffled).sort_index(), expected.sort_index())
    assert expected.groupby([n // 3 for n in range(900)]).nunique().max() == 1


def test_neither_the_name_nor_the_other_files_decide() -> None:
    index = made_up(300)
    renamed = index.assign(path=[f"elsewhere/{name}" for name in index["path"]])
    assert places(renamed).tolist() == places(index).tolist()


def test_another_seed_draws_another_split() -> None:
    index = made_up(1000)
    one, other = places(index, seed=0), places(index, seed=1)
    assert 0.2 < (one != other).mean() < 0.7


EVERY = made_up(600)
# A quarter of the files show what another one shows, in other bytes.
EVERY["picture"] = [EVERY["picture"][n - 2 if n % 8 in (6, 7) else n] for n in range(600)]
SHARES = {"validation": 0.2, "test": 0.2}


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.integers(0, 599), min_size=250), st.sets(st.integers(0, 599), min_size=1))
def test_further_images_move_none_towards_training(older: set[int], further: set[int]) -> None:
    """Further copies may move a group from training to the test, never back. The classes are too large to need help."""
    before = places(EVERY.iloc[sorted(older)].reset_index(drop=True), **SHARES)
    after = places(EVERY.iloc[sorted(older | further)].reset_index(drop=True), **SHARES)[before.index]
    assert (after.map(ORDER) >= before.map(ORDER)).all()
    moved = before.index[after != before]
    copied = EVERY.loc[sorted(further - older), "picture"]
    assert EVERY.set_index("path").loc[moved, "picture"].isin(copied).all()


def test_further_images_without_copies_move_nothing() -> None:
    index = made_up(4000, 10)
    before = places(index.iloc[:2000])
    assert (places(index)[before.index] == before).all()


# --- shares


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0.15, 0.15), (0.02, 0.05)])
def test_each_class_is_divided_by_the_shares_up_to_chance(validation: float, test: float) -> None:
    index = made_up(20_000, 10)
    table = assign(index, BLANK, params(validation=validation, test=test))
    counts = pd.crosstab(table["label"], table["split"])
    for name, share in (("validation", validation), ("test", test), ("train", 1 - validation - test)):
        deviation = np.sqrt(2000 * share * (1 - share))
        assert (counts[name] - 2000 * share).abs().max() < 4 * deviation


@pytest.mark.parametrize("seed", range(20))
def test_each_class_has_an_image_in_each_split_however_small(seed: int) -> None:
    index = made_up(3 * 30, 30)
    table = assign(index, BLANK, params(seed=seed))
    assert (pd.crosstab(table["label"], table["split"]) == 1).all(axis=None)


def test_two_images_of_a_class_are_too_few() -> None:
    index = made_up(60)
    index.loc[:1, "label"] = "rare"
    said = "class 'rare' has 2 different images, expected at least 3, one each for test, validation, train"
    assert complaint(index).startswith(said)


def test_copies_of_one_image_are_one_image() -> None:
    index = made_up(60)
    index.loc[:4, ["label", "sha256"]] = ["rare", "0" * 64]
    assert "class 'rare' has 1 different image," in complaint(index)


# --- duplicates


def groups_of(encoded: Sequence[bytes]) -> list[int]:
    index, table = index_of(encoded)
    return find_groups(index, table).tolist()


def test_copies_recompressed_and_resized_photographs_are_one_group() -> None:
    encoded = []
    for photo in (photos()[0], photos()[2]):
        half = photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS)
        original = encode(photo, "JPEG", quality=95)
        encoded += [original, original, encode(photo, "JPEG", quality=60), encode(half), encode(photo, "WEBP")]
    assert groups_of(encoded) == [0] * 5 + [5] * 5


def test_most_recompressed_and_resized_photographs_are_found() -> None:
    """Of parts of three photographs; measured: all at quality 60, 92 % at half size."""
    parts = crops(60, seed=1, smallest=200)
    halves = [encode(part.resize((part.width // 2, part.height // 2)), "JPEG", quality=90) for part in parts]
    coarse = [encode(part, "JPEG", quality=60) for part in parts]
    originals = [encode(part, "JPEG", quality=95) for part in parts]
    group = np.array(groups_of([*originals, *coarse, *halves])).reshape(3, 60)
    assert (group[1] == group[0]).mean() > 0.95
    assert (group[2] == group[0]).mean() > 0.85


def test_parts_of_one_photograph_are_different_pictures() -> None:
    parts = [encode(photos()[0].crop((left, 60, left + 300, 360))) for left in (0, 40, 80, 200, 340)]
    assert groups_of(parts) == [0, 1, 2, 3, 4]


def test_a_chain_of_copies_is_one_group() -> None:
    photo = encode(photos()[0])
    other = encode(photos()[0], "JPEG", quality=80)
    assert groups_of([other, encode(photos()[1]), photo, other, photo]) == [0, 1, 0, 0, 0]


def test_a_long_chain_of_similar_pictures_is_one_group_and_two_without_a_link() -> None:
    chain = [f"{(1 << 4 * link) - 1:016x}" for link in range(17)]  # neighbours differ in four bits
    order = np.random.default_rng(0).permutation(17)
    index = pd.DataFrame({"sha256": [f"{n:064x}" for n in order], "picture": [chain[n] for n in order]})
    same = np.stack([np.asarray(photos()[0].resize((64, 64)))] * 17)
    assert set(find_groups(index, same)) == {0}
    rest = np.flatnonzero(order != 8)
    groups = find_groups(index.iloc[rest].reset_index(drop=True), same[rest]).to_numpy()
    assert len(set(groups)) == 2
    assert (groups == groups[0]).tolist() == ((order[rest] < 8) == (order[rest][0] < 8)).tolist()


def test_pictures_are_compared_in_whole_numbers_which_every_cpu_adds_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    for side in (48, 32):
        one, other = _thumbnails(pixels[:, :side, :side], np.arange(2))[:, None]
        covariance = _covariance(one, other)
        assert covariance.dtype == np.int64
        expected = np.cov(one[0], other[0], ddof=0)[0, 1] * one.size**2
        assert covariance[0] == pytest.approx(expected, rel=1e-6)


def test_blank_pictures_of_any_gray_are_one_group() -> None:
    assert groups_of([encode(Image.new("L", (64, 64), gray)) for gray in (0, 9, 255)]) == [0, 0, 0]


def no_groups(pixels: NDArray[np.uint8]) -> bool:
    table = pixels[..., None]
    index = pd.DataFrame({"sha256": [f"{n:064x}" for n in range(len(table))], "picture": images.picture_hashes(table)})
    return bool((find_groups(index, table) == np.arange(len(table))).all())


def test_different_digits_are_different_pictures() -> None:
    """The hardest case: all alike and only 28 pixels wide. By hand: none of the full 70,000 are grouped either."""
    assert no_groups(digits()[0])


def test_the_test_digits_of_mnist_are_different_pictures() -> None:
    path = shared("mnist") / "t10k-images-idx3-ubyte.gz"
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
    assert no_groups(raw.reshape(-1, 28, 28))


def test_the_one_pair_of_real_duplicates_among_a_thousand_photographs_is_found() -> None:
    """Kaggle's Dogs vs. Cats has such pairs; the two files differ in their bytes."""
    path = shared("dogs-vs-cats-1000.zip")
    chosen = [item for item in read_layout(path) if "Dog/dog.1" in item.path or "dog.74." in item.path]
    with archive.Reader(path) as reader:
        encoded = [reader.read(item) for item in chosen]
    index, table = index_of(encoded)
    group = find_groups(index, table)
    pairs = [sorted(chosen[row].path for row in rows) for rows in group.groupby(group).groups.values() if len(rows) > 1]
    assert pairs == [["PetImages/Dog/dog.180.jpg", "PetImages/Dog/dog.74.jpg"]]


def test_what_duplicates_mean_is_counted() -> None:
    index = made_up(3000)
    index.loc[1, "sha256"] = index.loc[3, "sha256"] = index.loc[0, "sha256"]
    table = assign(index, BLANK, params())
    summary = summarize(index, table, params(), rejected=4)
    assert summary["rejected"] == 4
    assert summary["duplicates_same_bytes"] == 2
    assert summary["duplicates_same_picture"] == 0
    # Rows 0, 1 and 3 are of the classes 0, 1 and 1: three images in doubt.
    assert summary["duplicates_with_other_label"] == summary["left_out_images"] == 3
    assert summary["train_images"] + summary["validation_images"] + summary["test_images"] == 2997


# --- what lies in two classes, and parts that are empty or small


@pytest.mark.parametrize("official", [("",), ("train", "validation", "test")], ids=["drawn", "official"])
def test_a_picture_in_two_classes_is_in_no_part_and_named(official: Sequence[str]) -> None:
    index = made_up(900, 3, official)
    index.loc[[4, 8], "sha256"] = index.loc[0, "sha256"]  # in bytes; of the classes 0, 1 and 2, of all official parts
    index.loc[[30, 60], "sha256"] = index.loc[90, "sha256"]  # and copies within a class, which stay
    table = assign(index, BLANK, params(official=len(official) > 1))
    assert (table["split"] == "left_out")[[0, 4, 8]].all()
    assert not (table.loc[table["split"] != "left_out"].groupby("group")["label"].nunique() > 1).any()
    assert len(set(table["split"][[30, 60, 90]]) - {"left_out"}) == 1
    (said,) = cautions(table)
    assert said.startswith("3 images are left out, since the same picture lies in another class, such as ")
    assert said.endswith("'000000.jpg' and '000004.jpg'")


def test_a_picture_in_two_classes_moves_no_other_image() -> None:
    index = made_up(900)
    before = places(index)
    index.loc[1, "sha256"] = index.loc[0, "sha256"]
    after = places(index)
    assert (after[2:] == before[2:]).all()


def test_classes_without_an_official_test_or_validation_image_are_named() -> None:
    index = made_up(900, 3, ("train", "validation", "test"))
    index.loc[(index["label"] == "class 2") & (index["official"] != "train"), "official"] = "train"
    said = list(cautions(assign(index, BLANK, params(official=True))))
    assert said == [f"1 of 3 classes have no {part} image, such as 'class 2'" for part in ("validation", "test")]


def alike(index: pd.DataFrame, first: str, second: str, column: str = "official") -> pd.DataFrame:
    """The same index, but all images of the second part or class are copies of those of the first."""
    index.loc[index[column] == second, "sha256"] = index["sha256"][index[column] == first].tolist()
    return index


@pytest.mark.parametrize(
    ("index", "official", "said"),
    [
        (made_up(2), False, "class 'class 0' has 1 different image, expected at least 3"),
        (made_up(200, 100), False, "class 'class 0' has 2 different images, expected at least 3"),
        (alike(made_up(60), "class 0", "class 1", "label"), False, "every picture of class 'class 0' lies in another"),
        (made_up(60).assign(sha256="0" * 64), False, "too, such as '000000.jpg' and '000001.jpg'; delete the wrong"),
        (
            alike(made_up(90, 3, ("train", "validation", "test")), "test", "validation"),
            True,
            "all 30 official validation images are left out, since others show the same in another class or in the "
            "test images; set split.official: false",
        ),
        (
            alike(made_up(90, 3, ("train", "test")), "test", "train"),
            True,
            "class 'class 0' has no official train image",
        ),
    ],
    ids=["two classes of one", "a hundred of two", "two folders", "one picture", "validation", "train"],
)
def test_a_part_or_class_without_a_usable_image_is_one_sentence(index: pd.DataFrame, official: bool, said: str) -> None:
    assert said in complaint(index, official=official)


def test_every_official_test_image_in_doubt_is_one_sentence() -> None:
    index = made_up(120, 2, ("train", "train", "test", "validation"))
    tests = index.index[index["official"] == "test"]
    index.loc[tests[::2], "sha256"] = index.loc[tests[1::2], "sha256"].tolist()
    assert "all 30 official test images are left out" in complaint(index, official=True)


@pytest.mark.parametrize(("validation", "test"), [(0.001, 0.2), (0.1, 0.001), (0.001, 0.001)])
def test_a_share_that_rounds_to_nothing_still_gives_each_class_an_image(validation: float, test: float) -> None:
    table = assign(made_up(90, 3), BLANK, params(validation=validation, test=test))
    assert (pd.crosstab(table["label"], table["split"]) >= 1).all(axis=None)


def test_images_of_one_value_are_one_picture_and_so_in_no_class() -> None:
    gray = [encode(Image.new("L", (64, 64), value)) for value in (0, 50, 100, 150)]
    index, table = index_of(gray, ["a", "a", "b", "b"])
    with pytest.raises(PipelineError, match="every picture of class 'a' lies in another class, too"):
        assign(index, table, params())


def test_a_group_that_files_would_have_torn_apart_is_counted() -> None:
    index = made_up(3000)
    index["sha256"], index["label"] = [f"{n // 2:064x}" for n in range(3000)], "one"
    by_file = draws(index["path"], 0).to_numpy().reshape(-1, 2)
    placed = np.searchsorted([0.2, 0.3], by_file, side="right")
    torn = int((placed[:, 0] != placed[:, 1]).sum())
    summary = summarize(index, assign(index, BLANK, params()), params(), 0)
    assert summary["groups_that_would_have_leaked"] == torn > 500


# --- official


def test_an_official_test_set_is_kept_and_validation_comes_from_training() -> None:
    index = made_up(3000, 3, ("train", "train", "test"))
    split = assign(index, BLANK, params(official=True))["split"]
    assert ((split == "test") == (index["official"] == "test")).all()
    assert set(split) == set(ORDER)
    share = (split[index["official"] == "train"] == "validation").mean()
    assert abs(share - 0.1) < 0.03


def test_an_official_validation_set_is_kept() -> None:
    index = made_up(900, 3, ("train", "validation", "test"))
    assert assign(index, BLANK, params(official=True))["split"].tolist() == index["official"].tolist()


def test_what_would_leak_from_an_official_test_set_is_left_out_and_counted() -> None:
    index = made_up(900, 3, ("train", "validation", "test"))
    # The first images of train and validation are copies of a test image, a further one of train of one of validation.
    index.loc[[0, 3], "sha256"] = index.loc[6, "sha256"]
    index.loc[9, "sha256"] = index.loc[12, "sha256"]
    table = assign(index, BLANK, params(official=True))
    assert table["split"][table["split"] != index["official"]].to_dict() == dict.fromkeys([0, 3, 9], "left_out")
    assert summarize(index, table, params(official=True), 0)["left_out_images"] == 3
    assert summarize(index, table, params(official=True), 0)["groups_that_would_have_leaked"] == 2


def test_each_class_of_an_official_training_set_keeps_an_image_in_both_splits() -> None:
    index = made_up(30 * 4, 30, ("train", "train", "test", "test"))
    for seed in range(10):
        table = assign(index, BLANK, params(official=True, seed=seed))
        counts = pd.crosstab(table["label"], table["split"])
        assert (counts[["train", "validation"]] == 1).all(axis=None)


def test_a_class_without_official_training_images_is_told() -> None:
    index = made_up(300, 3, ("train", "test"))
    index.loc[index["official"] == "train", "label"] = "class 0"
    said = "class 'class 1' has no official train image to learn from; leave the class out"
    assert complaint(index, official=True) == said


def test_images_under_neither_folder_are_told() -> None:
    index = made_up(300, 3, ("train", "test", ""))
    assert "99 images lie under neither train nor test, such as '000006.jpg'" in complaint(index, official=True)


@pytest.mark.parametrize(("there", "missing"), [(("test",), "train"), (("train",), "test"), (("",), "test")])
def test_an_official_split_without_its_folders_is_told(there: tuple[str, ...], missing: str) -> None:
    said = complaint(made_up(60, 2, there), official=True)
    assert f"the archive has no {missing} images of its own" in said
    assert said.endswith("set split.official: false")


@pytest.mark.parametrize(
    ("there", "official", "said"),
    [
        (("train", "train", "test"), False, "(40 train and 20 test images), which is pooled and divided anew; split."),
        (("train", "validation"), False, "(30 train and 30 validation images), which is pooled and divided anew\n"),
        (("train", "validation", "test"), True, ""),
        (("train",), False, ""),
        (("",), False, ""),
    ],
)
def test_an_official_split_that_is_not_kept_is_told(
    capsys: pytest.CaptureFixture[str], there: tuple[str, ...], official: bool, said: str
) -> None:
    assign(made_up(60, 2, there), BLANK, params(official=official))
    assert said in (told := capsys.readouterr().err)
    assert bool(told) == bool(said)
    assert ("split.official: true keeps it" in told) == ("test" in said)


# --- the stage


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety photographs of three classes, of which one is stored twice and two files are broken, prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    files = [(f"{('NA', 'café', '0')[n % 3]}/{n}.jpg", encode(photo, "JPEG")) for n, photo in enumerate(crops(90))]
    files += [("0/copy of 0, in another class.jpg", files[0][1]), ("0/broken.jpg", b"x"), ("NA/broken\r\n.jpg", b"")]
    zip_of(folder / "data/raw.zip", files)
    succeed(folder, "prepare", prepare=SMALL | {"max_rejected": 0.1})
    return folder


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


def test_the_stage_writes_a_place_for_each_image_counts_them_and_says_what_is_doubtful(home: Path) -> None:
    done = run_stage(home, "split")
    assert done.stdout.startswith("split 91 images: ")
    doubtful, *few = done.stderr.splitlines()
    assert doubtful == (
        "split: 2 images are left out, since the same picture lies in another class, such as "
        "'NA/0.jpg' and '0/copy of 0, in another class.jpg'"
    )
    assert [line.partition(":")[2].split()[:4:2] for line in few] == [["only", "validation"], ["only", "test"]]
    table = pd.read_csv(home / "data/split.csv", dtype=str, keep_default_na=False)
    index = pd.read_csv(home / "data/index.csv", dtype=str, keep_default_na=False)
    assert list(table.columns) == ["path", "label", "split", "group"]
    assert table["path"].tolist() == index["path"].tolist()
    summary = json.loads((home / "metrics/data.json").read_text())
    assert (summary["images"], summary["rejected"], summary["duplicates_same_bytes"]) == (91, 2, 1)
    assert summary["duplicates_with_other_label"] == summary["left_out_images"] == 2
    assert {row["class"] for row in summary["classes"]} == {"0", "NA", "café"}
    for row in summary["classes"]:
        label = row.pop("class")
        counted = table["split"][table["label"] == label].value_counts().to_dict()
        assert row == {"left_out": 0} | counted
    assert table.groupby("group")["split"].nunique().max() == 1


def test_the_stage_writes_the_same_bytes_each_time(home: Path) -> None:
    written = []
    for _ in range(2):
        succeed(home, "split")
        written.append([(home / name).read_bytes() for name in ("data/split.csv", "metrics/data.json")])
    assert written[0] == written[1]


def test_the_stage_tells_what_it_cannot_divide_and_keeps_the_older_outputs(home: Path) -> None:
    succeed(home, "split")
    assert_fails(home, "split", "split.official is true", "set split.official: false", split={"official": True})


def test_the_official_split_of_idx_files_is_kept(tmp_path: Path) -> None:
    pixels, classes = (array[::20] for array in digits())
    files = [
        ("train-images-idx3-ubyte", idx(np.ascontiguousarray(pixels[::2]))),
        ("train-labels-idx1-ubyte", idx(np.ascontiguousarray(classes[::2]))),
        ("t10k-images-idx3-ubyte", idx(np.ascontiguousarray(pixels[1::2]))),
        ("t10k-labels-idx1-ubyte", idx(np.ascontiguousarray(classes[1::2]))),
    ]
    zip_of(tmp_path / "data/raw.zip", files)
    succeed(tmp_path, "prepare")
    succeed(tmp_path, "split", split={"official": True})
    table = pd.read_csv(tmp_path / "data/split.csv")
    assert (table["split"] == "test").tolist() == table["path"].str.startswith("t10k").tolist()
    assert json.loads((tmp_path / "metrics/data.json").read_text())["test_images"] == 125
