"""The uint8 table on its device, the order of an epoch, and augmentation as pure functions of whole batches.

Whatever is random in step k of epoch e is a function of (seed, e, k). `plan` recomputes it for any step.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from src import paths
from src.params import Train
from src.runtime import PipelineError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Table:
    """Some rows of all images, and their classes.

    images: (N, S, S, C) uint8; rows: (M,) int64 of those that belong to this table; labels: (M,) int64.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Gather images (B, S, S, C) and labels (B,) of the picks, which count from 0 within this table."""
        return self.images[self.rows[picks]], self.labels[picks]


@dataclass(frozen=True)
class Draw:
    """What chance decides for each of N images, drawn on the CPU, so that every device sees the same.

    flip: (N,) bool; shift: (N, 2) int64, pixels down and right.
    """

    flip: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Dataset:
    """All prepared images with their places.

    images: (N, S, S, C) uint8, in the file; places: path, label, split, group of the N rows; classes: in their order.
    """

    images: Pixels
    places: pd.DataFrame
    classes: list[str]

    @property
    def size(self) -> int:
        """Side of the images, in pixels."""
        return int(self.images.shape[1])

    @property
    def channels(self) -> int:
        """1 for gray, 3 for RGB."""
        return int(self.images.shape[3])

    def rows(self, split: str) -> NDArray[np.int64]:
        """Give the rows of train, validation or test."""
        return np.flatnonzero(self.places["split"] == split)

    def table(self, split: str, device: torch.device) -> Table:
        """Make the table of a split.

        On the CPU the images stay in the file, which the system reads and forgets as memory allows; another device
        gets a copy of its rows.
        """
        rows = self.rows(split)
        codes = pd.Categorical(self.places["label"].iloc[rows], categories=self.classes).codes
        labels = torch.from_numpy(codes.astype(np.int64))
        if device.type == "cpu":
            return Table(torch.from_numpy(self.images), torch.from_numpy(rows), labels)
        copied = torch.from_numpy(self.images[rows]).to(device)
        return Table(copied, torch.arange(len(rows), device=device), labels.to(device))


def read_dataset() -> Dataset:
    """Open what prepare and split have made. Raises PipelineError where a file is missing."""
    try:
        places = pd.read_csv(paths.SPLIT, dtype={"path": str, "label": str, "split": str}, keep_default_na=False)
        # Copy-on-write, since torch asks for memory that could be written; nothing writes to it.
        images = np.load(paths.IMAGES, mmap_mode="c")
    except FileNotFoundError as error:
        raise PipelineError(f"{error.filename} is missing; `dvc repro split` makes it") from None
    if len(places) != len(images):
        raise PipelineError(
            f"{paths.SPLIT} has {len(places):,} rows and {paths.IMAGES} {len(images):,}; `dvc repro split` mends it"
        )
    return Dataset(images, places, sorted(set(places["label"]), key=class_order))


def class_order(name: str) -> tuple[int, int, str]:
    """Sort key of class names: numbers by value, then words by letter."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def choose_device(name: str) -> torch.device:
    """Turn auto, cuda, mps or cpu into a device that is there. Raises PipelineError where it is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there[name]:
        raise PipelineError(f"the device {name!r} is asked for, but torch finds none; set device: auto or cpu")
    return torch.device(name)


def channel_statistics(table: Table) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, 0 to 255, from exact integer sums."""
    sums = torch.zeros(2, *table.images.shape[1:], dtype=torch.int64)
    # Few images at once need little memory, and their sums, each at most 64 x 255^2, fit into 32 bits: 12 times faster.
    for picks in torch.arange(len(table), device=table.rows.device).split(64):
        pixels = table.take(picks)[0].to(torch.int32)
        sums += torch.stack([part.sum(0, dtype=torch.int32) for part in (pixels, pixels * pixels)]).cpu()
    mean, square = sums.sum((1, 2)).double() / (len(table) * table.images[0, ..., 0].numel())
    # Not torch's square root, whose last bit depends on the CPU (see src/environment.py).
    return mean.tolist(), [math.sqrt(max(variance, 1.0)) for variance in (square - mean**2).tolist()]


@lru_cache(maxsize=2)  # a pure function, asked for once a step
def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """Give the order in which an epoch (from 1) visits `count` images: (count,) int64 on the CPU, not to be changed."""
    return torch.randperm(count, generator=step_generator("order", seed, epoch))


def step_generator(
    purpose: str, seed: int, epoch: int = 0, step: int = 0, device: str | torch.device = "cpu"
) -> Generator:
    """Give the generator of one purpose in step `step` of epoch `epoch` (both from 1), for draws on `device`.

    Each purpose, such as order, augmentation or dropout, has draws of its own: none is shifted by another.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}/{step}".encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(count: int, *, flip: bool, shift: int, generator: Generator) -> Draw:
    """Draw the augmentation of `count` images; what is turned off is drawn all the same, so it shifts nothing else."""
    coins = torch.rand(count, generator=generator) < 0.5
    steps = torch.randint(-shift, shift + 1, (count, 2), generator=generator)
    return Draw(flip=coins & flip, shift=steps)


def augment(images: Tensor, drawn: Draw) -> Tensor:
    """Mirror and move each image as drawn; what comes in from outside repeats the edge. (N, S, S, C) uint8 -> same."""
    size = torch.arange(images.shape[1])
    down = (size - drawn.shift[:, :1]).clamp(0, len(size) - 1)
    right = (size - drawn.shift[:, 1:]).clamp(0, len(size) - 1)
    right = torch.where(drawn.flip[:, None], len(size) - 1 - right, right)
    down, right = down.to(images.device), right.to(images.device)
    image = torch.arange(len(images), device=images.device)
    return images[image[:, None, None], down[:, :, None], right[:, None, :]]


def count_steps(count: int, batch: int) -> int:
    """Count the steps of an epoch over `count` images; the last may have fewer images than `batch`."""
    return math.ceil(count / batch)


def plan(count: int, params: Train, *, epoch: int, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Draw]:
    """Tell which of `count` training images step `step` of epoch `epoch` takes (both from 1), and how it changes them.

    This is all there is to know about a step, at any time, in any order of asking, on any machine. Of `world`
    processes, process `rank` (from 0) takes every `world`-th image: together they take the batch of one process, each
    image changed in the same way. Gives picks, (B,) int64, which count from 0 within the table, and the Draw of B
    images.
    """
    picks = epoch_order(count, seed=params.seed, epoch=epoch)[(step - 1) * params.batch : step * params.batch]
    generator = step_generator("augmentation", params.seed, epoch, step)
    drawn = draw(len(picks), flip=params.flip, shift=params.shift, generator=generator)
    return picks[rank::world], Draw(flip=drawn.flip[rank::world], shift=drawn.shift[rank::world])


def batches(table: Table, params: Train, epoch: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented images (B, S, S, C) uint8 and labels (B,) of each step of an epoch (from 1) after `done`."""
    for step in range(done + 1, count_steps(len(table), params.batch) + 1):
        picks, drawn = plan(len(table), params, epoch=epoch, step=step)
        images, labels = table.take(picks.to(table.rows.device))
        yield augment(images, drawn) if params.flip or params.shift else images, labels
