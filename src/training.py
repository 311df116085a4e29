"""The training loop: one step, one epoch, and a generator that yields a record an epoch and writes no file."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from lightning_fabric import Fabric
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from src.batches import Table, batches, choose_device, step_generator
from src.networks import Network
from src.params import Train
from src.runtime import PipelineError


@dataclass(frozen=True)
class Record:
    """What an epoch came to. loss: cross entropy an image; accuracy: 0 to 1; best: the best validation so far."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    best: bool


def make_fabric(params: Train) -> Fabric:
    """Choose device and precision, and make torch repeat the same bits."""
    device = choose_device(params.device)
    precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "auto": _best_precision(device)}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    return Fabric(accelerator=device.type, devices=1, precision=precision[params.precision])  # type: ignore[arg-type]


def fit(network: Network, train: Table, validation: Table, params: Train, fabric: Fabric) -> Iterator[Record]:
    """Train `network` in place and yield a record after each epoch, until the last or until patience ends.

    Raises PipelineError where the batch is larger than the data, or the loss is no number any more.
    """
    if params.batch > len(train):
        raise PipelineError(f"train.batch is {params.batch:,}, more than the {len(train):,} training images")
    model = network.to(memory_format=torch.channels_last)
    optimizer = Adam(model.parameters(), lr=params.lr, fused=fabric.device.type in ("cuda", "cpu"))
    compiled: nn.Module = torch.compile(model) if params.compile else model  # type: ignore[assignment]
    model, optimizer = fabric.setup(compiled, optimizer)

    best, waited = (-1.0, 0.0), 0
    with tqdm(total=params.epochs * len(train), unit=" images", unit_scale=True, disable=None) as bar:
        for epoch in range(1, params.epochs + 1):
            bar.set_description(f"epoch {epoch}/{params.epochs}")
            train_loss, train_accuracy = _train_epoch(model, optimizer, train, params, fabric, epoch, bar)
            validation_loss, validation_accuracy = evaluate(model, validation, params.batch)
            # Accuracy first, since that is what is promised; the loss decides between equals.
            score = (validation_accuracy, -validation_loss)
            improved = score > best
            best, waited = max(best, score), 0 if improved else waited + 1
            yield Record(epoch, train_loss, train_accuracy, validation_loss, validation_accuracy, improved)
            if 0 < params.patience <= waited:
                return


def train_step(
    model: nn.Module, optimizer: Optimizer, fabric: Fabric, images: Tensor, labels: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Take one step on one batch and give the sum of its losses and the number of right answers, on the device.

    images: (B, S, S, C) uint8; labels: (B,) int64.
    """
    logits = model(images, generator)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    return loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()


def evaluate(model: nn.Module, table: Table, batch: int) -> tuple[float, float]:
    """Mean cross entropy and accuracy over a table; sums are divided once, so that batches weigh by their size."""
    model.eval()
    sums = torch.zeros(2, device=table.labels.device)
    with torch.inference_mode():
        for picks in torch.arange(len(table), device=table.rows.device).split(batch):
            images, labels = table.take(picks)
            logits = model(images).float()
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right])
    loss, accuracy = (sums / len(table)).tolist()
    return loss, accuracy


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    table: Table,
    params: Train,
    fabric: Fabric,
    epoch: int,
    bar: "tqdm[NoReturn]",
) -> tuple[float, float]:
    """Train one epoch and give the mean loss and accuracy of its steps, read from the device once."""
    model.train()
    sums = torch.zeros(2, device=fabric.device)
    for step, (images, labels) in enumerate(batches(table, params, epoch), start=1):
        generator = step_generator(params.seed, epoch, step, fabric.device)
        sums += torch.stack(train_step(model, optimizer, fabric, images, labels, generator))
        bar.update(len(labels))
    loss, accuracy = (sums / len(table)).tolist()
    if not math.isfinite(loss):
        raise PipelineError(f"the training loss is {loss} in epoch {epoch}; use a smaller train.lr than {params.lr:g}")
    return loss, accuracy


def _best_precision(device: torch.device) -> str:
    """Mixed precision where the device computes it natively; on CPUs without bf16 units it is slower (measured)."""
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
