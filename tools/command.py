"""How the tools call git and DVC."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from src.runtime import PipelineError


def dvc(*words: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *words]


def environment(clone: Path) -> dict[str, str]:
    """Give the caller's environment with this interpreter first, and with nothing that belongs to another repository.

    DVC_ROOT would lead to the caller's resume store and a global configuration to a shared cache; DVC's own memory of
    hashes goes by path and time and outlives the clone, as do the kernels that torch compiles into TMPDIR.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
    own = {f"DVC_{kind}_DIR": str(clone.with_name("dvc")) for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return kept | own | {"PATH": path, "TMPDIR": str(clone.parent)}


def git(*words: str, otherwise: str) -> str:
    """Give what git prints; where it fails, raise the sentence `otherwise` with git's own reason."""
    # Within a hook, GIT_DIR and its like would turn each command for the clone into one for the caller's repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *words], env=env, capture_output=True, text=True, errors="surrogateescape")
    # Without a word, `git stash create` ends with 1 where files have new times and nothing else (2.39).
    if done.returncode and done.stderr:
        raise PipelineError(f"{otherwise} ({done.stderr.strip()})")
    return done.stdout.strip()


@contextmanager
def running(command: list[str], **settings: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a command beside this process; it ends with the block, and Ctrl-C gives it 20 seconds to do so by itself.

    It has a session of its own, so that one signal reaches DVC, the stage and its workers, however this process is
    stopped.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, text=True, **settings)
    try:
        yield child
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=20)
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
