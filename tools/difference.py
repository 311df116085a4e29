"""How two files differ, in the terms of their kind: values, weights, elements, lines or bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

PIECE = 2**20  # bytes


def digest(path: Path) -> str | None:
    """Give the md5 of a file or folder as DVC does, None where there is none.

    Of the bytes themselves: DVC trusts a file whose time and size are as it remembers them.
    """
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        entries = [{"md5": digest(files[name]), "relpath": name} for name in sorted(files)]
        return f"{hashlib.md5(json.dumps(entries).encode()).hexdigest()}.dir"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def difference(old: Path, new: Path, labels: tuple[str, str]) -> list[str]:
    """Say how two files or folders differ, a line a finding, none where they do not; labels: whose they are."""
    if digest(old) == digest(new):
        return []
    if old.is_dir() and new.is_dir():
        names = {file.relative_to(side).as_posix() for side in (old, new) for file in side.rglob("*") if file.is_file()}
        return [f"{name}: {line}" for name in sorted(names) for line in difference(old / name, new / name, labels)]
    for file, label in zip((old, new), labels, strict=True):
        if not file.is_file():
            return [f"{label}: no such file"]
    kinds = {".json": _values, ".safetensors": _weights, ".npy": _elements, ".csv": _lines, ".tsv": _lines}
    with suppress(ValueError, TypeError, EOFError, SafetensorError):  # a file that is not what its name says
        if old.suffix in kinds and (found := kinds[old.suffix](old, new, labels)):
            return found
    return _bytes(old, new, labels)


def _beside(former: Mapping[str, object], later: Mapping[str, object], labels: tuple[str, str]) -> list[str]:
    """Put the unequal values of two tables side by side."""
    keys = dict.fromkeys([*former, *later])
    rows = [(key, str(former.get(key, "nothing")), str(later.get(key, "nothing"))) for key in keys]
    rows = [row for row in rows if row[1] != row[2]]
    wide, wider = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    return [f"{key:{wide}}  {labels[0]} {first:{wider}}  {labels[1]} {second}" for key, first, second in rows]


def _values(old: Path, new: Path, labels: tuple[str, str]) -> list[str]:
    former, later = (dict(_flat(json.loads(file.read_bytes()))) for file in (old, new))
    return _beside(former, later, labels)


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, list) and len(value) == 1:  # as metrics/environment.json was
        yield from _flat(value[0], name)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):  # names, such as instruction sets
        yield from ((f"{name}.{item}", "yes") for item in value)
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _weights(old: Path, new: Path, labels: tuple[str, str]) -> list[str]:
    from safetensors.torch import load_file  # torch takes seconds to import, and few need this

    former, later = load_file(old), load_file(new)
    shapes, others = ({name: f"{tuple(t.shape)} {t.dtype}" for name, t in side.items()} for side in (former, later))
    if shapes != others:
        return _beside(shapes, others, labels)
    gaps = {name: (former[name].double() - later[name].double()).abs().nan_to_num(nan=np.inf) for name in former}
    count = sum(int(gap.count_nonzero()) for gap in gaps.values())
    most = {name: float(gap.max()) for name, gap in gaps.items() if gap.numel()}
    name = max(most, key=most.__getitem__)
    total = sum(gap.numel() for gap in gaps.values())
    return [f"largest weight difference {most[name]:.3g} in {name}; {count:,} of {total:,} differ"] if count else []


def _elements(old: Path, new: Path, labels: tuple[str, str]) -> list[str]:
    former, later = np.load(old, mmap_mode="r"), np.load(new, mmap_mode="r")
    kind, other = ({"shape": side.shape, "dtype": side.dtype} for side in (former, later))
    if kind != other:
        return _beside(kind, other, labels)
    most, count = 0.0, 0
    for first, second in zip(np.atleast_1d(former), np.atleast_1d(later), strict=True):  # rows, since it may be large
        gap = np.nan_to_num(np.abs(first.astype(float) - second.astype(float)), nan=np.inf)
        most, count = max(most, float(np.max(gap, initial=0))), count + int(np.count_nonzero(gap))
    return [f"largest difference {most:g}; {count:,} of {former.size:,} elements differ"] if count else []


def _lines(old: Path, new: Path, labels: tuple[str, str]) -> list[str]:
    pairs = list(zip_longest(*(file.read_text(encoding="utf-8").splitlines() for file in (old, new))))
    unequal = [number for number, (first, second) in enumerate(pairs, start=1) if first != second]
    if not unequal:
        return []
    texts = ("nothing" if text is None else text[:100] for text in pairs[unequal[0] - 1])
    first = (f"  {label} {text}" for label, text in zip(labels, texts, strict=True))
    return [f"{len(unequal):,} of {len(pairs):,} lines differ, the first is line {unequal[0]:,}:", *first]


def _bytes(old: Path, new: Path, labels: tuple[str, str]) -> list[str]:
    sizes = ", ".join(f"{label} {file.stat().st_size:,} bytes" for label, file in zip(labels, (old, new), strict=True))
    with old.open("rb") as first, new.open("rb") as second:
        start = 0
        while (former := first.read(PIECE)) == (later := second.read(PIECE)):
            start += PIECE
    shorter = min(len(former), len(later))
    at = next((at for at in range(shorter) if former[at] != later[at]), shorter)
    return [f"{sizes}; the first {start + at:,} are the same"]
