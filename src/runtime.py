"""What every stage shares: errors in one sentence, outputs that are complete or not there, arguments and locks."""

import argparse
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import fill
from typing import NoReturn

from filelock import FileLock, Timeout

from src import paths, yaml12
from src.provenance import Sources, declared

RESUME = Path(".resume")
"""Where half downloads, checkpoints and locks outlive a run: below `home()`; neither git nor DVC sees it."""


class PipelineError(Exception):
    """An error that the user can fix; its text is the one sentence that they see."""


_sources: Sources | None = None  # none outside of `run`, as in tests: there the caller is the one who edits


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`, alone in this folder, and watch its inputs; --help explains the stage instead."""
    global _sources
    stage = Path(sys.argv[0]).stem
    with in_one_sentence():
        if main.__module__ == "__main__":  # elsewhere, as in tests, the arguments belong to another program
            _explain_on_request(stage)
        # A stage that outlived its killed `dvc repro` would otherwise write the same files as its successor.
        with alone(RESUME / f"{stage}.lock", f"another process still runs {stage} in this folder"):
            _sources = Sources(stage)
            try:
                main()
            finally:
                _sources = None


class Parser(argparse.ArgumentParser):
    """Reads a script's arguments; a wrong one ends in one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Stop with the sentence alone, without the usage."""
        say(f"{message}; `{self.prog} --help` lists the arguments")
        raise SystemExit(2)


def _explain_on_request(stage: str) -> None:
    lines = {
        "reads": [dep for dep in declared(stage, "deps") if not dep.startswith(("src/", "stages/"))],
        "writes": declared(stage, "outs", "metrics", "plots"),
        "params": declared(stage, "params"),
    }
    about = [fill(f"{kind + ':':8}{', '.join(names)}", 100, subsequent_indent=" " * 8) for kind, names in lines.items()]
    Parser(
        prog=f"python -m stages.{stage}",
        description="\n".join([f"{sys.modules['__main__'].__doc__}\n", *about]),
        epilog=f"`dvc repro {stage}` runs it when an input has changed; src/params.py explains the params.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()


def watch(file: Path) -> None:
    """Watch one more file, which must not change, or appear, until this stage ends."""
    if _sources:
        _sources.watch(file)


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Turn the user's mistakes and the machine's limits into one sentence on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a console of ASCII or cp1252 lacks is printed escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except PipelineError as error:
        _stop(f"{error}{_undo(str(error))}")
    except KeyboardInterrupt:
        _stop("interrupted; nothing was half-written, run the same command again to go on")
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(f"the disk is full{where}; free some space and run the same command again")
        if error.errno == errno.EFBIG:
            _stop(f"the disk or a limit (`ulimit -f`) allows no larger file{where}; choose another place")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _stop(f"no permission{where} ({error.strerror}); allow it or choose another place")
        raise
    except (MemoryError, RuntimeError) as error:
        # torch's own errors of a full GPU and a full RAM, known by their text, since most stages never import torch.
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if not isinstance(error, MemoryError) and not full:
            raise
        _stop("the memory is full; use a smaller train.batch, evaluate.batch or prepare.image_size")


def _undo(sentence: str) -> str:
    """Say how to undo edits of params.yaml that a sentence names: a failed `dvc exp run -S` leaves its values there."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{paths.PARAMS}"], capture_output=True, encoding="utf-8")
        committed, now = yaml12.flatten(yaml12.parse(shown.stdout)), yaml12.flatten(yaml12.read(paths.PARAMS))
    except (OSError, ValueError, AttributeError):  # no git, no commit, or no params
        return ""
    edited = {key for key in committed | now if committed.get(key) != now.get(key)}
    named = any(re.search(rf"\b{re.escape(key)}\b", sentence) for key in edited)
    if not named or home().resolve() != Path.cwd().resolve():  # --temp and queued runs have a file of their own
        return ""
    return f"; `git checkout {paths.PARAMS}` undoes your edits there, and those of a failed `dvc exp run -S`"


def _stop(sentence: str) -> None:
    say(sentence)
    raise SystemExit(1)


def say(sentence: str) -> None:
    """Print one line on stderr, after the name of the stage."""
    print(f"{Path(sys.argv[0]).stem}: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 1,026 images, 2 classes."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


# --- outputs ----------------------------------------------------------------------------------------------------------


@contextmanager
def whole(*targets: Path) -> Iterator[list[Path]]:
    """Give a temporary path for each target and put all of them in place only when the block ends well.

    A block that fails, or is interrupted, or whose sources changed meanwhile, leaves the targets as they were. A target
    may be a file or a folder; the temporary one lies beside it, so that the last step is a rename within one file
    system.
    """
    parts = [target.with_name(f".{target.name}.part") for target in targets]
    with ExitStack() as cleanup:
        for part in parts:
            part.parent.mkdir(parents=True, exist_ok=True)
            remove(part)
            cleanup.callback(remove, part)
        yield parts
        if _sources and (changed := _sources.changed()):
            raise PipelineError(
                f"{', '.join(changed)} changed during the run; nothing was recorded; run the same command again"
            )
        for part, target in zip(parts, targets, strict=True):
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


@contextmanager
def in_sight(folder: Path) -> Iterator[Path]:
    """Let a block fill a folder that people watch while it grows; a block that fails puts the former one back."""
    former = folder.with_name(f".{folder.name}.part")
    if former.exists():  # a run that was killed left it, and the folder half-filled
        remove(folder)
    elif folder.exists():
        folder.replace(former)
    try:
        yield folder
    except BaseException:
        remove(folder)
        if former.exists():
            former.replace(folder)
        raise
    remove(former)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, the same bytes for the same value. Raises ValueError where it holds NaN, which is none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8", newline="\n")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- one process ------------------------------------------------------------------------------------------------------


def home() -> Path:
    """The folder of the repository, also for a --temp or queued run, which works in a copy that DVC throws away."""
    return Path(os.environ.get("DVC_ROOT", "."))


def mirror(place: Path) -> None:
    """Bring the user's own files that a --temp or queued run lacks: its copy holds only what git tracks (DVC 3.67).

    DVC takes the hash of the dependency from this copy after the command ran, so they have to be here: otherwise the
    lock would say that the archive was made of a README.
    """
    origin = home() / place
    if place.is_absolute() or home().resolve() == Path.cwd().resolve():
        return
    if origin.is_file() and not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(origin, place)
    for folder, folders, files in os.walk(origin):
        here = place / Path(folder).relative_to(origin)
        here.mkdir(parents=True, exist_ok=True)
        for name in folders + files:
            source = Path(folder, name)
            if os.path.lexists(here / name) or (source.is_dir() and not source.is_symlink()):
                continue
            if source.is_dir():
                (here / name).symlink_to(source.resolve())  # stays a link, so that DVC's hash is the workspace's
            else:
                _link(source, here / name)


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source.resolve(), place)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, place)


@contextmanager
def alone(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock, which the system releases however the process ends; a second process reports it and waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{otherwise}; waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
