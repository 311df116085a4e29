"""A search runs DVC experiments, goes on after any kill as if there was none, and shows the best among the others."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import psutil
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from src import yaml12
from src.runtime import PipelineError
from tests.helpers import ROOT, is_one_sentence
from tests.project import Project, clone
from tools.search import read_space, suggest

SEARCH = (sys.executable, "-m", "tools.search", "space.yaml")
SPACE = {
    "train.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True},
    "train.batch": {"choices": [32, 64]},
    "evaluate.batch": 256,
}

# In place of the six stages, one that is fast, reads the params as they do, and can be held.
DVC_YAML = """
stages:
  train:
    cmd: python -m stages.train
    deps: [stages/train.py]
    params: [model, train, evaluate]
    metrics: [metrics/test.json: {cache: false}]
"""
STAGE = """
import json, os, time
from pathlib import Path
from src.params import load_params
from src.runtime import in_one_sentence

home = Path(os.environ["DVC_ROOT"], ".resume")
with in_one_sentence():
    params = load_params()
    with (home / "ran").open("a") as file:
        file.write(f"{params.train.lr} {params.train.batch} {params.evaluate.batch}\\n")
    while (home / "hold").exists():
        time.sleep(0.02)
    Path("metrics/train").mkdir(parents=True, exist_ok=True)
    value = 1 - abs(params.train.lr - 0.002) - params.train.batch / 1000
    Path("metrics/test.json").write_text(json.dumps({"val_acc": value}))
"""


def miniature(folder: Path) -> Project:
    """A clone with that stage alone, and a space; nothing of it is untracked but the space."""
    project = clone(folder)
    project.git("rm", "--quiet", "-r", "--ignore-unmatch", "dvc.lock", "metrics", "plots", "stages")
    (folder / "stages").mkdir()
    for name, text in (("dvc.yaml", DVC_YAML), ("stages/train.py", STAGE)):
        (folder / name).write_text(text, encoding="utf-8")
    project.commit()
    write_space(project, SPACE)
    (folder / ".resume").mkdir()
    return project


def write_space(project: Project, space: object) -> None:
    (project.folder / "space.yaml").write_text(yaml12.dump(space), encoding="utf-8")


def ran(project: Project) -> list[str]:
    """The params of each run of the stage, which the run cache saves where it can."""
    file = project.folder / ".resume/ran"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def told(output: str) -> list[list[str]]:
    """The line of each trial: number, value, params and what became of it; without the seconds that it took."""
    lines = output.partition("\nthe best of")[0].splitlines()
    return [[word for word in line.split("  ") if not word.endswith(" s")] for line in lines if line[:6] == "space-"]


def start(project: Project, *words: str) -> "subprocess.Popen[str]":
    """Start a search whose first run of the stage is held, and wait until it is there."""
    (project.folder / ".resume/hold").touch()
    before = len(ran(project))
    child = subprocess.Popen(
        [*SEARCH, *words], cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(ran(project)) == before:
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    return child


def kill(child: "subprocess.Popen[Any]") -> None:
    """Kill a search and its DVC, as a machine does that loses its power."""
    (dvc,) = psutil.Process(child.pid).children()
    child.kill()
    os.killpg(dvc.pid, signal.SIGKILL)
    child.communicate()


def release(project: Project) -> None:
    (project.folder / ".resume/hold").unlink()


class Searched(NamedTuple):
    """A search's project, and what it printed."""

    project: Project
    output: str

    def copy(self, folder: Path) -> Project:
        """Copy the project for a test that changes it."""
        shutil.copytree(self.project.folder, folder, symlinks=True)
        return Project(folder)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search of two trials that nothing stopped, in a working tree with a change."""
    project = miniature(tmp_path_factory.mktemp("straight"))
    project.set(model__dropout=0.25)
    return Searched(project, project.run(*SEARCH, "--trials", "2"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Searched, str]:
    """The same search, killed in its second trial, interrupted there, and gone on with; and what that said."""
    project = miniature(tmp_path_factory.mktemp("stopped"))
    project.set(model__dropout=0.25)
    project.run(*SEARCH, "--trials", "1")
    child = start(project, "--trials", "2")
    kill(child)
    assert "Running" in project.dvc("exp", "show")
    child = start(project, "--trials", "2")
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 1
    release(project)
    return Searched(project, project.run(*SEARCH, "--trials", "2")), errors


# --- the experiments --------------------------------------------------------------------------------------------------


def test_each_trial_is_an_experiment_whose_params_are_those_it_tells(straight: Searched) -> None:
    shown = json.loads(straight.project.dvc("exp", "show", "--json"))[1]["experiments"]
    revs = {entry["name"]: entry["revs"][0]["data"] for entry in shown}
    lines = told(straight.output)
    assert [line[0] for line in lines] == ["space-0", "space-1"] == sorted(revs)
    for name, value, batch, lr in lines:
        params = revs[name]["params"]["params.yaml"]["data"]
        metrics = revs[name]["metrics"]["metrics/test.json"]["data"]
        assert f"{metrics['val_acc']:.4f}" == value
        assert [f"train.batch={params['train']['batch']}", f"train.lr={params['train']['lr']:.4g}"] == [batch, lr]


def test_what_the_space_fixes_and_what_is_not_committed_reaches_each_trial(straight: Searched) -> None:
    assert [line.split()[2] for line in ran(straight.project)] == ["256"] * 2
    ref = straight.project.git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/space-0").strip()
    assert yaml12.parse(straight.project.git("show", f"{ref}:params.yaml"))["model"]["dropout"] == 0.25


def test_the_workspace_is_left_alone(straight: Searched) -> None:
    assert straight.project.git("status", "--short").splitlines() == [" M params.yaml", "?? space.yaml"]
    assert "batch: 256" not in straight.project.bytes("params.yaml").decode()


def test_the_best_are_told_with_commands_that_work(straight: Searched, tmp_path: Path) -> None:
    best = sorted(told(straight.output), key=lambda line: line[1], reverse=True)
    table, _, commands = straight.output.partition("the best of 2 by ")[2].partition("\nnext:\n")
    assert [line.split()[:2] for line in table.splitlines()[1:3]] == [line[:2] for line in best]
    show, diff, apply = commands.splitlines()
    assert apply == f"  dvc exp apply {best[0][0]}"
    project = straight.copy(tmp_path / "copy")
    rows = [line.split() for line in project.run("sh", "-c", show).splitlines() if "[space-" in line]
    assert [row[2].strip("[]") for row in rows] == [line[0] for line in best]
    assert "train.lr" in project.run("sh", "-c", diff)
    project.run("sh", "-c", apply)
    assert f"{project.json('metrics/test.json')['val_acc']:.4f}" == best[0][1]


# --- stopped ----------------------------------------------------------------------------------------------------------


def test_a_search_that_was_stopped_comes_to_the_same_trials(straight: Searched, stopped: tuple[Searched, str]) -> None:
    assert told(stopped[0].output) == told(straight.output)
    assert stopped[0].output.partition("\nnext:")[2] == straight.output.partition("\nnext:")[2]


def test_only_the_trial_that_was_stopped_runs_again_with_the_same_params(
    straight: Searched, stopped: tuple[Searched, str]
) -> None:
    first, second = ran(straight.project)
    assert ran(stopped[0].project) == [first, second, second, second]


def test_an_interrupted_search_says_so_and_ends_its_trial(stopped: tuple[Searched, str]) -> None:
    assert stopped[1].splitlines()[-1].startswith("search: interrupted; nothing was half-written, run the same command")


def test_nothing_of_a_killed_trial_is_left(stopped: tuple[Searched, str]) -> None:
    assert "Running" not in stopped[0].project.dvc("exp", "show")
    assert list((stopped[0].project.folder / ".dvc/tmp/exps/standalone").glob("tmp*")) == []


def test_a_search_that_has_its_trials_repeats_none(straight: Searched) -> None:
    before = ran(straight.project)
    assert told(straight.project.run(*SEARCH, "--trials", "2")) == told(straight.output)
    assert ran(straight.project) == before


def test_a_search_that_was_killed_alone_is_waited_for(tmp_path: Path) -> None:
    project = miniature(tmp_path)
    child = start(project, "--trials", "1")
    child.kill()  # its DVC goes on
    second = subprocess.Popen(
        [*SEARCH, "--trials", "1"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert second.stderr is not None
    assert second.stderr.readline() == ("search: another process still runs the search space; waiting for it to end\n")
    time.sleep(3)
    assert len(ran(project)) == 1
    release(project)
    output, errors = second.communicate(timeout=60)
    child.communicate()
    assert second.returncode == 0, errors
    assert len(told(output)) == 1
    assert len(ran(project)) == 1  # what the first one computed came out of the run cache
    assert "Stage 'train' is cached - skipping run" in errors


def test_a_search_whose_study_is_lost_finds_its_results_again(straight: Searched, tmp_path: Path) -> None:
    project = straight.copy(tmp_path / "copy")
    (project.folder / ".resume/search/space.db").unlink()
    assert told(project.run(*SEARCH, "--trials", "1")) == told(straight.output)[:1]
    assert ran(project) == ran(straight.project)


# --- failures and repetitions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A search of a space of three points, one of which the params refuse."""
    project = miniature(tmp_path_factory.mktemp("few"))
    write_space(project, {"model.dropout": {"choices": [0.0, 0.5, 1.0]}})
    return Searched(project, project.run(*SEARCH, "--trials", "4", "--seed", "3"))


def test_a_trial_that_is_refused_is_told_with_its_sentence_and_the_search_goes_on(few: Searched) -> None:
    lines = told(few.output)
    refused = [line for line in lines if line[2] == "model.dropout=1"]
    assert refused
    assert lines.index(refused[0]) < len(lines) - 1
    for line in refused:
        assert line[1] == "failed"
        assert line[3] == "train: params.yaml: model.dropout is 1.0 (float): input should be less than 1"


def test_params_that_were_tried_are_told_and_not_run_again(few: Searched) -> None:
    lines = [line for line in told(few.output) if line[1] != "failed"]
    first = {line[2]: line for line in reversed(lines)}
    assert len(ran(few.project)) == len(first) == 2
    again = [line for line in lines if line not in first.values()]
    assert again
    assert [line[1:] for line in again] == [
        [first[line[2]][1], line[2], f"the same as {first[line[2]][0]}"] for line in again
    ]
    best = few.output.partition("the best of 4")[2].partition("\nnext:")[0]
    assert best.count("space-") == 2


def test_three_failures_and_nothing_else_end_the_search_which_then_begins_anew(tmp_path: Path) -> None:
    project = miniature(tmp_path)
    code = """
import sys
from src.runtime import in_one_sentence
from tools import search
sys.argv = ["search", "space.yaml"]
search.run = lambda *_: (None, "the line is cut")
with in_one_sentence():
    search.main()"""
    for _ in range(2):
        output = project.run(sys.executable, "-c", code, code=1)
        assert [line[1] for line in told(output)] == ["failed"] * 3
        assert output.endswith("search: the first 3 trials failed, the last one with: the line is cut\n")


# --- another space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "space", "sentence"),
    [
        ((), SPACE | {"train.lr": {"low": 1.0e-4, "high": 1.0e-1, "log": True}}, "begun with another space"),
        ((), SPACE | {"evaluate.batch": 128}, "begun with another space"),
        (("--seed", "1"), SPACE, "begun with another seed"),
    ],
)
def test_a_space_or_seed_that_changed_asks_for_another_name(
    straight: Searched, words: tuple[str, ...], space: object, sentence: str
) -> None:
    write_space(straight.project, space)
    try:
        output = straight.project.run(*SEARCH, "--trials", "9", *words, code=1)
    finally:
        write_space(straight.project, SPACE)
    assert is_one_sentence("search", 1, output, f"the search space was {sentence}; use another --name")


def test_trials_of_another_pipeline_are_not_mixed_in(straight: Searched) -> None:
    straight.project.set(model__dropout=0.5, train__lr=0.5)  # of which the space names the second
    try:
        output = straight.project.run(*SEARCH, "--trials", "9", code=1)
    finally:
        straight.project.set(model__dropout=0.25, train__lr=1.0e-3)
    assert output.splitlines()[-1].startswith("search: model.dropout changed since the search space began")
    with (straight.project.folder / "stages/train.py").open("a") as file:
        file.write("# an edit")
    try:
        output = straight.project.run(*SEARCH, "--trials", "9", code=1)
    finally:
        straight.project.git("checkout", "--quiet", "stages/train.py")
    assert output.splitlines()[-1].startswith("search: stages/train.py changed since the search space began")


def test_an_experiment_that_is_not_the_searchs_is_never_replaced(straight: Searched) -> None:
    refs = straight.project.git("for-each-ref")
    output = straight.project.run(*SEARCH, "--trials", "1", "--seed", "1", "--name", "space", code=1, DVC_ROOT="other")
    assert is_one_sentence("search", 1, output, "space-0 is already an experiment with other params; `dvc exp remove")
    assert straight.project.git("for-each-ref") == refs


# --- what is suggested ------------------------------------------------------------------------------------------------

RANGES: dict[str, Any] = {
    "train.lr": FloatDistribution(1e-4, 1e-2, log=True),
    "train.batch": CategoricalDistribution([32, 64]),
}


def ended(number: int, params: dict[str, Any], sign: float = 1) -> optuna.trial.FrozenTrial:
    """A trial with a result that follows from its params; each fourth failed."""
    if number % 4 == 3:
        return create_trial(state=TrialState.FAIL, params=params, distributions=RANGES)
    return create_trial(params=params, distributions=RANGES, value=sign * params["train.lr"])


def walk(count: int, seed: int = 0, sign: float = 1) -> list[optuna.trial.FrozenTrial]:
    """The trials of a search."""
    trials: list[optuna.trial.FrozenTrial] = []
    for number in range(count):
        trials.append(ended(number, suggest(RANGES, trials, seed), sign))
    return trials


def lrs(trials: list[optuna.trial.FrozenTrial]) -> list[float]:
    return [trial.params["train.lr"] for trial in trials]


def test_a_suggestion_follows_from_the_seed_and_the_trials(tmp_path: Path) -> None:
    straight = walk(15)
    assert len(set(lrs(straight))) == 15
    assert set(lrs(walk(3, seed=1))) & set(lrs(straight)) == set()
    opposite = walk(15, sign=-1)
    assert lrs(opposite)[:10] == lrs(straight)[:10]  # which are random, to have something to learn from
    assert lrs(opposite)[14] < 1e-3 < lrs(straight)[14]  # each time where the results are better
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    study.add_trials(straight)
    read = study.trials  # as a search does that goes on
    assert [suggest(RANGES, read[:number], 0) for number in range(15)] == [trial.params for trial in straight]


# --- the file of ranges -----------------------------------------------------------------------------------------------


def test_the_example_is_a_space_of_the_default_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    space = read_space(Path("docs/search.yaml"))
    assert {"train.lr", "train.batch", "model.dropout"} <= set(space.ranges)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A way to read a space beside params of any depth."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("train: {lr: 1, augment: {shift: 2, ops: {}}}\nseed: 0\n", encoding="utf-8")

    def of(text: str) -> Any:
        Path("space.yaml").write_text(text, encoding="utf-8")
        return read_space(Path("space.yaml"))

    return of


def test_ranges_of_nested_params_are_whole_where_both_ends_are(read: Callable[[str], Any]) -> None:
    space = read(
        "train.augment.shift: {low: 0, high: 4}\ntrain.lr: {low: 0, high: 1.0}\n"
        "seed: {choices: [a, 1, true, null]}\ntrain.augment.ops: false\n"
    )
    assert space.ranges == {
        "seed": CategoricalDistribution(["a", 1, True, None]),
        "train.augment.shift": IntDistribution(0, 4),
        "train.lr": FloatDistribution(0, 1),
    }
    assert list(space.ranges) == sorted(space.ranges)  # as the sampler goes through them
    assert space.fixed == {"train.augment.ops": False}
    assert list(yaml12.flatten({"a": {"b": {"c": 1}, "d": {}}})) == ["a.b.c", "a.d"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.lrr: 1", "space.yaml: train.lrr is no param of params.yaml; near it is train.lr"),
        ("train: {lr: 1}", "train is no param of params.yaml; near it is train.lr"),
        ("1: 2", "1 is no param of params.yaml; near it is nothing"),
        ("train.lr: 1", "space.yaml has nothing to search"),
        ("- train.lr", "space.yaml is no mapping"),
        ("", "space.yaml is no mapping"),
        ("a: b: c", "space.yaml is not valid YAML"),
        ("train.lr: [1, 2]", "train.lr is [1, 2] (list), expected a number, a word, true or false"),
        ("train.lr: {low: 1}", "train.lr is {'low': 1}, expected {low: …, high: …, log: true or false} or {choices"),
        ("train.lr: {low: 1, high: 2, step: 1}", "train.lr is {'low': 1, 'high': 2, 'step': 1}, expected {low"),
        ("train.lr: {low: 1, high: 2, log: 1}", "train.lr is {'low': 1, 'high': 2, 'log': 1}, expected {low"),
        ("train.lr: {low: 1, choices: [2]}", "expected {low: …, high: …, log: true or false} or {choices: […]}"),
        ("train.lr: {choices: []}", "expected {low: …, high: …, log: true or false} or {choices: […]}"),
        ("train.lr: {choices: 3}", "expected {low: …, high: …, log: true or false} or {choices: […]}"),
        ("train.lr: {choices: [[1]]}", "train.lr.choices is [1] (list), expected a number"),
        ("train.lr: {low: 1e-4x, high: 1}", "train.lr.low is '1e-4x' (str), expected a number"),
        ("train.lr: {low: 0, high: true}", "train.lr.high is True (bool), expected a number\n"),
        ("train.lr: {low: 0, high: .inf}", "train.lr.high is inf (float), expected a number\n"),
        ("train.lr: .nan", "train.lr is nan, expected a number"),
        ("train.lr: {low: 2, high: 1}", "train.lr goes from 2 to 1, expected low <= high"),
        ("train.lr: {low: 0, high: 1, log: true}", "train.lr goes from 0 to 1, expected low <= high, and with log"),
    ],
)
def test_a_space_that_cannot_be_meant_is_one_sentence(read: Callable[[str], Any], text: str, words: str) -> None:
    with pytest.raises(PipelineError) as error:
        read(text)
    assert words in f"{error.value}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["never.yaml"], "never.yaml is missing in "),
        (["docs/search.yaml", "--name", "a/b"], "--name a/b: expected letters, digits, _ and -"),
        (["docs/search.yaml", "--trials", "0"], "--trials 0 --seed 0: expected at least 1 trial"),
        (["docs/search.yaml", "--seed", "-1"], "--trials 20 --seed -1: expected at least 1 trial"),
    ],
)
def test_words_that_cannot_be_meant_are_one_sentence(words: list[str], sentence: str) -> None:
    assert is_one_sentence("search", 1, Project(ROOT).run(*SEARCH[:-1], *words, code=1), sentence)


# --- the whole pipeline -----------------------------------------------------------------------------------------------


def test_in_a_fresh_clone_a_killed_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    project = clone(tmp_path)
    pipeline = yaml12.read(project.folder / "dvc.yaml")
    stages = {name: pipeline["stages"][name] for name in ("download", "prepare", "split", "train")}  # to be fast
    (tmp_path / "dvc.yaml").write_text(yaml12.dump({"stages": stages}), encoding="utf-8")
    write_space(project, {"train.lr": {"low": 1.0e-3, "high": 2.0e-3}, "train.epochs": 3, "train.threads": 1})
    command = [*SEARCH, "--trials", "1"]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".resume/checkpoints/*/000001-*.json")):
        assert child.poll() is None
        time.sleep(0.02)
    kill(child)
    output = project.run(*command)
    assert re.search("train: going on after epoch [12] of 3", output)
    (line,) = told(output)
    project.dvc("exp", "apply", "space-0")
    assert f"{project.json('metrics/test.json')['val_acc']:.4f}" == line[1]
    assert project.dvc("status").strip() == "Data and pipelines are up to date."
