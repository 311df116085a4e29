"""What a stage is made of is the same at its end as at its start, or nothing is recorded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src import provenance, yaml12
from src.provenance import Sources, inputs_of
from tests.helpers import ROOT


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code with small stand-ins for the data, seen by a process that has just imported it."""
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    for name in ("images.npy", "split.csv", "index.csv", "rejected.csv"):
        (tmp_path / "data" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "_CODE", provenance._read_code())
    return tmp_path


def set_param(tree: Path, section: str, key: str, value: object) -> None:
    file = tree / "params.yaml"
    params = yaml12.read(file)
    params[section][key] = value
    file.write_text(yaml12.dump(params), encoding="utf-8")


def append(name: str) -> Callable[[Path], None]:
    def change(tree: Path) -> None:
        with (tree / name).open("a", encoding="utf-8") as file:
            file.write("\n# a change\n")

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda tree: (tree / name).unlink()


CHANGES = [
    (append("src/__init__.py"), ["src/__init__.py"]),
    (append("src/batches.py"), ["src/batches.py"]),
    (append("stages/train.py"), ["stages/train.py"]),
    (append("data/split.csv"), ["data/split.csv"]),
    (remove("src/schedules.py"), ["src/schedules.py"]),
    (remove("data/images.npy"), ["data/images.npy"]),
    (lambda tree: set_param(tree, "train", "lr", 0.5), ["params.yaml: train.lr"]),
    (lambda tree: set_param(tree, "train", "augment", {"flip": True}), ["params.yaml: train.augment"]),
    (lambda tree: set_param(tree, "model", "new", 1), ["params.yaml: model.new"]),
    (append("src/figures.py"), []),
    (append("stages/plot.py"), []),
    (append("data/index.csv"), []),
    (append("params.yaml"), []),
    (lambda tree: set_param(tree, "plot", "examples", 9), []),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_change_to_what_the_stage_is_made_of_is_named_and_no_other(
    tree: Path, change: Callable[[Path], None], named: list[str]
) -> None:
    sources = Sources("train")
    assert sources.changed() == []
    change(tree)
    assert sources.changed() == named


@pytest.mark.parametrize("content", ["train: [", "train: 3", ""])
def test_params_that_cannot_be_read_any_more_have_changed(tree: Path, content: str) -> None:
    sources = Sources("split")
    (tree / "params.yaml").write_text(content)
    assert "params.yaml: split.seed" in sources.changed()


def test_an_edit_between_import_and_start_is_noticed(tree: Path) -> None:
    append("src/batches.py")(tree)
    assert Sources("train").changed() == ["src/batches.py"]


def test_an_edit_that_is_taken_back_is_none(tree: Path) -> None:
    sources, text = Sources("train"), (tree / "src/batches.py").read_bytes()
    append("src/batches.py")(tree)
    (tree / "src/batches.py").write_bytes(text)
    assert sources.changed() == []


def test_the_inputs_are_all_that_dvc_yaml_names_with_the_code_that_was_imported(tree: Path) -> None:
    before = inputs_of("train")
    deps = yaml12.read(tree / "dvc.yaml")["stages"]["train"]["deps"]
    deps.remove("${model.weights}")  # the user's own, of which the model's card has the hash
    assert sorted(before) == sorted(deps)
    append("src/batches.py")(tree)
    assert inputs_of("train") == before
    append("data/split.csv")(tree)
    assert {name for name in deps if inputs_of("train")[name] != before[name]} == {"data/split.csv"}
