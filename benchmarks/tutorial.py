"""The yardstick: the Animals-10 tutorial's loop, as its article shows it, on a folder of images a class.

Nothing here is ours: files are opened again in each epoch, the loader's workers hand tensors over, the network is fp32.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def network(classes: int) -> nn.Sequential:
    """Five convolutions of 16-32-64-128-256 channels, two linear layers: for images of 128 px."""
    widths = [3, 16, 32, 64, 128, 256]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(256 * 4 * 4, 448), nn.ReLU(), nn.Linear(448, classes)
    )


def loader(folder: Path, *, size: int = 128, batch: int = 64, workers: int = 2) -> "DataLoader[tuple[Tensor, Tensor]]":
    """Open, resize and batch the images below class folders, in random order."""
    change = transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    images = datasets.ImageFolder(str(folder), transform=change)
    return DataLoader(images, batch_size=batch, shuffle=True, num_workers=workers)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: "DataLoader[tuple[Tensor, Tensor]]") -> float:
    """Train one epoch and give its mean loss."""
    model.train()
    running = 0.0
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item() * len(labels)
    return running / len(batches.dataset)  # type: ignore[arg-type, no-any-return]
