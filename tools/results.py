"""Record runs of recipes, and write what they came to: `python -m tools.results run …` and `… write`.

`run` trains a recipe on some data in a clone of the project as it stands, and keeps its figures as one JSON file. The
clone outlives a run that was cut off, so that the same command goes on. `write` makes docs/results.md, its picture and
the README's short table of these files: no figure is ever typed.
"""

import filecmp
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import chdir, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from src import paths, yaml12
from src.params import load_params
from src.provenance import hash_file
from src.runtime import RESUME, Parser, PipelineError, alone, in_one_sentence, remove, say, whole
from tools.command import dvc, environment, git, running
from tools.tables import RESULTS, write
from tools.verify import LOCK

RECIPES, RUNS, PIPELINE = Path("recipes"), RESUME / "runs", Path("dvc.yaml")

DATA = ("download", "prepare", "split", "plot")
"""Sections whose overrides fit a recipe to data, which have a name of their own, or change no figure."""

ASIDE = {
    *("train.seed", "train.device", "train.precision", "train.compile", "train.threads", "train.portable"),
    *(
        "train.snapshot_every",
        "train.checkpoint_minutes",
        "evaluate.batch",
        "evaluate.device",
        "evaluate.sure",
        "model.weights",
    ),
}
"""Overrides of the other sections that make no other recipe of it: seeds, places, how it is computed and not what."""

BEAT = 1.0  # seconds between two looks at the clock: so much of the time of a killed run is forgotten at most


class Run(NamedTuple):
    """A recipe on some data. typed: the overrides as text, by key; overrides: as values; params: with them in place.

    Only the last two hold paths of this machine.
    """

    recipe: str
    data: str
    label: str
    typed: dict[str, str]
    overrides: dict[str, Any]
    params: dict[str, Any]
    name: str

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def clone(self) -> Path:
        return self.folder / "clone"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


def main() -> None:
    parser = Parser(prog="python -m tools.results", description="Record runs of recipes.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train a recipe and record what it came to; goes on where it was cut off")
    run.add_argument("recipe", metavar="RECIPE", help="a file of recipes/, without .yaml")
    run.add_argument("--data", metavar="NAME", required=True, help="what to call the images in the tables")
    run.add_argument("--label", metavar="LABEL", help="what to call the changes, such as short-no-mixup; '' none")
    run.add_argument("--again", action="store_true", help="forget record and clone of this run, and begin anew")
    run.add_argument("-S", dest="words", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    commands.add_parser("write", help="write the tables of all records")
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled job ends its stage as Ctrl-C does
    if words.command == "run":
        record(plan(words.recipe, words.data, words.label, words.words), again=words.again)
    else:
        write()


# --- what to run ------------------------------------------------------------------------------------------------------


def plan(recipe: str, data: str, label: str | None, words: list[str]) -> Run:
    """Put the overrides into the recipe, check the whole as the pipeline does, and give the run its name."""
    for name in (data, label):
        if name and not re.fullmatch(r"[\w.=-]+", name):
            raise PipelineError(f"{name!r} becomes a part of a file's name; use letters, digits and . = - _ alone")
    if not (file := RECIPES / f"{recipe}.yaml").exists():
        raise PipelineError(f"{file} is missing; known are {', '.join(sorted(one.stem for one in RECIPES.iterdir()))}")
    load_params(file)
    params = yaml12.read(file)
    seeds, typed, overrides = _seeds(params), dict[str, str](), dict[str, Any]()
    for word in words:
        key, sign, text = word.partition("=")
        if not sign:
            raise PipelineError(f"-S {word}: expected KEY=VALUE, such as train.epochs=5")
        overrides[key] = override(params, key, text, file)
        typed[key] = str(public(overrides[key])) if _is_place(overrides[key]) else text
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        Path(file.name).write_text(yaml12.dump(params), encoding="utf-8")
        load_params(Path(file.name))

    changed = {key for key, value in _seeds(params).items() if value != seeds[key]} or {"seed"}
    numbers = [f"{key}{value}" for key, value in _seeds(params).items() if key in changed]
    label = _own_label(typed) if label is None else label
    name = "_".join(filter(None, [recipe, data, *numbers, label]))
    return Run(recipe, data, label, typed, overrides, params, name)


def override(params: dict[str, Any], key: str, text: str, file: Path) -> Any:
    """Set one key to a value that is read as params.yaml is; a path becomes absolute, since the run has its own folder.

    Raises PipelineError where the recipe does not have the key.
    """
    *above, last = key.split(".")
    section: Any = params
    for part in above:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        raise PipelineError(f"-S {key}={text}: {file} has no {key}")
    try:
        value = yaml12.parse(text)
    except ValueError:
        raise PipelineError(f"-S {key}={text}: {text!r} is not valid YAML") from None
    section[last] = str(Path(value).absolute()) if _is_path(value) else value
    return section[last]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and Path(value).exists()


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _seeds(params: dict[str, Any]) -> dict[str, Any]:
    return {"seed": params["train"]["seed"], "split": params["split"]["seed"]}


def _own_label(typed: dict[str, str]) -> str:
    """Name the overrides that make another recipe, such as epochs=5; none gives ''."""
    matter = [key for key in typed if key not in ASIDE and key.partition(".")[0] not in DATA]
    return "_".join(f"{key.removeprefix('train.')}={re.sub(r'[^0-9A-Za-z.-]+', '-', typed[key])}" for key in matter)


# --- the run ----------------------------------------------------------------------------------------------------------


def record(run: Run, *, again: bool = False) -> None:
    """Run the pipeline in the run's clone and write its record; a record of the same code and params stays as it is."""
    with alone(RUNS / f"{run.name}.lock", f"another process makes {run.name}"):
        if again:
            remove(run.folder)
            remove(run.file)
        if run.file.exists():
            known = json.loads(run.file.read_text(encoding="utf-8"))
            if known["overrides"] != public(run.overrides):
                raise PipelineError(f"{run.file} has other overrides; give a --label, another --data, or --again")
            if known["code"] == code(Path()) and known["params"] == public(run.params):
                say(f"{run.file} is of this code and these params already; --again makes it anew")
                return
        bring_up_to_date(run)
        made_by = code(run.clone)
        clock = repro(run)
        figures = describe(run, clock) | {"code": made_by}
        with whole(run.file) as (file,):
            file.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        say(f"{run.file}: test accuracy {figures['test_accuracy']:.2%}, trained for {figures['minutes']:.1f} minutes")


def bring_up_to_date(run: Run) -> None:
    """Make the clone the project as it stands, with the run's params; what the pipeline made there stays."""
    clone, words = run.clone, ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    stages = yaml12.read(PIPELINE)["stages"].values()
    entries = [entry for stage in stages for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    made = {Path(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in entries} | {
        LOCK,
        paths.PARAMS,
        paths.ENVIRONMENT,
    }

    def files(folder: Path) -> set[str]:
        listed = git("-C", str(folder), *words, otherwise=f"git cannot list the files of {folder}").split("\0")
        names = {name for name in listed if (folder / name).is_file()}
        return {name for name in names if not made & {Path(name), *Path(name).parents}}

    clone.mkdir(parents=True, exist_ok=True)
    git("-C", str(clone), "init", "--quiet", otherwise="git cannot make a clone")
    for name in files(clone) - (current := files(Path())):
        (clone / name).unlink()
    for name in current:
        if not (clone / name).exists() or not filecmp.cmp(name, clone / name, shallow=False):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, clone / name)
    (clone / paths.PARAMS).write_text(yaml12.dump(run.params), encoding="utf-8")
    # Each of the many clones would else keep its images twice.
    (clone / ".dvc/config.local").write_text("[cache]\n    type = reflink,hardlink,copy\n", encoding="utf-8")
    git("-C", str(clone), "add", "--all", otherwise="git cannot add the files of the clone")
    author = ("-c", "user.name=results", "-c", "user.email=results@localhost", "-c", "commit.gpgsign=false")
    git("-C", str(clone), *author, "commit", "--quiet", "--message", "state", otherwise="git cannot commit the clone")


def repro(run: Run) -> dict[str, Any]:
    """Run the stages to plot, the training by itself, and give the clock: the seconds of each part of all calls.

    The clock of the training begins anew with it: where its code, params or data have changed.
    """
    file = run.folder / "clock.json"
    clock: dict[str, Any] = {"training": None, "trained": False, "data": 0.0, "train": 0.0, "rest": 0.0}
    if file.exists():
        clock |= json.loads(file.read_text(encoding="utf-8"))
    timed(run, clock, "data", "split")
    if clock["training"] != (training := what_trains(run.clone)):
        clock |= {"training": training, "trained": False, "train": 0.0, "rest": 0.0}
        remove(run.clone / RESUME / "checkpoints")
    if not clock["trained"]:  # by force, since a result out of DVC's cache would take no time
        timed(run, clock, "train", "--force", "--no-run-cache", "--single-item", "train")
        clock["trained"] = True
    timed(run, clock, "rest", "plot")
    return clock


def what_trains(clone: Path) -> str:
    """Hash all that dvc.yaml says the training depends on."""
    stage = yaml12.read(clone / PIPELINE)["stages"]["train"]
    params = yaml12.read(clone / paths.PARAMS)
    files = {dep: hash_file(clone / dep) for dep in stage["deps"] if (clone / dep).is_file()}
    parts = [files, {section: params[section] for section in stage["params"]}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def timed(run: Run, clock: dict[str, Any], part: str, *words: str) -> None:
    """Run `dvc repro` in the clone, and add its time to a part of the clock, on the disk, too, while it runs."""
    before, start = clock[part], time.monotonic()

    def beat() -> None:
        clock[part] = before + time.monotonic() - start
        with whole(run.folder / "clock.json") as (file,):
            file.write_text(json.dumps(clock), encoding="utf-8")

    try:
        with running(dvc("repro", *words), cwd=run.clone, env=environment(run.clone.absolute())) as child:
            while child.poll() is None:
                beat()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(BEAT)
    finally:
        beat()
    if child.returncode:
        raise PipelineError(f"{run.name} failed, for the reason above, and is not recorded; its clone is {run.clone}")


# --- the record -------------------------------------------------------------------------------------------------------


def describe(run: Run, clock: dict[str, Any]) -> dict[str, Any]:
    """Gather what a run came to, with what, on which machine; no path of this machine is in it.

    Raises PipelineError where a metric is missing.
    """
    try:
        test, trained, machine, raw = (
            json.loads((run.clone / path).read_text(encoding="utf-8"))
            for path in (paths.EVALUATION, paths.TRAIN_LOG / "metrics.json", paths.ENVIRONMENT, paths.ORIGIN)
        )
        return {
            "recipe": run.recipe,
            "data": run.data,
            "label": run.label,
            "seed": run.params["train"]["seed"],
            "split_seed": run.params["split"]["seed"],
            "test_accuracy": test["accuracy"],
            "test_images": test["images"],
            **{name: test[name] for name in ("accuracy_low", "accuracy_high")},
            **{name: test[name] for name in ("macro_precision", "macro_recall", "macro_f1")},
            "validation_accuracy": trained["best_validation_accuracy"],
            "epochs": trained["step"],
            **{name: trained[name] for name in ("best_epoch", "parameters", "train_images")},
            "minutes": round(clock["train"] / 60, 3),
            "total_minutes": round((clock["data"] + clock["train"] + clock["rest"]) / 60, 3),
            "machine": {name: machine[name] for name in ("cpu", "isa", "threads", "device", "gpu")}
            | {"cores": os.cpu_count()},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},
            "overrides": public(run.overrides),
            "params": public(run.params),
            "data_sha256": raw["sha256"],
            "files_sha256": {
                key: hash_file(Path(value))
                for key, value in run.overrides.items()
                if _is_place(value) and Path(value).is_file()
            },
            "date": datetime.now(UTC).date().isoformat(),
            "command": command_of(run),
        }
    except (OSError, ValueError, KeyError) as error:
        raise PipelineError(f"{run.name} has no metrics to record ({error})") from None


def command_of(run: Run) -> str:
    words = ["python", "-m", "tools.results", "run", run.recipe, "--data", run.data]
    if run.label != _own_label(run.typed):
        words += ["--label", run.label]
    pairs = [f"{key}={text}" for key, text in run.typed.items()]
    return shlex.join([*words, *(["-S", *pairs] if pairs else [])])


def public(value: Any) -> Any:
    """Give a value without the paths of this machine: a file or folder has its name alone."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    return f"<path of {Path(value).name}>" if _is_place(value) else value


def code(root: Path) -> str:
    """Hash the pipeline's code: the names and contents of src/, stages/ and dvc.yaml."""
    files = [file for folder in ("src", "stages") for file in (root / folder).rglob("*") if file.is_file()]
    names = sorted(file.relative_to(root).as_posix() for file in [*files, root / PIPELINE])
    lines = [f"{hash_file(root / name)}  {name}\n" for name in names if "__pycache__" not in name]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    with in_one_sentence():
        main()
