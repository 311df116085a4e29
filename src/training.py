"""The training loop: one step, one epoch, and a generator that tells how far it is and writes no file."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from src.batches import Table, batches, choose_device, count_steps, step_generator
from src.checkpoints import Store
from src.networks import Card, Network, pack
from src.params import Train
from src.runtime import PipelineError, say
from src.schedules import learning_rate


@dataclass(frozen=True)
class Record:
    """What an epoch came to. loss: cross entropy an image; accuracy: 0 to 1; best: the best validation so far."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    best: bool

    def __str__(self) -> str:
        train = f"loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.2%}"
        validation = f"loss {self.validation_loss:.4f}, accuracy {self.validation_accuracy:.2%}"
        return f"epoch {self.epoch}: train {train}; validation {validation}{' *' if self.best else ''}"


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` steps into the epoch that follows those of `history`.

    sums: of the losses and of the right answers of these steps; whole numbers of float32, so that JSON keeps them.
    """

    history: tuple[Record, ...] = ()
    step: int = 0
    sums: tuple[float, float] = (0.0, 0.0)

    @property
    def record(self) -> Record | None:
        """The record of an epoch that has just ended."""
        return self.history[-1] if self.history and self.step == 0 else None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Take up what `asdict` gave and JSON kept."""
        loss, right = values["sums"]
        return cls(tuple(Record(**record) for record in values["history"]), values["step"], (loss, right))


def make_fabric(params: Train) -> Fabric:
    """Choose device and precision, and make torch repeat the same bits."""
    device = choose_device(params.device)
    precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "auto": _best_precision(device)}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    return Fabric(accelerator=device.type, devices=1, precision=precision[params.precision])  # type: ignore[arg-type]


class Trainer:
    """A network with its optimizer, which can stop after any step and go on in another process with the same bits."""

    def __init__(self, network: Network, params: Train, fabric: Fabric) -> None:
        self.params, self.fabric = params, fabric
        self.network = network.to(memory_format=torch.channels_last)
        optimizer = Adam(self.network.parameters(), lr=params.lr, fused=fabric.device.type in ("cuda", "cpu"))
        compiled: nn.Module = torch.compile(self.network) if params.compile else self.network  # type: ignore[assignment]
        self.model, self.optimizer = fabric.setup(compiled, optimizer)

    def state(self) -> dict[str, Tensor]:
        """Give all that has to be kept beside the weights: the optimizer's moments, and the scale of float16."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"optimizer.{index}.{name}": value for index in state for name, value in state[index].items()}
        scale = self.fabric.strategy.precision.state_dict()
        return moments | {f"precision.{name}": torch.tensor(value) for name, value in scale.items()}

    def restore(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Take up weights and state, in the memory format in which this network has them."""
        self.network.load_state_dict(weights)
        parameters = list(self.network.parameters())
        moments: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in state if key.startswith("optimizer.")):
            _, index, name = key.split(".", 2)
            like, value = parameters[int(index)], state[key]
            # A fused step walks weights and moments in the order of memory, so both must have the same.
            kept = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            moments.setdefault(int(index), {})[name] = kept
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        scale = {key.removeprefix("precision."): state[key].item() for key in state if key.startswith("precision.")}
        self.fabric.strategy.precision.load_state_dict(scale)

    def fit(self, train: Table, validation: Table, progress: Progress | None = None) -> Iterator[Progress]:
        """Train on from `progress`, and yield after each epoch, and within one every `checkpoint_minutes`.

        Ends with the last epoch, or when patience does. Raises PipelineError where the batch is larger than the data,
        or the loss is no number any more.
        """
        params, progress = self.params, progress or Progress()
        if params.batch > len(train):
            raise PipelineError(f"train.batch is {params.batch:,}, more than the {len(train):,} training images")
        done = len(progress.history) * len(train) + progress.step * params.batch
        total = params.epochs * len(train)
        with tqdm(total=total, initial=done, unit=" images", unit_scale=True, disable=None) as bar:
            while not _has_ended(progress.history, params):
                epoch = len(progress.history) + 1
                bar.set_description(f"epoch {epoch}/{params.epochs}")
                for step, sums in self._train_epoch(train, progress, bar):
                    if step < count_steps(len(train), params.batch):
                        yield Progress(progress.history, step, sums)
                train_loss, train_accuracy = (torch.tensor(sums) / len(train)).tolist()
                if not math.isfinite(train_loss):
                    raise PipelineError(
                        f"the training loss is {train_loss} in epoch {epoch}; use a smaller train.lr than {params.lr:g}"
                    )
                loss, accuracy = evaluate(self.model, validation, params.batch)
                # Accuracy first, since that is what is promised; the loss decides between equals.
                best = all(
                    (accuracy, -loss) > (one.validation_accuracy, -one.validation_loss) for one in progress.history
                )
                record = Record(epoch, train_loss, train_accuracy, loss, accuracy, best)
                progress = Progress((*progress.history, record))
                yield progress

    def _train_epoch(
        self, table: Table, progress: Progress, bar: "tqdm[NoReturn]"
    ) -> Iterator[tuple[int, tuple[float, float]]]:
        """Train on to the end of an epoch; there, and whenever a checkpoint is due, yield the step and the sums."""
        params, epoch = self.params, len(progress.history) + 1
        steps = count_steps(len(table), params.batch)
        self.model.train()
        sums = torch.tensor(progress.sums, device=self.fabric.device)
        kept = time.monotonic()
        for step, (images, labels) in enumerate(batches(table, params, epoch, progress.step), start=progress.step + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(params, epoch=epoch, step=step, steps=steps)
            generator = step_generator("dropout", params.seed, epoch, step, self.fabric.device)
            sums += torch.stack(train_step(self.model, self.optimizer, self.fabric, images, labels, generator))
            bar.update(len(labels))
            due = 0 < params.checkpoint_minutes * 60 <= time.monotonic() - kept
            if due or step == steps:
                loss, right = sums.tolist()  # the one reading from the device, which waits for it
                yield step, (loss, right)
                kept = time.monotonic()


def fit_from(store: Store, trainer: Trainer, train: Table, validation: Table, card: Card) -> Iterator[Record]:
    """Train on from the newest checkpoint of the store, keep each state there, and yield the records of all epochs.

    Those of former processes come first. At the end, `store.outputs` has the best weights, `model`, and the snapshots.
    """
    params, begun = trainer.params, Progress()
    if found := store.newest():
        begun = Progress.from_json(found.progress)
        trainer.restore(*(safetensors.torch.load(store.read(name)) for name in (found.weights, found.rest)))
        further = f" and {found.step} steps of the next" if found.step else ""
        say(f"going on after epoch {found.epoch} of {params.epochs}{further}, kept in {store.folder}")
        yield from begun.history
    for progress in trainer.fit(train, validation, begun):
        record, outputs = progress.record, []
        if record and record.best:
            outputs.append("model")
        if record and params.snapshot_every and record.epoch % params.snapshot_every == 0:
            outputs.append(f"epoch-{record.epoch:04}.safetensors")
        weights, rest = pack(trainer.network.state_dict(), card), pack(trainer.state())
        store.save(len(progress.history), progress.step, asdict(progress), weights=weights, rest=rest, outputs=outputs)
        if record:
            tqdm.write(str(record))
            yield record
    store.wait()


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


def _has_ended(history: Sequence[Record], params: Train) -> bool:
    waited = next((waited for waited, record in enumerate(reversed(history)) if record.best), 0)
    return len(history) >= params.epochs or 0 < params.patience <= waited


def _best_precision(device: torch.device) -> str:
    """Mixed precision where the device computes it natively; on CPUs without bf16 units it is slower (measured)."""
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
