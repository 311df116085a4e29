"""What is compared: a setup gives a function, and each of its calls one figure, such as images a second.

Each runs in a process of its own, so that none inherits the settings of another, on the same real photographs.
"""

import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from src import archive, images, paths, yaml12
from src.provenance import hash_file
from src.runtime import RESUME

Way = Callable[[], float | dict[str, float]]
"""Gives one figure, or several by name."""

SHARED = Path("../shared/data")
SETS = {
    "animals10": SHARED / "animals10-original-320.zip",
    "animals64": SHARED / "animals64.zip",
    "cats": SHARED / "dogs-vs-cats-1000.zip",
}


def photographs(name: str) -> list[tuple[str, bytes]]:
    """Read a set of photographs, as class folder and encoded file of each.

    Where the set does not lie beside the project: parts of photographs that scikit-learn ships, 300 x 225 as those of
    Animals-10 mostly are.
    """
    if SETS[name].exists():
        with zipfile.ZipFile(SETS[name]) as packed:
            names = [file for file in packed.namelist() if file.lower().endswith((".jpg", ".jpeg", ".png"))]
            return [(Path(file).parent.name, packed.read(file)) for file in names]
    from sklearn.datasets import load_sample_images

    random, found = np.random.default_rng(0), list[tuple[str, bytes]]()
    for number in range(320):
        photo = load_sample_images().images[number % 2]
        top, left = (int(random.integers(side - wanted)) for side, wanted in zip(photo.shape, (225, 300), strict=False))
        found.append((str(number % 10), encoded(photo[top : top + 225, left : left + 300])))
    return found


def encoded(pixels: images.Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def repeated(files: list[tuple[str, bytes]], count: int) -> Iterator[tuple[str, bytes]]:
    """Name `count` files, the same ones again and again."""
    for number in range(count):
        folder, content = files[number % len(files)]
        yield f"{folder}/{number}.jpg", content


# --- training ---------------------------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """A recipe and photographs that it is trained on.

    seen: px of training, 0 for all of `size`; classes: how many, 0 for the photographs' own; changes: of the params of
    train.
    """

    recipe: str
    photographs: str
    images: int
    size: int
    seen: int = 0
    classes: int = 0
    changes: tuple[tuple[str, Any], ...] = ()

    def params(self) -> Any:
        """Give the recipe's params, for one epoch, after torch was set as training sets it."""
        from src.environment import settle
        from src.params import load_params

        params = load_params(Path(f"recipes/{self.recipe}.yaml"))
        augment = params.train.augment.model_copy(update={"image_size": self.seen})
        once = {"epochs": 1, "warmup": 0, "patience": 0, "schedule": "constant", "snapshot_every": 0}
        train = params.train.model_copy(update={"augment": augment, **once, **dict(self.changes)})
        settle(train)
        return params.model_copy(update={"train": train})

    def load(self) -> tuple[Any, Any]:
        """Give the params, and the table."""
        import torch

        from src.batches import Table

        files = photographs(self.photographs)
        classes = sorted({folder for folder, _ in files})
        pixels = np.stack([images.decode(content, size=self.size, channels=3) for _, content in files])
        labels = torch.tensor([classes.index(folder) for folder, _ in files])
        rows = torch.arange(self.images) % len(files)
        table = Table(torch.from_numpy(pixels), rows, labels[rows], len(classes))
        if self.classes:
            table = replace(table, labels=rows % self.classes, classes=self.classes)
        return self.params(), table

    def trainer(self, params: Any, table: Any) -> tuple[Any, Any]:
        from src.batches import channel_statistics, step_generator
        from src.networks import start
        from src.training import Trainer, make_fabric

        fabric = make_fabric(params.train)
        classes = [str(code) for code in range(table.classes)]
        drawn = step_generator("weights", params.train.seed)
        network, card = start(params.model, self.size, 3, classes, channel_statistics(table), drawn)
        return Trainer(network, params.train, fabric), card


def bare(scene: Scene, steps: int = 20) -> Way:
    """Forward, backward and step of the network, on one batch that is in memory: images a second."""
    step, batch = _bare_step(scene)

    def measure() -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        _synchronize()
        return steps * batch / (time.perf_counter() - begun)

    return measure


def loop(scene: Scene) -> Way:
    """An epoch of ours with all that its recipe asks for, its metrics and its checkpoint, and bare steps in between.

    Gives images a second of both.
    """
    from src.batches import Table, count_steps
    from src.checkpoints import open_store
    from src.training import fit_from

    params, table = scene.load()
    few = Table(table.images, table.rows[:64], table.labels[:64], table.classes)
    step, batch = _bare_step(scene)

    def measure() -> dict[str, float]:
        beside = _beside(table, step)
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            trainer, card = scene.trainer(params, table)
            begun = time.perf_counter()
            with open_store(params.train, count_steps(len(table), batch), {}) as store:
                for _ in fit_from(store, trainer, beside, few, card):
                    pass
            spent = time.perf_counter() - begun - sum(beside.spent)
        return {"loop": len(table) / spent, "bare": len(beside.spent) * PAUSE * batch / sum(beside.spent)}

    return measure


def _bare_step(scene: Scene) -> tuple[Callable[[], object], int]:
    """Give what takes a step on a batch that is in memory, and the size of that batch."""
    from src.batches import batches, step_generator
    from src.training import train_step

    params, table = scene.load()
    trainer, _ = scene.trainer(params, table)
    seen, targets = next(batches(table, params.train, 1))
    drawn = step_generator("dropout", params.train.seed)
    trainer.model.train()
    return partial(train_step, trainer.model, trainer.optimizer, trainer.fabric, seen, targets, drawn), len(seen)


PAUSE = 5
"""Batches after which something else is timed, so that a machine whose speed changes by the second misleads nobody."""


def _beside(table: Any, other: Callable[[], object]) -> Any:
    """Make a table that lets `other` run PAUSE times after as many batches, and notes how long that took."""
    from src.batches import Table

    class Beside(Table):
        taken = 0
        spent: ClassVar[list[float]] = []

        def take(self, picks: Any) -> Any:
            Beside.taken += 1
            if Beside.taken % PAUSE == 0:
                _synchronize()
                begun = time.perf_counter()
                for _ in range(PAUSE):
                    other()
                _synchronize()
                self.spent.append(time.perf_counter() - begun)
            return super().take(picks)

    return Beside(**vars(table))


def _synchronize() -> None:
    """Wait for a GPU, which does what it is told later."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def step_parts(scene: Scene, part: str, steps: int = 20) -> Way:
    """Seconds a step up to a part of it: batches alone, with the forward pass, the backward pass, all."""
    from torch.nn import functional as F

    from src.batches import batches, step_generator

    params, table = scene.load()
    trainer, _ = scene.trainer(params, table)
    trainer.model.train()
    drawn = step_generator("dropout", params.train.seed)

    def measure() -> float:
        begun = time.perf_counter()
        for number, (seen, targets) in enumerate(batches(table, params.train, 1)):
            if number == steps:
                break
            if part == "batches":
                continue
            loss = F.cross_entropy(trainer.model(seen, drawn), targets)
            if part == "forward":
                continue
            trainer.optimizer.zero_grad()
            trainer.fabric.backward(loss)
            if part == "all":
                trainer.optimizer.step()
        _synchronize()
        return (time.perf_counter() - begun) / steps

    return measure


def first_step(scene: Scene) -> Way:
    """Seconds until a compiled network has taken its first step, without what former compilations left."""
    from src.batches import batches, step_generator
    from src.training import train_step

    params, table = scene.load()
    seen, targets = next(batches(table, params.train, 1))
    drawn = step_generator("dropout", params.train.seed)

    def measure() -> float:
        import torch

        torch.compiler.reset()
        trainer, _ = scene.trainer(params, table)
        with tempfile.TemporaryDirectory() as folder, torch._inductor.utils.fresh_inductor_cache(dir=folder):
            begun = time.perf_counter()
            train_step(trainer.model.train(), trainer.optimizer, trainer.fabric, seen, targets, drawn)
            return time.perf_counter() - begun

    return measure


def tutorial_loop(name: str, count: int) -> Way:
    """An epoch of the tutorial's loop on the same files, unpacked to folders: images a second."""
    import torch

    from benchmarks import tutorial

    folder = tempfile.mkdtemp()
    for file, content in repeated(photographs(name), count):
        (Path(folder) / file).parent.mkdir(exist_ok=True)
        (Path(folder) / file).write_bytes(content)
    found = tutorial.loader(Path(folder))
    network = tutorial.network(len(found.dataset.classes))  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def measure() -> float:
        begun = time.perf_counter()
        tutorial.epoch(network, optimizer, found)
        return count / (time.perf_counter() - begun)

    return measure


# --- prepare ----------------------------------------------------------------------------------------------------------


def pil_one_core(name: str, size: int) -> Way:
    """Pillow's open and resize, on one core, of images that are in memory: images a second."""
    files = [content for _, content in photographs(name)]

    def measure() -> float:
        begun = time.perf_counter()
        for content in files:
            np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        return len(files) / (time.perf_counter() - begun)

    return measure


def in_all_cores(name: str, size: int, decode: Callable[[bytes, int], object]) -> Way:
    """A way to decode alone, on all cores, of images that are in memory: images a second."""
    files = [content for _, content in photographs(name)]
    workers, share = images.cores(), math.ceil(20_000 / images.cores())
    pool = get_context("fork").Pool(workers)
    work = partial(_decode_all, (files * math.ceil(share / len(files)))[:share], size, decode)

    def measure() -> float:
        begun = time.perf_counter()
        for done in [pool.apply_async(work) for _ in range(workers)]:
            done.get()
        return workers * share / (time.perf_counter() - begun)

    return measure


def _decode_all(files: list[bytes], size: int, decode: Callable[[bytes, int], object]) -> None:
    for content in files:
        decode(content, size)


def to_pixels(content: bytes, size: int) -> object:
    """What a row of the table is, and nothing else."""
    return images.decode(content, size=size, channels=3)


def jpeg_alone(content: bytes, size: int) -> object:
    """Decoding at the smallest sufficient scale: no conversion, no resizing, no hash."""
    image = Image.open(io.BytesIO(content))
    image.draft(None, (size, size))
    return image.load()


def prepare(name: str, size: int, count: int) -> Way:
    """`python -m stages.prepare`, from the start of its processes to the whole table: images a second."""
    home = lay_out("animals10-article", name, repeated(photographs(name), count), size=size)

    def measure() -> float:
        (home / paths.IMAGES).unlink(missing_ok=True)  # as DVC does; to replace a gigabyte takes the file system 0.2 s
        return count / run_stage("prepare", home)[0]

    return measure


def lay_out(recipe: str, name: str, files: Iterator[tuple[str, bytes]], *, size: int) -> Path:
    """Make a folder in which stages can run: an archive of these photographs, and the params of a recipe."""
    home = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
    for output in (paths.RAW, paths.INDEX, paths.DATA_METRICS):
        (home / output).parent.mkdir(exist_ok=True, parents=True)
    archive.write(home / paths.RAW, files)
    params = yaml12.read(Path(f"recipes/{recipe}.yaml"))
    params["prepare"] |= {"image_size": size, "classes": {}}
    params["train"] |= {"epochs": 1}
    (home / "params.yaml").write_text(yaml12.dump(params), encoding="utf-8")
    return home


def full(content: bytes, size: int) -> images.Pixels:
    """Decode all of a JPEG's pixels and then resize them, as most do: what `decode` has to be as good as."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(images._square(image, size, image.size))


def decibels(name: str, size: int) -> list[float]:
    """How near each image comes to what full decoding gives: its peak signal-to-noise ratio, in dB."""
    found = []
    for _, content in photographs(name):
        pixels = images.decode(content, size=size, channels=3)
        error = np.square(pixels.astype(float) - full(content, size)).mean()
        found.append(10 * math.log10(255**2 / max(error, 1e-2)))
    return found


def accuracies(name: str, seed: int, size: int = 64, epochs: int = 20) -> dict[str, float]:
    """Train the article's network on images that were decoded either way, and test it on both kinds.

    Gives the share of right answers by how the training's and the test's images were decoded.
    """
    import torch

    from src.batches import Table, batches, step_generator
    from src.training import evaluate

    scene = Scene("animals10-article", name, 0, size)
    files = photographs(name)
    classes = sorted({folder for folder, _ in files})
    labels = torch.tensor([classes.index(folder) for folder, _ in files])
    order = torch.randperm(len(files), generator=step_generator("order", seed))
    train, test = order[len(files) * 3 // 10 :], order[: len(files) * 3 // 10]
    decoded = {
        "drafted": torch.from_numpy(np.stack([images.decode(content, size=size, channels=3) for _, content in files])),
        "full": torch.from_numpy(np.stack([full(content, size) for _, content in files])),
    }
    params = scene.params()
    params = params.model_copy(update={"train": params.train.model_copy(update={"seed": seed})})
    found = {}
    for way, pixels in decoded.items():
        table = Table(pixels, train, labels[train], len(classes))
        trainer, _ = scene.trainer(params, table)
        trainer.model.train()
        for epoch in range(1, epochs + 1):
            for step, (seen, targets) in enumerate(batches(table, params.train, epoch), start=1):
                drawn = step_generator("dropout", seed, epoch, step)
                trainer.step(seen, targets, 1e-3, drawn)
        for judged, other in decoded.items():
            with trainer.fabric.autocast():
                result = evaluate(trainer.network, Table(other, test, labels[test], len(classes)), 256)
            found[f"{way}_on_{judged}"] = result[1]
    return found


def at_once(count: int, epochs: int = 5) -> Way:
    """So many trainings of the sample at once, as of a queue, each in a folder of its own: seconds until all end."""
    homes = [_sampled(epochs) for _ in range(count)]

    def measure() -> float:
        for home in homes:
            shutil.rmtree(home / RESUME, ignore_errors=True)  # or training would find itself done
        begun = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(partial(run_stage, "train"), homes))
        return time.perf_counter() - begun

    return measure


def _sampled(epochs: int) -> Path:
    """Make a folder in which the sample is ready to be trained on."""
    home = Path(tempfile.mkdtemp(prefix="bench-sample-"))
    params = yaml12.read(Path("recipes/sample.yaml"))
    params["train"] |= {"epochs": epochs}
    (home / "params.yaml").write_text(yaml12.dump(params), encoding="utf-8")
    for stage in ("download", "prepare", "split"):
        run_stage(stage, home)
    return home


# --- evaluation -------------------------------------------------------------------------------------------------------


def prediction(scene: Scene) -> Way:
    """`predict`, as evaluate calls it, and the forward passes alone in between: images a second of both."""
    import torch

    from src.evaluation import predict

    params, table = scene.load()
    network, batch = scene.trainer(params, table)[0].network.eval(), params.evaluate.batch
    pixels, views = table.take(torch.arange(batch))[0], 1 + params.evaluate.flip

    def forward() -> None:
        for _ in range(views):
            network(pixels)

    def measure() -> dict[str, float]:
        beside = _beside(table, forward)
        begun = time.perf_counter()
        predict(network, beside, batch=batch, flip=params.evaluate.flip)
        spent = time.perf_counter() - begun - sum(beside.spent)
        return {"predict": len(table) / spent, "forward": len(beside.spent) * PAUSE * batch / sum(beside.spent)}

    return measure


# --- what people feel -------------------------------------------------------------------------------------------------


def command(*words: str) -> Way:
    """Seconds of a command."""

    def measure() -> float:
        begun = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        return time.perf_counter() - begun

    return measure


# --- download ---------------------------------------------------------------------------------------------------------


def fetch(name: str, count: int) -> Way:
    """`download` of one's own zip, with its check: bytes a second."""
    from src.params import load_params
    from src.sources import fetch as bring

    folder, size = _packed(name, count)
    params = load_params().download.model_copy(update={"source": "folder", "path": str(folder / "raw.zip")})

    def measure() -> float:
        begun = time.perf_counter()
        bring(params, folder / "fetched.zip")
        return size / (time.perf_counter() - begun)

    return measure


def copy(name: str, count: int) -> Way:
    """Copying the zip and reading it once more, for its hash and its checksums: bytes a second."""
    folder, size = _packed(name, count)

    def measure() -> float:
        begun = time.perf_counter()
        shutil.copy(folder / "raw.zip", folder / "copy.zip")
        hash_file(folder / "copy.zip")
        return size / (time.perf_counter() - begun)

    return measure


def _packed(name: str, count: int) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp())
    archive.write(folder / "raw.zip", repeated(photographs(name), count))
    return folder, (folder / "raw.zip").stat().st_size


# --- growth -----------------------------------------------------------------------------------------------------------


def multiplied(name: str, times: int) -> Iterator[tuple[str, bytes]]:
    """Give `times` as many photographs: each one shifted, with noise, so that no two are the same picture."""
    random = np.random.default_rng(0)
    for number, (folder, content) in enumerate(photographs(name)):
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        for turn in range(times):
            moved = np.roll(pixels, tuple(random.integers(pixels.shape[:2])), (0, 1))
            noise = random.integers(0, 8, moved.shape, np.uint8)
            yield f"{folder}/{number}-{turn}.jpg", encoded((moved & 0xF8) | noise)


def run_stage(name: str, home: Path, watch: float = 60.0) -> tuple[float, float]:
    """Run a stage in a folder, and give its seconds and the peak of its processes' memory, in bytes.

    watch: seconds between looks at the memory, each of which costs the stage some time.
    """
    import psutil

    begun, peak, project = time.perf_counter(), 0.0, os.environ | {"PYTHONPATH": str(Path.cwd())}
    child = psutil.Popen([sys.executable, "-m", f"stages.{name}"], cwd=home, env=project, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        peak = max(peak, sum(map(_resident, _family(child))))
        with suppress(psutil.TimeoutExpired):
            child.wait(watch)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, name)
    return time.perf_counter() - begun, peak


def _family(process: Any) -> Iterable[Any]:
    import psutil

    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: Any) -> float:
    import psutil

    try:
        return float(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0.0
