"""The training loop: one step, one epoch, and a generator that tells how far it is and writes no file."""

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from tqdm import tqdm

from src.batches import Table, augments, batches, choose_device, count_steps, step_generator
from src.checkpoints import Progress, Record, Store
from src.intervals import report_few
from src.networks import Card, Head, Network, pack
from src.optimizers import make_optimizer
from src.params import Train
from src.runtime import PipelineError, say
from src.schedules import learning_rate


def make_fabric(params: Train) -> Fabric:
    """Choose device and precision, and make torch repeat the same bits."""
    device = choose_device(params.device)
    precision = {
        "32": "32-true",
        "bf16": "bf16-mixed",
        "16": "16-mixed",
        "auto": _best_precision(device, portable=params.portable),
    }
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    # Only an aid in finding what reads memory before it is written; it is a sixth of a step of the residual network.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Fabric(accelerator=device.type, devices=1, precision=precision[params.precision])  # type: ignore[arg-type]


class Trainer:
    """A network with its optimizer, which can stop after any step and go on in another process with the same bits."""

    def __init__(self, network: Network, params: Train, fabric: Fabric) -> None:
        self.params, self.fabric = params, fabric
        self.network = network.to(memory_format=torch.channels_last)
        _check_size(self.network, params.augment.image_size)
        # A fused step takes the scale of float16 off the gradient by itself, too late for clipping and for Muon.
        late = params.clip > 0 or params.optimizer == "muon"
        scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        fused = fabric.device.type in ("cuda", "cpu") and not (late and scaled)
        dtype = torch.bfloat16 if fabric.strategy.precision.precision == "bf16-mixed" else torch.float32
        optimizer = make_optimizer(self.network, params, fused=fused, dtype=dtype)
        self.model, self.optimizer = fabric.setup(self._compiled(self.network), optimizer)
        self.head = fabric.setup_module(self._compiled(Head(self.network)))
        # What validation judges, and what is kept: the average of the weights, where there is one.
        self.judged = copy.deepcopy(self.network) if params.ema else self.network
        # timm fixes some weights for good, such as places computed from sines.
        self._thawed = [parameter for parameter in self.network.backbone.parameters() if parameter.requires_grad]
        self._features: list[Table] = []

    def _compiled(self, module: nn.Module) -> nn.Module:
        return torch.compile(module) if self.params.compile else module  # type: ignore[return-value]

    def state(self) -> dict[str, Tensor]:
        """Give all that has to be kept beside the weights of `judged`.

        These are the optimizer's moments, the scale of float16, and the weights themselves where these are averaged.
        """
        state = self.optimizer.state_dict()["state"]
        kept = {f"optimizer.{index}.{name}": value for index in state for name, value in state[index].items()}
        scale = self.fabric.strategy.precision.state_dict()
        kept |= {f"precision.{name}": torch.tensor(value) for name, value in scale.items()}
        if self.params.ema:
            kept |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return kept

    def restore(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Take up weights and state, in the memory format in which this network has them."""
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}, "precision": {}}
        for key, value in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.judged.load_state_dict(weights)
        if self.params.ema:
            self.network.load_state_dict(parts["network"])
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            # A fused step walks weights and moments in the order of memory, so both must have the same.
            kept = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            moments.setdefault(int(index), {})[name] = kept
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.fabric.strategy.precision.load_state_dict(
            {name: value.item() for name, value in parts["precision"].items()}
        )

    def fit(self, train: Table, validation: Table, progress: Progress | None = None) -> Iterator[Progress]:
        """Train on from `progress`, and yield after each epoch, and within one every `checkpoint_minutes`.

        Ends with the last epoch, or when patience does. Raises PipelineError where batch normalisation would get a
        single image a step, or a loss is no finite number any more.
        """
        params, progress = self.params, progress or Progress()
        self._check_batch(len(train))
        done = progress.epoch * len(train) + progress.step * params.batch
        total = params.epochs * len(train)
        with tqdm(total=total, initial=done, unit=" images", unit_scale=True, disable=None) as bar:
            while not _has_ended(progress.history, params):
                epoch = progress.epoch + 1
                bar.set_description(f"epoch {epoch}/{params.epochs}")
                (learner, seen), (judge, judged) = self._freeze(train, validation, frozen=epoch <= params.freeze)
                for step, sums in self._train_epoch(learner, seen, progress, bar):
                    self._check_loss("training", sums[0], epoch)
                    if step < count_steps(len(train), params.batch):
                        yield Progress(progress.history, step, sums)
                train_loss, train_accuracy = (torch.tensor(sums) / len(train)).tolist()
                with self.fabric.autocast():
                    loss, accuracy = evaluate(judge, judged, params.batch)
                self._check_loss("validation", loss, epoch)
                # Accuracy first, since that is what is promised; the loss decides between equals.
                best = all(
                    (accuracy, -loss) > (one.validation_accuracy, -one.validation_loss) for one in progress.history
                )
                record = Record(epoch, train_loss, train_accuracy, loss, accuracy, best)
                progress = Progress((*progress.history, record))
                yield progress

    def step(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        rate: float,
        generator: Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Take one step at a learning rate: the sum of the losses and the number of right answers, (2,).

        model: `model` on images, or `head` on the features that a frozen backbone gave.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        smoothing, clip = self.params.label_smoothing, self.params.clip
        sums = train_step(
            model,
            self.optimizer,
            self.fabric,
            images,
            targets,
            generator,
            smoothing=smoothing,
            weights=weights,
            clip=clip,
        )
        return torch.stack(sums)

    def _check_batch(self, images: int) -> None:
        frozen = self.params.freeze >= self.params.epochs
        trained = self.network.layers if frozen else self.network
        if min(self.params.batch, images) == 1 and any(isinstance(layer, _BatchNorm) for layer in trained.modules()):
            raise PipelineError(
                f"found one image a step (train.batch: {self.params.batch}, training images: {images}), "
                "but the batch normalisation of this network needs 2 or more"
            )
        if self.params.batch > images:
            say(f"train.batch is {self.params.batch:,}, more than the training images ({images:,}): one step an epoch")

    def _check_loss(self, which: str, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise PipelineError(
                f"the {which} loss is {loss} in epoch {epoch}; use a smaller train.lr than {self.params.lr:g}"
            )

    def _freeze(
        self, train: Table, validation: Table, *, frozen: bool
    ) -> tuple[tuple[nn.Module, Table], tuple[nn.Module, Table]]:
        """Freeze the backbone or not; give what is trained and on what, and what is judged and on what, in an epoch.

        A frozen backbone computes its features once, for the head to be called with. Images that augmentation changes
        have to be seen anew in each epoch.
        """
        for parameter in self._thawed:
            parameter.requires_grad_(not frozen)
        if not frozen or not self._thawed:
            self._features = []
            return (self.model, train), (self.judged, validation)
        changed = augments(self.params.augment)
        if not self._features:
            self._features = [train if changed else self._embed(train), self._embed(validation)]
        seen, judged = self._features
        return (self.model if changed else self.head, seen), (Head(self.judged), judged)

    def _embed(self, table: Table) -> Table:
        self.network.eval()
        found = []
        with (
            torch.no_grad(),
            self.fabric.autocast(),
            tqdm(total=len(table), desc="embed", unit=" images", disable=None) as bar,
        ):
            for images, _ in table.parts(self.params.batch):
                found.append(self.network.forward_features(images).float())
                bar.update(len(images))
        return Table(torch.cat(found), torch.arange(len(table), device=table.device), table.labels, table.classes)

    def _train_epoch(
        self, model: nn.Module, table: Table, progress: Progress, bar: "tqdm[NoReturn]"
    ) -> Iterator[tuple[int, tuple[float, float]]]:
        """Train on to the end of an epoch; there, and whenever a checkpoint is due, yield the step and the sums."""
        params, epoch = self.params, progress.epoch + 1
        steps = count_steps(len(table), params.batch)
        weights = class_weights(table) if params.class_weights else None
        model.train()
        self.network.backbone.train(epoch > params.freeze)
        sums = torch.tensor(progress.sums, device=self.fabric.device)
        kept = time.monotonic()
        for step, (images, targets) in enumerate(batches(table, params, epoch, progress.step), start=progress.step + 1):
            rate = learning_rate(params, epoch=epoch, step=step, steps=steps)
            generator = step_generator("dropout", params.seed, epoch, step, self.fabric.device)
            sums += self.step(model, images, targets, rate, generator, weights)
            if params.ema:
                average(self.judged, self.network, keep=params.ema, step=(epoch - 1) * steps + step)
            bar.update(len(targets))
            due = 0 < params.checkpoint_minutes * 60 <= time.monotonic() - kept
            if due or step == steps:
                loss, correct = sums.tolist()  # the one reading from the device, which waits for it
                yield step, (loss, correct)
                kept = time.monotonic()


def fit_from(store: Store, trainer: Trainer, train: Table, validation: Table, card: Card) -> Iterator[Record]:
    """Train on from the newest checkpoint of the store, keep each state there, and yield the records of all epochs.

    Those of former processes come first. At the end, `store.outputs` has the best weights, `model`, and the snapshots.
    """
    params, begun = trainer.params, Progress()
    if found := store.newest():
        begun = found.progress
        trainer.restore(*(safetensors.torch.load(store.read(name)) for name in (found.weights, found.rest)))
        further = f" and {begun.step} steps of the next" if begun.step else ""
        say(f"going on after epoch {begun.epoch} of {params.epochs}{further}, kept in {store.folder}")
        yield from begun.history
    progress = begun
    for progress in trainer.fit(train, validation, begun):
        record, outputs = progress.record, []
        if record and record.best:
            outputs.append("model")
        if record and params.snapshot_every and record.epoch % params.snapshot_every == 0:
            outputs.append(f"epoch-{record.epoch:04}.safetensors")
        weights, rest = pack(trainer.judged.state_dict(), card), pack(trainer.state())
        store.save(progress, weights=weights, rest=rest, outputs=outputs)
        if record:
            tqdm.write(str(record))
            yield record
    store.wait()
    report_few("validation", len(validation), max(record.validation_accuracy for record in progress.history))


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    fabric: Fabric,
    images: Tensor,
    targets: Tensor,
    generator: Generator,
    *,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
    clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Take one step on one batch and give the sum of its losses and the number of right answers, on the device.

    images: (B, S, S, C) uint8; targets: (B, classes), which sum to 1; smoothing: the share of each target that is
    spread over all classes (Szegedy et al. 2016); weights: of the classes, (classes,); clip: the largest norm of the
    gradient, or 0. Where an image is mixed with another one, the right answer is the class of the larger share.
    """
    logits = model(images, generator)
    loss = F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)
    optimizer.zero_grad()
    fabric.backward(loss)
    if clip:
        # A norm that is no number shows in the loss, which `fit` looks at; float16 meets some, and skips their step.
        fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
    optimizer.step()
    return loss.detach() * len(targets), (logits.detach().argmax(1) == targets.argmax(1)).sum()


def average(averaged: nn.Module, current: nn.Module, *, keep: float, step: int) -> None:
    """Move averaged weights towards the current ones after step `step` (from 1), keeping a share `keep` of themselves.

    At first they keep less, (1 + step) / (10 + step), so that the initial weights are soon forgotten, as in TensorFlow.
    """
    pairs = list(zip(averaged.state_dict().values(), current.state_dict().values(), strict=True))
    mine, theirs = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(mine, theirs, 1 - min(keep, (1 + step) / (10 + step)))


def class_weights(table: Table) -> Tensor:
    """Weigh classes so that all count the same: (classes,), N / (classes * images of the class).

    A class without an image, which an official split may have, weighs as if it had one.
    """
    counts = torch.bincount(table.labels.cpu(), minlength=table.classes).clamp(min=1).to(table.labels.device)
    return len(table) / (table.classes * counts.float())


def evaluate(model: nn.Module, table: Table, batch: int) -> tuple[float, float]:
    """Mean cross entropy and accuracy over a table; sums are divided once, so that batches weigh by their size."""
    model.eval()
    sums = torch.zeros(2, device=table.labels.device)
    with torch.inference_mode():
        for images, labels in table.parts(batch):
            logits = model(images).float()
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right])
    loss, accuracy = (sums / len(table)).tolist()
    return loss, accuracy


def _check_size(network: Network, size: int) -> None:
    try:
        with torch.inference_mode():
            if size:
                network.eval()(torch.zeros(1, size, size, network.mean.numel(), dtype=torch.uint8))
    except RuntimeError:
        raise PipelineError(
            f"train.augment.image_size is {size}, but this network takes no images of other sides than "
            "prepare.image_size; set 0"
        ) from None


def _has_ended(history: Sequence[Record], params: Train) -> bool:
    waited = next((waited for waited, record in enumerate(reversed(history)) if record.best), 0)
    return len(history) >= params.epochs or 0 < params.patience <= waited


def _best_precision(device: torch.device, *, portable: bool) -> str:
    """Mixed precision where the device computes it natively; on CPUs without bf16 units it is slower (measured)."""
    if device.type == "cpu" and not portable:
        found = torch.cpu.get_capabilities()
        return "bf16-mixed" if found.get("avx512_bf16") or found.get("amx_bf16") else "32-true"
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
