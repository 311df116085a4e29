"""The whole pipeline on real images, most of it through the unmodified Kaggle client.

`make test` takes most as far as the split, and one to the plots after an epoch at a small size; `make real` trains all
as told under FULL and prints what each reached and took.
"""

import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest

from src import archive
from tests.kaggle_server import KaggleServer
from tests.project import ROOT, Project, clone

DATA = ROOT.parent / "shared/data"
FULL = bool(os.environ.get("FULL"))

ANIMALS10 = {
    "cane": "dog",
    "cavallo": "horse",
    "elefante": "elephant",
    "farfalla": "butterfly",
    "gallina": "chicken",
    "gatto": "cat",
    "mucca": "cow",
    "pecora": "sheep",
    "ragno": "spider",
    "scoiattolo": "squirrel",
}

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not on this machine")


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    """A clone in which nothing has run."""
    project = clone(tmp_path / "fresh")
    project.set(model__name="article", model__dropout=0.5, prepare__channels=3)
    project.set(train__augment__flip=True, train__augment__shift=4)
    return project


def run(project: Project, title: str, quick: str, **env: str) -> dict[str, object]:
    """Run the pipeline to its end, or in `make test` to the stage `quick`, and give metrics/data.json."""
    start = time.perf_counter()
    project.dvc("repro", *([] if FULL else [quick]), **env)
    seconds, data = time.perf_counter() - start, project.json("metrics/data.json")
    if FULL or quick == "plot":
        test = project.json("metrics/evaluation.json")
        print(f"\n{title}: {data['images']} images, test accuracy {test['accuracy']:.2%}, {seconds:.0f} s")
        assert (project.folder / "plots/report.html").stat().st_size > 50_000
        assert data["test_images"] == test["images"]
    return data


def settle(project: Project, full: dict[str, object], quick: dict[str, object]) -> None:
    project.set(**(full if FULL else quick))


def test_animals10_as_kaggle_has_it(fresh: Project) -> None:
    fresh.set(download__source="kaggle", download__dataset="alessiocorrado99/animals10", download__version=2)
    fresh.set(prepare__classes=ANIMALS10, train__batch=32)
    settle(fresh, {"prepare__image_size": 128, "train__epochs": 20}, {"prepare__image_size": 64})
    archive_file = DATA / "animals10-original-320.zip"
    with KaggleServer(dataset="alessiocorrado99/animals10", versions={2: archive_file}) as server:
        data = run(fresh, "animals10-original-320, Kaggle", "split", **server.env)
    assert data["images"] == 320
    assert sorted(row["class"] for row in data["classes"]) == sorted(ANIMALS10.values())
    assert fresh.bytes("data/raw.zip") == archive_file.read_bytes()


def test_animals64_through_kaggle(fresh: Project) -> None:
    fresh.set(download__source="kaggle", download__dataset="someone/animals64", download__version=1)
    settle(fresh, {"prepare__image_size": 64, "train__epochs": 10}, {"prepare__image_size": 32})
    with KaggleServer(dataset="someone/animals64", versions={1: DATA / "animals64.zip"}) as server:
        data = run(fresh, "animals64, Kaggle", "split", **server.env)
    assert data["images"] == 10_450


def test_dogs_and_cats_through_kaggle(fresh: Project) -> None:
    fresh.set(download__source="kaggle", download__dataset="someone/dogs-vs-cats", download__version=1)
    settle(fresh, {"prepare__image_size": 128, "train__epochs": 20}, {"prepare__image_size": 32, "train__epochs": 1})
    with KaggleServer(dataset="someone/dogs-vs-cats", versions={1: DATA / "dogs-vs-cats-1000.zip"}) as server:
        data = run(fresh, "dogs-vs-cats-1000, Kaggle", "plot", **server.env)
    assert data["images"] == 1_000
    assert data["duplicates_same_picture"] == 1


def test_mnist_keeps_its_official_split(fresh: Project, tmp_path: Path) -> None:
    files = sorted((DATA / "mnist").glob("*.gz"))
    archive.write(tmp_path / "mnist.zip", [(file.name, file) for file in files])
    fresh.set(download__source="kaggle", download__dataset="someone/mnist", download__version=1, split__official=True)
    fresh.set(model__name="keras_mnist", model__dropout=0.0, prepare__channels=1)
    fresh.set(train__augment__flip=False, train__augment__shift=0)
    settle(fresh, {"train__epochs": 10, "train__batch": 32}, {})
    with KaggleServer(dataset="someone/mnist", versions={1: tmp_path / "mnist.zip"}) as server:
        data = run(fresh, "MNIST, Kaggle", "split", **server.env)
    if FULL:
        assert fresh.json("metrics/test.json")["accuracy"] > 0.98
    assert (data["train_images"] + data["validation_images"], data["test_images"]) == (60_000, 10_000)
    assert data["left_out_images"] == 0


def test_a_folder_of_photographs(fresh: Project) -> None:
    with zipfile.ZipFile(DATA / "animals10-original-320.zip") as photographs:
        photographs.extractall(fresh.folder / "data/inbox")
    fresh.set(download__source="folder", train__batch=32)
    settle(fresh, {"prepare__image_size": 128, "train__epochs": 20}, {"prepare__image_size": 32})
    data = run(fresh, "animals10-original-320, folder", "split")
    assert data["images"] == 320
    shutil.rmtree(fresh.folder / "data/inbox/raw-img")
