"""`train.portable`: the same bytes on CPUs of other makers and ages, emulated by qemu. `make portable` runs this."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import src
from src import paths
from src.environment import PORTABLE
from tests.helpers import EVERYTHING, ROOT, contents, crops, encode, environment
from tests.project import Project

pytestmark = pytest.mark.skipif(not os.environ.get("FULL"), reason="takes minutes; `make portable` runs it")
# Debian 13's qemu-user, 10.0. That of Debian 12, 7.2, crashes in torch's grid_sample, which augmentation calls.
QEMU = shutil.which("qemu-x86_64")
emulated = pytest.mark.skipif(QEMU is None, reason="needs qemu-user 10; README says where it comes from")
CPUS = ("Haswell", "EPYC")
"""Intel's of 2013, AMD's of 2017."""
STAGES = ("download", "prepare", "split", "train", "evaluate", "plot", "export")


def emulated_python(folder: Path, cpu: str) -> str:
    """Make a virtual environment whose Python, and with it every process that it starts, runs on an emulated CPU."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    real = Path(sys.executable).resolve()
    python.write_text(f'#!/bin/sh\nexec {QEMU} -cpu {cpu} -0 {python} {real} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), folder)
    (folder / "lib").symlink_to(Path(sys.prefix, "lib"))
    started = subprocess.run([python, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
    assert started.stdout == f"{python}\n", started.stderr  # which the workers of prepare are started with, too
    return str(python)


def digits(home: Project) -> None:
    """All 5,000 digits, of which every 16th is trained on: the default, but for the length."""
    home.set(train__epochs=1, train__schedule="cosine", train__threads=2)


def photographs(home: Project) -> None:
    """Photographs in the formats that people have, and a training with all that draws or changes a number."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        *(("JPEG", {"quality": quality, "progressive": quality > 80}) for quality in (70, 95)),
        *(("WEBP", {"quality": 80}), ("AVIF", {"quality": 70}), ("JPEG2000", {"irreversible": True})),
        *(("PNG", {}), ("GIF", {}), ("TIFF", {}), ("BMP", {})),
    ]
    for number, (photo, (kind, options)) in enumerate(zip(crops(45, smallest=200), cycle(kinds), strict=False)):
        image = photo.convert("L") if number % 5 == 0 else photo
        suffix = {"JPEG2000": "jp2"}.get(kind, kind.lower())
        file = home.folder / f"data/inbox/{'abc'[number // 15]}/{number}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image, kind, **options))
    home.set(
        **{f"train__{name}": value for name, value in EVERYTHING.items()},
        **{"train__schedule": "onecycle", "train__warmup": 1, "train__epochs": 2, "train__batch": 8},
        **{"download__source": "folder", "prepare__image_size": 48, "prepare__channels": 3, "evaluate__flip": True},
        **{"model__name": "residual", "model__widths": [8, 16, 32]},
    )


def results(
    folder: Path, python: str, scene: Callable[[Project], None], until: str = "export", **changes: object
) -> Any:
    """All that the stages make with this Python; the record of the machine is set aside."""
    (folder / "data").mkdir(parents=True)
    home = Project(folder)
    shutil.copy(ROOT / "params.yaml", folder)
    scene(home)
    home.set(**changes)
    env = {name: value for name, value in environment().items() if name not in PORTABLE | src.SETTINGS}
    for stage in STAGES[: STAGES.index(until) + 1]:
        begun = time.monotonic()
        command = [python, "-m", f"stages.{stage}"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1_200)
        assert done.returncode == 0, done.stderr
        print(f"{folder.name}: {stage} took {time.monotonic() - begun:.0f} s")
        if stage == "prepare" and scene is digits:
            _keep_every_16th(folder)
    found = {name: content for name, content in contents(folder).items() if not name.startswith(str(paths.INBOX))}
    assert found[str(paths.REJECTED)].count(b"\n") == 1
    print(found.pop(str(paths.ENVIRONMENT), b"").decode())
    return found


def _keep_every_16th(folder: Path) -> None:
    for file in (paths.IMAGES, paths.INDEX):
        shutil.copy(folder / file, folder / f"{file}.whole")
    np.save(folder / paths.IMAGES, np.load(folder / paths.IMAGES)[::16])
    rows = pd.read_csv(folder / paths.INDEX, dtype=str)[::16]
    rows.to_csv(folder / paths.INDEX, index=False, lineterminator="\n")


@emulated
@pytest.mark.parametrize("scene", [digits, photographs])
def test_intel_and_amd_give_the_same_bytes(tmp_path: Path, scene: Callable[[Project], None]) -> None:
    here = results(tmp_path / "here", sys.executable, scene)
    for cpu in CPUS:
        there = results(tmp_path / cpu, emulated_python(tmp_path / f"{cpu}-python", cpu), scene)
        assert sorted(name for name in here if here[name] != there.get(name)) == [], cpu
        assert sorted(here) == sorted(there)
    print(f"{scene.__name__}: {len(here)} files the same here and on {', '.join(CPUS)}: {', '.join(sorted(here))}")
    assert len(here) > 20


@emulated
def test_without_portable_another_cpu_gives_other_bytes(tmp_path: Path) -> None:
    python = emulated_python(tmp_path / "python", "Haswell")
    here, there = (
        results(tmp_path / name, executable, digits, until="train", train__portable=False)
        for name, executable in (("here", sys.executable), ("there", python))
    )
    assert here[str(paths.MODEL)] != there[str(paths.MODEL)]


SPEED = """
import sys, time
import torch
from src.batches import step_generator
from src.environment import settle
from src.networks import start
from src.params import load_params
from src.training import Trainer, make_fabric, train_step

portable, network, size, channels, count = sys.argv[1] == "True", sys.argv[2], *map(int, sys.argv[3:])
changes = {"portable": portable, "threads": 0, "device": "cpu", "precision": "32"}
params = load_params().train.model_copy(update=changes)
settle(params)
asked = load_params().model.model_copy(update={"name": network, "dropout": 0.5})
statistics = [99.0] * channels, [55.0] * channels
started, _ = start(asked, size, channels, list("0123456789"), statistics, step_generator("weights", 0))
fabric = make_fabric(params)
trainer = Trainer(started, params, fabric)
images = torch.randint(0, 256, (64, size, size, channels), dtype=torch.uint8)
targets = torch.eye(10)[torch.randint(0, 10, (64,))]
trainer.model.train()
for step in range(3 + count):
    if step == 3:
        begun = time.perf_counter()
    train_step(trainer.model, trainer.optimizer, fabric, images, targets, step_generator("dropout", 0, 1, step))
print(64 * count / (time.perf_counter() - begun))
"""


@pytest.mark.parametrize("case", ["keras_mnist 28 1 150", "article 128 3 12"])
def test_portable_costs_less_than_half_of_the_speed(case: str) -> None:
    env = {name: value for name, value in os.environ.items() if name not in (*PORTABLE, "OMP_NUM_THREADS")}
    rates: dict[bool, list[float]] = {True: [], False: []}
    for portable in [True, False] * 5:
        command = [sys.executable, "-c", SPEED, str(portable), *case.split()]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        rates[portable].append(float(done.stdout))
    slow, fast = (statistics.median(rates[portable]) for portable in (True, False))
    print(f"{case}: {fast:,.0f} images/s, portable {slow:,.0f}, {slow / fast:.0%}; {rates}")
    assert slow > fast / 2
