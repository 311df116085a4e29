"""Training repeats itself byte for byte, keeps its best epoch, and loses nothing when it fails or is stopped."""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src import paths, training, yaml12
from src.batches import Dataset, Table, read_dataset, step_generator
from src.checkpoints import Record, Store
from src.networks import Network, load, start
from src.optimizers import make_optimizer
from src.params import Train, load_params
from src.provenance import hash_file
from src.runtime import PipelineError
from src.schedules import learning_rate
from src.training import (
    Trainer,
    class_weights,
    evaluate,
    fit_from,
    make_fabric,
    train_step,
)
from stages import evaluate as evaluate_stage
from stages import train as train_stage
from tests.helpers import (
    EVERYTHING,
    ROOT,
    assert_fails,
    augmented_by,
    contents,
    environment,
    is_one_sentence,
    run_stage,
    succeed,
)
from tests.project import Project

CPU = torch.device("cpu")


RESIDUAL = {"name": "residual", "widths": [8, 16]}
PLAIN = {"augment": augmented_by(), "checkpoint_minutes": 0.0}


def a_network(data: Dataset, **changes: object) -> Network:
    params = load_params().model.model_copy(update={"dropout": 0.0, **changes})
    drawn = step_generator("weights", 0)
    network, _ = start(params, data.size, data.channels, data.classes, ([33.0], [78.0]), drawn)
    return network.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def train_params(**changes: object) -> Train:
    return load_params().train.model_copy(update={**PLAIN, **changes})


def a_trainer(network: Network, **changes: object) -> Trainer:
    params = train_params(**changes)
    return Trainer(network, params, make_fabric(params))


def fit(data: Dataset, trainer: Trainer) -> list[Record]:
    train, validation = data.table("train", CPU), data.table("validation", CPU)
    return [progress.record for progress in trainer.fit(train, validation) if progress.record]


def fitted(data: Dataset, network: Network | None = None, **changes: object) -> list[Record]:
    """Train on the CPU with changed params, and give the records."""
    return fit(data, a_trainer(network or a_network(data), **changes))


@pytest.fixture
def data(home: Project) -> Dataset:  # noqa: ARG001
    return read_dataset()


def trained_outputs(home: Project) -> dict[str, bytes]:
    """All that the train stage writes, and what it might forget to tidy up."""
    mine = ("models/", "metrics/train/", "data/training_batch.npy")
    return {name: data for name, data in contents(home.folder).items() if name.startswith(mine) or ".part" in name}


def everything() -> dict[str, object]:
    """All that draws a number or changes one, as fields of Train."""
    return {**EVERYTHING, "augment": augmented_by(**EVERYTHING["augment"])}


# --- the same bytes


def test_training_twice_gives_the_same_bytes_in_another_process_and_folder(
    finished: Project, home: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained_outputs(finished)
    for name in first:
        (home.folder / name).unlink()
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    params = yaml12.read(home.folder / "params.yaml")
    succeed(home.folder, "train", train=params["train"], model=params["model"])
    assert trained_outputs(home) == first
    assert sorted(first) == [
        "data/training_batch.npy",
        "metrics/train/metrics.json",
        "metrics/train/plots/metrics/train/accuracy.tsv",
        "metrics/train/plots/metrics/train/loss.tsv",
        "metrics/train/plots/metrics/validation/accuracy.tsv",
        "metrics/train/plots/metrics/validation/loss.tsv",
        "models/model.safetensors",
        "models/snapshots/SHA256SUMS",
        "models/snapshots/epoch-0001.safetensors",
        "models/snapshots/epoch-0002.safetensors",
    ]


def scramble(split: str) -> None:
    """Write noise over the images of a split."""
    rows = np.flatnonzero(pd.read_csv(paths.SPLIT)["split"] == split)
    images = np.load(paths.IMAGES)
    images[rows] = np.random.default_rng(0).integers(0, 256, images[rows].shape, dtype=np.uint8)
    np.save(paths.IMAGES, images)


def test_training_never_sees_a_test_image_nor_any_global_seed(finished: Project, home: Project) -> None:
    scramble("test")
    torch.manual_seed(1234)
    train_stage.main()
    assert trained_outputs(home) == trained_outputs(finished)
    scramble("validation")  # which does count: the test above can fail
    train_stage.main()
    assert trained_outputs(home) != trained_outputs(finished)


def test_training_moves_no_global_chance(data: Dataset) -> None:
    network = a_network(data, dropout=0.5, **RESIDUAL)
    state = torch.get_rng_state()
    fitted(data, network, epochs=1, **everything())
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_trains_another_model(finished: Project, home: Project) -> None:
    home.set(train__seed=1, train__epochs=1)
    train_stage.main()
    first = "models/snapshots/epoch-0001.safetensors"
    assert home.bytes(first) != finished.bytes(first)


def test_the_augmented_examples_are_the_first_that_training_sees(home: Project) -> None:
    home.set(train__batch=10)
    train_stage.main()
    seen = np.load(home.folder / paths.TRAINING_BATCH)
    assert (seen.shape, seen.dtype) == ((10, 28, 28, 1), np.uint8)
    home.set(train__batch=64)
    train_stage.main()
    assert np.array_equal(np.load(home.folder / paths.TRAINING_BATCH)[:10, 0, 0], seen[:, 0, 0])
    assert len(np.load(home.folder / paths.TRAINING_BATCH)) == train_stage.SEEN


# --- going on


def train_on(home: Project, **changes: object) -> dict[str, bytes]:
    """Run the stage in this process, and give what it wrote."""
    home.set(**changes)
    train_stage.main()
    return trained_outputs(home)


def run_until(step: int, patch: pytest.MonkeyPatch) -> None:
    """Run the stage in this process, interrupted before its step number `step`, from 0."""
    with patch.context() as inner:
        stop_at_step(inner, step)
        with pytest.raises(KeyboardInterrupt):
            train_stage.main()


def stop_at_step(patch: pytest.MonkeyPatch, count: int) -> None:
    left = [count]

    def stops(*parts: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return train_step(*parts, **options)

    patch.setattr(training, "train_step", stops)


@pytest.mark.parametrize("minutes", [0.0, 1e-9], ids=["each epoch kept", "each step kept"])
@pytest.mark.parametrize("stops", [[0], [3], [7, 1], [8, 4, 2], [15]], ids=str)
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(
    finished: Project,
    home: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stops: list[int],
    minutes: float,
) -> None:
    home.set(train__checkpoint_minutes=minutes)
    steps, done = 8, 0
    for stop in stops:
        run_until(stop, monkeypatch)
        done = done + stop if minutes else (done + stop) // steps * steps
    capsys.readouterr()
    assert train_on(home) == trained_outputs(finished)
    further = f" and {done % steps} steps of the next" if done % steps else ""
    line = f"going on after epoch {done // steps} of 2{further}, kept in .resume" if done else ""
    assert line in capsys.readouterr().err
    assert bool(line) == bool(done)


WITH_EVERYTHING: dict[str, object] = {
    **{f"train__{name}": value for name, value in EVERYTHING.items()},
    **{f"model__{name}": value for name, value in RESIDUAL.items()},
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("minutes", [0.0, 1e-9], ids=["each epoch kept", "each step kept"])
def test_with_everything_on_it_goes_on_to_the_same_bytes(
    home: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minutes: float, optimizer: str
) -> None:
    straight = train_on(home, **{**WITH_EVERYTHING, "train__optimizer": optimizer})
    shutil.rmtree(home.folder / ".resume")
    home.set(train__checkpoint_minutes=minutes)
    run_until(11, monkeypatch)
    run_until(2, monkeypatch)
    capsys.readouterr()
    assert train_on(home) == straight
    further = " and 5 steps of the next" if minutes else ""
    assert f"going on after epoch 1 of 2{further}, kept in" in capsys.readouterr().err


def test_a_longer_training_with_everything_on_ends_as_if_it_had_run_straight_through(
    home: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    short = train_on(home, **WITH_EVERYTHING)
    long = train_on(home, train__epochs=4)
    assert "going on after epoch 2 of 4" in capsys.readouterr().err
    shutil.rmtree(home.folder / ".resume")
    assert train_on(home) == long
    assert {long[name] == short[name] for name in short if "epoch-0002" in name} == {True}


def test_a_damaged_state_costs_its_epoch_and_no_byte(
    finished: Project, home: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.set(train__checkpoint_minutes=1e-9)
    run_until(12, monkeypatch)
    newest = sorted((home.folder / ".resume/checkpoints").glob("*/*.json"))[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    assert train_on(home) == trained_outputs(finished)
    told = capsys.readouterr().err
    assert "is damaged and left out" in told
    assert "going on after epoch 1 of 2 and 3 steps of the next" in told


def test_a_disk_that_fills_up_is_one_sentence_and_costs_no_byte(finished: Project, home: Project) -> None:
    params = yaml12.read(home.folder / "params.yaml")
    fill = """
import errno, os
real, left = os.fsync, [8]
def fsync(file):
    left[0] -= 1
    if left[0] <= 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    real(file)
os.fsync = fsync"""
    assert_fails(home.folder, "train", "the disk is full", before=fill, train=params["train"], model=params["model"])
    done = run_stage(home.folder, "train", train=params["train"], model=params["model"])
    assert "going on after epoch 1 of 2" in done.stderr
    assert trained_outputs(home) == trained_outputs(finished)


def test_a_longer_training_goes_on_and_ends_as_if_it_had_run_straight_through(
    home: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    short = train_on(home, train__epochs=3)
    long = train_on(home, train__epochs=6)
    assert "going on after epoch 3 of 6" in capsys.readouterr().err
    (home.folder / ".resume").rename(home.folder / "kept")
    assert train_on(home) == long
    assert "going on" not in capsys.readouterr().err
    # And back: fewer epochs never get the longer run's weights.
    (home.folder / ".resume").rename(home.folder / "another")
    (home.folder / "kept").rename(home.folder / ".resume")
    assert train_on(home, train__epochs=3) == short
    assert long["models/model.safetensors"] != short["models/model.safetensors"]


def test_a_longer_training_with_a_decay_goes_on_from_the_end_of_its_stable_part(
    home: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on(home, train__schedule="wsd", train__warmup=1, train__decay=2, train__epochs=5)
    long = train_on(home, train__epochs=7)
    assert "going on after epoch 3 of 7" in capsys.readouterr().err
    shutil.rmtree(home.folder / ".resume")
    assert train_on(home) == long


@pytest.mark.parametrize(
    "changes",
    [{"train__lr": 5e-4}, {"train__seed": 1}, {"train__schedule": "cosine"}, {"model__dropout": 0.1}],
    ids=str,
)
def test_another_training_begins_anew(
    finished: Project, home: Project, capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    shutil.copytree(finished.folder / ".resume", home.folder / ".resume")
    train_on(home, **changes)
    assert "going on" not in capsys.readouterr().err


def test_what_has_been_trained_to_its_end_is_written_again_without_a_step(
    finished: Project, home: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.folder / ".resume", home.folder / ".resume")
    for name in trained_outputs(home):
        (home.folder / name).unlink()
    stop_at_step(monkeypatch, 0)
    params = yaml12.read(home.folder / "params.yaml")
    home.set(train__threads=params["train"]["threads"])
    train_stage.main()
    assert trained_outputs(home) == trained_outputs(finished)


@pytest.mark.skipif(not os.environ.get("FULL"), reason="measures a time; FULL=1 runs it")
def test_checkpoints_cost_at_most_two_percent_of_the_training(
    sample: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sample.folder)
    spent = {"training waits": 0.0, "the writer computes": 0.0}

    def timed(name: str, clock: Callable[[], float], function: Callable[..., object]) -> Callable[..., object]:
        def measured(*parts: object, **options: object) -> object:
            begun = clock()
            try:
                return function(*parts, **options)
            finally:
                spent[name] += clock() - begun

        return measured

    # All that training does for a checkpoint on its own thread, and what the other thread takes from its cores.
    monkeypatch.setattr(Store, "save", timed("training waits", time.perf_counter, Store.save))
    monkeypatch.setattr(training, "pack", timed("training waits", time.perf_counter, training.pack))
    monkeypatch.setattr(Trainer, "state", timed("training waits", time.perf_counter, Trainer.state))
    monkeypatch.setattr(Store, "_write", timed("the writer computes", time.thread_time, Store._write))
    sample.set(train__threads=os.cpu_count())
    begun = time.perf_counter()
    train_stage.main()
    total = time.perf_counter() - begun
    with capsys.disabled():
        print(f"\n{sample.json('metrics/train/metrics.json')['step']} epochs in {total:.1f} s, checkpoints: {spent}")
    assert sum(spent.values()) < 0.02 * total


def test_patience_that_ended_a_training_ends_it_again(home: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    home.set(train__augment=augmented_by().model_dump())
    ended = train_on(home, train__epochs=9, train__patience=1, train__lr=2e-2)
    assert home.json("metrics/train/metrics.json")["step"] != 9, "the test needs a training that patience ends"
    stop_at_step(monkeypatch, 0)
    assert train_on(home, train__epochs=12) == ended


def test_the_scale_of_half_precision_is_kept_and_taken_up_again(data: Dataset) -> None:
    params = load_params().train
    first, second = (Trainer(a_network(data), params, make_fabric(params)) for _ in range(2))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**7), torch.amp.GradScaler("cpu")]
    for trainer, scaler in zip((first, second), scalers, strict=True):
        # What Fabric's 16-mixed does; it wants a CUDA device.
        trainer.fabric.strategy.precision.state_dict = scaler.state_dict  # type: ignore[method-assign]
        trainer.fabric.strategy.precision.load_state_dict = scaler.load_state_dict  # type: ignore[method-assign]
    second.restore(first.network.state_dict(), first.state())
    assert scalers[1].state_dict() == scalers[0].state_dict()
    assert scalers[1].get_scale() == 2.0**7


# --- what is kept


def test_the_model_is_the_best_epoch_by_validation_not_the_last(home: Project) -> None:
    home.set(train__epochs=8, train__lr=1.0e-2, train__augment=augmented_by().model_dump())
    train_stage.main()
    accuracy = pd.read_csv("metrics/train/plots/metrics/validation/accuracy.tsv", sep="\t")["accuracy"]
    summary = home.json("metrics/train/metrics.json")
    best = int(accuracy.argmax()) + 1
    assert (accuracy == accuracy.max()).sum() == 1
    assert best < 8, "the test needs an epoch after the best one"
    assert summary["best_epoch"] == best
    assert summary["best_validation_accuracy"] == pytest.approx(accuracy.max())
    assert home.bytes("models/model.safetensors") == home.bytes(f"models/snapshots/epoch-{best:04}.safetensors")
    # The file's weights, loaded again, reach what is promised.
    network, _ = load(paths.MODEL)
    assert evaluate(network, read_dataset().table("validation", CPU), 64)[1] == pytest.approx(accuracy.max())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The validation losses and accuracies that training is told, instead of those it would measure."""
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(training, "evaluate", lambda *_: told.pop(0))
    return told


def test_the_loss_decides_between_epochs_of_equal_accuracy(data: Dataset, script: list[tuple[float, float]]) -> None:
    script += [(0.9, 0.5), (0.8, 0.5), (0.8, 0.5), (0.1, 0.4), (2.0, 0.6)]
    assert [record.best for record in fitted(data, epochs=5, batch=400)] == [True, True, False, False, True]


def test_patience_counts_the_epochs_since_the_best(data: Dataset, script: list[tuple[float, float]]) -> None:
    worse = (1.0, 0.1)
    script += [(1.0, 0.5), worse, (1.0, 0.6), worse, worse, (1.0, 0.9), worse]
    assert [record.epoch for record in fitted(data, epochs=7, batch=400, patience=2)] == [1, 2, 3, 4, 5]


def test_without_patience_every_epoch_is_trained(data: Dataset, script: list[tuple[float, float]]) -> None:
    script += [(1.0, 0.5)] * 7
    assert [record.epoch for record in fitted(data, epochs=7, batch=400, patience=0)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("every", "kept"), [(0, []), (2, [2]), (1, [1, 2, 3])])
def test_snapshots_are_kept_as_often_as_asked(home: Project, every: int, kept: list[int]) -> None:
    home.set(train__epochs=3, train__snapshot_every=every, train__batch=400)
    train_stage.main()
    names = [f"epoch-{n:04}.safetensors" for n in kept]
    assert sorted(file.name for file in paths.SNAPSHOTS.iterdir()) == ["SHA256SUMS", *names]
    sums = [f"{hash_file(paths.SNAPSHOTS / name)}  {name}" for name in names]
    assert (paths.SNAPSHOTS / "SHA256SUMS").read_text().splitlines() == sums


# --- the arithmetic


def one_hot(table: Table, picks: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = table.take(picks)
    return images, F.one_hot(labels, table.classes).float()


def reference_steps(
    network: Network, steps: list[tuple[Tensor, Tensor]], lr: float, optimizer: str, decay: float
) -> list[Tensor]:
    """Cross entropy, and Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) or Nesterov's, written out."""
    weights = list(network.parameters())
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for count, (images, targets) in enumerate(steps, start=1):
        loss = -(targets * network(images).log_softmax(1)).sum(1).mean()
        for weight, m, v, gradient in zip(weights, first, second, torch.autograd.grad(loss, weights), strict=True):
            own = decay if weight.ndim > 1 else 0.0
            slope = gradient if optimizer == "adamw" else gradient + own * weight.data
            if optimizer == "sgd":
                m.mul_(0.9).add_(slope)
                weight.data -= lr * (slope + 0.9 * m)
                continue
            m.mul_(0.9).add_(0.1 * slope)
            v.mul_(0.999).add_(0.001 * slope**2)
            if optimizer == "adamw":
                weight.data *= 1 - lr * own
            weight.data -= lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_three_steps_are_those_of_the_optimizer_on_the_cross_entropy(
    data: Dataset, optimizer: str, decay: float
) -> None:
    table, lr = data.table("train", CPU), 1e-3
    steps = [one_hot(table, torch.arange(start, start + 32)) for start in (0, 100, 200)]
    network = a_network(data).train()
    begun = [weight.detach().clone() for weight in network.parameters()]
    unfused = copy.deepcopy(network)
    expected = reference_steps(copy.deepcopy(network), steps, lr, optimizer, decay)
    trainer = a_trainer(network, optimizer=optimizer, lr=lr, weight_decay=decay)
    plain = make_optimizer(unfused, trainer.params, fused=False)
    for images, targets in steps:
        logits = network(images)
        drawn = step_generator("dropout", 0, 1, 1)
        loss, right = train_step(trainer.model, trainer.optimizer, trainer.fabric, images, targets, drawn)
        assert loss.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)
        assert right.item() == (logits.argmax(1) == targets.argmax(1)).sum().item()
        plain.zero_grad()
        F.cross_entropy(unfused(images), targets).backward()
        plain.step()
    near = (0.002 if optimizer == "sgd" else 0.02) * lr
    rows = zip(network.parameters(), expected, unfused.parameters(), begun, strict=True)
    for mine, theirs, torchs, former in rows:
        assert (mine - former).abs().max() > 20 * near
        assert torch.allclose(mine, theirs, rtol=0, atol=near)
        assert torch.allclose(mine, torchs, rtol=0, atol=near)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd"])
def test_without_a_gradient_weights_decay_and_norms_and_biases_stay(data: Dataset, optimizer: str, fused: bool) -> None:
    network = a_network(data, **RESIDUAL)
    for weight in network.parameters():
        nn.init.uniform_(weight, 0.5, 1.0, generator=torch.Generator().manual_seed(0))
        weight.grad = torch.zeros_like(weight)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    lr, decay = 0.01, 0.2
    make_optimizer(network, train_params(optimizer=optimizer, lr=lr, weight_decay=decay), fused=fused).step()
    left = {
        "adamw": lambda weight: weight * (1 - lr * decay),
        "muon": lambda weight: weight * (1 - lr * decay),
        "adam": lambda weight: weight - lr,  # whose first step is as long as the learning rate
        "sgd": lambda weight: weight * (1 - 1.9 * lr * decay),
    }[optimizer]
    decayed = {name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])}
    kinds = (nn.Conv2d, nn.Linear)
    layers = {name for name, layer in network.named_modules() if isinstance(layer, kinds)}
    assert decayed == {f"{name}.weight" for name in layers}
    assert len(before) > 2 * len(decayed)
    for name, weight in network.named_parameters():
        expected = left(before[name]) if name in decayed else before[name]
        assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-7), name


def a_step(
    data: Dataset, network: Network, targets: Tensor | None = None, lr: float = 1e-9, **options: Any
) -> tuple[Tensor, float, float]:
    """Take a step on 32 images: the logits before it, the mean loss, and the share of right answers."""
    images, given = one_hot(data.table("train", CPU), torch.arange(32))
    trainer = a_trainer(network.train(), lr=lr, optimizer="sgd")
    logits, drawn = network(images).detach(), step_generator("dropout", 0, 1, 1)
    targets = given if targets is None else targets
    loss, right = train_step(trainer.model, trainer.optimizer, trainer.fabric, images, targets, drawn, **options)
    return logits, loss.item() / 32, right.item() / 32


def mixed_targets() -> Tensor:
    """Targets of images that are mixed by three to seven, and whole ones."""
    first, second = (torch.arange(32) % 10, torch.arange(32) * 3 % 10)
    share = torch.where(torch.arange(32) < 20, 0.3, 0.0)[:, None]
    return torch.lerp(F.one_hot(first, 10).float(), F.one_hot(second, 10).float(), share)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_that_of_smoothed_and_weighted_labels(data: Dataset, smoothing: float, weighted: bool) -> None:
    weights = torch.linspace(0.5, 3, 10) if weighted else None
    targets = mixed_targets()
    logits, loss, right = a_step(data, a_network(data), targets, smoothing=smoothing, weights=weights)
    smoothed = (1 - smoothing) * targets + smoothing / 10
    counted = smoothed * (1 if weights is None else weights)
    assert loss == pytest.approx(-(counted * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert right == (logits.argmax(1) == torch.arange(32) % 10).float().mean().item()


def test_class_weights_make_all_classes_count_the_same() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    table = Table(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), torch.arange(100), labels, 3)
    weights = class_weights(table)
    assert weights.tolist() == pytest.approx([100 / (3 * 60), 100 / (3 * 30), 100 / (3 * 10)])
    assert (weights[labels].sum(), weights[labels][:60].sum()) == (pytest.approx(100), pytest.approx(100 / 3))


def test_class_weights_change_nothing_where_classes_are_balanced(data: Dataset) -> None:
    labels = torch.arange(50) % 5
    table = Table(torch.zeros(50, 1, 1, 1, dtype=torch.uint8), torch.arange(50), labels, 5)
    assert class_weights(table).tolist() == [1.0] * 5
    plain, weighted = a_network(data), a_network(data)
    a_step(data, plain, lr=0.1)
    a_step(data, weighted, lr=0.1, weights=torch.ones(10))
    for mine, theirs in zip(weighted.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_a_class_without_a_training_image_has_a_finite_weight_and_loss(data: Dataset) -> None:
    table = Table(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), torch.arange(8), torch.arange(8) % 9, 10)
    weights = class_weights(table)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(torch.tensor(a_step(data, a_network(data), weights=weights)[1]))


@pytest.mark.parametrize("asked", [False, True])
def test_training_smooths_weighs_and_clips_as_the_params_say(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    seen: list[dict[str, Any]] = []

    def spy(*_: object, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(options)
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(training, "train_step", spy)
    fitted(data, epochs=1, class_weights=asked, label_smoothing=0.2 * asked, clip=3.0 * asked)
    for options in seen:
        assert (options["smoothing"], options["clip"]) == (0.2 * asked, 3.0 * asked)
        if asked:
            assert torch.equal(options["weights"], class_weights(data.table("train", CPU)))
        else:
            assert options["weights"] is None


def norm(network: Network) -> float:
    return math.sqrt(sum(float((weight.grad.double() ** 2).sum()) for weight in network.parameters()))  # type: ignore[union-attr]


def test_clipping_shortens_a_long_gradient_keeps_its_direction_and_leaves_a_short_one(data: Dataset) -> None:
    free, clipped, short = (a_network(data) for _ in range(3))
    a_step(data, free)
    long = norm(free)
    a_step(data, clipped, clip=long / 4)
    a_step(data, short, clip=long * 4)
    assert norm(clipped) == pytest.approx(long / 4, rel=1e-4)
    for one, other, third in zip(free.parameters(), clipped.parameters(), short.parameters(), strict=True):
        assert torch.allclose(one.grad / 4, other.grad, rtol=1e-3, atol=1e-9)  # type: ignore[operator, arg-type]
        assert torch.equal(one.grad, third.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clip", "optimizer", "scaled", "fused"),
    [
        (0.0, "adamw", True, True),
        (1.0, "adamw", True, False),
        (1.0, "adamw", False, True),
        (0.0, "muon", True, False),
        (0.0, "muon", False, True),
    ],
)
def test_a_step_is_fused_unless_the_scale_of_float16_has_to_come_off_before_it(
    data: Dataset, clip: float, optimizer: str, scaled: bool, fused: bool
) -> None:
    params = train_params(clip=clip, optimizer=optimizer)
    fabric = make_fabric(params)
    if scaled:  # as 16-mixed has it, which wants a CUDA device
        fabric.strategy.precision.scaler = SimpleNamespace()  # type: ignore[attr-defined]
    assert Trainer(a_network(data), params, fabric).optimizer.defaults["fused"] is fused


# --- the average of the weights


def test_the_average_is_that_of_the_formula_and_is_what_validation_judges(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = a_network(data, **RESIDUAL)
    states = [copy.deepcopy(network.state_dict())]

    def spy(*parts: Any, **options: Any) -> tuple[Tensor, Tensor]:
        done = train_step(*parts, **options)
        states.append(copy.deepcopy(network.state_dict()))
        return done

    monkeypatch.setattr(training, "train_step", spy)
    trainer = a_trainer(network, ema=0.6, epochs=2, lr=1e-2)
    records = fit(data, trainer)
    assert len(states) == 1 + 2 * 8
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    expected = {name: states[0][name].double() for name in names}
    for step, state in enumerate(states[1:], start=1):
        keep = min(0.6, (1 + step) / (10 + step))
        expected = {name: keep * expected[name] + (1 - keep) * state[name].double() for name in names}
    for name, value in trainer.judged.state_dict().items():
        if name in names:
            assert torch.allclose(value.double(), expected[name], rtol=1e-4, atol=1e-5), name
    validation = data.table("validation", CPU)
    told = (records[-1].validation_loss, records[-1].validation_accuracy)
    assert told == evaluate(trainer.judged, validation, 64)
    assert told[0] != pytest.approx(evaluate(network, validation, 64)[0], rel=1e-3)
    assert torch.equal(network.state_dict()["mean"], trainer.judged.state_dict()["mean"])


def test_without_an_average_the_weights_themselves_are_judged(data: Dataset) -> None:
    network = a_network(data)
    trainer = a_trainer(network)
    assert trainer.judged is network
    assert not any(name.startswith("network.") for name in trainer.state())


def test_the_model_file_and_the_snapshots_hold_the_average(home: Project) -> None:
    train_on(home, train__ema=0.9, train__epochs=1, train__snapshot_every=1)
    network, _ = load(paths.MODEL)
    loss = evaluate(network, read_dataset().table("validation", CPU), 64)[0]
    told = pd.read_csv("metrics/train/plots/metrics/validation/loss.tsv", sep="\t")["loss"].iloc[-1]
    assert loss == pytest.approx(told, rel=1e-6)
    assert home.bytes("models/snapshots/epoch-0001.safetensors") == home.bytes("models/model.safetensors")
    averaged = home.bytes("models/model.safetensors")
    train_on(home, train__ema=0.0)
    assert home.bytes("models/model.safetensors") != averaged


def test_averaging_takes_no_step_that_would_not_be_taken_without(data: Dataset) -> None:
    plain, averaged = a_network(data), a_network(data)
    first, second = fitted(data, plain, epochs=2), fitted(data, averaged, epochs=2, ema=0.99)
    for mine, theirs in zip(averaged.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [record.train_loss for record in second] == [record.train_loss for record in first]


# --- validation, and the epochs


@pytest.mark.parametrize("batch", [1, 7, 64, 10_000])
def test_validation_weighs_each_image_alike_in_batches_of_any_size(data: Dataset, batch: int) -> None:
    network, table = a_network(data), data.table("validation", CPU)
    images, labels = table.take(torch.arange(len(table)))
    logits = network.eval()(images).detach()
    loss, accuracy = evaluate(network.train(), table, batch)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item(), rel=1e-6)


def test_an_uneven_last_batch_counts_by_its_images(data: Dataset) -> None:
    network, table = a_network(data), data.table("train", CPU)
    assert len(table) % 100 not in (0, 100 // 2)
    expected = evaluate(copy.deepcopy(network), table, 64)
    (record,) = fitted(data, network, epochs=1, batch=100, lr=1e-12)  # so small that the weights stay
    assert (record.train_loss, record.train_accuracy) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_the_first_step_moves_weights_by_the_learning_rate(data: Dataset, lr: float) -> None:
    network = a_network(data)
    before = [weight.detach().clone() for weight in network.parameters()]
    fitted(data, network, epochs=1, batch=len(data.table("train", CPU)), lr=lr)
    moved = max((new - old).abs().max().item() for new, old in zip(network.parameters(), before, strict=True))
    assert moved == pytest.approx(lr, rel=1e-2)


def test_dropout_is_on_in_every_training_epoch_and_off_in_validation(data: Dataset) -> None:
    network = a_network(data, dropout=0.9)
    records = fitted(data, network, epochs=2, batch=64, lr=1e-12)
    still = evaluate(copy.deepcopy(network), data.table("train", CPU), 64)[0]
    for record in records:
        assert abs(record.train_loss - still) > 1e-2
    assert records[0].validation_loss == pytest.approx(records[1].validation_loss, rel=1e-6)


def test_each_step_of_each_epoch_has_its_own_generator(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def spy(*parts: object, **_: object) -> tuple[Tensor, Tensor]:
        drawn.append(torch.rand(1, generator=parts[-1]).item())  # type: ignore[call-overload]
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(training, "train_step", spy)
    fitted(data, epochs=3, batch=200, seed=7)
    keys = [(7, epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3)]
    assert drawn == [torch.rand(1, generator=step_generator("dropout", *key)).item() for key in keys]


def test_each_step_is_taken_at_the_rate_of_the_schedule(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []

    def spy(*parts: object, **_: object) -> tuple[Tensor, Tensor]:
        used.extend(group["lr"] for group in parts[1].param_groups)  # type: ignore[attr-defined]
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(training, "train_step", spy)
    changes = {"epochs": 4, "batch": 200, "schedule": "wsd", "warmup": 1, "decay": 2}
    fitted(data, **changes)
    params = load_params().train.model_copy(update=changes)
    steps = [(epoch, step) for epoch in range(1, 5) for step in range(1, 4)]
    expected = [learning_rate(params, epoch=epoch, step=step, steps=3) for epoch, step in steps]
    assert used == [rate for rate in expected for _ in range(2)]  # of the weights that decay, and of those that do not
    assert len(set(used)) > 5


def test_bf16_computes_in_half_precision_and_keeps_whole_weights(data: Dataset) -> None:
    networks = [a_network(data), a_network(data)]
    seen: list[torch.dtype] = []
    networks[1].layers[0].register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    (whole,), (half,) = (
        fitted(data, network, epochs=1, precision=precision)
        for network, precision in zip(networks, ("32", "bf16"), strict=True)
    )
    assert set(seen) == {torch.bfloat16}
    assert {weight.dtype for weight in networks[1].parameters()} == {torch.float32}
    assert half.train_loss == pytest.approx(whole.train_loss, rel=0.05)


@pytest.mark.parametrize(
    ("portable", "found", "chosen"),
    [
        (False, {"avx512_bf16": True}, "bf16-mixed"),
        (False, {"amx_bf16": True}, "bf16-mixed"),
        (False, {"avx512_f": True, "avx512_bf16": False}, "32-true"),
        (False, {}, "32-true"),
        (True, {"avx512_bf16": True, "amx_bf16": True}, "32-true"),
    ],
    ids=str,
)
def test_auto_takes_bf16_on_a_cpu_that_has_it_unless_bits_are_portable(
    monkeypatch: pytest.MonkeyPatch, portable: bool, found: dict[str, bool], chosen: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    asked = {"portable": portable, "device": "cpu"}
    assert make_fabric(train_params(**asked, precision="auto")).strategy.precision.precision == chosen
    assert make_fabric(train_params(**asked, precision="32")).strategy.precision.precision == "32-true"
    assert make_fabric(train_params(**asked, precision="bf16")).strategy.precision.precision == "bf16-mixed"


@pytest.mark.skipif(not os.environ.get("FULL"), reason="compiling takes a minute; FULL=1 runs it")
def test_a_compiled_network_trains_alike_and_is_saved_alike(home: Project, data: Dataset) -> None:
    plain = fitted(data, epochs=2)
    compiled = fitted(data, epochs=2, compile=True)
    for one, other in zip(plain, compiled, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
    home.set(train__compile=True)
    train_stage.main()
    evaluate_stage.main()
    assert load(paths.MODEL)[1].classes == list("0123456789")


def test_three_epochs_of_the_sample_reach_ninety_percent_on_test(
    sample: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sample.folder)
    data = read_dataset()
    network = a_network(data)
    records = fitted(data, network, epochs=3, augment=augmented_by(shift=2))
    assert [record.epoch for record in records] == [1, 2, 3]
    assert records[0].train_loss > records[1].train_loss > records[2].train_loss
    assert evaluate(network, data.table("test", CPU), 512)[1] > 0.9


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train__batch": 1, "model__name": "residual", "model__widths": [4]},
            "found one image a step (train.batch: 1, training images: 451), but the batch normalisation of this",
        ),
        ({"train__lr": 1e30}, "the training loss is nan in epoch 1; use a smaller train.lr than 1e+30"),
        (
            {"train__lr": 1e30, "train__clip": 1.0},
            "the training loss is nan in epoch 1; use a smaller train.lr than 1e+30",
        ),
        ({"train__device": "cuda"}, "the device 'cuda' is asked for, but torch finds none"),
        ({"model__name": "resnet"}, "model.name is 'resnet', expected article, "),
    ],
    ids=["batch normalisation", "lr", "lr, clipped", "device", "name"],
)
def test_a_mistake_is_one_sentence_and_costs_no_older_output(
    home: Project, sentence_of: Callable[[Callable[[], None]], str], changes: dict[str, object], words: str
) -> None:
    if changes.get("train__device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = trained_outputs(home)
    home.set(**changes)
    assert words in sentence_of(train_stage.main)
    assert trained_outputs(home) == before


def only(data: Dataset, count: int) -> Dataset:
    """The same data with so many training images."""
    rows = data.rows("train")[count:]
    return replace(data, places=data.places.assign(split=data.places["split"].mask(data.places.index.isin(rows), "")))


@pytest.mark.parametrize(
    "changes", [{"batch": 1}, {"mixup": 0.5, "batch": 1}, {"patience": 3}, {"class_weights": True}]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_without_batch_normalisation_any_number_of_images_is_trained_on(
    data: Dataset, count: int, changes: dict[str, object]
) -> None:
    mixed = {"augment": augmented_by(mixup=changes["mixup"])} if "mixup" in changes else {}
    others = {name: value for name, value in changes.items() if name != "mixup"}
    (record,) = fitted(only(data, count), epochs=1, **{**others, **mixed})
    assert math.isfinite(record.train_loss)


@pytest.mark.parametrize(("count", "batch"), [(28, 9), (10, 3), (3, 2), (2, 64), (5, 64)])
def test_a_single_image_left_over_does_not_stop_batch_normalisation(data: Dataset, count: int, batch: int) -> None:
    small = augmented_by(image_size=8)  # of which one pixel is left behind the last stage: one value an image
    network = a_network(data, name="residual", widths=[4, 4, 4])
    records = fitted(only(data, count), network, epochs=2, batch=batch, augment=small)
    assert [math.isfinite(record.train_loss) for record in records] == [True, True]


def test_a_batch_larger_than_the_data_is_one_step_of_all_images(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, larger = a_network(data), a_network(data)
    (expected,) = fitted(data, whole, epochs=1, batch=451)
    assert "train.batch" not in capsys.readouterr().err
    assert fitted(data, larger, epochs=1, batch=10_000) == [expected]
    assert "train.batch is 10,000, more than the training images (451): one step an epoch" in capsys.readouterr().err
    assert all(map(torch.equal, larger.parameters(), whole.parameters()))


def test_batch_normalisation_of_one_training_image_is_one_sentence(data: Dataset) -> None:
    with pytest.raises(PipelineError, match=r"found one image a step \(train\.batch: 64, training images: 1\), but"):
        fitted(only(data, 1), a_network(data, **RESIDUAL))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_no_number_is_one_sentence(
    data: Dataset, script: list[tuple[float, float]], loss: float
) -> None:
    script += [(0.5, 0.5), (loss, 0.1)]
    with pytest.raises(PipelineError, match=rf"the validation loss is {loss} in epoch 2; use a smaller train\.lr"):
        fitted(data, epochs=3, batch=400)


def test_a_failure_after_some_epochs_costs_no_older_output(
    home: Project, sentence_of: Callable[[Callable[[], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_late(*parts: object) -> Iterator[Record]:
        for record in fit_from(*parts):  # type: ignore[arg-type]
            if record.epoch == 2:
                raise PipelineError("something happened")
            yield record

    before = trained_outputs(home)
    home.set(train__seed=5)
    monkeypatch.setattr(train_stage, "fit_from", fails_late)
    assert "something happened" in sentence_of(train_stage.main)
    assert trained_outputs(home) == before


# --- being stopped, and being watched


@pytest.fixture
def running(home: Project) -> Iterator[subprocess.Popen[str]]:
    """A training that would take long, in a process group of its own, whose third epoch is on disk."""
    home.set(train__epochs=1_000, train__seed=9)
    log, former = home.folder / paths.TRAIN_LOG, home.folder / "metrics/.train.part"
    curve = log / "plots/metrics/validation/loss.tsv"
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=home.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            lengths: list[int] = []
            while len(lengths) < 3:
                assert process.poll() is None, process.communicate()
                if former.exists() and curve.exists() and curve.stat().st_size not in lengths:
                    lengths.append(curve.stat().st_size)
                time.sleep(0.005)
            assert lengths == sorted(lengths), "the curve grows while training goes on"
            assert (log / "metrics.json").exists()
            yield process
        finally:
            process.kill()


def test_ctrl_c_is_one_sentence_and_costs_no_older_output(
    finished: Project, home: Project, running: subprocess.Popen[str]
) -> None:
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert is_one_sentence("train", running.returncode, errors, "interrupted; nothing was half-written")
    assert trained_outputs(home) == trained_outputs(finished)


def test_a_killed_training_leaves_the_older_model_and_the_next_one_tidies_up(
    finished: Project, home: Project, running: subprocess.Popen[str]
) -> None:
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    older = trained_outputs(finished)
    kept = [name for name in older if not name.startswith("metrics/")]
    assert [home.bytes(name) for name in kept] == [older[name] for name in kept]
    home.set(train__epochs=2, train__seed=0)
    train_stage.main()
    assert trained_outputs(home) == older


def test_nothing_but_a_line_an_epoch_is_printed_where_nobody_watches(finished: Project) -> None:
    (few,) = finished.bytes("stderr").decode().splitlines()
    assert few.startswith("train: only 58 validation images: an accuracy of ")
    first, *epochs = finished.bytes("stdout").decode().splitlines()
    count = (pd.read_csv(finished.folder / paths.SPLIT)["split"] == "train").sum()
    assert first.startswith(f"keras_mnist, 225,034 parameters, on {count} images, ")
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]


def test_starting_to_train_loads_no_library_that_it_does_not_need() -> None:
    script = "import sys, stages.train; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    unneeded = "sklearn matplotlib scipy kaggle torchvision PIL mlxtend tensorboard onnx timm".split()
    assert set(unneeded) & set(loaded.stdout.split()) == set()


def test_a_network_that_takes_one_size_alone_is_trained_on_no_other(data: Dataset) -> None:
    smaller = {"augment": load_params().train.augment.model_copy(update={"image_size": 20})}
    with pytest.raises(
        PipelineError, match=r"train\.augment\.image_size is 20, but this network takes no images of other"
    ):
        a_trainer(a_network(data, name="keras_mnist"), **smaller)
    (record,) = fitted(data, a_network(data, name="residual", widths=[4, 8]), epochs=1, **smaller)
    assert record.validation_loss < 10
