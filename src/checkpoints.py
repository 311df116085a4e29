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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.params import Train
from src.provenance import hash_file
from src.runtime import RESUME, alone, home, remove, say
from src.schedules import FIELDS, fingerprints, shared_epochs

DAYS, BYTES = 30, 20 * 2**30
"""Keys that nobody touched for so long, and the oldest ones beyond so much, are removed when a training starts."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training has come to.

    epoch: how many have ended; step: how many steps of the next one are done; rates: the fingerprint of all learning
    rates up to the end of the epoch that these belong to; progress: what `save` was told; weights, rest: names of the
    tensors; outputs: by output, the names of the tensors that belong there by now.
    """

    epoch: int
    step: int
    rates: str
    progress: dict[str, Any]
    weights: str
    rest: str
    outputs: dict[str, str]

    def files(self) -> set[str]:
        """Name all files of tensors that it needs."""
        return {self.weights, self.rest, *self.outputs.values()}


class Store:
    """The checkpoints of one key. Whatever is in it is whole: a temporary name, fsync, then a rename.

    rates: the fingerprint of the learning rates up to each epoch's end, from epoch 0; keep: the epoch from which a
    longer run continues, whose checkpoint stays.
    """

    def __init__(self, folder: Path, rates: list[str], keep: int) -> None:
        self.folder, self.rates, self.keep = folder, rates, keep
        self.outputs: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # for `_prune`: touched today
        for left in folder.glob("*.part"):  # of a process that was killed
            left.unlink()
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
            path.unlink()
        return None

    def read(self, name: str) -> bytes:
        """Read a file of tensors."""
        return (self.folder / f"{name}.safetensors").read_bytes()

    def save(
        self, epoch: int, step: int, progress: dict[str, Any], *, weights: bytes, rest: bytes, outputs: list[str]
    ) -> None:
        """Keep a state: packed weights, and what else has to be known; `outputs` are those that these weights become.

        It is written while training goes on; a failure is raised by the next call, or by `wait` or `close`.
        """
        self.wait()
        tensors = {hashlib.sha256(content).hexdigest(): content for content in (weights, rest)}
        names = list(tensors)
        self.outputs |= dict.fromkeys(outputs, names[0])
        rates = self.rates[epoch + (step > 0)]
        checkpoint = Checkpoint(epoch, step, rates, progress, names[0], names[-1], dict(self.outputs))
        self._writing = self._writer.submit(self._write, checkpoint, tensors)

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
        text = json.dumps(asdict(checkpoint))
        path = self.folder / f"{checkpoint.epoch:06}-{checkpoint.step:09}-{checkpoint.rates[:8]}.json"
        _write_whole(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())
        self._tidy(checkpoint)

    def _tidy(self, newest: Checkpoint) -> None:
        """Keep this checkpoint, the one before it, that of epoch `keep`, and those ahead, which a longer run left."""
        found = {path: (one.epoch, one.step) for path, one in self._all().items() if one}
        behind = [path for path, place in found.items() if place <= (newest.epoch, newest.step)]
        for path in behind[:-2]:
            if found[path] != (self.keep, 0):
                path.unlink()
        needed = {name for one in self._all().values() if one for name in one.files()}
        for file in self.folder.glob("*.safetensors"):
            if file.stem not in needed:
                file.unlink()

    def _all(self) -> dict[Path, Checkpoint | None]:
        """Read all checkpoints, by epoch and step; None for what is damaged."""
        return {path: _parse(path.read_bytes()) for path in sorted(self.folder.glob("*.json"))}

    def _is_on_the_way(self, checkpoint: Checkpoint) -> bool:
        epoch = checkpoint.epoch + (checkpoint.step > 0)
        return epoch < len(self.rates) and self.rates[epoch] == checkpoint.rates

    def _is_whole(self, name: str) -> bool:
        path = self.folder / f"{name}.safetensors"
        if path.exists() and hash_file(path) == name:
            return True
        path.unlink(missing_ok=True)  # so that a further training writes it again
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
        store = Store(top / key, fingerprints(params, steps=steps), shared_epochs(params, steps=steps))
        try:
            yield store
        finally:
            store.close()


def _parse(content: bytes) -> Checkpoint | None:
    digest, _, text = content.partition(b"\n")
    return Checkpoint(**json.loads(text)) if hashlib.sha256(text).hexdigest().encode() == digest else None


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
