"""The inputs of a stage, which are the files and params that dvc.yaml names, and whether they have changed."""

import hashlib
from pathlib import Path

from src import paths, yaml12

ROOT = Path(__file__).resolve().parent.parent


def inputs_of(stage: str) -> dict[str, str]:
    """Give the SHA-256 of each file that a stage depends on by dvc.yaml; code, as it was when it was imported."""
    return {name: _CODE[name] if name in _CODE else hash_file(Path(name)) for name in _files(stage)}


def hash_file(path: Path) -> str:
    """Give the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Sources:
    """The inputs of a stage as they were at its start.

    DVC hashes dependencies after the command ran (3.67, dvc#11058), so that an edit during a run would be recorded
    beside outputs that it never made.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.watched: list[Path] = []
        self.before = self._look() | {name: _CODE[name] for name in _files(stage) if name in _CODE}

    def watch(self, file: Path) -> None:
        """Add a file of the user's own, which may be missing."""
        self.watched.append(file)
        self.before[str(file)] = _identity(file)

    def changed(self) -> list[str]:
        """Name the files and params that are not what they were."""
        now = self._look()
        return sorted(name for name in self.before | now if self.before.get(name) != now.get(name))

    def _look(self) -> dict[str, object]:
        code = _read_code()
        deps = _files(self.stage)
        found = {name: code.get(name) if name in _CODE else _identity(Path(name)) for name in deps}
        return found | {str(file): _identity(file) for file in self.watched} | _params(self.stage)


def declared(stage: str, *kinds: str) -> list[str]:
    """List what dvc.yaml names for a stage under `deps`, `params`, `outs`, `metrics` or `plots`; nothing for others."""
    entry = yaml12.read(ROOT / "dvc.yaml")["stages"].get(stage, {})
    named = (item for kind in kinds for item in entry.get(kind, []))
    return [next(iter(item)) if isinstance(item, dict) else item for item in named]


def _files(stage: str) -> list[str]:
    # A dep whose name is a param is the user's own: `fetch` watches the images, `pretrained_weights` its file.
    return [dep for dep in declared(stage, "deps") if not dep.startswith("$")]


def _params(stage: str) -> dict[str, object]:
    """Each value of the stage's sections; a file that cannot be read now is one that changed."""
    try:
        params = yaml12.read(paths.PARAMS)
        sections = {section: params[section] for section in declared(stage, "params")}
        return {
            f"{paths.PARAMS}: {section}.{key}": value for section in sections for key, value in params[section].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {f"{paths.PARAMS}": None}


def _identity(path: Path) -> tuple[int, int] | None:
    """Identify a file by its modification time, in ns, and its size."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


def _read_code() -> dict[str, str]:
    files = [file for folder in ("src", "stages") for file in (ROOT / folder).iterdir() if file.is_file()]
    return {file.relative_to(ROOT).as_posix(): hash_file(file) for file in files}


# Read at import, which every stage does among the first: hardly an edit falls between importing and noticing.
_CODE = _read_code()
