"""The commands that users type, with real DVC, in a clone of the project of each test's own.

Most name `plot` as what to make: exporting takes longer than all the other stages of so small a run.
"""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from src import yaml12
from tests.project import Project, stages_run


@pytest.fixture
def inbox(project: Project) -> Callable[[str], Path]:
    """A way to put class folders of scikit-learn's 8x8 digits into a folder, 20 of each of 0, 1 and 2."""
    digits = load_digits()

    def fill(name: str) -> Path:
        folder = project.folder / name
        for label in (0, 1, 2):
            (folder / f"digit {label}").mkdir(parents=True)
            for number, pixels in enumerate(digits.images[digits.target == label][:20]):
                Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"digit {label}" / f"{number}.png")
        return folder

    project.set(train__batch=16, train__epochs=1)
    return fill


def test_a_second_repro_runs_nothing_and_takes_two_seconds(project: Project) -> None:
    project.dvc("repro")  # the copy's files have new inodes, which DVC hashes once
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = project.dvc("repro")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of the processor, which other tests beside this one do not lengthen; alone it is the time on the clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert stages_run(output) == []
    assert "up to date" in output


def test_a_fresh_clone_gets_the_same_results_again(project: Project, trained: Path, tmp_path: Path) -> None:
    project.git("clone", "--quiet", str(trained), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    # Plots and metrics came with the clone; they are right as long as what they are made of comes out the same.
    assert stages_run(clone.dvc("repro")) == ["download", "prepare", "split", "train", "evaluate", "export"]
    assert clone.git("status", "--short") == ""
    clone.dvc("repro", "--force", "--single-item", "plot")
    assert clone.git("status", "--short") == ""


def test_another_split_decodes_nothing_again(project: Project) -> None:
    project.set(split__seed=1)
    assert stages_run(project.dvc("repro", "plot")) == ["split", "train", "evaluate", "plot"]


def test_a_change_to_a_figure_trains_nothing_again(project: Project) -> None:
    with (project.folder / "src/figures.py").open("a", encoding="utf-8") as file:
        file.write("# a change\n")
    assert stages_run(project.dvc("repro")) == ["plot"]


def test_a_change_to_the_evaluation_trains_nothing_again(project: Project) -> None:
    project.set(evaluate__batch=100)
    assert stages_run(project.dvc("repro")) == ["evaluate", "plot", "export"]


def test_another_image_size_makes_other_images_in_the_workspace_and_aside(project: Project) -> None:
    def side(name: str) -> int:
        return int(np.load(project.folder / name).shape[1])

    def recorded(stage: str, section: str) -> dict[str, Any]:
        params = yaml12.read(project.folder / "dvc.lock")["stages"][stage]["params"]["params.yaml"][section]
        return dict(params.get("augment", params))

    project.set(model__name="residual", model__widths=[4])
    for size in (28, 20):
        project.set(prepare__image_size=size)
        project.dvc("repro", "prepare")
        assert (side("data/images.npy"), recorded("prepare", "prepare")["image_size"]) == (size, size)
    for size in (12, 10):
        project.dvc("exp", "run", "-S", f"train.augment.image_size={size}", "train")
        assert (side("data/training_batch.npy"), recorded("train", "train")["image_size"]) == (size, size)
    project.dvc("exp", "run", "--temp", "--name", "aside", "-S", "prepare.image_size=16", "prepare")
    assert side("data/images.npy") == 20
    project.dvc("exp", "apply", "aside")
    assert (side("data/images.npy"), recorded("prepare", "prepare")["image_size"]) == (16, 16)


def test_an_experiment_is_run_compared_and_shown(project: Project) -> None:
    settings = ("train.epochs=3", "train.lr=2e-3", "model.dropout=0.1")
    project.dvc("exp", "run", *(word for setting in settings for word in ("-S", setting)), "plot")
    diff = json.loads(project.dvc("metrics", "diff", "--json"))
    assert {file: sorted(metrics) for file, metrics in diff.items()} == {
        "metrics/test.json": ["accuracy", "macro_f1", "val_acc"]
    }
    assert diff["metrics/test.json"]["accuracy"]["diff"] > 0
    assert "train.epochs" in project.dvc("params", "diff")
    assert project.json("metrics/train/metrics.json")["step"] == 3

    table = project.dvc("exp", "show", "--only-changed", "--no-pager", COLUMNS="120").splitlines()
    assert max(map(len, table)) <= 120
    header = next(line.split() for line in table if "Experiment" in line)
    metrics, params = ["accuracy", "macro_f1", "val_acc"], ["model.dropout", "train.epochs", "train.lr"]
    assert header[:8] == ["Experiment", "Created", *metrics, *params]
    # DVC folds up the columns of deps that do not fit, but not that of the first by its name, 32 characters wide.
    workspace = json.loads(project.dvc("exp", "show", "--json"))[0]["data"]
    assert min(workspace["deps"]) == "data/images.npy", "an experiment in training must not change it"

    data = json.loads(project.dvc("plots", "diff", "--json"))["data"]
    pictures = [f"plots/{name}.png" for name in ("augmented", "classes", "confusion", "curves", "examples", "mistakes")]
    assert sorted(data) == ["accuracy", "confusion", "loss", "metrics/classes.csv", *pictures]
    project.dvc("plots", "diff")
    page = (project.folder / "dvc_plots/index.html").read_text(encoding="utf-8")
    for title in (
        "Cross entropy after each epoch",
        "Accuracy after each epoch",
        "Test images, as a share",
        "F1 of each",
    ):
        assert title in page
    assert "workspace" in page
    assert "HEAD" in page


def test_an_experiment_that_was_run_before_comes_back_from_the_run_cache(project: Project) -> None:
    first = project.bytes("models/model.safetensors"), project.bytes("metrics/test.json")
    output = project.dvc("exp", "run", "--name", "other", "-S", "train.lr=1e-4", "plot")
    assert "going on after" not in output
    assert project.bytes("models/model.safetensors") != first[0]
    shutil.rmtree(project.folder / ".resume")  # which would be quick, too
    output = project.dvc("exp", "run", "--name", "back", "-S", "train.lr=0.001", "plot")
    assert output.count("is cached - skipping run") == 2
    assert stages_run(output) == ["plot"]  # whose report DVC takes for neither metric nor plot
    assert (project.bytes("models/model.safetensors"), project.bytes("metrics/test.json")) == first


def test_more_epochs_continue_and_come_to_the_same_as_straight_through(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder, tmp_path / "straight")
    shutil.rmtree(tmp_path / "straight/.resume")
    straight = Project(tmp_path / "straight")
    assert "going on after" not in straight.dvc("exp", "run", "-S", "train.epochs=3", "plot")
    before = project.bytes("models/model.safetensors"), project.git("status", "--short")
    output = project.dvc("exp", "run", "--temp", "--name", "more", "-S", "train.epochs=3", "plot")
    assert "going on after epoch 1 of 3" in output
    assert (project.bytes("models/model.safetensors"), project.git("status", "--short")) == before, "it is run aside"
    project.dvc("exp", "apply", "more")
    assert yaml12.read(project.folder / "params.yaml")["train"]["epochs"] == 3
    assert project.bytes("dvc.lock") == straight.bytes("dvc.lock")
    assert project.git("diff", "--no-index", "--stat", "metrics", str(straight.folder / "metrics")) == ""


def while_training(project: Project, edit: Callable[[], object]) -> str:
    """Run the pipeline, with an edit as soon as the first epoch has ended, and give what it printed."""
    command = [str(Path(sys.executable).parent / "dvc"), "repro", "plot"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    log = project.folder / "metrics/train/metrics.json"
    log.unlink()
    with subprocess.Popen(
        command, cwd=project.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while not log.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        edit()
        return process.communicate(timeout=300)[0]


def add_a_comment(text: str) -> str:
    return f"{text}\n# an edit\n"


def double_the_rate(text: str) -> str:
    return text.replace("lr: 0.001", "lr: 0.002")


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("src/batches.py", add_a_comment, "src/batches.py"),
        ("params.yaml", double_the_rate, "params.yaml: train.lr"),
        ("src/figures.py", add_a_comment, None),
    ],
    ids=["source", "param", "another stage's source"],
)
def test_an_edit_during_a_run_fails_the_stage_that_it_touches(
    project: Project, name: str, edit: Callable[[str], str], named: str | None
) -> None:
    project.set(train__epochs=4)
    lock, file = project.bytes("dvc.lock"), project.folder / name
    before = file.read_text(encoding="utf-8")
    output = while_training(project, lambda: file.write_text(edit(before), encoding="utf-8"))
    assert file.read_text(encoding="utf-8") != before
    if named is None:
        assert project.dvc("status", "plot") == "Data and pipelines are up to date.\n", output
        return
    assert f"train: {named} changed during the run; nothing was recorded" in output
    assert "Traceback" not in output
    assert project.bytes("dvc.lock") == lock
    assert not (project.folder / "models/model.safetensors").exists()
    assert not (project.folder / "metrics/train/metrics.json").exists()
    file.write_text(before, encoding="utf-8")
    assert "going on after epoch 4 of 4" in project.dvc("repro", "train")


def test_queued_experiments_run_side_by_side(project: Project) -> None:
    project.dvc("exp", "run", "--queue", "-S", "train.lr=1e-3,3e-4", "plot")
    # The workers keep the caller's stdout open, so they get a file of their own.
    with (project.folder / "worker.log").open("w") as log:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(
            ["dvc", "queue", "start", "-j", "2"], cwd=project.folder, env=environment, stdout=log, stderr=log
        )
    try:
        for _ in range(120):
            status = project.dvc("queue", "status")
            if status.count("Success") == 2 or "Failed" in status:
                break
            time.sleep(1)
        assert status.count("Success") == 2, status
    finally:
        project.dvc("queue", "stop")
    rows = project.dvc("exp", "show", "--csv").splitlines()
    rates = {row["train.lr"] for row in _csv(rows) if row["typ"] == "branch_commit" or row["typ"] == "branch_base"}
    assert rates == {"0.001", "0.0003"}


def test_a_typo_in_params_is_one_sentence_and_loses_nothing(project: Project) -> None:
    model = project.bytes("models/model.safetensors")
    for command in (["exp", "run", "-S", "split.seed=1", "-S", "train.lr=fast"], ["repro"]):
        output = project.dvc(*command, code=None)
        assert "params.yaml: train.lr is 'fast' (str): input should be a valid number" in output
        assert "`git checkout params.yaml` undoes your edits there, and those of a failed `dvc exp run -S`" in output
        assert "Traceback" not in output
    project.git("checkout", "--quiet", "params.yaml", "metrics", "plots")
    project.dvc("checkout")
    assert project.bytes("models/model.safetensors") == model
    assert stages_run(project.dvc("repro")) == []


def test_images_in_the_inbox_reach_workspace_and_temporary_runs(project: Project, inbox: Callable[[str], Path]) -> None:
    folder = inbox("data/inbox")
    project.set(download__source="folder")
    assert stages_run(project.dvc("repro", "plot")) == ["download", "prepare", "split", "train", "evaluate", "plot"]
    assert project.json("metrics/data.json")["images"] == 60
    assert stages_run(project.dvc("repro", "plot")) == []
    project.commit()

    # Twice in a temporary folder, since a run that DVC's run cache remembers must not hide a further change.
    for left, name in ((59, "0.png"), (58, "1.png")):
        (folder / "digit 0" / name).unlink()
        output = project.dvc("exp", "run", "--temp", "--name", f"with-{left}", "split")
        assert stages_run(output) == ["download", "prepare", "split"]
    project.dvc("repro", "split")
    assert project.json("metrics/data.json")["images"] == 58
    project.git("checkout", "--quiet", ".")
    project.dvc("exp", "apply", "with-59")
    assert project.json("metrics/data.json")["images"] == 59


@pytest.fixture
def colleague(project: Project, inbox: Callable[[str], Path], tmp_path: Path) -> Callable[[], Project]:
    """A way to push a project whose images are in its inbox, and to get a clone of it into which all is pulled."""
    inbox("data/inbox")
    project.set(download__source="folder")
    project.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))

    def clone() -> Project:
        project.dvc("repro", "plot")
        project.commit()
        project.dvc("push")
        # As Windows' git is set up; the remote's path is absolute.
        project.git("clone", "--quiet", "--config", "core.autocrlf=true", str(project.folder), str(tmp_path / "clone"))
        found = Project(tmp_path / "clone")
        found.dvc("pull")
        return found

    return clone


def test_a_clone_gets_the_images_of_the_inbox_back_and_reruns_nothing(colleague: Callable[[], Project]) -> None:
    clone = colleague()
    lock, archive = clone.bytes("dvc.lock"), clone.bytes("data/raw.zip")
    stages = ("download", "prepare", "split", "train", "evaluate", "plot")
    changed = json.loads(clone.dvc("status", "--json", *stages))
    assert changed == {"download": [{"changed deps": {"data/inbox": "modified"}}]}
    output = clone.dvc("exp", "run", "--temp", "--name", "aside", "-S", "train.epochs=2", "plot")
    assert stages_run(output) == ["download", "train", "evaluate", "plot"]
    output = clone.dvc("repro", "plot")
    assert stages_run(output) == ["download"]
    assert "data/inbox held no images; those of the archive that dvc.lock records are back in it" in output
    assert (clone.bytes("dvc.lock"), clone.bytes("data/raw.zip")) == (lock, archive)
    assert clone.git("status", "--short") == ""
    assert "up to date" in clone.dvc("repro", "plot")

    shutil.rmtree(clone.folder / ".dvc/cache")
    for path in (*(clone.folder / "data/inbox").glob("digit *"), clone.folder / ".dvc/tmp"):
        shutil.rmtree(path)
    assert stages_run(clone.dvc("repro", "download")) == ["download"], "out of the remote"
    assert clone.bytes("dvc.lock") == lock


def test_images_that_dvc_tracks_are_up_to_date_in_a_clone(project: Project, colleague: Callable[[], Project]) -> None:
    project.dvc("add", *(f"data/inbox/digit {label}" for label in (0, 1, 2)))
    clone = colleague()
    assert "up to date" in clone.dvc("repro", "plot")
    assert clone.git("status", "--short") == ""


def test_a_folder_outside_the_repository_is_watched(project: Project, inbox: Callable[[str], Path]) -> None:
    folder = inbox("../photos of mine")
    project.set(download__source="folder", download__path=str(folder.resolve()))
    project.dvc("repro", "split")
    assert project.json("metrics/data.json")["images"] == 60
    assert stages_run(project.dvc("repro", "split")) == []
    project.commit()
    (folder / "digit 0" / "0.png").unlink()
    output = project.dvc("exp", "run", "--temp", "--name", "outside", "split")
    assert stages_run(output) == ["download", "prepare", "split"]
    project.dvc("exp", "apply", "outside")
    assert project.json("metrics/data.json")["images"] == 59


def _csv(lines: list[str]) -> list[dict[str, str]]:
    return list(csv.DictReader(lines))
