"""`train.portable`: the same bytes on CPUs of other makers and ages, emulated by qemu. `make portable` runs this."""

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from src import yaml12
from src.environment import PORTABLE
from tests.helpers import EVERYTHING, ROOT, contents, environment
from tests.project import Project

pytestmark = pytest.mark.skipif(not os.environ.get("FULL"), reason="takes minutes; `make portable` runs it")
# Debian 13's qemu-user, 10.0. That of Debian 12, 7.2, crashes in torch's grid_sample, which augmentation calls.
emulated = pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="`apt install qemu-user` brings the emulator")
STAGES = ("split", "train", "evaluate", "plot")
"""Without prepare, whose workers would leave the emulator; it computes in whole numbers (Pillow)."""


@pytest.fixture(scope="module")
def tiny(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """625 digits, two epochs with all that draws or changes a number."""
    home = Project(tmp_path_factory.mktemp("tiny") / "home")
    for name in ("data/images.npy", "data/index.csv", "data/rejected.csv", "data/raw.json", "params.yaml"):
        (home.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished.folder / name, home.folder / name)
    index = home.folder / "data/index.csv"
    pd.read_csv(index, dtype=str)[::8].to_csv(index, index=False, lineterminator="\n")
    home.set(train__schedule="cosine", train__threads=2)
    params = yaml12.read(home.folder / "params.yaml")["train"]
    assert (params["portable"], params["augment"]["flip"], params["augment"]["shift"]) == (True, True, 2)
    return home.folder


MODERN: dict[str, object] = {
    **{f"train__{name}": value for name, value in EVERYTHING.items()},
    **{"train__schedule": "onecycle", "train__warmup": 1, "evaluate__flip": True},
    **{"model__name": "residual", "model__widths": [8, 16, 32]},
}
"""All that the tutorials' networks go without."""


def results(tiny: Path, folder: Path, cpu: str | None, **changes: object) -> dict[str, bytes]:
    """All that the stages make of it on this CPU, or on an emulated one; the record of the machine is set aside."""
    shutil.copytree(tiny, folder)
    Project(folder).set(**changes)
    emulator = ["qemu-x86_64", "-cpu", cpu] if cpu else []
    env = {name: value for name, value in environment().items() if name not in PORTABLE}
    for stage in STAGES:
        command = [*emulator, sys.executable, "-m", f"stages.{stage}"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1_200)
        assert done.returncode == 0, done.stderr
    found = contents(folder)
    print(found.pop("metrics/environment.json").decode())
    return found


@emulated
@pytest.mark.parametrize("changes", [{}, MODERN], ids=["as it is", "with everything on"])
def test_intel_and_amd_give_the_same_bytes(tiny: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    here = results(tiny, tmp_path / "here", None, **changes)
    for cpu in ("Haswell", "EPYC"):  # Intel's of 2013, AMD's of 2017
        there = results(tiny, tmp_path / cpu, cpu, **changes)
        assert sorted(name for name in here if here[name] != there[name]) == [], cpu
        assert sorted(here) == sorted(there)


@emulated
def test_without_portable_another_cpu_gives_other_bytes(tiny: Path, tmp_path: Path) -> None:
    here = results(tiny, tmp_path / "here", None, train__portable=False)
    there = results(tiny, tmp_path / "there", "Haswell", train__portable=False)
    assert here["models/model.safetensors"] != there["models/model.safetensors"]


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
