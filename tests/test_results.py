"""Recipes are whole; a run is recorded as it was, also when it was cut off; and the tables say what the records say."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from src import yaml12
from src.params import load_params
from src.runtime import PipelineError
from tests.helpers import ROOT, digits, idx, is_one_sentence, zip_of
from tests.project import Project, clone, stages_run
from tools import results, tables
from tools.results import Run, bring_up_to_date, code, plan, public, what_trains
from tools.tables import chart, page, read, short_table

RESULTS = (sys.executable, "-m", "tools.results")
NAME = "sample_digits_seed3_epochs=3"
AN_HOUR = 3600.0


# --- recipes ----------------------------------------------------------------------------------------------------------


def _keys(value: Any, above: str = "") -> set[str]:
    """All keys of params, dotted; those of prepare.classes are the names of folders."""
    if not isinstance(value, dict) or above == "prepare.classes.":
        return {above}
    return {key for name in value for key in _keys(value[name], f"{above}{name}.")}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_has_exactly_the_keys_of_params_yaml(recipe: Path) -> None:
    load_params(recipe)
    params, default = (yaml12.read(path) for path in (recipe, ROOT / "params.yaml"))
    assert _keys(params) == _keys(default)


def test_the_sample_is_the_default() -> None:
    assert (ROOT / "recipes/sample.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


# --- what is committed ------------------------------------------------------------------------------------------------


def test_the_committed_page_and_chart_are_what_write_makes_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = read()
    assert tables.PAGE.read_text(encoding="utf-8") == page(runs)
    assert (tables.CHART.read_bytes() if tables.CHART.exists() else None) == chart(runs)
    readme = Path("README.md").read_text(encoding="utf-8")
    begin, end = tables.MARKS
    assert begin not in readme or f"{begin}\n{short_table(runs)}\n{end}" in readme


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value


def paths_in(record: dict[str, Any]) -> list[str]:
    """The texts of a record that hold an absolute path: a / that begins a word, a value or a quotation."""
    return [text for text in _strings(record) if re.search(r"(^|[\s='\"])[~/]", text)]


def test_no_record_holds_a_path_of_a_machine() -> None:
    records = {file.name: json.loads(file.read_text("utf-8")) for file in (ROOT / "docs/results").glob("*.json")}
    assert {name: paths_in(record) for name, record in records.items() if paths_in(record)} == {}


# --- what to run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(
    ("data", "label", "words", "name"),
    [
        ("digits", None, "", "sample_digits_seed0"),
        (
            "digits",
            None,
            "download.source=folder prepare.image_size=32 split.validation=0.2 train.seed=1",
            "sample_digits_seed1",
        ),
        ("digits", None, "split.seed=2", "sample_digits_split2"),
        ("digits", None, "split.seed=2 train.seed=3 train.threads=1", "sample_digits_seed3_split2"),
        ("digits", None, "train.lr=1.0e-2 model.dropout=0.5", "sample_digits_seed0_lr=1.0e-2_model.dropout=0.5"),
        ("digits", "no-dropout", "model.dropout=0.0", "sample_digits_seed0_no-dropout"),
        ("digits", "", "model.dropout=0.0", "sample_digits_seed0"),
    ],
)
def test_a_run_is_named_by_recipe_data_seeds_and_what_else_matters(
    data: str, label: str | None, words: str, name: str
) -> None:
    assert plan("sample", data, label, words.split()).name == name


@pytest.mark.usefixtures("at_home")
def test_an_override_is_read_as_params_yaml_is_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = plan("sample", "x", None, ["train.epochs=7", "prepare.classes={a: b, c: null}"]).params
    assert params["train"]["epochs"] == 7
    assert params["prepare"]["classes"] == {"a": "b", "c": None}
    deep: dict[str, Any] = {"train": {"augment": {"mixup": 0.2}}}
    assert results.override(deep, "train.augment.mixup", "0.0", Path("some.yaml")) == 0.0
    assert deep == {"train": {"augment": {"mixup": 0.0}}}
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    download: dict[str, Any] = {"download": {"path": ""}}
    assert results.override(download, "download.path", "./images", Path("some.yaml")) == str(tmp_path / "images")


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train.epoch=1"], "-S train.epoch=1: recipes/sample.yaml has no train.epoch"),
        (["train.lr.deep=1"], "recipes/sample.yaml has no train.lr.deep"),
        (["epochs=1"], "recipes/sample.yaml has no epochs"),
        (["train.lr=fast"], "train.lr is 'fast' (str)"),
        (["train.epochs=0"], "train.epochs is 0"),
        (["train.epochs"], "expected KEY=VALUE"),
        (["prepare.classes={"], "'{' is not valid YAML"),
    ],
)
def test_an_override_that_does_not_fit_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(sentence)):
        plan("sample", "x", None, words)


@pytest.mark.usefixtures("at_home")
def test_an_unknown_recipe_and_a_name_that_is_no_name_are_one_sentence() -> None:
    with pytest.raises(PipelineError, match=r"recipes/never.yaml is missing; known are .*sample"):
        plan("never", "x", None, [])
    with pytest.raises(PipelineError, match=r"'\.\./x' becomes a part of a file's name"):
        plan("sample", "../x", None, [])


# --- the run ----------------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A run that was killed in the middle of its training and went on."""

    project: Project
    archive: Path
    command: tuple[str, ...]
    before: float
    output: str
    seconds: float

    @property
    def record(self) -> dict[str, Any]:
        return self.project.json(f"docs/results/{NAME}.json")


def _clock(project: Project) -> dict[str, Any]:
    return project.json(f".resume/runs/{NAME}/clock.json")


def _wait(child: subprocess.Popen[str], for_what: Callable[[], bool]) -> None:
    while not for_what():
        assert child.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Three epochs on a zip of real digits, killed with DVC after the first; an hour is put on its clock before it goes
    on, so that nobody takes the sum for one of its parts."""
    folder = tmp_path_factory.mktemp("recorded")
    images, labels = digits()
    files = [("images-idx3-ubyte", idx(images)), ("labels-idx1-ubyte", idx(labels))]
    archive = zip_of(folder / "archives/digits.zip", files)
    project = clone(folder / "project")
    overrides = ("download.source=folder", f"download.path={archive}", "train.seed=3", "train.epochs=3")
    command = (*RESULTS, "run", "sample", "--data", "digits", "-S", *overrides, "train.threads=1")
    child = subprocess.Popen(
        command, cwd=project.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    checkpoints = project.folder / f".resume/runs/{NAME}/clone/.resume/checkpoints"
    _wait(child, lambda: any(checkpoints.glob("*/000001-*.json")))
    dvc = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])
    child.kill()
    child.wait()
    os.killpg(dvc, signal.SIGKILL)
    while _is_there(dvc):
        time.sleep(0.02)
    assert not (project.folder / f"docs/results/{NAME}.json").exists()

    clock = _clock(project)
    assert clock["train"] > 0
    clock["train"] += AN_HOUR
    (project.folder / f".resume/runs/{NAME}/clock.json").write_text(json.dumps(clock), encoding="utf-8")
    start = time.monotonic()
    output = project.run(*command)
    return Recorded(project, archive, command, clock["train"], output, time.monotonic() - start)


def _is_there(group: int) -> bool:
    """Tell whether a process group has any member; DVC (3.67) heeds also the lock of one that nobody has reaped yet."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_that_was_killed_goes_on_and_its_minutes_are_the_sum(recorded: Recorded) -> None:
    assert stages_run(recorded.output) == ["train", "evaluate", "plot"]
    assert "going on after epoch" in recorded.output
    seconds = 60 * recorded.record["minutes"]
    assert recorded.before + 0.5 < seconds < recorded.before + recorded.seconds
    assert seconds < 60 * recorded.record["total_minutes"] < recorded.before + recorded.seconds + 60


def test_the_record_holds_what_the_pipeline_found(recorded: Recorded) -> None:
    record, made = recorded.record, Project(recorded.project.folder / f".resume/runs/{NAME}/clone")
    test, trained = made.json("metrics/evaluation.json"), made.json("metrics/train/metrics.json")
    assert record["test_accuracy"] == test["accuracy"]
    assert record["macro_f1"] == test["macro_f1"]
    assert (record["test_images"], record["train_images"]) == (test["images"], trained["train_images"])
    assert record["validation_accuracy"] == trained["best_validation_accuracy"]
    assert (record["epochs"], record["best_epoch"]) == (3, trained["best_epoch"])
    assert (record["recipe"], record["data"], record["label"]) == ("sample", "digits", "epochs=3")
    assert (record["seed"], record["split_seed"], record["parameters"]) == (3, 0, 225_034)
    assert record["machine"] | {"threads": 1, "cores": os.cpu_count(), "device": "cpu"} == record["machine"]
    assert record["code"] == code(made.folder)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    text = recorded.project.bytes(f"docs/results/{NAME}.json").decode()
    assert text == json.dumps(record, indent=2, sort_keys=True) + "\n"


def test_the_record_tells_the_data_by_name_and_hash_and_never_by_a_path(recorded: Recorded) -> None:
    record = recorded.record
    assert paths_in(record) == []
    assert record["data_sha256"] == record["files_sha256"]["download.path"] == results.hash_file(recorded.archive)
    given = [word.replace(str(recorded.archive), "<path of digits.zip>") for word in recorded.command[1:]]
    assert shlex.split(record["command"]) == ["python", *given]
    assert record["overrides"]["download.path"] == record["params"]["download"]["path"] == "<path of digits.zip>"


def test_the_data_are_in_the_clone_once(recorded: Recorded) -> None:
    images = recorded.project.folder / f".resume/runs/{NAME}/clone/data/images.npy"
    assert images.stat().st_nlink == 2  # in the workspace and in DVC's cache


def test_a_run_that_is_recorded_already_is_not_made_again(recorded: Recorded) -> None:
    before = recorded.project.bytes(f"docs/results/{NAME}.json")
    output = recorded.project.run(*recorded.command)
    assert (
        output == f"results: docs/results/{NAME}.json is of this code and these params already; --again makes it anew\n"
    )
    assert recorded.project.bytes(f"docs/results/{NAME}.json") == before


def test_a_record_is_not_overwritten_by_another_run_of_its_name(recorded: Recorded) -> None:
    output = recorded.project.run(*recorded.command, "plot.examples=9", code=1)
    assert is_one_sentence("results", 1, output, f"docs/results/{NAME}.json has other overrides", "--label")


def test_a_pipeline_that_fails_leaves_no_record(recorded: Recorded) -> None:
    gone = ("-S", "download.source=folder", "download.path=/never/was.zip")
    output = recorded.project.run(*RESULTS, "run", "sample", "--data", "gone", *gone, code=1)
    assert output.splitlines()[-1].startswith("results: sample_gone_seed0 failed, for the reason above")
    assert not (recorded.project.folder / "docs/results/sample_gone_seed0.json").exists()


def test_write_makes_the_page_of_the_records_and_tells_where_the_readme_has_no_place(recorded: Recorded) -> None:
    project, begin, end = recorded.project, *tables.MARKS
    text = project.bytes("README.md").decode()
    without = text.replace(begin, "").replace(end, "")
    (project.folder / "README.md").write_text(without, encoding="utf-8")
    assert "README.md has no <!-- results -->" in project.run(*RESULTS, "write")
    assert project.bytes("README.md").decode() == without
    first = project.bytes("docs/results.md")
    assert f"[{NAME}](results/{NAME}.json)" in first.decode()
    (project.folder / "README.md").write_text(f"above\n{begin}\nold\n{end}\nbelow\n", encoding="utf-8")
    assert project.run(*RESULTS, "write") == ""
    assert project.bytes("README.md").decode().startswith(f"above\n{begin}\n| recipe | data |")
    assert project.bytes("README.md").decode().endswith(f" |\n{end}\nbelow\n")
    assert project.bytes("docs/results.md") == first


def test_an_interrupted_run_ends_its_stage(recorded: Recorded, tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/stage; exec sleep 100\n")
    shell.chmod(0o755)
    command = (*RESULTS, "run", "sample", "--data", "interrupted")
    environment = {**os.environ, "SHELL": str(shell)}
    child = subprocess.Popen(
        command,
        cwd=recorded.project.folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    _wait(child, (tmp_path / "stage").exists)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 1
    assert errors.splitlines()[-1].startswith("results: interrupted")
    assert not Path("/proc", (tmp_path / "stage").read_text().strip()).exists()


# --- the clone --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run in a fresh clone of the project, which is the current folder, and whose own clone is made."""
    monkeypatch.chdir(clone(tmp_path / "project").folder)
    run = plan("sample", "digits", None, ["train.epochs=1"])
    bring_up_to_date(run)
    return run


def test_the_clone_is_the_project_as_it_stands_with_the_params_of_the_run_and_none_of_its_results(run: Run) -> None:
    assert yaml12.read(run.clone / "params.yaml") == run.params
    assert (run.clone / "src/params.py").read_bytes() == Path("src/params.py").read_bytes()
    assert not (run.clone / "metrics").exists()
    assert not (run.clone / "dvc.lock").exists()
    assert Project(run.clone).git("status", "--short") == ""


def test_a_later_call_brings_the_clone_up_to_date_and_keeps_what_was_made_there(run: Run) -> None:
    kept = [run.clone / name for name in ("dvc.lock", "metrics/test.json", "data/images.npy", ".resume/checkpoints/a")]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("made here", encoding="utf-8")
    Path("src/new.py").write_text("new\n", encoding="utf-8")
    Path("src/figures.py").unlink()
    Path("stages/plot.py").write_text("changed\n", encoding="utf-8")
    bring_up_to_date(run)
    assert (run.clone / "src/new.py").read_text(encoding="utf-8") == "new\n"
    assert (run.clone / "stages/plot.py").read_text(encoding="utf-8") == "changed\n"
    assert not (run.clone / "src/figures.py").exists()
    assert [file.read_text(encoding="utf-8") for file in kept] == ["made here"] * 4


def test_the_hash_of_the_code_is_of_what_the_pipeline_is_made_of(run: Run) -> None:
    first = code(Path())
    assert code(run.clone) == first
    Path("README.md").write_text("changed", encoding="utf-8")
    Path("src/__pycache__").mkdir()
    Path("src/__pycache__/x.pyc").write_text("", encoding="utf-8")
    assert code(Path()) == first
    Path("src/report.html.j2").rename("src/report2.html.j2")
    second = code(Path())
    Path("stages/plot.py").write_text("changed\n", encoding="utf-8")
    assert len({first, second, code(Path())}) == 3


def test_the_clock_begins_anew_with_the_training_and_only_then(run: Run) -> None:
    for name in ("data/images.npy", "data/split.csv"):
        (run.clone / name).parent.mkdir(exist_ok=True)
        (run.clone / name).write_text("some", encoding="utf-8")
    first = what_trains(run.clone)
    (run.clone / "src/figures.py").write_text("", encoding="utf-8")
    assert what_trains(run.clone) == first
    (run.clone / "data/split.csv").write_text("other", encoding="utf-8")
    second = what_trains(run.clone)
    (run.clone / "src/training.py").write_text("", encoding="utf-8")
    third = what_trains(run.clone)
    changed = plan("sample", "x", None, ["train.lr=0.5"]).params
    (run.clone / "params.yaml").write_text(yaml12.dump(changed), encoding="utf-8")
    assert len({first, second, third, what_trains(run.clone)}) == 4


def test_again_forgets_record_and_clone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_left(run: Run) -> None:
        assert not run.folder.exists()
        assert not run.file.exists()
        raise PipelineError("far enough")

    run.file.parent.mkdir(parents=True, exist_ok=True)
    run.file.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(results, "bring_up_to_date", nothing_is_left)
    with pytest.raises(PipelineError, match="far enough"):
        results.record(run, again=True)


# --- the tables -------------------------------------------------------------------------------------------------------


def a_run(recipe: str, accuracy: float, seed: int = 0, label: str = "", **values: Any) -> dict[str, Any]:
    """A record as `read` gives it."""
    name = f"{recipe}_animals64_seed{seed}{label and '_'}{label}"
    figures = ("accuracy_low", "accuracy_high", "validation_accuracy", "macro_precision", "macro_recall", "macro_f1")
    record: dict[str, Any] = dict.fromkeys(figures, accuracy) | dict.fromkeys(("split_seed", "best_epoch"), 1)
    record |= {"recipe": recipe, "data": "animals64", "label": label, "seed": seed, "name": name}
    record |= {"test_accuracy": accuracy, "test_images": 2_000, "parameters": 1_234_567, "epochs": 40, "minutes": 30.0}
    record |= {"train_images": 6_000}
    record |= {"machine": {"cpu": "a CPU", "gpu": None, "cores": 2, "threads": 2, "isa": "AVX2"}, "date": "2026-11-22"}
    return record | {"total_minutes": 31.0, "code": "0123456789", "command": "python -m …"} | values


def row(text: str, *begin: str) -> list[str]:
    """The one row of a table that begins with these cells."""
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(begin)} |")]
    return [cell.strip() for cell in found.strip("| ").split(" | ")]


def test_a_recipe_is_the_mean_and_the_standard_deviation_of_the_sample_beside_its_tutorial() -> None:
    runs = [a_run("animals10", accuracy, seed, minutes=10.0 * seed) for seed, accuracy in enumerate((0.8, 0.81, 0.85))]
    cells = row(page(runs), "animals10", "animals64")
    assert cells[2] == "82.00 ± 2.65 % (n = 3)"  # sqrt((2² + 1² + 3²) / 2)
    assert cells[3] == "75 % after 50 epochs, 78 % after 100; 2,232,554 parameters"
    assert cells[4:] == ["1,234,567", "40", "10.0", "a CPU, 2 cores, 2 threads, AVX2", "`python -m …`"]
    assert row(short_table(runs), "animals10", "animals64") == cells[:4]


def test_one_run_has_no_deviation_and_says_so() -> None:
    assert row(page([a_run("sample", 0.5)]), "sample", "animals64")[2:4] == ["50.00 % (n = 1)", "—"]


def test_a_run_with_a_label_is_no_run_of_the_recipe_itself() -> None:
    runs = [a_run("animals10", 0.8), a_run("animals10", 0.2, label="short"), a_run("animals10", 0.1, label="epochs=1")]
    assert row(page(runs), "animals10", "animals64")[2] == "80.00 % (n = 1)"
    assert len(re.findall(r"^\| \[animals10", page(runs), re.MULTILINE)) == 3


def test_only_cats_and_dogs_have_precision_recall_and_f1() -> None:
    assert "## Dogs vs cats" not in page([a_run("animals10", 0.8)])
    text = page([a_run("dogs-vs-cats", 0.8, macro_precision=0.7, macro_recall=0.6, macro_f1=0.65)])
    rows = [line for line in text.splitlines() if line.startswith("| dogs-vs-cats | animals64")]
    assert rows[1] == "| dogs-vs-cats | animals64 | 70.00 % (n = 1) | 60.00 % (n = 1) | 65.00 % (n = 1) |"


def test_a_part_is_compared_with_the_short_runs_of_the_whole_and_their_noise() -> None:
    runs = [a_run("animals10", accuracy, seed, "short") for seed, accuracy in enumerate((0.79, 0.80, 0.81))]
    runs += [
        a_run("animals10", 0.99),
        a_run("animals10", 0.785, label="short-no-flip", validation_accuracy=0.82),
        a_run("animals10", 0.775, label="short-no-mixup", validation_accuracy=0.825, minutes=31.0),
    ]
    size = "40 epochs of 6,000 training images, 30 to 31 minutes a run; a CPU, 2 cores, 2 threads, AVX2."
    assert f"### animals10 on animals64\n\n{size}\n" in page(runs)
    assert row(page(runs), "the whole")[1::2] == ["80.00 ± 1.00 % (n = 3)"] * 2
    flip, mixup = row(page(runs), "no-flip"), row(page(runs), "no-mixup")
    assert flip[2::2] == ["−1.50, within the noise", "+2.00, within the noise"]
    assert mixup[2::2] == ["−2.50", "+2.50"]


def test_a_part_that_is_taken_from_the_full_length_is_compared_with_the_recipes_own_runs() -> None:
    runs = [a_run("animals10", accuracy, seed) for seed, accuracy in enumerate((0.84, 0.85, 0.86))]
    text = page([*runs, a_run("animals10", 0.82, label="long-no-mixing"), a_run("animals10", 0.5, label="short")])
    full = text.partition("## The same at full length")[2].partition("## Every run")[0]
    assert row(full, "the whole")[1] == "85.00 ± 1.00 % (n = 3)"
    assert row(full, "no-mixing")[1:3] == ["82.00 % (n = 1)", "−3.00"]
    assert "50.00" not in full
    assert "## The same at full length" not in page(runs)


def test_a_label_that_only_begins_like_a_part_is_none() -> None:
    text = page(
        [a_run("animals10", 0.85), a_run("animals10", 0.8, label="shorter"), a_run("mnist", 0.9, label="longer")]
    )
    assert "## What each part gives" not in text
    assert "## The same at full length" not in text


def test_where_the_noise_is_not_known_nothing_is_said_of_it() -> None:
    runs = [a_run("animals10", 0.8, label="short"), a_run("animals10", 0.7, label="short-no-flip")]
    assert row(page(runs), "no-flip")[2] == "−10.00, noise not known"
    assert row(page(runs[1:]), "no-flip")[2] == "—"


def test_the_order_of_the_files_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("docs/results")
    folder.mkdir(parents=True)
    for run in [a_run("animals10", 0.8, seed) for seed in (10, 2, 1)] + [a_run("animals10", 0.7, 0, "short")]:
        (folder / f"{run['name']}.json").write_text(json.dumps(run), encoding="utf-8")
    assert [(run["label"], run["seed"]) for run in read()] == [("", 1), ("", 2), ("", 10), ("short", 0)]


def test_the_chart_has_the_same_bytes_each_time_and_is_none_without_a_run() -> None:
    runs = [a_run("animals10", 0.8), a_run("animals10", 0.82, 1), a_run("sample", 0.9)]
    assert chart(runs) == chart(runs)
    assert "date" not in str(chart(runs))
    assert chart([]) is None


def test_the_chart_tells_the_mean_and_bears_a_run_without_an_error() -> None:
    drawn = chart([a_run("animals10", 0.8), a_run("animals10", 0.83, 1), a_run("sample", 1.0)])
    assert drawn is not None
    for words in (b"81.50 %", b"100.00 %", b"animals10 on animals64"):
        assert words in drawn
    assert len(re.findall(rb'<use [^>]*style="fill: #0072b2', drawn)) == 3, "a dot a run"


def test_a_path_is_reduced_to_its_name_wherever_it_is() -> None:
    assert public({"a": {"b": "/home/me/x.zip"}, "c": "data/inbox", "d": 1}) == {
        "a": {"b": "<path of x.zip>"},
        "c": "data/inbox",
        "d": 1,
    }
