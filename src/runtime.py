"""What every stage shares: a user's mistake is one sentence, and outputs appear whole or not at all."""

import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


class PipelineError(Exception):
    """A mistake or a circumstance that the user can mend; its text is the one sentence that they read."""


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`; what goes wrong for the user's reasons ends in one sentence on stderr and exit code 1."""
    try:
        main()
    except PipelineError as error:
        _stop(str(error))
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
        # torch's own error of a full GPU, known by its name, since most stages never import torch.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _stop("the memory is full; use a smaller train.batch, evaluate.batch or prepare.size")


def _stop(sentence: str) -> None:
    stage = Path(sys.argv[0]).stem
    print(f"{stage}: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(1)


@contextmanager
def whole(*targets: Path) -> Iterator[list[Path]]:
    """Give a temporary path for each target and put all of them in place only when the block ends well.

    A block that fails, or is interrupted, leaves the targets as they were. A target may be a file or a folder; the
    temporary one lies beside it, so that the last step is a rename within one file system.
    """
    parts = [target.with_name(f".{target.name}.part") for target in targets]
    with ExitStack() as cleanup:
        for part in parts:
            part.parent.mkdir(parents=True, exist_ok=True)
            _remove(part)
            cleanup.callback(_remove, part)
        yield parts
        for part, target in zip(parts, targets, strict=True):
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


@contextmanager
def in_sight(folder: Path) -> Iterator[Path]:
    """Let a block fill a folder that people watch while it grows; a block that fails puts the former one back."""
    former = folder.with_name(f".{folder.name}.part")
    if former.exists():  # a run that was killed left it, and the folder half-filled
        _remove(folder)
    elif folder.exists():
        folder.replace(former)
    try:
        yield folder
    except BaseException:
        _remove(folder)
        if former.exists():
            former.replace(folder)
        raise
    _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
