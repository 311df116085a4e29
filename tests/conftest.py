"""Clones of the project for the tests that run real DVC, and the stages' own outputs for those that need none."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from src import environment, paths
from src.runtime import run
from tests.helpers import is_one_sentence, run_stage, succeed
from tests.project import Project, clone

# The tests call stages in this process, too: it has to compute as theirs do from the start.
os.environ |= environment.PORTABLE
# A script that starts the tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it stands, cloned, with one epoch of the sample, at half its size, trained and committed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with FileLock(f"{folder}.lock"):  # the processes of pytest-xdist share it
        if not folder.exists():
            project = clone(folder.with_suffix(".part"))
            project.set(prepare__image_size=14, train__epochs=1, train__threads=1)
            project.dvc("repro")
            project.commit()
            project.folder.rename(folder)
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Project:
    """A copy of the trained clone, cache and all, that a test may change."""
    shutil.copytree(trained, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The 5,000 digits of the sample, downloaded, prepared and split by the stages alone."""
    home = Project(tmp_path_factory.mktemp("sample"))
    for stage in ("download", "prepare", "split"):
        succeed(home.folder, stage)
    return home


@pytest.fixture(scope="session")
def finished(sample: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Every eighth of those digits, trained for two epochs with a snapshot each, and what that printed."""
    home = Project(tmp_path_factory.mktemp("finished") / "home")
    shutil.copytree(sample.folder, home.folder)
    images, split = home.folder / paths.IMAGES, home.folder / paths.SPLIT
    np.save(images, np.load(images)[::8])
    pd.read_csv(split, dtype=str)[::8].to_csv(split, index=False, lineterminator="\n")
    train = {"epochs": 2, "snapshot_every": 1, "augment": {"flip": True}}
    done = run_stage(home.folder, "train", train=train, model={"dropout": 0.25})
    assert done.returncode == 0, done.stderr
    for name in ("stdout", "stderr"):
        (home.folder / name).write_text(getattr(done, name), encoding="utf-8")
    return home


@pytest.fixture
def home(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of that folder, which a test may change and which is the current one."""
    shutil.copytree(finished.folder, tmp_path / "home", ignore=shutil.ignore_patterns(".resume"))
    monkeypatch.chdir(tmp_path / "home")
    return Project(tmp_path / "home")


@pytest.fixture
def sentence_of(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], None]], str]:
    """A way to run a stage's main in this process that must fail in one sentence, and to read the sentence."""

    def fails(main: Callable[[], None]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(main)
        sentence = capsys.readouterr().err
        assert is_one_sentence(Path(sys.argv[0]).stem, int(str(stop.value.code)), sentence)
        return sentence

    return fails
