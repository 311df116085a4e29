"""Kill the pipeline at random moments, type the same again, and compare all bytes with an undisturbed run.

    python -m tests.torture [COUNT [SEED]]        25 trials; ends with one line, such as `25 equal, 0 different`

No code of the product knows of this. PYTHONPATH brings a sitecustomize.py into every process below, which in `train`
and `evaluate` counts the moments it meets, and at the one that was drawn kills the process group, DVC included.
"""

import atexit
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src import paths
from tests.project import ROOT, Project, clone

CHANGES: dict[str, object] = {
    "prepare.image_size": 28,  # half of it, as in the tests, makes epochs too short for checkpoints by the clock
    "model.dropout": 0.25,
    "train.batch": 128,
    "train.checkpoint_minutes": 3.0e-3,
    "train.epochs": 4,
    "train.augment.crop": 0.6,
    "train.augment.cutmix": 0.3,
    "train.augment.flip": True,
    "train.augment.mixup": 0.3,
    "train.clip": 1.0,
    "train.ema": 0.9,
    "train.snapshot_every": 2,
    "train.threads": 1,
}
"""What the runs change in params.yaml: all that draws or is carried along, and several checkpoints an epoch."""

PLACES = ("dvc repro", "dvc exp run", "dvc exp run --temp", "dvc exp run --queue")

STEP = "in the middle of an epoch"
WRITE = "while a checkpoint is written"
RENAME = "between write and rename"
REMOVE = "while old checkpoints are removed"
VALIDATE = "during validation"
OUTPUTS = "while outputs are written"
EVALUATE = "during evaluation"
ANY = "at any time"
MOMENTS = (WRITE, STEP, RENAME, EVALUATE, REMOVE, VALIDATE, ANY, OUTPUTS)

SECONDS = 240
"""So long may one run take; one that takes longer hangs."""


# --- in the process of a stage ----------------------------------------------------------------------------------------

SITECUSTOMIZE = f"""
import os, sys
if sys.orig_argv[1:] in (["-m", "stages.train"], ["-m", "stages.evaluate"]) and os.path.exists(os.environ["TORTURE"]):
    sys.path.insert(0, {str(ROOT)!r})
    from tests.torture import lurk
    sys.path.remove({str(ROOT)!r})
    lurk()
"""


def lurk() -> None:
    """Count what this process does until it meets the plan's moment for the plan's n-th time; then kill the group.

    The plan is used up by this, so that the next run goes through. One that ends unharmed leaves its counts beside it.
    """
    file, stage = Path(os.environ["TORTURE"]), sys.orig_argv[-1].removeprefix("stages.")
    plan, met = json.loads(file.read_text()), Counter[str]()
    atexit.register(lambda: file.with_suffix(f".{stage}").write_text(json.dumps(met)))

    def strike() -> None:
        file.rename(file.with_suffix(".struck"))
        os.killpg(0, signal.SIGKILL)

    def is_now(moment: str) -> bool:
        met[moment] += 1
        return (moment, met[moment]) == (plan["moment"], plan["number"])

    def meet(moment: str) -> None:
        if is_now(moment):
            strike()

    def listen(event: str, words: tuple[Any, ...]) -> None:
        if event not in ("os.rename", "os.remove"):
            return
        path = str(words[0])
        if _is_kept(path):
            if not path.endswith(".lock"):
                meet(RENAME if event == "os.rename" else REMOVE)
        elif event == "os.rename" and path.endswith(".part"):
            meet(OUTPUTS)

    def open_and_listen(path: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
        opened = intact(path, mode, *words, **options)
        moment = WRITE if _is_kept(str(path)) else OUTPUTS if ".part" in str(path) else None
        if moment and "w" in mode:
            write = opened.write

            def write_a_part(content: bytes) -> int:
                if is_now(moment):
                    write(content[: int(plan["share"] * len(content))])
                    opened.flush()
                    strike()
                return int(write(content))

            opened.write = write_a_part
        return opened

    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    sys.addaudithook(listen)
    intact, io.open = io.open, open_and_listen  # which is what pathlib calls
    register_optimizer_step_post_hook(lambda *_: meet(STEP))
    judging = VALIDATE if stage == "train" else EVALUATE
    register_module_forward_pre_hook(lambda module, _: None if module.training else meet(judging))


def _is_kept(path: str) -> bool:
    return ".resume/checkpoints/" in path


# --- the trials -------------------------------------------------------------------------------------------------------


@dataclass
class Undisturbed:
    """A run that nobody killed: the hashes of its outputs, how often each moment came, and how long it took."""

    hashes: dict[str, str]
    counts: Counter[str]
    seconds: float


@dataclass
class Trial:
    """One run that was killed, and what became of it."""

    place: str
    moments: tuple[str, ...]
    kills: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        kills, verdict = "; ".join(self.kills), f"DIFFERENT: {', '.join(self.problems)}" if self.problems else "equal"
        return f"{self.place:19}  {kills}  {verdict}  {self.seconds:.0f} s"


class Lurked:
    """A copy of the trained project in which commands run with a killer that may lurk in the stages."""

    def __init__(self, base: Path, folder: Path, place: str) -> None:
        shutil.copytree(base, folder / "project", symlinks=True)
        self.project, self.place, self.plan = Project(folder / "project"), place, folder / "plan.json"
        self.log, self.session = folder / "log", 0
        shutil.rmtree(self.project.folder / ".resume", ignore_errors=True)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "TORTURE": str(self.plan)}
        self.env["OMP_NUM_THREADS"] = "1"
        if place == "dvc repro":
            self.project.set(**{name.replace(".", "__"): value for name, value in CHANGES.items()})

    def run(self, seconds: float = SECONDS, **plan: object) -> str:
        """Type the place's command, with a plan for the killer, and wait for its end; `seconds` kill it, too."""
        self.plan.write_text(json.dumps(plan))
        command = [*self.place.split(), "plot"]
        if self.place != "dvc repro":
            command += [
                "--name",
                "trial",
                *(word for item in CHANGES.items() for word in ("-S", "=".join(map(str, item)))),
            ]
        if self.place.endswith("--queue"):
            self._enqueue(command)
            command = ["dvc", "queue", "start"]
        with self.log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=self.project.folder, env=self.env, stdout=output, stderr=output, start_new_session=True
            )
            self.session = process.pid
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self.place.endswith("--queue"):
            return self._wait_for_worker(seconds)
        return self.log.read_text()

    def was_struck(self) -> bool:
        return self.plan.with_suffix(".struck").exists()

    def kept(self) -> tuple[int, int] | None:
        """Epoch and step of the newest checkpoint."""
        files = (self.project.folder / ".resume").glob("checkpoints/*/*.json")
        places = [(int(epoch), int(step)) for epoch, step in (file.name.split("-")[:2] for file in files)]
        return max(places, default=None)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every output of every stage, and of DVC's own record of them.

        The record of the machine is no output: it keeps the former model where DVC's run cache gives this one.
        """
        tops = [self.project.folder / name for name in ("data", "models", "metrics", "plots")]
        files = [self.project.folder / "dvc.lock", *(file for top in tops for file in top.rglob("*") if file.is_file())]
        names = {str(file.relative_to(self.project.folder)): file for file in files}
        del names[str(paths.ENVIRONMENT)]
        return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in names.items()}

    def left(self) -> list[str]:
        """What a run that ended well should not leave behind."""
        return [
            str(path.relative_to(self.project.folder))
            for path in self.project.folder.rglob("*.part")
            if not path.is_relative_to(self.project.folder / ".dvc/tmp/exps")
        ]

    def _enqueue(self, command: list[str]) -> None:
        """Queue the experiment; one that was killed is Running for ever to DVC, and `queue start` passes it over."""
        status = self.project.dvc("queue", "status") if self.log.exists() else ""
        if "Running" in status and not self._has_experiment():
            self.project.dvc("queue", "kill", "trial")
            self.project.dvc("queue", "remove", "trial")
        if "Queued" not in status and not self._has_experiment():
            self.project.run(*command)

    def _wait_for_worker(self, seconds: float) -> str:
        """Wait until the experiment ended, or the worker was killed, and give what the stages printed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.was_struck() and not self._has_experiment():
            time.sleep(0.2)
        self._stop_worker()
        logs = (self.project.folder / ".dvc/tmp/exps/run").glob("*/*.out")
        newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
        return newest.read_text() if newest else ""

    def _has_experiment(self) -> bool:
        return bool(self.project.git("for-each-ref", "refs/exps/*/*/trial"))

    def _stop_worker(self) -> None:
        """Kill the worker and all below it: a process group of its own, in the session that `queue start` began."""
        for file in (self.project.folder / ".dvc/tmp/exps/celery").glob("*.pid"):
            with suppress(ProcessLookupError):
                worker = int(file.read_text())
                if os.getsid(worker) == self.session:
                    os.killpg(os.getpgid(worker), signal.SIGKILL)


def prepare(folder: Path) -> Path:
    """Clone the project and commit one trained epoch."""
    project = clone(folder)
    project.set(train__epochs=1, train__threads=1)
    project.dvc("repro")
    project.commit()
    return project.folder


def leave_alone(base: Path, folder: Path) -> Undisturbed:
    """Do the run that all others must equal."""
    run, begun = Lurked(base, folder, "dvc repro"), time.monotonic()
    output = run.run(moment=None, number=0)
    assert "stages.plot" in output, output
    counts = Counter[str]()
    for stage in ("train", "evaluate"):
        counts |= Counter(json.loads(run.plan.with_suffix(f".{stage}").read_text()))  # each process counts its own
    return Undisturbed(run.hashes(), counts, time.monotonic() - begun)


def torture(base: Path, folder: Path, undisturbed: Undisturbed, trial: Trial, seed: object) -> Trial:
    """Kill a run at each of the trial's moments, let it end, and compare."""
    draw, begun = random.Random(str(seed)), time.monotonic()
    run = Lurked(base, folder, trial.place)
    kept: tuple[int, int] | None = None
    for number, moment in enumerate((*trial.moments, None)):
        plan: dict[str, Any] = {"moment": moment, "number": 0, "share": draw.random()}
        if moment == ANY:
            seconds = draw.uniform(0, undisturbed.seconds)
            output = run.run(seconds, **plan)
            told = f"{moment} (after {seconds:.0f} of {undisturbed.seconds:.0f} s)"
        elif moment:
            # Checkpoints come by the clock, so a run may meet fewer; and later runs of a trial have less to do.
            most = undisturbed.counts[moment] * (0.8 if moment in (WRITE, RENAME, REMOVE) else 1) / (1 + 3 * number)
            plan["number"] = draw.randint(1, max(1, int(most)))
            output = run.run(**plan)
            told = f"{moment} ({plan['number']} of {undisturbed.counts[moment]})"
            if not run.was_struck():
                told += " not met"
                trial.problems += ["the first moment never came"] if number == 0 else []
        else:
            output = run.run(**plan)
        line = next((line for line in output.splitlines() if "going on" in line), "")
        numbers = {"0", *re.findall(r"\d+", line)}
        # A run that is killed again may not come so far; the last one must.
        if kept and "stages.train" in output and (line or not moment) and not {*map(str, kept)} <= numbers:
            trial.problems.append(f"{kept} was kept, but it said '{line}'")
        if (now := run.kept()) != kept and kept and (not now or now < kept):
            trial.problems.append(f"{kept} was kept, then only {now}")
        if trial.kills and line:
            trial.kills[-1] += f" -> {line.partition(', kept in')[0]}"
        kept = now
        if moment:
            run.plan.with_suffix(".struck").unlink(missing_ok=True)
            trial.kills.append(f"{told}, kept {kept}")
    if run.place.endswith(("--temp", "--queue")):
        applied = run.project.dvc("exp", "apply", "trial", code=None)
        if "ERROR" in applied:
            trial.problems.append(f"no experiment: {output[-500:]}")
    found, expected = run.hashes(), undisturbed.hashes
    trial.problems += sorted(name for name in found | expected if found.get(name) != expected.get(name))
    trial.problems += run.left()
    trial.seconds = time.monotonic() - begun
    shutil.rmtree(folder)
    return trial


def draw_trials(count: int) -> list[Trial]:
    """Pair places with moments, so that 32 in a row are all pairs; one in five is killed twice, one in ten thrice."""
    trials = []
    for number in range(count):
        moments = [MOMENTS[(number * step + number // 8) % 8] for step in (1, 3, 5)]
        kills = 3 if number % 10 == 9 else 2 if number % 5 == 4 else 1
        trials.append(Trial(PLACES[number % 4], tuple(moments[:kills])))
    return trials


def main(count: int = 25, seed: int | None = None) -> int:
    """Run the long form; 1 if any trial differs."""
    seed = random.randrange(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        base = prepare(Path(name) / "base")
        undisturbed = leave_alone(base, Path(name) / "undisturbed")
        print(f"seed {seed}; undisturbed {undisturbed.seconds:.0f} s, {dict(undisturbed.counts)}", flush=True)
        bad = 0
        for number, trial in enumerate(draw_trials(count), start=1):
            done = torture(base, Path(name) / f"trial-{number}", undisturbed, trial, f"{seed}-{number}")
            bad += bool(done.problems)
            print(f"{number:2}  {done}", flush=True)
    print(f"{count - bad} equal, {bad} different")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
