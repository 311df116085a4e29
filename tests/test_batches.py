"""What a step is given: pure functions of (seed, epoch, step), each image once, changed and mixed as drawn."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from src import paths
from src.batches import (
    Dataset,
    Draw,
    Table,
    augment,
    augments,
    batches,
    channel_statistics,
    choose_device,
    class_order,
    count_steps,
    draw,
    epoch_order,
    plan,
    read_dataset,
    step_generator,
)
from src.params import Augment, Train, load_params
from src.runtime import PipelineError
from tests.helpers import EVERYTHING, OFF, augmented_by, photos
from tests.project import Project

CPU = torch.device("cpu")
Image = NDArray[np.uint8]


def noise(count: int, size: int, channels: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


ALL: dict[str, Any] = {name: value for name, value in EVERYTHING["augment"].items() if name != "image_size"}


def train_params(**changes: object) -> Train:
    return load_params().train.model_copy(update=changes)


def drawn_for(count: int, params: Augment, seed: int = 0) -> Draw:
    return draw(count, params, step_generator("augmentation", seed, 1, 1))


def changed(images: Image, params: Augment, seed: int = 0) -> tuple[Image, Draw]:
    """Images augmented, and what was drawn for them; they are left as they were."""
    given_images, drawn = torch.from_numpy(images.copy()), drawn_for(len(images), params, seed)
    found, _ = augment(given_images, torch.zeros(len(images), dtype=torch.int64), drawn, params, 1)
    side = params.image_size or images.shape[1]
    assert (found.dtype, found.shape) == (torch.uint8, (len(images), side, side, images.shape[3]))
    assert np.array_equal(given_images.numpy(), images)
    return found.numpy(), drawn


def portrait(size: int, channels: int = 3, count: int = 1) -> Image:
    """A photograph, made small, so many times."""
    photo = photos()[2].convert("RGB" if channels == 3 else "L").resize((size, size))
    return np.asarray(photo).reshape(1, size, size, channels).repeat(count, axis=0)


def table_of(images: Tensor, rows: Tensor | None = None, classes: int = 1) -> Table:
    """A table whose labels are the numbers of its rows, or the remainders of these."""
    rows = torch.arange(len(images)) if rows is None else rows
    return Table(images, rows, rows % classes if classes > 1 else rows, max(classes, int(rows.max()) + 1))


@pytest.fixture
def marked() -> Table:
    """A table of 150 of 200 images, each filled with its row's number, which no move changes, and its label."""
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 4, 4, 1)
    return table_of(images, torch.arange(49, 199))


# --- chance


@given(count=st.integers(1, 500), seed=st.integers(0, 2**32 - 1), epoch=st.integers(1, 10_000))
@settings(max_examples=30, deadline=None)
def test_an_epoch_visits_each_image_once_in_an_order_that_seed_and_epoch_decide(
    count: int, seed: int, epoch: int
) -> None:
    order = epoch_order(count, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(count))
    torch.manual_seed(epoch)
    assert torch.equal(order, epoch_order(count, seed=seed, epoch=epoch))


def test_no_two_epochs_seeds_or_steps_share_their_chance() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=e).tolist()) for seed in range(10) for e in range(1, 11)}
    assert len(orders) == 100
    # Both 1/11/1 and 11/1/1 are there: written without a separator, they would be one.
    keys = [(seed, epoch, step) for seed in (0, 1, 11) for epoch in (1, 11, 111) for step in (0, 1, 11)]
    draws = {tuple(torch.rand(4, generator=step_generator("order", *key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    again = [torch.rand(4, generator=step_generator("order", 3, 2, 1)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_about_half_are_mirrored_and_every_distance_occurs() -> None:
    drawn = drawn_for(10_000, augmented_by(flip=True, shift=2))
    assert 0.48 < is_mirrored(drawn).double().mean() < 0.52
    for axis in (0, 1):
        values, counts = drawn.shift[:, axis].unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > 1_800


def is_mirrored(drawn: Draw) -> Tensor:
    """Where left and right change places: of the axes of the old image in the new one, just one is turned round."""
    return torch.linalg.det(drawn.view[:, :, :2].double()) < 0


@pytest.mark.parametrize("name", ["mixup", "cutmix", "erase"])
def test_as_many_images_are_mixed_or_erased_as_is_said(name: str) -> None:
    drawn = drawn_for(10_000, augmented_by(**{**ALL, name: 0.3}))
    met = {"mixup": drawn.blend > 0, "cutmix": has_area(drawn.patch), "erase": has_area(drawn.hole)}
    assert 0.28 < met[name].double().mean() < 0.32
    assert not (met["mixup"] & met["cutmix"]).any()


def has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def test_mixup_and_cutmix_may_take_all_images_between_them() -> None:
    drawn = drawn_for(10_000, augmented_by(mixup=0.7, cutmix=0.3))
    assert ((drawn.blend > 0) ^ has_area(drawn.patch)).all()


def test_each_image_of_a_batch_draws_for_itself() -> None:
    drawn = drawn_for(64, augmented_by(**{**ALL, "shift": 4096, "mixup": 0.5, "cutmix": 0.5, "erase": 0.99}))
    for name, values in vars(drawn).items():
        different = len({tuple(row.flatten().tolist()) for row in values})
        assert different == 64 if name not in ("blend", "patch") else different > 20, name
    assert len(set(is_mirrored(drawn).tolist())) == 2


@pytest.mark.parametrize("off", list(ALL))
def test_turning_one_augmentation_off_leaves_the_other_draws_as_they_were(off: str) -> None:
    everything = drawn_for(500, augmented_by(**ALL))
    without = drawn_for(500, augmented_by(**{**ALL, off: OFF[off]}))
    alone = drawn_for(500, augmented_by(**{off: ALL[off]}))
    of = {"jitter": "colour", "erase": "hole", "mixup": "blend", "cutmix": "patch"}.get(off, "view")
    of = "shift" if off == "shift" else of
    for name, values in vars(everything).items():
        assert torch.equal(vars(without)[name], values) == (name != of), name
        # And alone, it draws what it draws among the others.
        assert name != of or name == "view" or torch.equal(vars(alone)[name], values)
    changed_parts = {"flip": {"mirrored"}, "rotate": {"angle"}, "crop": {"sides"}, "stretch": {"sides"}}.get(off, set())
    former, left = taken_apart(everything), taken_apart(without)
    assert {name for name in former if not torch.allclose(left[name], former[name], atol=1e-5)} == changed_parts


def taken_apart(drawn: Draw) -> dict[str, Tensor]:
    """What a view is made of: the sides of the part that is cut out, its angle, and whether it is mirrored."""
    turned = drawn.view[:, :, :2].double()
    sides = turned.norm(dim=2)
    angle = torch.atan2(-turned[:, 0, 1] / sides[:, 0], turned[:, 1, 1] / sides[:, 1])
    return {"sides": sides, "angle": torch.rad2deg(angle), "mirrored": torch.linalg.det(turned).sign()}


# --- augmentation


def by_hand(image: Image, flip: bool, right: int, down: int) -> Image:
    """Mirror one image, pad it with its edge, and cut out what is seen after the move."""
    size, far = len(image), max(abs(down), abs(right))
    image = image[:, ::-1] if flip else image
    padded = np.pad(image, ((far, far), (far, far), (0, 0)), mode="edge")
    return padded[far - down : far - down + size, far - right : far - right + size]


@given(
    count=st.integers(1, 6),
    size=st.sampled_from([*range(1, 13), 28, 33, 64, 100]),
    channels=st.sampled_from([1, 3]),
    far=st.integers(0, 15),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_a_batch_is_mirrored_and_moved_as_single_images_by_hand(
    count: int, size: int, channels: int, far: int, seed: int
) -> None:
    images = noise(count, size, channels, seed)
    found, drawn = changed(images, augmented_by(flip=True, shift=far), seed)
    places = zip(images, is_mirrored(drawn).tolist(), drawn.shift.tolist(), strict=True)
    assert np.array_equal(found, np.stack([by_hand(image, flip, *moved) for image, flip, moved in places]))


@pytest.mark.parametrize("size", [224, 1_024])
def test_large_images_are_moved_by_whole_pixels_too(size: int) -> None:
    images = noise(2, size, 3)
    found, drawn = changed(images, augmented_by(flip=True, shift=size // 3))
    for image, moved, flip, shift in zip(images, found, is_mirrored(drawn).tolist(), drawn.shift.tolist(), strict=True):
        assert np.array_equal(moved, by_hand(image, flip, *shift))


NOTHING = drawn_for(1, augmented_by())


def test_a_move_right_and_down_repeats_the_first_column_and_row() -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)[None, :, :, None]
    drawn, params = replace(NOTHING, shift=torch.tensor([[2, 1]])), augmented_by(shift=2)
    moved, _ = augment(image, torch.tensor([0]), drawn, params, 1)
    assert moved[0, :, :, 0].tolist() == [[1, 1, 1], [1, 1, 1], [4, 4, 4]]
    drawn = replace(NOTHING, view=NOTHING.view * torch.tensor([-1.0, 1.0, 1.0]))
    mirrored, _ = augment(image, torch.tensor([0]), drawn, params, 1)
    assert mirrored[0, :, :, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]


def test_without_augmentation_a_batch_is_what_was_prepared() -> None:
    images = torch.from_numpy(noise(20, 5, 3))
    for seen, targets in batches(table_of(images), train_params(augment=augmented_by(), batch=8), 1):
        assert torch.equal(seen, images[targets.argmax(1)])
        assert torch.equal(targets, F.one_hot(targets.argmax(1), 20).float())


@pytest.mark.parametrize("name", list(ALL))
def test_whatever_is_turned_on_changes_images_and_nothing_else_does(name: str) -> None:
    # A stretch is that of the part which a crop cuts out.
    params = augmented_by(**{name: ALL[name], **({"crop": 0.5} if name == "stretch" else {})})
    assert augments(params)
    assert not augments(augmented_by())
    images = np.concatenate([portrait(24), noise(19, 24, 3)])
    found, _ = changed(images, params)
    assert not np.array_equal(found, images)
    # Each one alone, at its weakest, takes no byte away from an image that it leaves alone.
    still = {"rotate": 1e-9, "jitter": 1e-9, "crop": 1 - 1e-9, "stretch": 1 + 1e-9}
    if name in still:
        assert np.array_equal(changed(images, augmented_by(**{name: still[name]}))[0], images)


def cut(image: Image, view: Tensor) -> NDArray[np.float64]:
    """What is seen through a view, place by place: bilinear between the four nearest pixels, the edge repeated."""
    size, (across, down) = len(image), np.meshgrid(*[(np.arange(len(image)) + 0.5) / len(image) * 2 - 1] * 2)
    places = view.double().numpy() @ np.stack([across.ravel(), down.ravel(), np.ones(size**2)])
    x, y = np.clip((places + 1) / 2 * size - 0.5, 0, size - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, low = np.minimum(left + 1, size - 1), np.minimum(top + 1, size - 1)
    pixels, x, y = image.astype(np.float64), (x - left)[:, None], (y - top)[:, None]
    upper = pixels[top, left] * (1 - x) + pixels[top, right] * x
    lower = pixels[low, left] * (1 - x) + pixels[low, right] * x
    return (upper * (1 - y) + lower * y).reshape(image.shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_turned_and_cut_images_are_those_sampled_by_hand(channels: int) -> None:
    images = np.concatenate([portrait(20, channels, 6), noise(6, 20, channels)])
    found, drawn = changed(images, augmented_by(flip=True, rotate=180.0, crop=0.3, stretch=2.0))
    for image, seen, view in zip(images, found, drawn.view, strict=True):
        assert np.abs(seen - cut(image, view)).max() < 0.51


@given(crop=st.floats(0.01, 1), stretch=st.floats(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_crop_is_no_smaller_no_longer_and_no_further_out_than_is_said(crop: float, stretch: float, seed: int) -> None:
    drawn = drawn_for(2_000, augmented_by(**{**ALL, "crop": crop, "stretch": stretch}), seed)
    sides, middle = taken_apart(drawn)["sides"], drawn.view[:, :, 2]
    area, ratio = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert crop * (1 - 1e-5) <= area.min()
    assert max(ratio.max(), 1 / ratio.min()) <= stretch * (1 + 1e-5)
    assert (sides + middle.abs()).max() <= 1 + 1e-6


def test_crops_have_all_areas_ratios_and_places() -> None:
    drawn = drawn_for(10_000, augmented_by(crop=0.25, stretch=1.5))
    sides, middle = taken_apart(drawn)["sides"], drawn.view[:, :, 2]
    area, ratio = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert area.mean() == pytest.approx((0.25 + 1) / 2, abs=0.01)
    assert (area.min(), area.max()) == (pytest.approx(0.25, abs=0.01), pytest.approx(1, abs=0.01))
    assert (ratio.min(), ratio.max()) == (pytest.approx(1 / 1.5, abs=0.01), pytest.approx(1.5, abs=0.01))
    for axis in (0, 1):
        free = sides[:, axis] < 0.999
        place = (middle[:, axis] / (1 - sides[:, axis]))[free]
        assert (place.min(), place.max()) == (pytest.approx(-1, abs=0.02), pytest.approx(1, abs=0.02))


def test_a_crop_is_enlarged_to_the_whole_image() -> None:
    # A slope from left to right and one from top to bottom: what is seen goes from one end of the part to the other.
    slope = np.arange(100, dtype=np.uint8)
    images = np.stack([*np.meshgrid(slope, slope), np.zeros((100, 100), np.uint8)], 2)[None]
    found, drawn = changed(images.repeat(50, axis=0), augmented_by(crop=0.2, stretch=1.3))
    for seen, view in zip(found.astype(int), drawn.view, strict=True):
        for axis, far in ((0, seen[50, -1, 0] - seen[50, 0, 0]), (1, seen[-1, 50, 1] - seen[0, 50, 1])):
            assert far == pytest.approx(99 * view[axis, axis].item(), abs=1.5)


def test_what_training_sees_may_be_smaller_than_what_was_prepared() -> None:
    whole = portrait(64)
    (half,), _ = changed(whole, augmented_by(image_size=32))
    # Half as wide and high: each pixel lies between four, and is their mean.
    expected = whole[0].astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert half.shape == (32, 32, 3)
    assert np.abs(half - expected).max() <= 0.5


def test_labels_are_mixed_by_the_area_that_a_smaller_image_shows() -> None:
    images, targets, drawn = labelled(noise(8, 30, 1), augmented_by(image_size=13, cutmix=0.99))
    assert images.shape == (8, 13, 13, 1)
    places = (np.arange(13) + 0.5) / 13
    for target, box in zip(targets, drawn.patch.numpy(), strict=True):
        inside = [(places >= box[i]) & (places < box[i + 2]) for i in (0, 1)]
        share = np.outer(*inside).mean()
        assert 1 - target.max() == pytest.approx(min(share, 1 - share), abs=1e-6)


def test_a_turn_is_within_its_angle_both_ways_and_bends_nothing() -> None:
    drawn = drawn_for(10_000, augmented_by(rotate=30.0))
    angles = taken_apart(drawn)["angle"]
    assert (angles.min(), angles.max()) == (pytest.approx(-30, abs=0.1), pytest.approx(30, abs=0.1))
    assert angles.mean().abs() < 0.5
    turned = drawn.view[:, :, :2]
    assert torch.allclose(turned @ turned.mT, torch.eye(2).expand_as(turned), atol=1e-6)


def test_a_turn_by_ninety_degrees_is_numpys() -> None:
    image = noise(1, 9, 3)
    quarter = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]])
    turned, _ = augment(
        torch.from_numpy(image), torch.tensor([0]), replace(NOTHING, view=quarter), augmented_by(rotate=90.0), 1
    )
    assert any(np.array_equal(turned[0].numpy(), np.rot90(image[0], way)) for way in (1, 3))


def recoloured(image: Image, change: list[float]) -> NDArray[np.float64]:
    """Saturation, contrast, then brightness and tint, as the words say."""
    brightness, contrast, saturation, *tint = change
    pixels = image.astype(np.float64)
    gray = pixels.mean(2, keepdims=True)
    pixels = gray + (pixels - gray) * (1 + saturation)
    pixels = pixels.mean() + (pixels - pixels.mean()) * (1 + contrast)
    return np.clip(pixels * (1 + brightness + np.array(tint[: image.shape[2]]) / 2), 0, 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_changes_brightness_contrast_saturation_and_tint(channels: int) -> None:
    images = np.concatenate([portrait(20, channels, 20), noise(20, 20, channels)])
    found, drawn = changed(images, augmented_by(jitter=0.6))
    for image, seen, change in zip(images, found, drawn.colour.tolist(), strict=True):
        assert np.abs(seen - recoloured(image, change)).max() < 0.51


def test_jitter_is_within_its_share_both_ways() -> None:
    colour = drawn_for(10_000, augmented_by(jitter=0.4)).colour
    assert colour.shape == (10_000, 6)
    for column in colour.T:
        assert (column.min(), column.max()) == (pytest.approx(-0.4, abs=0.01), pytest.approx(0.4, abs=0.01))


def test_jitter_without_tint_leaves_gray_images_gray() -> None:
    gray = portrait(20, 1).repeat(3, axis=3)
    drawn = replace(NOTHING, colour=torch.tensor([[0.2, -0.3, 0.4, 0.0, 0.0, 0.0]]))
    seen, _ = augment(torch.from_numpy(gray), torch.tensor([0]), drawn, augmented_by(jitter=0.4), 1)
    assert not np.array_equal(seen.numpy(), gray)
    assert (seen == seen[..., :1]).all()


def test_a_flat_image_stays_flat_whatever_its_colours_become() -> None:
    flat = np.full((50, 6, 6, 3), (10, 128, 250), dtype=np.uint8)
    found, _ = changed(flat, augmented_by(**{**ALL, "mixup": 0.0, "cutmix": 0.0}))
    assert (found == found[:, :1, :1]).all()


def test_nothing_runs_over_at_black_and_white() -> None:
    # An overflow of uint8 would make black of white.
    white, black = (np.full((100, 6, 6, 3), value, dtype=np.uint8) for value in (255, 0))
    found, drawn = changed(white, augmented_by(jitter=0.9))
    assert found[drawn.colour[:, 0] + drawn.colour[:, 3:].amin(1) / 2 > 0].min() == 255
    assert found[drawn.colour[:, 0] < -0.5].max() < 255
    assert changed(black, augmented_by(**{**ALL, "jitter": 0.9}))[0].max() == 0


def test_what_is_brighter_than_white_is_mixed_as_white() -> None:
    bright, dark = torch.full((1, 4, 4, 3), 250, dtype=torch.uint8), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    drawn = Draw(**{name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in vars(NOTHING).items()})
    drawn = replace(drawn, blend=torch.tensor([0.5, 0.0]), colour=torch.tensor([[0.8] + [0.0] * 5] * 2))
    seen, _ = augment(torch.cat([bright, dark]), torch.tensor([0, 0]), drawn, augmented_by(jitter=0.9, mixup=0.5), 1)
    assert seen[0].unique().tolist() == [128]


def test_erasing_paints_one_box_of_two_to_twenty_percent_in_the_images_mean_colour() -> None:
    size = 100
    images = portrait(size, 3, 300) // 2 + noise(300, size, 3) // 4
    found, drawn = changed(images, augmented_by(erase=0.5))
    differs = (found != images).any(3)
    shares, places = [], []
    for image, seen, where, hole in zip(images, found, differs, drawn.hole.tolist(), strict=True):
        if hole[2] == hole[0]:
            assert not where.any()
            continue
        left, top, right, bottom = (round(side * size) for side in hole)
        box = seen[top:bottom, left:right]
        assert (box == box[0, 0]).all()
        assert np.abs(box[0, 0] - image.mean((0, 1))).max() < 0.51
        where[top:bottom, left:right] = False
        assert not where.any()
        assert 0 <= left < right <= size
        assert 0 <= top < bottom <= size
        shares.append(box[..., 0].size / size**2)
        places.append((left / (size - right + left), top / (size - bottom + top)))
    assert 100 < len(shares) < 200
    assert 0.018 < min(shares) < 0.03
    assert 0.17 < max(shares) < 0.21
    assert np.ptp(places, axis=0).min() > 0.9


# --- mixing


def labelled(images: Image, params: Augment, seed: int = 0) -> tuple[Image, NDArray[np.float32], Draw]:
    """Images augmented, each of a class of its own, and their targets."""
    drawn, labels = drawn_for(len(images), params, seed), torch.arange(len(images))
    found, targets = augment(torch.from_numpy(images), labels, drawn, params, len(images))
    return found.numpy(), targets.numpy(), drawn


def test_mixup_blends_pixels_and_labels_with_the_next_image_by_the_same_share() -> None:
    images = noise(60, 8, 3)
    found, targets, drawn = labelled(images, augmented_by(mixup=0.5))
    shares = drawn.blend.numpy()
    assert 15 < (shares > 0).sum() < 45
    assert (shares[shares > 0].min() < 0.2) & (shares.max() > 0.8)
    for number, share in enumerate(shares):
        following = (number + 1) % 60
        expected = images[number] * (1.0 - share) + images[following] * float(share)
        assert np.abs(found[number] - expected).max() < 0.51
        assert targets[number, number] == pytest.approx(1 - share, abs=1e-6)
        assert targets[number, following] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 32])
def test_cutmix_pastes_a_box_of_the_next_image_and_labels_by_its_pixels(size: int) -> None:
    # Flat images, each in a colour of its own: each pixel tells whose it is.
    images = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(size, 1).repeat(size, 2)
    found, targets, _ = labelled(images, augmented_by(cutmix=0.6))
    areas = []
    for number, seen in enumerate(found[..., 0]):
        following = (number + 1) % 200
        pasted = seen == following
        assert (pasted | (seen == number)).all()
        rows, columns = pasted.any(1), pasted.any(0)
        assert np.array_equal(pasted, rows[:, None] & columns)
        assert all(np.ptp(np.flatnonzero(side)) == side.sum() - 1 for side in (rows, columns) if side.any())
        assert targets[number, following] == np.float32(pasted.mean())
        assert targets[number, number] == pytest.approx(1 - pasted.mean(), abs=1e-6)
        areas.append(pasted.mean())
    assert size == 1 or 0.25 < np.mean(areas) < 0.35  # 0.6 of the images, by half on average


def test_an_image_alone_in_its_step_is_mixed_with_itself() -> None:
    image = noise(1, 8, 1)
    for seed in range(20):
        found, targets, _ = labelled(image, augmented_by(mixup=0.5, cutmix=0.5), seed)
        assert np.array_equal(found, image)
        assert targets.tolist() == [[1.0]]


@given(st.integers(1, 40), st.integers(2, 12), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_targets_are_shares_that_sum_to_one(count: int, size: int, channels: int, seed: int) -> None:
    params, labels = augmented_by(**{**ALL, "mixup": 0.5, "cutmix": 0.5}), torch.arange(count) % 7
    drawn = drawn_for(count, params, seed)
    seen, targets = augment(torch.from_numpy(noise(count, size, channels, seed)), labels, drawn, params, 9)
    assert (seen.shape, seen.dtype) == ((count, size, size, channels), torch.uint8)
    assert (targets.shape, targets.dtype) == ((count, 9), torch.float32)
    assert targets.min() >= 0
    assert torch.allclose(targets.sum(1), torch.ones(count), atol=1e-6)
    assert (targets[:, 7:] == 0).all()


def test_gray_images_are_augmented_like_each_channel_of_coloured_ones() -> None:
    gray = np.concatenate([portrait(20, 1, 30), noise(30, 20, 1)])
    params = augmented_by(**{**ALL, "jitter": 0.0})  # whose tint is drawn for each channel
    one, three = (labelled(images, params) for images in (gray, gray.repeat(3, axis=3)))
    assert np.array_equal(one[0].repeat(3, axis=3), three[0])
    assert np.array_equal(one[1], three[1])


# --- an epoch


def test_an_epoch_shows_each_training_image_once_beside_its_own_label(marked: Table) -> None:
    moves = {**ALL, "jitter": 0.0, "mixup": 0.0, "cutmix": 0.0}  # none of which changes a flat image
    params = train_params(augment=augmented_by(**moves), batch=64)
    epochs = [list(batches(marked, params, epoch)) for epoch in (1, 2)]
    assert [len(targets) for _, targets in epochs[0]] == [64, 64, 22]
    for epoch in epochs:
        labels = torch.cat([targets for _, targets in epoch]).argmax(1)
        assert sorted(labels.tolist()) == list(range(49, 199))
        seen = torch.cat([images for images, _ in epoch])
        assert (seen == labels[:, None, None, None]).all()
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_an_epoch_neither_reads_nor_moves_any_global_chance() -> None:
    params, table = train_params(augment=augmented_by(**ALL), batch=16), table_of(torch.from_numpy(noise(200, 6, 3)))
    first = list(batches(table, params, 1))
    torch.manual_seed(1234)
    np.random.seed(1234)
    random.seed(1234)
    state = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    second = list(batches(table, params, 1))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (np.random.get_state()[1].tobytes(), random.getstate())
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


# --- any step, at any time


@st.composite
def steps(choose: st.DrawFn) -> tuple[int, Train, int, int]:
    """A number of images, params, and an epoch and a step of that training."""
    count, batch = choose(st.integers(1, 300)), choose(st.integers(1, 80))
    on = {name: ALL[name] for name in choose(st.sets(st.sampled_from(list(ALL))))}
    changes = {"seed": choose(st.integers(0, 2**32 - 1)), "augment": augmented_by(**on)}
    epoch, step = choose(st.integers(1, 10**6)), choose(st.integers(1, count_steps(count, batch)))
    return count, train_params(**changes, batch=batch), epoch, step


@given(steps())
@settings(max_examples=100, deadline=None)
def test_any_step_can_be_recomputed_alone_and_is_what_training_sees(case: tuple[int, Train, int, int]) -> None:
    count, params, epoch, step = case
    epoch_order.cache_clear()
    picks, drawn = plan(count, params, epoch=epoch, step=step)
    table = table_of(torch.from_numpy(noise(count, 6, 1)), classes=5)
    images, targets = list(batches(table, params, epoch))[step - 1]
    expected = augment(*table.take(picks), drawn, params.augment, table.classes)
    assert torch.equal(images, expected[0])
    assert torch.equal(targets, expected[1])


def tell(picks: Tensor, drawn: Draw) -> list[list[float]]:
    """Each image with all that is drawn for it."""
    columns = [values.reshape(len(picks), math.prod(values.shape[1:])) for values in (picks, *vars(drawn).values())]
    return torch.cat([column.double() for column in columns], 1).tolist()  # type: ignore[no-any-return]


def test_a_share_of_a_draw_is_that_of_its_images() -> None:
    drawn = drawn_for(10, augmented_by(**ALL))
    for name, values in vars(drawn[3::2]).items():
        assert torch.equal(values, vars(drawn)[name][3::2])
    assert tell(torch.arange(10)[3::2], drawn[3::2]) == tell(torch.arange(10), drawn)[3::2]


@given(steps(), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_processes_of_any_number_share_the_batch_of_one(case: tuple[int, Train, int, int], world: int) -> None:
    count, params, epoch, step = case
    picks, drawn = plan(count, params, epoch=epoch, step=step)
    shares = [plan(count, params, epoch=epoch, step=step, rank=rank, world=world) for rank in range(world)]
    assert sorted(told for mine, changes in shares for told in tell(mine, changes)) == sorted(tell(picks, drawn))
    assert max(len(mine) for mine, _ in shares) - min(len(mine) for mine, _ in shares) <= 1


@given(steps())
@settings(max_examples=50, deadline=None)
def test_an_epoch_goes_on_after_any_step(case: tuple[int, Train, int, int]) -> None:
    count, params, epoch, done = case
    table = table_of(torch.from_numpy(noise(count, 6, 1)), classes=5)
    straight, rest = list(batches(table, params, epoch))[done:], list(batches(table, params, epoch, done))
    assert len(rest) == count_steps(count, params.batch) - done
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(straight, rest, strict=True))


@given(st.integers(1, 300), st.integers(1, 80))
@settings(max_examples=200, deadline=None)
def test_an_epoch_takes_each_image_once_and_none_alone(count: int, batch: int) -> None:
    params = train_params(seed=3, augment=augmented_by(), batch=batch)
    picks = [plan(count, params, epoch=2, step=step)[0] for step in range(1, count_steps(count, batch) + 1)]
    assert torch.equal(torch.cat(picks), epoch_order(count, seed=3, epoch=2))
    sizes = [len(some) for some in picks]
    assert set(sizes[:-1]) <= {batch}
    assert sizes[-1] <= batch + (count % batch == 1)
    assert min(sizes) > 1 or 1 in (count, batch)


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [
        (28, 9, [9, 9, 10]),
        (27, 9, [9, 9, 9]),
        (29, 9, [9, 9, 9, 2]),
        (10, 9, [10]),
        (5, 9, [5]),
        (1, 9, [1]),
        (3, 1, [1, 1, 1]),
        (3_472, 64, [64] * 54 + [16]),  # the sample's
    ],
)
def test_a_single_image_left_over_joins_the_step_before(count: int, batch: int, sizes: list[int]) -> None:
    params = train_params(augment=augmented_by(), batch=batch)
    table = table_of(torch.zeros(count, 2, 2, 1, dtype=torch.uint8))
    assert [len(targets) for _, targets in batches(table, params, 1)] == sizes
    for step in (0, len(sizes) + 1):
        with pytest.raises(AssertionError, match=f"step {step} of an epoch of {len(sizes)}"):
            plan(count, params, epoch=1, step=step)


def test_each_step_of_each_epoch_and_seed_draws_its_own_changes() -> None:
    keys = [(seed, epoch, step) for seed in (0, 1) for epoch in (1, 2) for step in (1, 2)]
    drawn = []
    for seed, epoch, step in keys:
        params = train_params(seed=seed, augment=augmented_by(**ALL), batch=50)
        drawn.append(plan(100, params, epoch=epoch, step=step)[1])
    for name in vars(NOTHING):
        found = {tuple(vars(one)[name].flatten().tolist()) for one in drawn}
        assert len(found) == len(keys), name


def test_each_purpose_has_draws_of_its_own() -> None:
    draws = {torch.rand(1, generator=step_generator(purpose, 0, 1, 1)).item() for purpose in ("order", "dropout", "x")}
    assert len(draws) == 3


# --- the table


@pytest.mark.usefixtures("home")
def test_a_table_holds_the_images_and_labels_of_its_split_alone() -> None:
    data = read_dataset()
    places = pd.read_csv(paths.SPLIT, dtype=str)
    for split in ("train", "validation", "test"):
        table = data.table(split, CPU)
        images, labels = table.take(torch.arange(len(table)))
        mine = places[places["split"] == split]
        assert [data.classes[code] for code in labels] == mine["label"].tolist()
        assert table.classes == len(data.classes) == 10
        assert np.array_equal(images.numpy(), np.load(paths.IMAGES)[mine.index])


@pytest.mark.usefixtures("home")
def test_a_table_in_the_memory_of_a_device_gives_what_the_file_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, params = read_dataset(), train_params(batch=64, augment=augmented_by(**ALL))
    streamed = data.table("train", CPU)
    monkeypatch.setattr("src.batches.free_memory", lambda _: 2 * int(data.images.nbytes))
    kept = data.table("train", CPU)
    assert (len(streamed.images), len(kept.images)) == (len(data.images), len(kept))
    for one, other in zip(batches(streamed, params, 1), batches(kept, params, 1), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert capsys.readouterr().err == ""  # only a GPU has a choice that needs a word


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is resident of a file")
def test_the_pages_of_a_large_file_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.npy"
    np.save(file, np.zeros((1_000, 64, 64, 3), np.uint8))

    def resident(large: int) -> int:
        """The kB of the file that are resident when all of its images were taken."""
        monkeypatch.setattr("src.batches._LARGE", large)
        images = np.load(file, mmap_mode="c")
        places = pd.DataFrame({"label": ["a", "b"] * 500, "split": ["train"] * 1_000})
        for _ in Dataset(images, places, ["a", "b"]).table("train", CPU).parts(100):
            pass
        mapped = Path("/proc/self/smaps").read_text().split(f"{file}\n")[1]
        return int(mapped.split("Rss:")[1].split()[0])

    assert resident(2**30) > 10_000
    assert resident(2**20) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_are_those_of_numpy_in_double_precision(channels: int) -> None:
    images = noise(2_500, 6, channels)  # more than one chunk, and an uneven last one
    images[..., 0] = images[..., 0] // 2 + 100
    rows = np.arange(0, 2_500, 2)
    mean, deviation = channel_statistics(table_of(torch.from_numpy(images), torch.from_numpy(rows)))
    chosen = images[rows].astype(np.float64)
    assert mean == pytest.approx(chosen.mean((0, 1, 2)).tolist(), rel=1e-12)
    assert deviation == pytest.approx(chosen.std((0, 1, 2)).tolist(), rel=1e-9)


def test_images_of_one_colour_have_a_deviation_that_can_be_divided_by() -> None:
    white = torch.full((3, 4, 4, 1), 255, dtype=torch.uint8)
    assert channel_statistics(Table(white, torch.arange(3), torch.zeros(3), 1)) == ([255.0], [1.0])


def test_classes_are_in_order_of_number_then_letter() -> None:
    assert sorted(["b", "10", "9", "a", "2 b", "-1"], key=class_order) == ["9", "10", "-1", "2 b", "a", "b"]


def test_classes_are_read_as_words_and_ordered_as_numbers(home: Project) -> None:
    split = home.folder / paths.SPLIT
    split.write_text(split.read_text().replace(",0,", ",NA,").replace(",1,", ",10,"))
    assert read_dataset().classes == [*"23456789", "10", "NA"]


def test_a_device_that_is_not_there_is_one_sentence() -> None:
    assert choose_device("cpu") == CPU
    missing = next(name for name in ("mps", "cuda") if not getattr(torch.backends, name, torch.cuda).is_available())
    with pytest.raises(PipelineError, match=f"the device '{missing}' is asked for, but torch finds none"):
        choose_device(missing)


def test_missing_or_unequal_files_are_one_sentence(home: Project) -> None:
    images = home.folder / paths.IMAGES
    np.save(images, np.load(images)[:-1])
    with pytest.raises(PipelineError, match=r"split.csv has 625 rows and data/images.npy 624"):
        read_dataset()
    images.unlink()
    with pytest.raises(PipelineError, match=r"data/images.npy is missing; `dvc repro split` makes it"):
        read_dataset()
