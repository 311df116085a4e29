"""Search a space of params with Optuna: `python -m tools.search SPACE.yaml --trials 20 [--name NAME]`.

Each trial is a DVC experiment of its own, NAME-0, NAME-1 and so on, which leaves the workspace alone. They are judged
by the best validation accuracy; no test image has a part in it. What a trial tries is a function of the seed, the space
and the trials before it, and those that ended are in `.resume/search/NAME.db`: after a kill, the same command goes on,
and comes to the same trials as a search that was never stopped.
"""

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from src import paths, yaml12
from src.provenance import hash_file
from src.runtime import RESUME, Parser, PipelineError, home, in_one_sentence, remove, say
from tools.command import dvc, git, running

METRICS, OBJECTIVE = paths.TEST_METRICS, "val_acc"
HOPELESS = 3
"""So many failures, and no success, end a search at its start."""


class Space(NamedTuple):
    """What a file of ranges asks for: `ranges` are searched, `fixed` is the same for all trials."""

    ranges: dict[str, BaseDistribution]
    fixed: dict[str, Any]


def main() -> None:
    parser = Parser(prog="python -m tools.search", description="Search a space of params.")
    parser.add_argument("space", metavar="SPACE.yaml", type=Path, help="ranges by param, as in docs/search.yaml")
    parser.add_argument("--trials", type=int, default=20, help="in all, with those that ended before (default: 20)")
    parser.add_argument("--name", help="of the search; its experiments begin with it (default: the file's name)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other trials (default: 0)")
    words = parser.parse_args()
    name = words.name or words.space.stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise PipelineError(f"--name {name}: expected letters, digits, _ and -")
    if words.trials < 1 or words.seed < 0:
        raise PipelineError(f"--trials {words.trials} --seed {words.seed}: expected at least 1 trial and a seed of 0")
    space = read_space(words.space)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled job ends its trial as Ctrl-C does
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with lock(name) as held:
        study = open_study(name, space, words.seed)
        for trial in study.trials:
            print(describe(name, trial))
        while len(study.trials) < words.trials:
            check_pipeline(study, name, space)
            study.add_trial(attempt(name, space, study.trials, words.seed, held))
            print(describe(name, study.trials[-1]), flush=True)
            if len(study.trials) == HOPELESS and not _good(study.trials):
                _file(name).unlink()  # so that they run again once the reason is mended
                reason = study.trials[-1].user_attrs["reason"]
                raise PipelineError(f"the first {HOPELESS} trials failed, the last one with: {reason}")
        report(name, space, study.trials)


# --- the space --------------------------------------------------------------------------------------------------------


def read_space(file: Path) -> Space:
    """Read and check the ranges. Raises PipelineError with the param, what was found and what was expected."""
    asked, known = _read(file), yaml12.flatten(_read(paths.PARAMS))
    ranges, fixed = dict[str, BaseDistribution](), dict[str, Any]()
    for name in sorted(asked, key=str):  # the order of the file changes nothing
        if name not in known:
            near = ", ".join(get_close_matches(str(name), known, cutoff=0.3)) or "nothing"
            raise PipelineError(f"{file}: {name} is no param of {paths.PARAMS}; near it is {near}")
        if isinstance(asked[name], dict):
            ranges[name] = _range(f"{file}: {name}", asked[name])
        else:
            fixed[name] = _value(f"{file}: {name}", asked[name])
    if not ranges:
        raise PipelineError(f"{file} has nothing to search, such as train.lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}")
    return Space(ranges, fixed)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml12.read(file)
    except FileNotFoundError:
        raise PipelineError(f"{file} is missing in {Path.cwd()}") from None
    except ValueError as error:
        raise PipelineError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(found, dict):
        raise PipelineError(f"{file} is no mapping of params, such as train.batch: {{choices: [32, 64]}}")
    return found


def _range(where: str, asked: dict[str, Any]) -> BaseDistribution:
    choices = asked.get("choices")
    if set(asked) == {"choices"} and isinstance(choices, list) and choices:
        return CategoricalDistribution([_value(f"{where}.choices", choice) for choice in choices])
    if not {"low", "high"} <= set(asked) <= {"low", "high", "log"} or not isinstance(asked.get("log", False), bool):
        raise PipelineError(f"{where} is {asked}, expected {{low: …, high: …, log: true or false}} or {{choices: […]}}")
    low, high, log = asked["low"], asked["high"], asked.get("log", False)
    for key, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise PipelineError(f"{where}.{key} is {value!r} ({type(value).__name__}), expected a number")
    if low > high or (log and low <= 0):
        raise PipelineError(f"{where} goes from {low} to {high}, expected low <= high, and with log both above 0")
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    return kind(low, high, log=log)


def _value(where: str, value: Any) -> bool | int | float | str | None:
    if not isinstance(value, bool | int | float | str | None):
        raise PipelineError(f"{where} is {value!r} ({type(value).__name__}), expected a number, a word, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise PipelineError(f"{where} is {value!r}, expected a number")
    return value


# --- the study --------------------------------------------------------------------------------------------------------


@contextmanager
def lock(name: str) -> Iterator[int]:
    """Hold the search's lock and give its descriptor, for DVC to inherit: who comes second waits for both to end.

    A search that was killed alone leaves its DVC running, and `runtime.alone` would not know.
    """
    path = _file(name).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process still runs the search {name}; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def open_study(name: str, space: Space, seed: int) -> optuna.Study:
    """Open the search's study, or begin it. Raises PipelineError where it was begun with another space or seed."""
    storage = f"sqlite:///{_file(name)}"
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    made_of = {"seed": seed, "space": {key: repr(value) for key, value in (space.ranges | space.fixed).items()}}
    if not study.user_attrs:
        study.set_user_attr("made_of", made_of | {"pipeline": _pipeline(space)})
    former = study.user_attrs["made_of"]
    if changed := [key for key in made_of if made_of[key] != former[key]]:
        raise PipelineError(f"the search {name} was begun with another {' and '.join(changed)}; use another --name")
    return study


def check_pipeline(study: optuna.Study, name: str, space: Space) -> None:
    """Raise PipelineError where code, or a param that the space leaves alone, is not that of the earlier trials."""
    former, now = study.user_attrs["made_of"]["pipeline"], _pipeline(space)
    if changed := sorted(part for part in former | now if former.get(part) != now.get(part)):
        raise PipelineError(
            f"{', '.join(changed)} changed since the search {name} began, so that its trials could not be compared; "
            "take that back, or begin another with --name"
        )


def suggest(ranges: dict[str, BaseDistribution], trials: list[FrozenTrial], seed: int) -> dict[str, Any]:
    """Give the params of the next trial; after the same trials, always the same."""
    own = int(np.random.SeedSequence([seed, len(trials)]).generate_state(1)[0])
    memory = optuna.create_study(direction="maximize", sampler=TPESampler(seed=own))
    memory.add_trials(trials)
    return memory.ask(ranges).params


def _file(name: str) -> Path:
    return home() / RESUME / "search" / f"{name}.db"


def _pipeline(space: Space) -> dict[str, str]:
    files = git("ls-files", "src", "stages", "dvc.yaml", otherwise="this is no git repository").splitlines()
    params = {key: repr(value) for key, value in yaml12.flatten(_read(paths.PARAMS)).items()}
    for key in space.ranges | space.fixed:  # which may differ, as after `dvc exp apply`
        del params[key]
    return params | {file: hash_file(Path(file)) for file in files if Path(file).exists()}


def _good(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Give the trials that ended well, the best first, those with the same params once."""
    done = (trial for trial in trials if trial.value is not None and "same" not in trial.user_attrs)
    return sorted(done, key=lambda trial: trial.value or 0, reverse=True)


# --- a trial ----------------------------------------------------------------------------------------------------------


def attempt(name: str, space: Space, trials: list[FrozenTrial], seed: int, held: int) -> FrozenTrial:
    """Run the next trial, and give it with its result, or with the reason why it has none."""
    params, began = suggest(space.ranges, trials, seed), time.monotonic()
    same = next((trial for trial in _good(trials) if trial.params == params), None)
    notes: dict[str, Any]
    if same:
        value, notes = same.value, {"same": same.number}
    else:
        value, reason = run(f"{name}-{len(trials)}", space.fixed | params, held)
        notes = {"seconds": round(time.monotonic() - began), **({"reason": reason} if reason else {})}
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    return create_trial(state=state, params=params, distributions=space.ranges, value=value, user_attrs=notes)


def run(experiment: str, params: dict[str, Any], held: int) -> tuple[float | None, str]:
    """Run one experiment, and give its objective; or None, and the sentence that says why it failed."""
    head = git("rev-parse", "HEAD", otherwise="this repository has no commit yet")
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{experiment}"
    clear(experiment, ref, params)
    settings = [word for key, value in params.items() for word in ("-S", f"{key}={json.dumps(value)}")]
    # The whole pipeline, so that the metrics and plots of trials can be compared like those of any experiment.
    code, lines = follow(dvc("--wait-for-lock", "exp", "run", "--temp", "--name", experiment, *settings), held)
    if code < 0:
        raise PipelineError(f"{experiment} was ended by signal {-code}; run the same command again to go on")
    if code:
        first = next((number for number, line in enumerate(lines) if line.startswith("ERROR: ")), -1)
        stage = "failed to reproduce" in lines[first]  # and said why in the line before
        return None, lines[first - stage].removeprefix("ERROR: ")
    metrics = git("show", f"{ref}:{METRICS}", otherwise=f"{experiment} has no {METRICS}")
    return float(json.loads(metrics)[OBJECTIVE]), ""


def clear(experiment: str, ref: str, params: dict[str, Any]) -> None:
    """Remove what a killed trial left: its folder, which DVC lists as running for ever, or its unrecorded experiment.

    Raises PipelineError where an experiment of that name is another one.
    """
    for file in Path(".dvc/tmp/exps/standalone/run").glob("*/*.run"):
        with suppress(ValueError):  # half-written
            if (info := json.loads(file.read_text(encoding="utf-8")))["name"] == experiment:
                remove(Path(info["root_dir"]))
    if git("for-each-ref", ref, otherwise="git cannot list the experiments"):
        text = git("show", f"{ref}:{paths.PARAMS}", otherwise=f"{experiment} has no {paths.PARAMS}")
        if not params.items() <= yaml12.flatten(yaml12.parse(text)).items():
            raise PipelineError(
                f"{experiment} is already an experiment with other params; "
                f"`dvc exp remove {experiment}`, or use another --name"
            )
        git("update-ref", "-d", ref, otherwise=f"git cannot remove {experiment}")


def follow(command: list[str], held: int) -> tuple[int, list[str]]:
    """Run a command, show on stderr what it prints, and give its exit code and its lines."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    lines = [""]
    with running(command, env=env, pass_fds=[held], **told) as child:
        for line in child.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            lines += [line.strip()] if line.strip() else []
        return child.wait(), lines


# --- what is told -----------------------------------------------------------------------------------------------------


def describe(name: str, trial: FrozenTrial) -> str:
    """Tell a trial in one line."""
    notes = trial.user_attrs
    value = "failed" if trial.value is None else f"{trial.value:.4f}"
    params = (f"{key}={x:.4g}" if isinstance(x, float) else f"{key}={x}" for key, x in sorted(trial.params.items()))
    end = f"the same as {name}-{notes['same']}" if "same" in notes else f"{notes['seconds']} s"
    return "  ".join([f"{name}-{trial.number}", value, *params, end, *filter(None, [notes.get("reason")])])


def report(name: str, space: Space, trials: list[FrozenTrial]) -> None:
    """Print the best three, and what to type next."""
    if not (good := _good(trials)):
        raise PipelineError(f"all {len(trials)} trials failed, for the reasons above")
    print(f"\nthe best of {len(trials)} by {OBJECTIVE}, in which no test image has a part:")
    print(*(f"  {describe(name, trial)}" for trial in good[:3]), sep="\n")
    shown = "|".join(("Experiment", OBJECTIVE, *space.ranges))
    best = f"{name}-{good[0].number}"
    print(
        "\nnext:",
        f"dvc exp show --drop '.*' --keep '{shown}' --sort-by {METRICS}:{OBJECTIVE} --sort-order desc",
        f"dvc exp diff HEAD {best}",
        f"dvc exp apply {best}",
        sep="\n  ",
    )


if __name__ == "__main__":
    with in_one_sentence():
        main()
