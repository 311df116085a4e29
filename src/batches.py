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
from torch.nn import functional as F

from src import paths
from src.params import Augment, Train
from src.runtime import PipelineError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Table:
    """Some rows of all images, and their classes.

    images: (N, S, S, C) uint8; rows: (M,) int64 of those that belong to this table; labels: (M,) int64; classes: how
    many there are.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Gather images (B, S, S, C) and labels (B,) of the picks, which count from 0 within this table."""
        return self.images[self.rows[picks]], self.labels[picks]


@dataclass(frozen=True)
class Draw:
    """What chance decides for each of N images, drawn on the CPU, so that every device sees the same.

    shift: (N, 2) int64, pixels right and down; view: (N, 2, 3), the affine map from a place in the new image, x and y
    from -1 to 1, to that in the old one; colour: (N, 6), changes of brightness, contrast, saturation and each channel;
    hole, patch: (N, 4), left, top, right and bottom, 0 to 1, of what is painted over, and of what another image covers;
    blend: (N,), how much of another image shines through.
    """

    shift: Tensor
    view: Tensor
    colour: Tensor
    hole: Tensor
    patch: Tensor
    blend: Tensor

    def __getitem__(self, which: slice) -> "Draw":
        """Give what is drawn for some of the images."""
        return Draw(**{name: drawn[which] for name, drawn in vars(self).items()})

    def to(self, device: torch.device) -> "Draw":
        """Bring it to a device."""
        return Draw(**{name: drawn.to(device) for name, drawn in vars(self).items()})


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
            return Table(torch.from_numpy(self.images), torch.from_numpy(rows), labels, len(self.classes))
        copied = torch.from_numpy(self.images[rows]).to(device)
        return Table(copied, torch.arange(len(rows), device=device), labels.to(device), len(self.classes))


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


def draw(count: int, params: Augment, generator: Generator) -> Draw:
    """Draw the augmentation of `count` images; what is turned off is drawn all the same, so it shifts nothing else."""
    flip, mix, cover, erase, hole, area = torch.rand(6, count, generator=generator)
    ratio, angle = torch.rand(2, count, generator=generator) * 2 - 1
    place, corner, spot = torch.rand(3, count, 2, generator=generator)
    colour = torch.rand(count, 6, generator=generator) * 2 - 1
    shift = torch.randint(-params.shift, params.shift + 1, (count, 2), generator=generator)

    # Sides whose product is the area, and whose ratio is at most `stretch`, either way round; neither is longer than
    # the image. Roots are taken through logarithms, since the last bit of torch's own square root depends on the CPU
    # (see src/environment.py).
    area = torch.log(1 - area * (1 - params.crop))
    ratio = (ratio * math.log(params.stretch)).clamp(area, -area)
    sides = torch.exp(torch.stack([area + ratio, area - ratio], 1) / 2)
    angle = angle * math.radians(params.rotate)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(count, 2, 2)
    mirror = torch.stack([torch.where((flip < 0.5) & params.flip, -1.0, 1.0), torch.ones(count)], 1)
    offset = (1 - sides) * (2 * place - 1)

    # One at the lower and one at the upper end, so that neither moves the other.
    blended, covered = mix < params.mixup, mix >= 1 - params.cutmix
    return Draw(
        shift=shift,
        view=torch.cat([sides[:, :, None] * turn * mirror[:, None], offset[:, :, None]], 2),
        colour=colour * params.jitter,
        hole=_box(spot, (0.02 + 0.18 * hole) * (erase < params.erase)),
        patch=_box(corner, cover * covered),
        blend=cover * blended,
    )


def augments(params: Augment) -> bool:
    """Tell whether any image is changed at all."""
    unchanged = {"crop": 1.0, "stretch": 1.0}
    return any(value != unchanged.get(name, 0) for name, value in params)


def augment(images: Tensor, labels: Tensor, drawn: Draw, params: Augment, classes: int) -> tuple[Tensor, Tensor]:
    """Change each image as drawn, and mix it with the next one of the batch where that is drawn.

    images: (B, S, S, C) uint8; labels: (B,) int64. Gives images whose side is `size`, or the same where that is 0, and
    labels as shares of the classes, (B, classes). Random resized crop as in Szegedy et al. 2015, colours as in Howard
    2013, random erasing as in Zhong et al. 2017, mixup as in Zhang et al. 2018, CutMix as in Yun et al. 2019.
    """
    targets = F.one_hot(labels, classes).float()
    if not augments(params):
        return images, targets
    count, side, _, channels = images.shape
    size, drawn = params.size or side, drawn.to(images.device)
    # Sampled a channel at a time, which is three times faster on a CPU than pixels with their channels side by side.
    pixels = images.permute(0, 3, 1, 2).float().contiguous()
    turn, offset = drawn.view.split([2, 1], dim=2)
    view = torch.cat([turn, offset - turn @ (drawn.shift[:, :, None] * (2 / side))], 2)
    grid = F.affine_grid(view, [count, channels, size, size], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if params.jitter:
        pixels = _recolour(pixels, drawn.colour)
    if params.mixup or params.cutmix:
        patch = _inside(drawn.patch, size)
        share = torch.where(patch, 1.0, drawn.blend.view(-1, 1, 1, 1))
        pixels = torch.lerp(pixels, pixels.roll(-1, 0), share)
        targets = torch.lerp(targets, targets.roll(-1, 0), share.mean((1, 2, 3))[:, None])
    if params.erase:
        pixels = torch.where(_inside(drawn.hole, size), pixels.mean((2, 3), keepdim=True), pixels)
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), targets


def _recolour(pixels: Tensor, change: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation by 1 + change, and each channel by half of what is drawn for it."""
    brightness, contrast, saturation, *tint = change.view(-1, 6, 1, 1, 1).unbind(1)
    gray = pixels.mean(1, keepdim=True)
    pixels = torch.lerp(gray, pixels, 1 + saturation)
    pixels = torch.lerp(pixels.mean((1, 2, 3), keepdim=True), pixels, 1 + contrast)
    return (pixels * (1 + brightness + torch.cat(tint[: pixels.shape[1]], 1) / 2)).clamp(0, 255)


def _box(place: Tensor, area: Tensor) -> Tensor:
    """Squares of a share of the image, within it at places (N, 2): left, top, right, bottom, (N, 4)."""
    side = torch.exp(torch.log(area) / 2)[:, None]
    start = place * (1 - side)
    return torch.cat([start, start + side], 1)


def _inside(box: Tensor, size: int) -> Tensor:
    """Tell which pixels have their middle in the box: (N, 4) -> (N, 1, S, S) bool."""
    places = (torch.arange(size, device=box.device) + 0.5) / size
    across, down = ((places >= box[:, i, None]) & (places < box[:, i + 2, None]) for i in (0, 1))
    return (down[:, :, None] & across[:, None, :])[:, None]


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
    drawn = draw(len(picks), params.augment, step_generator("augmentation", params.seed, epoch, step))
    return picks[rank::world], drawn[rank::world]


def batches(table: Table, params: Train, epoch: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what each step of an epoch (from 1) after `done` sees: images (B, S, S, C) uint8, labels (B, classes)."""
    for step in range(done + 1, count_steps(len(table), params.batch) + 1):
        picks, drawn = plan(len(table), params, epoch=epoch, step=step)
        images, labels = table.take(picks.to(table.rows.device))
        yield augment(images, labels, drawn, params.augment, table.classes)
