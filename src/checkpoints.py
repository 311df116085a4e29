"""The resume store: where training stood, kept so that the next run goes on from there and ends in the same bytes.

One folder a key, `$DVC_ROOT/.resume/checkpoints/<key>/`, for workspace, `--temp` and queued runs alike. It is no DVC
out: `persist: true` would turn the run cache off and hand stale states to other runs (dvc 3.67). A checkpoint is a
small JSON file that names files of tensors by their SHA-256; these are written once, never changed, and shared.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from src.params import Train
from src.provenance import hash_file
from src.runtime import RESUME, alone, home, remove, say
from src.schedules import FIELDS, fingerprints, shared_epochs

DAYS, BYTES = 30, 20 * 2**30
"""Keys that nobody touched for so long, and the oldest ones beyond so much, are removed when a training starts."""


STRICT = ConfigDict(strict=True, extra="forbid")
"""What JSON says is checked, since anything may have written it: a name with `../` in it must reach no file outside."""
Name = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Output = Annotated[str, Field(pattern=r"^(model|epoch-[0-9]{4,}\.safetensors)$")]


@dataclass(frozen=True, config=STRICT)
class Record:
    """What an epoch came to. loss: cross entropy an image; accuracy: 0 to 1; best: the best validation so far."""

    epoch: int
    train_loss: FiniteFloat
    train_accuracy: FiniteFloat
    validation_loss: FiniteFloat
    validation_accuracy: FiniteFloat
    best: bool

    def __str__(self) -> str:
        train = f"loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.2%}"
        validation = f"loss {self.validation_loss:.4f}, accuracy {self.validation_accuracy:.2%}"
        return f"epoch {self.epoch}: train {train}; validation {validation}{' *' if self.best else ''}"


@dataclass(frozen=True, config=STRICT)
class Progress:
    """Where training stands: `step` steps into the epoch that follows those of `history`.

    sums: of the losses and of the right answers of these steps; whole numbers of float32, so that JSON keeps them.
    """

    history: tuple[Record, ...] = ()
    step: Annotated[int, Field(ge=0, lt=10**9)] = 0
    sums: tuple[FiniteFloat, FiniteFloat] = (0.0, 0.0)

    @property
    def epoch(self) -> int:
        """How many epochs have ended."""
        return len(self.history)

    @property
    def record(self) -> Record | None:
        """The record of an epoch that has just ended."""
        return self.history[-1] if self.history and self.step == 0 else None


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """What a training has come to.

    rates: the fingerprint of all learning rates up to the end of the epoch that `progress` belongs to; weights, rest:
    names of the tensors, their SHA-256; outputs: by output, the names of the tensors that belong there by now.
    """

    progress: Progress
    rates: Name
    weights: Name
    rest: Name
    outputs: dict[Output, Name]

    @property
    def position(self) -> tuple[int, int]:
        """How many epochs have ended, and how many steps of the next one are done."""
        return self.progress.epoch, self.progress.step

    def files(self) -> set[str]:
        """Name all files of tensors that it needs."""
        return {self.weights, self.rest, *self.outputs.values()}


class Store:
    """The checkpoints of one key. Whatever is in it is whole: a temporary name, fsync, then a rename.

    steps: of an epoch; rates: the fingerprint of the learning rates up to each epoch's end, from epoch 0; keep: the
    epoch from which a longer run continues, whose checkpoint stays.
    """

    def __init__(self, folder: Path, steps: int, rates: list[str], keep: int) -> None:
        self.folder, self.steps, self.rates, self.keep = folder, steps, rates, keep
        self.outputs: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # for `_prune`: touched today
        for left in folder.glob("*.part"):  # of a process that was killed
            remove(left)
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def newest(self) -> Checkpoint | None:
        """Find the checkpoint that is furthest on this run's way, and whole.

        One that is damaged, or lacks a file, is told, removed, and the one before it taken.
        """
        for path, checkpoint in reversed(self._all().items()):
            if checkpoint and not self._is_on_the_way(checkpoint):
                continue
            if checkpoint and all(self._is_whole(name) for name in checkpoint.files()):
                self.outputs = dict(checkpoint.outputs)
                return checkpoint
            say(f"the checkpoint {path} is damaged and left out")
            remove(path)
        return None

    def read(self, name: str) -> bytes:
        """Read a file of tensors."""
        return (self.folder / f"{name}.safetensors").read_bytes()

    def save(self, progress: Progress, *, weights: bytes, rest: bytes, outputs: list[str]) -> None:
        """Keep a state: packed weights, and what else has to be known; `outputs` are those that these weights become.

        It is written while training goes on; a failure is raised by the next call, or by `wait` or `close`.
        """
        self.wait()
        tensors = {hashlib.sha256(content).hexdigest(): content for content in (weights, rest)}
        names = list(tensors)
        self.outputs |= dict.fromkeys(outputs, names[0])
        rates = self.rates[progress.epoch + (progress.step > 0)]
        checkpoint = Checkpoint(progress, rates, names[0], names[-1], dict(self.outputs))
        self._writing = self._writer.submit(self._write, checkpoint, tensors)

    def write_outputs(self, model: Path, snapshots: Path) -> None:
        """Write the best weights, and a folder of the snapshots and their checksums, as `sha256sum` lists them."""
        outputs = dict(sorted(self.outputs.items()))
        model.write_bytes(self.read(outputs.pop("model")))
        snapshots.mkdir()
        # Without a snapshot it lists none: DVC warns of an empty folder (3.67).
        sums = "".join(f"{name}  {output}\n" for output, name in outputs.items())
        (snapshots / "SHA256SUMS").write_text(sums, encoding="utf-8")
        for output, name in outputs.items():
            (snapshots / output).write_bytes(self.read(name))

    def wait(self) -> None:
        """Wait until all that was saved is on the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Finish writing."""
        self._writer.shutdown()
        self.wait()

    def _write(self, checkpoint: Checkpoint, tensors: dict[str, bytes]) -> None:
        for name, content in tensors.items():
            if not (path := self.folder / f"{name}.safetensors").exists():
                _write_whole(path, content)
        text = json.dumps(asdict(checkpoint), allow_nan=False)
        epoch, step = checkpoint.position
        path = self.folder / f"{epoch:06}-{step:09}-{checkpoint.rates[:8]}.json"
        _write_whole(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
        self._tidy(checkpoint)

    def _tidy(self, newest: Checkpoint) -> None:
        """Keep this checkpoint, the one before it, that of epoch `keep`, and those ahead, which a longer run left."""
        found = {path: one.position for path, one in self._all().items() if one}
        behind = [path for path, position in found.items() if position <= newest.position]
        for path in behind[:-2]:
            if found[path] != (self.keep, 0):
                path.unlink()
        needed = {name for one in self._all().values() if one for name in one.files()}
        for file in self.folder.glob("*.safetensors"):
            if file.stem not in needed:
                remove(file)

    def _all(self) -> dict[Path, Checkpoint | None]:
        """Read all checkpoints, by epoch and step; None for what is damaged."""
        return {path: _read(path) for path in sorted(self.folder.glob("*.json"))}

    def _is_on_the_way(self, checkpoint: Checkpoint) -> bool:
        epoch, step = checkpoint.position
        epoch += step > 0
        return step < self.steps and epoch < len(self.rates) and self.rates[epoch] == checkpoint.rates

    def _is_whole(self, name: str) -> bool:
        path = self.folder / f"{name}.safetensors"
        if path.is_file() and hash_file(path) == name:
            return True
        remove(path)  # so that a further training writes it again
        return False


@contextmanager
def open_store(params: Train, steps: int, parts: dict[str, Any]) -> Iterator[Store]:
    """Open the store of a training of `steps` steps an epoch for this process alone, and tidy up what is old.

    Its key is a hash of all that determines the weights but length and learning rates, which each checkpoint brings
    itself: the params, and `parts`, which JSON must be able to hold.
    """
    settings = params.model_dump(exclude={*FIELDS, "checkpoint_minutes"})
    key = hashlib.sha256(json.dumps([settings, parts], sort_keys=True).encode()).hexdigest()[:16]
    top = home() / RESUME / "checkpoints"
    with alone(top / f"{key}.lock", "another process trains exactly this"):
        _prune(top, keep=key)
        store = Store(top / key, steps, fingerprints(params, steps=steps), shared_epochs(params, steps=steps))
        try:
            yield store
        finally:
            store.close()


def _read(path: Path) -> Checkpoint | None:
    if not path.is_file():
        return None
    digest, _, text = path.read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return None
    with suppress(ValidationError):
        return TypeAdapter(Checkpoint).validate_json(text)
    return None


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:  # a full disk, which the half file would keep full
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself, too, outlives a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _prune(top: Path, keep: str) -> None:
    """Remove keys by age, then by size, the oldest first; never one that another process holds."""
    touched = {path: path.stat().st_mtime for path in top.iterdir() if path.is_dir()}
    total = 0
    for folder in sorted(touched, key=touched.__getitem__, reverse=True):
        total += sum(map(_size, folder.iterdir()))
        if folder.name != keep and (touched[folder] < time.time() - DAYS * 86400 or total > BYTES):
            with suppress(Timeout), FileLock(top / f"{folder.name}.lock", timeout=0):
                remove(folder)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process works there
        return 0
