"""The uint8 table on its device, the order of an epoch, and augmentation as pure functions of whole batches.

Whatever is random in step k of epoch e is a function of (seed, e, k). `plan` recomputes it for any step.
"""

import hashlib
import math
import mmap
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
from src.runtime import PipelineError, say

Pixels = NDArray[np.uint8]

_LARGE = 2**26
"""Bytes of a file whose pages are given back once they were read."""


@dataclass(frozen=True)
class Table:
    """Some rows of all images, and their classes.

    images: (N, S, S, C) uint8, in the memory of the device or of the host; rows: (M,) int64 of those that belong to
    this table, beside the images; labels: (M,) int64, on the device; classes: how many there are; mapped: the file
    that the images are read from, where its pages shall not stay in memory.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor
    classes: int
    mapped: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.labels.device

    def take(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Give images (B, S, S, C) and labels (B,) of the picks, which count from 0 within this table, on the device.

        From the host they go through pinned memory, while the device still computes what it was given before.
        """
        # Whole rows, which a CPU copies nine times as fast as by `images[rows]`.
        images = self.images.index_select(0, self.rows[picks.to(self.rows.device)])
        if self.mapped:
            self.mapped.madvise(mmap.MADV_DONTNEED)  # otherwise they count as this process's, up to the whole file
        return move(images, self.device), self.labels[move(picks, self.device)]

    def parts(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all images and labels in their order, `batch` at a time."""
        yield from map(self.take, torch.arange(len(self)).split(batch))


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device without waiting for it: a GPU fetches it from pinned memory by itself."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
        return Draw(**{name: move(drawn, device) for name, drawn in vars(self).items()})


@dataclass(frozen=True)
class Dataset:
    """All prepared images with their places.

    images: (N, S, S, C) uint8, in the file; places: label and split of the N rows, and what else was asked for;
    classes: in their order.
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
        """Make the table of a split: on the device where it takes at most half of the memory that is free there.

        Otherwise, and on the CPU, the images stay in the file, which the system reads and forgets as memory allows.
        """
        chosen = self.rows(split)
        codes = pd.Categorical(self.places["label"].iloc[chosen], categories=self.classes).codes
        labels = torch.from_numpy(codes.astype(np.int64)).to(device)
        whole, rows = torch.from_numpy(self.images), torch.from_numpy(chosen)
        needed, free = len(rows) * whole[0].numel(), free_memory(device)
        if device.type == "cuda":
            place = "kept there" if needed <= free / 2 else "brought there batch by batch"
            say(f"the {split} images take {needed:,} bytes, of {free:,} that the GPU has free, and are {place}")
        if needed > free / 2:
            mapped = self.images.base if self.images.nbytes > _LARGE else None
            return Table(whole, rows, labels, len(self.classes), mapped if isinstance(mapped, mmap.mmap) else None)
        copied = torch.cat([whole[some].to(device) for some in rows.split(1024)])
        return Table(copied, torch.arange(len(rows), device=device), labels, len(self.classes))


def free_memory(device: torch.device) -> int:
    """Tell how many bytes a GPU has free for images; none on a device that shares the memory of the host."""
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return free


def read_dataset(*further: str) -> Dataset:
    """Open what prepare and split have made, with further columns of data/split.csv if they are asked for.

    Of each image a few bytes are held, unless its name is asked for. Raises PipelineError where a file is missing.
    """
    try:
        columns = ["label", "split", *further]
        places = pd.read_csv(paths.SPLIT, dtype="str", usecols=columns, keep_default_na=False)
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
    for images, _ in table.parts(64):
        pixels = images.to(torch.int32)
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
    side = images.shape[1]
    size, drawn = params.image_size or side, drawn.to(images.device)
    # Sampled a channel at a time, which is three times faster on a CPU than pixels with their channels side by side.
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    pixels = F.grid_sample(pixels, _grid(drawn, side, size), padding_mode="border", align_corners=False)
    if params.jitter:
        pixels = _recolour(pixels, drawn.colour)
    if params.mixup or params.cutmix:
        patch = _inside(drawn.patch, size)
        share = torch.where(patch, 1.0, drawn.blend.view(-1, 1, 1, 1))
        pixels = torch.lerp(pixels, pixels.roll(-1, 0), share)
        targets = torch.lerp(targets, targets.roll(-1, 0), share.mean((1, 2, 3))[:, None])
    if params.erase:
        pixels = torch.where(_inside(drawn.hole, size), pixels.mean((2, 3), keepdim=True), pixels)
    return pixels.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), targets


def _grid(drawn: Draw, side: int, size: int) -> Tensor:
    """Give the places in the old image, of `side` pixels, of each pixel of the new one: (N, size, size, 2), -1 to 1.

    As torch's affine_grid, but sums of what each row and each column adds: on a CPU fifty times as fast.
    """
    turn, offset = drawn.view.split([2, 1], dim=2)
    offset = offset - turn @ (drawn.shift[:, :, None] * (2 / side))
    places = (2 * torch.arange(size, device=turn.device) + 1) / size - 1
    across, down = turn[:, :, :1] * places, turn[:, :, 1:] * places + offset
    grid: Tensor = down[:, :, :, None] + across[:, :, None]
    return grid.permute(0, 2, 3, 1)


def _recolour(pixels: Tensor, change: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation by 1 + change, and each channel by half of what is drawn for it.

    Saturation moves a pixel's channels to or from their mean, contrast all of them to or from that of the image, which
    saturation leaves as it is: together they are one matrix and one offset for each image.
    """
    count, channels, size, _ = pixels.shape
    brightness, contrast, saturation, tint = (1 + change).split([1, 1, 1, 3], dim=1)
    own = torch.eye(channels, device=pixels.device) * saturation[:, :, None]
    matrix = (own + (1 - saturation[:, :, None]) / channels) * contrast[:, :, None]
    offset = (1 - contrast) * pixels.mean((1, 2, 3))[:, None]
    scale = (brightness + (tint[:, :channels] - 1) / 2)[:, :, None]
    flat = torch.baddbmm(offset[:, :, None] * scale, matrix * scale, pixels.view(count, channels, -1))
    return flat.clamp_(0, 255).view(count, channels, size, size)


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
    """Count the steps of an epoch over `count` images.

    The last one may have fewer images than `batch`, but never one alone, which has no variance for batch normalisation:
    a single left-over image joins the step before it, whose size is `batch` + 1.
    """
    return max(1, count // batch + (count % batch > 1))


def plan(count: int, params: Train, *, epoch: int, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Draw]:
    """Tell which of `count` training images step `step` of epoch `epoch` takes (both from 1), and how it changes them.

    This is all there is to know about a step, at any time, in any order of asking, on any machine. Of `world`
    processes, process `rank` (from 0) takes every `world`-th image: together they take the batch of one process, each
    image changed in the same way. Gives picks, (B,) int64, which count from 0 within the table, and the Draw of B
    images: B is `train.batch`, but for the last step of an epoch, which takes all that are left (see `count_steps`).
    """
    steps = count_steps(count, params.batch)
    assert 1 <= step <= steps, f"step {step} of an epoch of {steps}"
    end = count if step == steps else step * params.batch
    picks = epoch_order(count, seed=params.seed, epoch=epoch)[(step - 1) * params.batch : end]
    drawn = draw(len(picks), params.augment, step_generator("augmentation", params.seed, epoch, step))
    return picks[rank::world], drawn[rank::world]


def batches(table: Table, params: Train, epoch: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what each step of an epoch (from 1) after `done` sees: images (B, S, S, C) uint8, labels (B, classes)."""
    for step in range(done + 1, count_steps(len(table), params.batch) + 1):
        picks, drawn = plan(len(table), params, epoch=epoch, step=step)
        yield augment(*table.take(picks), drawn, params.augment, table.classes)
