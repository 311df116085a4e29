"""Do all ways of deployment answer as the evaluated model does? On every test image of two real data sets.

`python -m tests.parity` trains a model on each where the data lie beside the repository, and compares the probabilities
that `evaluate` wrote with those of onnxruntime, the web service and a browser, each from the original file's bytes. A
second run finds the trained models. Exit code 1 where a bound is missed.
"""

import io
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import requests
from numpy.typing import NDArray
from PIL import Image, ImageOps
from playwright.sync_api import sync_playwright

from src import paths
from tests.browser import in_browser, launch
from tests.project import ROOT, Project, clone
from tests.served import Served

DATA = ROOT.parent / "shared"
MODELS = ROOT / ".resume/parity"

TOP1, DIFFERENCE = 0.999, 1e-3
TOP1_INT8, LOSS_INT8 = 0.99, 0.005
"""The bounds: same top-1 class, and largest difference of a probability or smallest loss of accuracy."""

Answers = NDArray[np.float64]

SETTINGS: dict[str, dict[str, object]] = {
    "animals64": {
        "recipe": "animals10",
        "download__path": "data/animals64.zip",
        "prepare__image_size": 64,
        "prepare__classes": {},
        "train__epochs": 30,
        "train__augment__image_size": 0,
    },
    "dogs-vs-cats-1000": {
        "recipe": "dogs-vs-cats",
        "download__path": "data/dogs-vs-cats-1000.zip",
        "prepare__image_size": 288,
        "model__name": "timm/tf_efficientnet_lite0",
        "model__weights": "weights/tf_efficientnet_lite0.safetensors",
        "train__epochs": 4,
        "train__freeze": 3,
    },
}


def train(name: str) -> Project:
    """Train a model on a data set in a clone of the project as it stands."""
    settings = dict(SETTINGS[name])
    folder = MODELS / name
    if folder.exists():
        return Project(folder)
    part = folder.with_name(f".{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    project = clone(part)
    shutil.copy(ROOT / "recipes" / f"{settings.pop('recipe')}.yaml", part / "params.yaml")
    for key in ("download__path", "model__weights"):
        if key in settings:
            settings[key] = str(DATA / str(settings[key]))
    project.set(download__source="folder", **settings)
    print(project.run(sys.executable, "-m", "dvc", "repro", "export", timeout=7200)[-1500:])
    part.rename(folder)
    return Project(folder)


def compare(name: str) -> bool:
    """Print a row for each way of deployment; tell whether all keep the bounds."""
    folder = train(name).folder
    written = pd.read_csv(folder / paths.PREDICTIONS, dtype={"path": str, "actual": str})
    with zipfile.ZipFile(folder / paths.RAW) as archive:
        files = [archive.read(path) for path in written["path"]]
    classes = [column.removeprefix("p_") for column in written.columns if column.startswith("p_")]
    evaluated = written[[f"p_{name}" for name in classes]].to_numpy()
    codes = pd.Categorical(written["actual"], categories=classes).codes
    ways: dict[str, Callable[[], Answers]] = {
        "onnxruntime": lambda: by_onnxruntime(folder / paths.ONNX, files),
        "service": lambda: by_service(folder / paths.ONNX, files, classes),
        "browser": lambda: by_browser(folder / paths.ONNX, files),
        "onnxruntime, 8 bits": lambda: by_onnxruntime(folder / paths.INT8, files),
        "service, 8 bits": lambda: by_service(folder / paths.INT8, files, classes),
    }
    kept = True
    for way, ask in ways.items():
        found = ask()
        same = float((found.argmax(1) == evaluated.argmax(1)).mean())
        largest, over = np.abs(found - evaluated).max(1), DIFFERENCE
        loss = float((evaluated.argmax(1) == codes).mean() - (found.argmax(1) == codes).mean())
        exact = "8 bits" not in way
        fine = (same >= TOP1 and largest.max() <= over) if exact else (same >= TOP1_INT8 and loss <= LOSS_INT8)
        kept = kept and bool(fine)
        print(
            f"| {name} | {way} | {len(found):,} | {same:.2%} | {largest.max():.1e} | {np.median(largest):.1e} | "
            f"{(largest > over).sum()} | {loss:+.2%} | {'' if fine else 'missed'} |",
            flush=True,
        )
    return kept


def by_onnxruntime(model: Path, files: list[bytes]) -> Answers:
    """Decode each file in full by Pillow, as anyone would, and leave all else to the model file."""
    session = onnxruntime.InferenceSession(model)

    def ask(data: bytes) -> NDArray[np.float32]:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        probabilities: NDArray[np.float32] = session.run(["probabilities"], {"images": np.asarray(picture)[None]})[0]
        return probabilities[0]

    return np.array([ask(data) for data in files], np.float64)


def by_service(model: Path, files: list[bytes], classes: list[str]) -> Answers:
    """Send the files to the web service, eight at a time."""
    found = []
    with Served(model) as service, requests.Session() as session:
        for start in range(0, len(files), 8):
            parts = [("files", (str(number), data)) for number, data in enumerate(files[start : start + 8])]
            answer = session.post(f"{service.url}/predict?top=1000", files=parts, timeout=60)
            answer.raise_for_status()
            for prediction in answer.json()["predictions"]:
                shares = {share["class"]: share["probability"] for share in prediction["classes"]}
                found.append([shares[name] for name in classes])
    return np.array(found)


def by_browser(model: Path, files: list[bytes]) -> Answers:
    """Let Chromium decode the files and run the model, as the phone app does."""
    with Served(model) as service, sync_playwright() as playwright:
        page = launch(playwright).new_page()
        page.goto(f"{service.url}/?device")
        return np.concatenate([in_browser(page, files[start : start + 50]) for start in range(0, len(files), 50)])


def main() -> None:
    print("| data | by | images | same top-1 | largest difference | median | over 1e-3 | loss of accuracy | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    kept = [compare(name) for name in sys.argv[1:] or SETTINGS]
    if not all(kept):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
