"""Prove that a recorded revision can be made again, byte for byte: `python -m tools.verify [REV]`.

The revision, or without one the working tree as it stands, goes into a temporary clone that knows no run cache, no
resume store and no former result. There every stage runs again, and each output's hash is compared with dvc.lock.
"""

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from src import paths, yaml12
from src.runtime import Parser, PipelineError, in_one_sentence
from tools.command import dvc, environment, git, running
from tools.difference import difference, digest

LOCK = Path("dvc.lock")


class Output(NamedTuple):
    """What dvc.lock says of one output; a folder's md5 ends in .dir."""

    stage: str
    path: str
    md5: str


class Scene(NamedTuple):
    """The revision, and where its files are: `clone` is where it is made again, `committed` its outputs in git."""

    name: str
    commit: str
    clone: Path
    committed: Path
    fetched: Path


def main() -> None:
    parser = Parser(prog="python -m tools.verify", description="Make a recorded revision again.")
    parser.add_argument("revision", metavar="REV", nargs="?", help="commit, branch or tag; else the working tree")
    revision = parser.parse_args().revision
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled CI job cleans up as Ctrl-C does
    commit, name = resolve(revision)
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        scene = Scene(name, commit, *(Path(scratch) / part for part in ("clone", "committed", "fetched")))
        lock = check_out(scene)
        outputs = [
            Output(stage, out["path"], out["md5"])
            for stage in lock
            for out in lock[stage].get("outs", [])
            if out["path"] != str(paths.ENVIRONMENT)  # an output in older revisions
        ]
        given = give_archive(scene, lock, outputs)
        rerun(scene, outputs, given)
        if not report(scene, outputs, given, ("in git", scene.committed) if revision else ("here", Path())):
            raise SystemExit(1)


# --- the clone --------------------------------------------------------------------------------------------------------


def resolve(revision: str | None) -> tuple[str, str]:
    """Give the commit to verify and its name; changes in the working tree become a commit that no branch knows of."""
    git("rev-parse", "--git-dir", otherwise=f"{Path.cwd()} is no git repository, so nothing is recorded here")
    if revision:
        words = ["rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}"]
        return git(*words, otherwise=f"{revision} is no revision of this repository"), revision
    head = git("rev-parse", "--verify", "HEAD", otherwise="this repository has no commit yet")
    words = ["-c", "user.name=verify", "-c", "user.email=verify@localhost", "stash", "create"]
    return git(*words, otherwise="git cannot take the working tree, `git add` first") or head, "the working tree"


def check_out(scene: Scene) -> dict[str, Any]:
    """Check the commit out, its results aside, and give the stages of its dvc.lock.

    Raises PipelineError where dvc.lock is not of the sources and params beside it.
    """
    name, clone = scene.name, scene.clone
    # Not `git clone --shared`: out of a shallow repository, such as CI's, it leaves the working tree's commit behind.
    objects = git("rev-parse", "--path-format=absolute", "--git-path", "objects", otherwise="git is older than 2.31")
    git("init", "--quiet", str(clone), otherwise="git cannot make a clone")
    (clone / ".git/objects/info/alternates").write_text(f"{objects}\n", encoding="utf-8")
    git("-C", str(clone), "checkout", "--quiet", "--detach", scene.commit, otherwise=f"git cannot check out {name}")
    if not (clone / LOCK).exists():
        raise PipelineError(f"{name} has no {LOCK}, so no result is recorded; `dvc repro` and commit")

    done = subprocess.run(dvc("status", "--json"), cwd=clone, env=environment(clone), capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"{name} is no pipeline that DVC can read: {done.stderr}")
    lock: dict[str, Any] = yaml12.read(clone / LOCK)["stages"]
    if stale := [*_changed(json.loads(done.stdout), lock), *_torn(lock)]:
        raise PipelineError(f"{name}: {LOCK} was not made with what lies beside it: {', '.join(stale)}; `dvc repro`")
    for path in {
        *_outs(lock),
        str(paths.ENVIRONMENT),
    }:  # results in git step aside, so that whatever lies in their place later was made there
        if (clone / path).exists():
            (scene.committed / path).parent.mkdir(parents=True, exist_ok=True)
            (clone / path).rename(scene.committed / path)
    return lock


def _changed(status: dict[str, list[Any]], lock: dict[str, Any]) -> Iterator[str]:
    """Name sources, params and commands that are not the recorded ones, out of what DVC finds in the bare clone."""
    # Outputs are missing there and are judged later; the user's own images lie outside git.
    apart = {*_outs(lock), _download(lock).get("path")}
    for stage, entries in status.items():
        for entry in entries:
            found = entry if isinstance(entry, dict) else {"": {entry: ""}}
            names = (item for kind in found.values() for item in kind.items())
            for name, state in names:
                if name not in apart:
                    yield f"{' '.join([name, *state]) if isinstance(state, dict) else name} of {stage}"


def _torn(lock: dict[str, Any]) -> Iterator[str]:
    """Name inputs that are not what the stage before gives: of two stages, only the first one ran again."""
    outs = _outs(lock)
    for stage, entry in lock.items():
        for dep in entry.get("deps", []):
            if dep["path"] in outs and dep["md5"] != outs[dep["path"]]:
                yield f"{dep['path']} of {stage}"


def _outs(lock: dict[str, Any]) -> dict[str, str]:
    return {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", [])}


def _download(lock: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = lock.get("download", {}).get("params", {}).get(str(paths.PARAMS), {}).get("download", {})
    return found


def give_archive(scene: Scene, lock: dict[str, Any], outputs: list[Output]) -> set[str]:
    """Copy the raw archive into the clone where it is at hand, and give the paths of what was copied.

    The sample is made again in any case, since it needs neither network nor time.
    """
    raw = [output for output in outputs if output.stage == "download"]
    files = {} if _download(lock).get("source") == "sample" else {output: find(scene, output) for output in raw}
    if not files or not all(files.values()):
        return set()
    for output, file in files.items():
        (scene.clone / output.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file), scene.clone / output.path)
    return {output.path for output in raw}


def rerun(scene: Scene, outputs: list[Output], given: set[str]) -> None:
    """Run every stage, or all after the download where the archive is given; what they print is for the user to see."""
    command = dvc("repro", "--force", "--no-run-cache", "--no-commit", *(["--downstream", "prepare"] if given else []))
    with running(command, cwd=scene.clone, env=environment(scene.clone)) as child:
        code = child.wait()
    if code:
        failed = next((output.stage for output in outputs if not (scene.clone / output.path).exists()), "dvc")
        raise PipelineError(f"{scene.name} cannot be made again: {failed} failed, for the reason above")


# --- the report -------------------------------------------------------------------------------------------------------


def report(scene: Scene, outputs: list[Output], given: set[str], here: tuple[str, Path]) -> bool:
    """Print what became of each output and how the environment differs; tell whether all outputs are the same.

    here: where the results that people read lie, and what to call that place.
    """
    label, place = here
    stages, names = (max(map(len, column)) for column in list(zip(*outputs, strict=True))[:2])
    different = 0
    print(f"\n{scene.name}, made again:")
    for output in outputs:
        made, present, notes = scene.clone / output.path, place / output.path, list[str]()
        if digest(present) not in (None, output.md5):
            notes = [f"the file {label} is not the one of {LOCK}", *difference(present, made, (label, "rerun"))]
        if digest(made) != output.md5:
            recorded = find(scene, output)
            notes += (
                difference(recorded, made, ("recorded", "rerun")) if recorded else ["the recorded file is not at hand"]
            )
        different += bool(notes)
        status = "different" if notes else "given" if output.path in given else "same"
        print(f"  {output.stage:{stages}}  {output.path:{names}}  {status}", *notes, sep="\n      ")
    state, lines = compare_machines(scene, outputs)
    if lines:
        print("\nenvironment:", *lines, sep="\n  ")
    results = len(outputs) - len(given)
    verdict = f"{different} of {results} outputs different" if different else f"all {results} outputs the same"
    print(f"\n{scene.name}: {verdict}, environment {state}")
    return not different


def compare_machines(scene: Scene, outputs: list[Output]) -> tuple[str, list[str]]:
    """Compare the machine that made the recorded model with this one: a verdict, and a line for each difference.

    Another machine may well give the same results, so that it decides nothing.
    """
    recorded, here = scene.committed / paths.ENVIRONMENT, scene.clone / paths.ENVIRONMENT
    if not recorded.exists():
        return "not recorded", []
    lines = difference(recorded, here, ("recorded", "here"))
    model = next((line for line in lines if line.startswith("model ")), None)
    lines = [line for line in lines if line != model]
    if model and digest(scene.clone / paths.MODEL) in {output.md5 for output in outputs}:  # as out of DVC's run cache
        return "recorded for another model", lines
    return "different" if lines else "the same", lines


def find(scene: Scene, output: Output) -> Path | None:
    """Find the file that dvc.lock means: in git, in the workspace, else in DVC's cache or its remote."""
    for place in (scene.committed, Path()):
        if digest(place / output.path) == output.md5:
            return place / output.path
    import dvc.api  # type: ignore[import-untyped]

    file = scene.fetched / output.path
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(Exception):  # remotes fail in as many ways as there are kinds of them
        dvc.api.DVCFileSystem(str(Path.cwd()), rev=scene.commit).get(output.path, str(file), recursive=True)
    return file if digest(file) == output.md5 else None


if __name__ == "__main__":
    with in_one_sentence():
        main()
