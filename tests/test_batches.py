"""What a step is given: pure functions of (seed, epoch, step), each image once, moved and mirrored as drawn."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from src import paths
from src.batches import (
    Draw,
    Table,
    augment,
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
from src.params import Train, load_params
from src.runtime import PipelineError
from tests.project import Project

CPU = torch.device("cpu")
Image = NDArray[np.uint8]


def noise(count: int, size: int, channels: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def train_params(**changes: object) -> Train:
    return load_params().train.model_copy(update=changes)


@pytest.fixture
def marked() -> Table:
    """A table of 150 of 200 images, each filled with its row's number, which no augmentation changes, and its label."""
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 4, 4, 1)
    rows = torch.arange(49, 199)
    return Table(images, rows, rows.clone())


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
    drawn = draw(10_000, flip=True, shift=2, generator=step_generator("augmentation", 0, 1, 1))
    assert 0.48 < drawn.flip.double().mean() < 0.52
    for axis in (0, 1):
        values, counts = drawn.shift[:, axis].unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > 1_800


def test_each_image_of_a_batch_draws_for_itself() -> None:
    drawn = draw(64, flip=True, shift=10**6, generator=step_generator("augmentation", 0, 1, 1))
    assert len({tuple(moved) for moved in drawn.shift.tolist()}) == 64
    assert len(set(drawn.flip.tolist())) == 2


def test_turning_one_augmentation_off_leaves_the_other_draws_as_they_were() -> None:
    both, moved, mirrored = (
        draw(64, flip=flip, shift=shift, generator=step_generator("augmentation", 0, 1, 1))
        for flip, shift in ((True, 3), (False, 3), (True, 0))
    )
    assert torch.equal(both.shift, moved.shift)
    assert torch.equal(both.flip, mirrored.flip)
    assert not moved.flip.any()
    assert not mirrored.shift.any()


# --- augmentation


def by_hand(image: Image, flip: bool, down: int, right: int) -> Image:
    """Mirror one image, pad it with its edge, and cut out what is seen after the move."""
    size, far = len(image), max(abs(down), abs(right))
    image = image[:, ::-1] if flip else image
    padded = np.pad(image, ((far, far), (far, far), (0, 0)), mode="edge")
    return padded[far - down : far - down + size, far - right : far - right + size]


@given(
    count=st.integers(1, 6),
    size=st.integers(1, 12),
    channels=st.sampled_from([1, 3]),
    far=st.integers(0, 15),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_a_batch_is_mirrored_and_moved_as_single_images_by_hand(
    count: int, size: int, channels: int, far: int, seed: int
) -> None:
    images = noise(count, size, channels, seed)
    drawn = draw(count, flip=True, shift=far, generator=torch.Generator().manual_seed(seed))
    expected = [
        by_hand(image, flip, *moved)
        for image, flip, moved in zip(images, drawn.flip.tolist(), drawn.shift.tolist(), strict=True)
    ]
    given_images = torch.from_numpy(images.copy())
    augmented = augment(given_images, drawn)
    assert augmented.dtype == torch.uint8
    assert np.array_equal(augmented.numpy(), np.stack(expected))
    assert np.array_equal(given_images.numpy(), images)


def test_a_move_down_and_right_repeats_the_first_row_and_column() -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)[None, :, :, None]
    moved = augment(image, Draw(flip=torch.tensor([False]), shift=torch.tensor([[1, 2]])))
    assert moved[0, :, :, 0].tolist() == [[1, 1, 1], [1, 1, 1], [4, 4, 4]]
    mirrored = augment(image, Draw(flip=torch.tensor([True]), shift=torch.tensor([[0, 0]])))
    assert mirrored[0, :, :, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]


def test_without_augmentation_a_batch_is_what_was_prepared() -> None:
    images = torch.from_numpy(noise(20, 5, 3))
    table = Table(images, torch.arange(20), torch.arange(20))
    for seen, labels in batches(table, train_params(flip=False, shift=0, batch=8), 1):
        assert torch.equal(seen, images[labels])


# --- an epoch


def test_an_epoch_shows_each_training_image_once_beside_its_own_label(marked: Table) -> None:
    params = train_params(flip=True, shift=2, batch=64)
    epochs = [list(batches(marked, params, epoch)) for epoch in (1, 2)]
    assert [len(labels) for _, labels in epochs[0]] == [64, 64, 22]
    for epoch in epochs:
        labels = torch.cat([labels for _, labels in epoch])
        assert sorted(labels.tolist()) == list(range(49, 199))
        seen = torch.cat([images for images, _ in epoch])
        assert (seen == labels[:, None, None, None]).all()
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_an_epoch_neither_reads_nor_moves_any_global_chance() -> None:
    rows = torch.arange(200)
    params, table = train_params(flip=True, shift=2, batch=16), Table(torch.from_numpy(noise(200, 6, 3)), rows, rows)
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
    changes = {
        "seed": choose(st.integers(0, 2**32 - 1)),
        "flip": choose(st.booleans()),
        "shift": choose(st.integers(0, 4)),
    }
    epoch, step = choose(st.integers(1, 10**6)), choose(st.integers(1, count_steps(count, batch)))
    return count, train_params(**changes, batch=batch), epoch, step


@given(steps())
@settings(max_examples=200, deadline=None)
def test_any_step_can_be_recomputed_alone_and_is_what_training_sees(case: tuple[int, Train, int, int]) -> None:
    count, params, epoch, step = case
    epoch_order.cache_clear()
    picks, drawn = plan(count, params, epoch=epoch, step=step)
    images = torch.from_numpy(noise(count, 6, 1))
    seen = list(batches(Table(images, torch.arange(count), torch.arange(count)), params, epoch))[step - 1]
    assert torch.equal(seen[1], picks)
    assert torch.equal(seen[0], augment(images[picks], drawn))


@given(steps(), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_processes_of_any_number_share_the_batch_of_one(case: tuple[int, Train, int, int], world: int) -> None:
    count, params, epoch, step = case
    picks, drawn = plan(count, params, epoch=epoch, step=step)
    shares = [plan(count, params, epoch=epoch, step=step, rank=rank, world=world) for rank in range(world)]
    together = [
        (int(pick), bool(flip), shift.tolist())
        for mine, changes in shares
        for pick, flip, shift in zip(mine, changes.flip, changes.shift, strict=True)
    ]
    assert sorted(together) == sorted(
        (int(pick), bool(flip), shift.tolist())
        for pick, flip, shift in zip(picks, drawn.flip, drawn.shift, strict=True)
    )
    assert max(len(mine) for mine, _ in shares) - min(len(mine) for mine, _ in shares) <= 1


@given(steps())
@settings(max_examples=50, deadline=None)
def test_an_epoch_goes_on_after_any_step(case: tuple[int, Train, int, int]) -> None:
    count, params, epoch, done = case
    table = Table(torch.from_numpy(noise(count, 6, 1)), torch.arange(count), torch.arange(count))
    straight, rest = list(batches(table, params, epoch))[done:], list(batches(table, params, epoch, done))
    assert len(rest) == count_steps(count, params.batch) - done
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(straight, rest, strict=True))


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
        assert np.array_equal(images.numpy(), np.load(paths.IMAGES)[mine.index])


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics_are_those_of_numpy_in_double_precision(channels: int) -> None:
    images = noise(2_500, 6, channels)  # more than one chunk, and an uneven last one
    images[..., 0] = images[..., 0] // 2 + 100
    rows = np.arange(0, 2_500, 2)
    mean, deviation = channel_statistics(
        Table(torch.from_numpy(images), torch.from_numpy(rows), torch.from_numpy(rows))
    )
    chosen = images[rows].astype(np.float64)
    assert mean == pytest.approx(chosen.mean((0, 1, 2)).tolist(), rel=1e-12)
    assert deviation == pytest.approx(chosen.std((0, 1, 2)).tolist(), rel=1e-9)


def test_images_of_one_colour_have_a_deviation_that_can_be_divided_by() -> None:
    white = torch.full((3, 4, 4, 1), 255, dtype=torch.uint8)
    assert channel_statistics(Table(white, torch.arange(3), torch.zeros(3))) == ([255.0], [1.0])


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
