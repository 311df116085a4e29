"""A changed param or dependency is a changed result: no change has the same key in DVC's run cache as what it was."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from dvc.stage.cache import _get_stage_hash
from dvc_data.hashfile.meta import Meta

from src import yaml12
from tests.helpers import ROOT

IGNORED = {Meta.PARAM_SIZE, Meta.PARAM_NFILES}
"""Keys that DVC 3.67 leaves out of the run cache's keys, at any depth (`_get_cache_hash`; iterative/dvc#10296)."""


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repo]:
    """The pipeline as DVC loads it, with small stand-ins for the data."""
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with Repo.init(no_scm=True) as repo:
        for path in {Path(dep.fs_path) for stage in repo.index.stages for dep in stage.deps}:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(path.name)
        yield repo


def keys(repo: Repo, file: str = "") -> dict[str, str]:
    """The key of each stage in the run cache, by DVC's own function, after a change of one file or of any."""
    for stage in repo.index.stages:
        for dep in stage.deps:
            if not file or Path(dep.fs_path) == Path(file).absolute():
                dep.save()
    return {stage.name: _get_stage_hash(stage) for stage in repo.index.stages}


def changed(former: dict[str, str], now: dict[str, str]) -> set[str]:
    return {stage for stage in former if former[stage] != now[stage]}


def leaves(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """The way to each value that holds no other one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from (leaf for key, one in inner for leaf in leaves(one, *path, key))
    if not inner or not value:
        yield path


def with_another(params: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    """The params with one leaf changed."""
    params = deepcopy(params)
    section: Any = params
    for key in path[:-1]:
        section = section[key]
    value = section[path[-1]]
    if isinstance(value, bool):
        value = not value
    elif isinstance(value, dict | list):  # an empty one
        value = {"new": "one"} if isinstance(value, dict) else [1]
    else:
        value = f"another {value}" if value is None or isinstance(value, str) else value + 1
    section[path[-1]] = value
    return params


def misjudged(repo: Repo, params: dict[str, Any], section: str = "") -> list[str]:
    """The leaves of which a change does not change the keys of just those stages that name their section."""
    users = {section: {stage.name for stage in repo.index.stages if section in _sections(stage)} for section in params}
    file, wrong = Path("params.yaml"), list[str]()
    file.write_text(yaml12.dump(params), encoding="utf-8")
    former = keys(repo)
    for path in leaves(params):
        if section not in ("", path[0]):
            continue
        file.write_text(yaml12.dump(with_another(params, path)), encoding="utf-8")
        if changed(former, keys(repo, "params.yaml")) != users[str(path[0])]:
            wrong.append(".".join(map(str, path)))
    return wrong


def _sections(stage: Any) -> set[str]:
    return {name for dep in stage.deps if isinstance(dep, ParamsDependency) for name in dep.params}


def test_a_change_of_any_param_changes_the_key_of_every_stage_that_uses_it_and_of_no_other(repo: Repo) -> None:
    params = yaml12.read(ROOT / "params.yaml")
    params["prepare"]["classes"] = {"cane": "dog", "sfondo": None}
    params["model"]["head"] = [512, 64]
    assert len(list(leaves(params))) > 60
    assert misjudged(repo, params) == []


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_a_name_that_dvc_leaves_out_is_found(repo: Repo, name: str) -> None:
    params = yaml12.read(ROOT / "params.yaml")
    params["prepare"] = {name: params["prepare"]["image_size"], "classes": {"a": "b", name: "c"}}
    assert misjudged(repo, params, "prepare") == [f"prepare.{name}", f"prepare.classes.{name}"]


def test_a_change_of_any_dependency_changes_the_key_of_every_stage_that_has_it_and_of_no_other(repo: Repo) -> None:
    users: dict[Path, set[str]] = {}
    for stage in repo.index.stages:
        for dep in stage.deps:
            if not isinstance(dep, ParamsDependency):
                users.setdefault(Path(dep.fs_path), set()).add(stage.name)
    former = keys(repo)
    for path, stages in users.items():
        path.write_bytes(path.read_bytes() + b"\n")
        now = keys(repo, str(path))
        assert changed(former, now) == stages, path
        former = now


def test_no_param_dependency_or_output_has_a_name_that_dvc_leaves_out(repo: Repo) -> None:
    for file in [ROOT / "params.yaml", *(ROOT / "recipes").glob("*.yaml")]:
        assert not {key for path in leaves(yaml12.read(file)) for key in path} & IGNORED, file
    paths = {Path(entry.fs_path) for stage in repo.index.stages for entry in (*stage.deps, *stage.outs)}
    assert not {part for path in paths for part in path.parts} & IGNORED
