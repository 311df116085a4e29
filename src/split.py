"""Which images train, which choose, which judge: duplicates stay together, and places never depend on other files.

An image draws a number in [0, 1) from the hash of its bytes and the seed. Below `test` it judges, below
`test + validation` it chooses, else it trains; so every class is divided alike up to chance, and a new version of a
data set moves no image. A group of duplicates takes the lowest draw of its members: a further copy can move it towards
test, never out of it. A picture that lies in two classes is in no part: at most one of its labels is right.
"""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from src.params import Split
from src.runtime import PipelineError, counted, say

TRAIN, VALIDATION, TEST, LEFT_OUT = "train", "validation", "test", "left_out"

# Two pictures are the same where their hashes differ in at most 4 of 64 bits and their gray thumbnails correlate by
# 0.993. Measured on 300 photographs each of three data sets: at 128 pixels all are found again as a JPEG of quality 40,
# and 99 % at half size (at 64 pixels 99.6 and 94 %); no two others of 10,450 differ in less than 6 bits. Of MNIST's
# 70,000 digits, all different, no pair within 4 bits correlates above 0.9916.
MAX_BITS = 4
MIN_CORRELATION = 0.993

Rows = NDArray[np.int64]


def assign(index: pd.DataFrame, images: NDArray[np.uint8], params: Split) -> pd.DataFrame:
    """Give each row of `index` its place.

    index: path, label, official, sha256, picture of N images; images: (N, S, S, C) uint8. Returns path, label, split
    (train, validation, test or left_out) and group (the first row of its duplicates) of the same N rows. Raises
    PipelineError where a class or a part is too small, or the archive's own split is wanted and incomplete.
    """
    table = index[["path", "label"]].copy()
    table["group"] = find_groups(index, images)
    draw, doubtful = draws(index["sha256"], params.seed), _in_two_classes(table)
    if lost := sorted(set(table["label"]) - set(table["label"][~doubtful])):
        example = _example(table[table["label"] == lost[0]], table)
        raise PipelineError(
            f"every picture of class {lost[0]!r} lies in another class, too, such as {example}; "
            "delete the wrong copies, or leave the class out with prepare.classes"
        )
    if params.official:
        table["split"] = _official(index, table["group"], draw, doubtful, params.validation)
    else:
        _tell_official(index["official"])
        lowest = draw.groupby(table["group"]).transform("min")
        table["split"] = _place(lowest, test=params.test, validation=params.validation).mask(doubtful, LEFT_OUT)
        _fill(table, lowest, {TEST: 0.0, VALIDATION: params.test, TRAIN: 1.0})
    return table[["path", "label", "split", "group"]]


def cautions(table: pd.DataFrame) -> Iterator[str]:
    """Say what of a split its user should know."""
    if (doubtful := _in_two_classes(table)).any():
        yield (
            f"{doubtful.sum():,} images are left out, since the same picture lies in another class, such as "
            f"{_example(table[doubtful], table)}"
        )
    counts = pd.crosstab(table["label"], table["split"])
    for part in (VALIDATION, TEST):
        if without := counts.index[counts[part] == 0].tolist():
            yield f"{len(without):,} of {len(counts):,} classes have no {part} image, such as {without[0]!r}"


def summarize(index: pd.DataFrame, table: pd.DataFrame, params: Split, rejected: int) -> dict[str, Any]:
    """Count images a class and split, duplicates, and the groups that a split by single files would have torn apart."""
    members = table.groupby("group")
    same_bytes = int(index["sha256"].duplicated().sum())
    by_file = draws(index["path"], params.seed)
    torn = index["official"] if params.official else _place(by_file, test=params.test, validation=params.validation)
    counts = pd.crosstab(table["label"], table["split"])
    return {
        "images": len(table),
        "rejected": rejected,
        "duplicates_same_bytes": same_bytes,
        "duplicates_same_picture": len(table) - members.ngroups - same_bytes,
        "duplicates_with_other_label": int(_in_two_classes(table).sum()),
        "groups_that_would_have_leaked": int((torn.groupby(table["group"]).nunique() > 1).sum()),
        **{f"{name}_images": int((table["split"] == name).sum()) for name in (TRAIN, VALIDATION, TEST, LEFT_OUT)},
        # A list, in which DVC looks for no metrics: three counts a class would fill `dvc exp show`.
        "classes": [
            {"class": str(label)} | {str(name): int(count) for name, count in row.items()}
            for label, row in counts.iterrows()
        ],
    }


def draws(names: "pd.Series[str]", seed: int) -> "pd.Series[float]":
    """Draw a number in [0, 1) for each name, as a function of that name and the seed alone."""
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names)
    return pd.Series([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests], index=names.index)


def _in_two_classes(table: pd.DataFrame) -> "pd.Series[bool]":
    """Tell which rows show a picture of more than one label."""
    return table.groupby("group")["label"].transform("nunique") > 1


def _example(doubtful: pd.DataFrame, table: pd.DataFrame) -> str:
    """Name the first of these images, and one of another class that shows the same picture."""
    first = doubtful.iloc[0]
    same = table[(table["group"] == first["group"]) & (table["label"] != first["label"])]
    return f"{first['path']!r} and {same['path'].iloc[0]!r}"


def find_groups(index: pd.DataFrame, images: NDArray[np.uint8]) -> "pd.Series[int]":
    """Number each row by the first row that shows the same picture, by the same bytes or by the looks."""
    same_bytes = _first_rows(pd.factorize(index["sha256"])[0])
    rows = np.unique(same_bytes)
    hashes = np.array([int(text, 16) for text in index["picture"].iloc[rows]], dtype=np.uint64)
    pairs = rows[_similar_hashes(hashes)]
    pairs = pairs[_same_picture(images, pairs)]
    copies = np.stack([same_bytes, np.arange(len(index))], axis=1)
    return pd.Series(_connect(len(index), np.concatenate([pairs, copies])), index=index.index)


def _first_rows(codes: NDArray[Any]) -> Rows:
    """Replace each code by the first position where it stands."""
    _codes, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rows: Rows = first[inverse]
    return rows


def _connect(count: int, pairs: Rows) -> Rows:
    """Replace each of `count` rows by the first of those that `pairs`, (P, 2), connect it with, however long the chain.

    Of the first rows of both ends the later one follows the earlier, until all do (Shiloach and Vishkin 1982).
    """
    first = np.arange(count)
    while np.ptp(ends := first[pairs], axis=1).any():
        np.minimum.at(first, ends.max(axis=1), ends.min(axis=1))
        while (first != first[first]).any():
            first = first[first]
    return first


def _similar_hashes(hashes: NDArray[np.uint64]) -> Rows:
    """Find all pairs of 64-bit hashes that differ in at most MAX_BITS bits: (P, 2) positions.

    Of MAX_BITS + 1 bands of the bits at least one is the same in such a pair, so only equal bands are compared.
    """
    edges = np.linspace(0, 64, MAX_BITS + 2).astype(np.uint64)
    found = [np.empty((0, 2), dtype=np.int64)]
    for low, high in pairwise(edges):
        band = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, ordered = band[order], hashes[order]
        position, offset = np.arange(len(hashes)), 0
        while len(position):
            offset += 1
            position = position[position + offset < len(hashes)]
            position = position[band[position] == band[position + offset]]
            near = np.bitwise_count(ordered[position] ^ ordered[position + offset]) <= MAX_BITS
            found.append(np.stack([order[position[near]], order[position[near] + offset]], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _same_picture(images: NDArray[np.uint8], pairs: Rows) -> NDArray[np.bool_]:
    """Compare the thumbnails of each pair of rows, some at a time, so that memory stays small.

    Two blank pictures are the same. The sums are whole numbers, so that the order in which a CPU adds decides nothing.
    """
    found = [np.empty(0, dtype=np.bool_)]
    for start in range(0, len(pairs), 4096):
        rows, places = np.unique(pairs[start : start + 4096], return_inverse=True)
        thumbnails = _thumbnails(images, rows)
        one, other = (thumbnails[place] for place in places.T)
        spread, spread_of_other = _covariance(one, one), _covariance(other, other)
        alike = _covariance(one, other) >= MIN_CORRELATION * np.sqrt(spread.astype(float) * spread_of_other)
        found.append(alike & ((spread == 0) == (spread_of_other == 0)))
    return np.concatenate(found)


def _covariance(one: Rows, other: Rows) -> Rows:
    """Times the number of pixels squared, so that it is a whole number: (N, pixels) twice -> (N,)."""
    covariance: Rows = one.shape[1] * np.einsum("ij,ij->i", one, other) - one.sum(axis=1) * other.sum(axis=1)
    return covariance


def _thumbnails(images: NDArray[np.uint8], rows: Rows) -> Rows:
    """Rows in gray, 16x16 pixels (as they are up to 32x32), as sums of the channels: (len(rows), pixels)."""
    small = (
        images[rows].sum(axis=-1, dtype=np.int64)
        if images.shape[1] <= 32
        else np.stack([_shrink(images[row]) for row in rows]).astype(np.int64)
    )
    return small.reshape(len(rows), -1)


def _shrink(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gray = Image.fromarray(image.mean(axis=-1).astype(np.uint8))
    return np.asarray(gray.resize((16, 16), Image.Resampling.BOX))


def _place(draw: "pd.Series[float]", *, test: float, validation: float) -> "pd.Series[str]":
    return pd.Series(np.select([draw < test, draw < test + validation], [TEST, VALIDATION], TRAIN), index=draw.index)


def _official(
    index: pd.DataFrame,
    group: "pd.Series[int]",
    draw: "pd.Series[float]",
    doubtful: "pd.Series[bool]",
    validation: float,
) -> "pd.Series[str]":
    """Keep the archive's own places, carve validation from train where there is none, leave out what would leak."""
    split = index["official"].astype(str)
    if missing := sorted({TRAIN, TEST} - set(split)):
        raise PipelineError(
            f"split.official is true, but the archive has no {missing[0]} images of its own "
            f"(a {missing[0]} folder above the class folders, or idx files); set split.official: false"
        )
    if (nowhere := ~split.isin([TRAIN, VALIDATION, TEST])).any():
        raise PipelineError(
            f"split.official is true, but {int(nowhere.sum()):,} images lie under neither train nor test, "
            f"such as {index['path'][nowhere].iloc[0]!r}; leave them out with prepare.include"
        )
    carve = VALIDATION not in set(split)
    split = split.mask(doubtful, LEFT_OUT)
    for judge in (TEST, VALIDATION):
        judged = (split == judge).groupby(group).transform("any")
        learns = split.isin([TRAIN, VALIDATION] if judge == TEST else [TRAIN])
        split = split.mask(judged & learns, LEFT_OUT)
        if not judged.any() and (judge == TEST or not carve):
            raise PipelineError(
                f"all {int((index['official'] == judge).sum()):,} official {judge} images are left out, since others "
                "show the same in another class or in the test images; set split.official: false"
            )
    trains = split == TRAIN
    if unknown := sorted(set(index["label"]) - set(index["label"][trains])):
        raise PipelineError(f"class {unknown[0]!r} has no official train image to learn from; leave the class out")
    if carve:
        table = pd.DataFrame({"label": index["label"], "group": group})[trains]
        lowest = draw[trains].groupby(table["group"]).transform("min")
        table["split"] = _place(lowest, test=0.0, validation=validation)
        _fill(table, lowest, {VALIDATION: 0.0, TRAIN: 1.0})
        split[trains] = table["split"]
    return split


def _tell_official(split: "pd.Series[str]") -> None:
    """Tell that the archive's own split is not used, since its test images then are not those of others' results."""
    there = [name for name in (TRAIN, VALIDATION, TEST) if (split == name).any()]
    if len(there) > 1:
        counts = " and ".join(f"{int((split == name).sum()):,} {name}" for name in there)
        keep = "; split.official: true keeps it" if {TRAIN, TEST} <= {*there} else ""
        say(f"the archive has a split of its own ({counts} images), which is pooled and divided anew{keep}")


def _fill(table: pd.DataFrame, draw: "pd.Series[float]", wanted: dict[str, float]) -> None:
    """Give each class at least one group in each wanted split: the one whose draw is nearest to that split's.

    Only small classes need it: with 50 images and a share of 0.1 a class goes without in one seed of 200.
    """
    groups = table[["label", "group"]].assign(draw=draw)[table["split"] != LEFT_OUT].drop_duplicates()
    for label, members in groups.groupby("label"):
        if len(members) < len(wanted):
            raise PipelineError(
                f"class {str(label)!r} has {counted(len(members), 'different image')}, "
                f"expected at least {len(wanted)}, one each for {', '.join(wanted)}; "
                "add images or leave the class out with prepare.classes"
            )
        for name, place in wanted.items():
            here = table.loc[members.index, "split"]
            if (here == name).any():
                continue
            spare = members[here.map(here.value_counts()) > 1]
            nearest = spare.loc[(spare["draw"] - place).abs().idxmin(), "group"]
            table.loc[table["group"] == nearest, "split"] = name
