"""What the names in an archive mean: its classes and official splits, read from the whole tree of its folders.

- A folder above all others means nothing (raw-img/). A folder named train, validation or test (seg_train, Testing,
  val2017) is an official split where folders with images lie below it, or where it lies beside other splits.
- Of the folders that remain above an image, one level is its class: the only one that tells classes apart, or
  prepare.class_level.
- A folder that prepare.classes maps to null is left out before anything is read, and so is one with the same files as
  another folder of its name and split. A folder that prepare.classes maps to a name is a class.
Where the names allow several readings, or none, nothing is guessed: a PipelineError names the readings and the param
that chooses.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from src.archive import Idx, Item, contents, pair_idx
from src.runtime import PipelineError, counted
from src.zipped import Entry

SPLITS = ("train", "validation", "test")
_SPLIT = re.compile(r"(?:(train|training)|(val|valid|validation)|(test|testing|t10k))(?:sets?|data|images?|imgs?)?\d*")

# Folders of these names hold the parts of one data set, pictures and what is known of them, not its classes.
_PARTS = frozenset(
    "images image imgs img jpegimages pictures photos masks mask labels label annotations annotation ground_truth "
    "groundtruth gt segmentation segmentations".split()
)
# A folder of these tells of the data; one of other suffixes, or of none, may be a class of images that cannot be read.
_DOCUMENTS = frozenset(
    " .txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .log .py .ipynb .sh .doc .docx "
    ".xls .xlsx .names".split(" ")
)
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx")
# cat.0, Abyssinian_100, dog (7): a word, and a number of its own.
_NUMBERED = re.compile(r"([^\W\d_]\D*?)[\W_]*\d+\W*")

# Why a file is no image of a class.
_HIDDEN = "hidden by systems and devices"
_OTHER = "not images by their names"
_UNMATCHED = "not matched by prepare.include"
_MAPPED = "by prepare.classes"
_COPY = "copies of the same files in another folder"
_UNPAIRED = "idx files that are copies, or lack their images or labels"

_ROWS, _NAMES = 20, 8
"""What a table, and a sentence, shows at most."""

Names = Mapping[str, str | None]
"""prepare.classes: what a folder's class is called; None leaves the folder out."""
Matches = Callable[[str], bool]


@dataclass(slots=True)
class Tally:
    """How many files there are of a kind, and the first of them."""

    count: int = 0
    example: str = ""

    def add(self, path: str, count: int = 1) -> None:
        """Count some more files, of which `path` is one."""
        self.example = self.example or path
        self.count += count


@dataclass(frozen=True)
class Layout:
    """The images of an archive that are used, with their classes and official splits.

    folders: class and split of each folder that holds some, by its path; idx: pairs of idx files with their split;
    counts: how many, by class and split; examples: a path of each class; left_out: the other files, by the reason.
    Iterated over, it yields the images in the archive's own order, anew each time: they are never held.
    """

    path: Path
    matches: Matches
    names: Names
    folders: Mapping[str, tuple[str, str]]
    idx: Sequence[tuple[Idx, str]]
    counts: Mapping[tuple[str, str], int]
    examples: Mapping[str, str]
    left_out: Mapping[str, Tally]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[Item]:
        yield from _idx_items(self.idx, self.names, self.matches)
        for kind, entry in contents(self.path) if self.folders else ():
            path = _path(entry)
            assigned = self.folders.get(path.rpartition("/")[0])
            if kind == "image" and assigned and self.matches(path):
                yield Item(path, *assigned, entry)


def read_layout(path: Path, include: str = "*", classes: Names | None = None, class_level: int = 0) -> Layout:
    """Read which classes and splits an archive holds, from its names and the params of `prepare`.

    Raises PipelineError where several readings are possible, or none with at least two classes.
    """
    names = {unicodedata.normalize("NFC", folder): name for folder, name in (classes or {}).items()}
    matches = _matcher(include)
    tree = _scan(path, matches)
    every = [(pair, official(PurePosixPath(pair.images.name).name)) for pair in pair_idx(path, tree.idx)]
    if len(tree.idx) > 2 * len(every):
        tree.left_out[_UNPAIRED].add(tree.idx[-1].name, len(tree.idx) - 2 * len(every))
    pairs = [pair for pair in every if next(_idx_items([pair], {}, matches), None)]
    assigned: dict[Folder, tuple[str, str]] = {}
    groups: Iterable[tuple[tuple[str, str], int, str]]
    if pairs:
        _check_kinds(tree, pairs)
        codes = {str(code) for pair, _ in pairs for code in set(pair.labels)}
        _check_names(names, codes, codes)
        groups = (((item.label, item.official), 1, item.path) for item in _idx_items(pairs, names, matches))
    else:
        assigned = _read_folders(path, tree, names, class_level)
        groups = ((of, folder.images, folder.example) for folder, of in assigned.items())
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[str, str] = {}
    for (label, split), count, example in groups:
        counts[label, split] += count
        examples.setdefault(label, example)
    if rest := sum(len(pair.labels) for pair, _ in every) - (counts.total() if pairs else 0):
        tree.left_out[f"{_UNMATCHED}, or {_MAPPED}"].add(every[0][0].images.name, rest)
    if not counts:
        raise PipelineError(f"no image of the archive is left: {'; '.join(_lines(tree.left_out)) or 'it is empty'}")
    if len(examples) < 2:
        raise PipelineError(
            f"prepare.classes and prepare.include leave 1 class ({_some(examples)}), expected at least 2 to tell apart"
        )
    folders = {where: assigned[folder] for where, folder in tree.folders.items() if folder in assigned}
    return Layout(path, matches, names, folders, pairs, counts, examples, tree.left_out)


@lru_cache(1024)
def official(name: str) -> str:
    """Tell the split that a name stands for, '' for none: train, Training, test_set, seg_train, testSet, val2017."""
    for word in re.split(r"[-_. ]+|(?<=[a-z])(?=[A-Z])", name):
        if found := _SPLIT.fullmatch(word.lower()):
            return SPLITS[(found.lastindex or 1) - 1]
    return ""


def describe(layout: Layout) -> str:
    """Draw the table that a user checks: each class with its images by split and an example, and what was left out."""
    splits = [split for split in (*SPLITS, "") if any(split == found for _, found in layout.counts)]
    heads = [] if splits == [""] else [split or "without" for split in splits]
    rows = [["class", *heads, "images", "example"]]
    for label, example in islice(sorted(layout.examples.items()), _ROWS):
        numbers = [layout.counts.get((label, split), 0) for split in splits]
        shown = [f"{number:,}" for number in (*numbers[: len(heads)], sum(numbers))]
        rows.append([_short(label, 28), *shown, _short(example, 48)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join((label.ljust(widths[0]), *map(str.rjust, numbers, widths[1:]), example))
        for label, *numbers, example in rows
    ]
    if (more := len(layout.examples) - _ROWS) > 0:
        lines.append(f"… and {more:,} more")
    return "\n".join((*lines, *(f"left out: {line}" for line in _lines(layout.left_out))))


def _lines(left_out: Mapping[str, Tally]) -> list[str]:
    return [f"{tally.count:,} {reason}, such as {_short(tally.example, 48)}" for reason, tally in left_out.items()]


# --- the tree ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Folder:
    """A folder, with counts of what lies directly in it.

    images: those that are used; unused: those that prepare.include does not match, copies, and idx files; others: files
    that are no images, by suffix; content: the same for the same images in any order; total: images, with those of all
    folders below.
    """

    name: str
    parent: "Folder | None" = None
    children: dict[str, "Folder"] = field(default_factory=dict)
    images: int = 0
    unused: int = 0
    others: Counter[str] = field(default_factory=Counter)
    content: int = 0
    example: str = ""
    total: int = 0

    def tree(self) -> Iterator["Folder"]:
        """Yield this folder and all below it, each before those below it."""
        waiting = [self]
        while waiting:
            yield (folder := waiting.pop())
            waiting += folder.children.values()

    def parts(self) -> list[str]:
        """Give the names of the folders from the top of the archive down to this one."""
        names, folder = list[str](), self
        while folder.parent:
            names.append(folder.name)
            folder = folder.parent
        return names[::-1]

    def filled(self) -> list["Folder"]:
        """List the folders directly below that hold images, at any depth."""
        return [child for child in self.children.values() if child.total]


@dataclass
class _Tree:
    """What one pass over an archive finds. folders: each by its path."""

    root: Folder
    folders: dict[str, Folder]
    idx: list[Entry]
    left_out: dict[str, Tally]


def _scan(path: Path, matches: Matches) -> _Tree:
    root = Folder("")
    tree = _Tree(root, {"": root}, [], defaultdict(Tally))
    suffixes: Counter[str] = Counter()
    for kind, entry in contents(path):
        name = _path(entry)
        where, _, file = name.rpartition("/")
        if kind == "hidden":
            if file:
                tree.left_out[_HIDDEN].add(name)
            continue
        if not (folder := tree.folders.get(where)):
            folder = tree.folders[where] = _descend(root, where)
        if kind == "idx":
            tree.idx.append(entry)
            folder.unused += 1
        elif kind == "other":
            suffix = PurePosixPath(file).suffix.lower()
            folder.others[suffix] += 1
            suffixes[suffix] += 1
            tree.left_out[_OTHER].add(name)
        elif kind == "image" and matches(name):
            folder.images += 1
            folder.content += hash((entry.crc, entry.size))
            folder.example = folder.example or name
        elif kind == "image":
            folder.unused += 1
            tree.left_out[_UNMATCHED].add(name)
    if suffixes:
        tree.left_out[f"{_OTHER} ({_count(suffixes)})"] = tree.left_out.pop(_OTHER)
    _add_up(root)
    return tree


def _path(entry: Entry) -> str:
    """Give the name as it is written down: pandas writes a lone \\r as it is, and reads it as the end of a row."""
    return entry.name.replace("\r", "\\r")


def _matcher(include: str) -> Matches:
    if include == "*":
        return lambda _: True
    match = re.compile(translate(unicodedata.normalize("NFC", include)), re.IGNORECASE).match
    return lambda path: match(unicodedata.normalize("NFC", path)) is not None


def _descend(folder: Folder, where: str) -> Folder:
    """Go down to a folder by its path, through folders that are made where they are missing."""
    for part in unicodedata.normalize("NFC", where).split("/"):
        if part not in ("", "."):
            folder = folder.children.setdefault(part, Folder(part, folder))
    return folder


def _add_up(root: Folder) -> None:
    for folder in reversed(list(root.tree())):
        folder.total = folder.images + sum(child.total for child in folder.children.values())


def _leave_out(tree: _Tree, names: Names) -> None:
    """Take the folders that are mapped to null out of the tree, then those that hold copies."""
    for folder in tree.root.tree():
        if folder.parent and names.get(folder.name, "") is None:
            if folder.total:
                example = next(below.example for below in folder.tree() if below.images)
                tree.left_out[f"{_MAPPED}: {_yaml({folder.name: None})}"].add(example, folder.total)
            del folder.parent.children[folder.name]
            folder.children = {}
    for folder in _copies(tree.root):
        tree.left_out[_COPY].add(folder.example, folder.images)
        folder.images, folder.unused = 0, folder.unused + folder.images
    _add_up(tree.root)


def _copies(root: Folder) -> list[Folder]:
    """List the folders with the images of another one of the same name and split, where all beside them are such, too.

    Seen on Kaggle: cell_images/Parasitized is there again as cell_images/cell_images/Parasitized.
    """
    alike: dict[tuple[str, int, int], list[Folder]] = defaultdict(list)
    for folder in root.tree():
        if folder.images:
            alike[folder.name.casefold(), folder.images, folder.content].append(folder)
    copies: set[Folder] = set()
    for group in alike.values():
        seen: set[str] = set()
        for parts, folder in sorted(
            ((folder.parts(), folder) for folder in group), key=lambda pair: (len(pair[0]), pair[0])
        ):
            split = next(filter(None, map(official, reversed(parts))), "")
            if split in seen:
                copies.add(folder)
            seen.add(split)
    beside = {folder: folder.parent.filled() for folder in copies if folder.parent}
    return [folder for folder, others in beside.items() if len(others) > 1 and copies.issuperset(others)]


# --- the reading ------------------------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """A folder that holds images, its official split, and the folders from the top down that may be its class."""

    folder: Folder
    split: str
    levels: tuple[Folder, ...]

    def at(self, level: int) -> Folder:
        """Give the folder of a level, 1 or more, or the innermost one above it."""
        return self.levels[min(level, len(self.levels)) - 1]


def _read_folders(path: Path, tree: _Tree, names: Names, class_level: int) -> dict[Folder, tuple[str, str]]:
    """Give the class and the split of each folder that holds images."""
    _check_names(names, {folder.name for folder in tree.root.tree()}, {f.name for f in tree.root.tree() if f.images})
    _leave_out(tree, names)
    named = {folder for folder, name in names.items() if name is not None}
    leaves = list(_leaves(tree.root, named))
    if not leaves:
        return {}
    inside = [leaf for leaf in leaves if leaf.levels]
    level = _find_level(inside, named, class_level)
    labels = {leaf.folder: leaf.at(level).name for leaf in inside if level}
    parts = {label for label in labels.values() if label.lower() in _PARTS} - named
    if len(set(labels.values())) < 2 or len(parts) > 1:
        raise PipelineError(_no_classes(path, leaves))
    _check_alike(sorted(set(labels.values())), names)
    _check_unlabelled(leaves, labels, names)
    _check_unreadable(dict.fromkeys(leaf.at(level).parent for leaf in inside))
    _check_names(dict.fromkeys(named), set(labels.values()), set(labels.values()))
    splits = {leaf.folder: leaf.split for leaf in inside}
    return {
        folder: (names.get(labels[folder]) or labels[folder], splits[folder])
        for folder in tree.folders.values()
        if folder in splits
    }


def _leaves(root: Folder, named: set[str]) -> Iterator[Leaf]:
    """Walk down the tree, past splits and the folders that hold everything."""
    waiting = [Leaf(root, "", ())]
    while waiting:
        leaf = waiting.pop()
        if leaf.folder.images:
            yield leaf
        inner = leaf.folder.filled()
        beside = {official(folder.name) for folder in inner}
        for folder in inner:
            if (split := official(folder.name)) and _is_split(folder, beside, named):
                waiting.append(Leaf(folder, split, leaf.levels))
            elif len(inner) == 1 and folder.filled() and not leaf.levels:
                waiting.append(Leaf(folder, leaf.split, ()))
            else:
                waiting.append(Leaf(folder, leaf.split, (*leaf.levels, folder)))


def _is_split(folder: Folder, beside: set[str], named: set[str]) -> bool:
    """Tell whether a folder that is named as a split is one, and not a class: trains beside buses are vehicles.

    beside: the splits that all folders there are named as.
    """
    return bool(folder.filled()) or (folder.name not in named and ("" not in beside or len(beside) > 2))


def _find_level(inside: Sequence[Leaf], named: set[str], wanted: int) -> int:
    """Find the level of the classes: `wanted`, or the only one that divides the images; 0 where there is none.

    Raises PipelineError where several levels divide them differently, or where `wanted` does not.
    """
    deepest = max((len(leaf.levels) for leaf in inside), default=0)
    levels = [wanted] if wanted else range(1, min(deepest, _NAMES) + 1)
    readings = [(level, [leaf.at(level).name for leaf in inside]) for level in levels]
    readings = [(level, labels) for level, labels in readings if len(set(labels)) > 1]
    if wanted and inside and (wanted > deepest or not readings):
        what = (
            f"the folders are {deepest} deep" if wanted > deepest else f"all lie in {inside[0].at(wanted).name!r} there"
        )
        raise PipelineError(f"prepare.class_level is {wanted}, but {what}; 0 finds the classes, or names the choices")
    divisions: dict[tuple[int, ...], tuple[int, list[str]]] = {}
    for level, labels in [reading for reading in readings if named.issubset(reading[1])] or readings:
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        divisions.setdefault(tuple(numbers[label] for label in labels), (level, labels))
    if len(divisions) > 1:
        ways = [f"{_some(sorted(labels))} (prepare.class_level: {level})" for level, labels in divisions.values()]
        raise PipelineError(
            f"the folders can be read as the classes {', or as '.join(ways)}; write the level that is meant into "
            "params.yaml, or leave folders out by prepare.classes: {NAME: null}"
        )
    return next((level for level, _ in divisions.values()), 0)


def _no_classes(path: Path, leaves: Sequence[Leaf]) -> str:
    """Say that there are no two classes, and where they may be told instead."""
    names = sorted({leaf.folder.name for leaf in leaves})
    odd = [name for name in names if official(name) or name.lower() in _PARTS]
    if names == [""]:
        what = "the images of the archive lie in no folder"
    elif odd:
        which = "which" if odd == names else f"of which {_some(odd)}"
        no_class = "by its name is no class" if len(odd) == 1 else "by their names are no classes"
        what = f"the images of the archive lie in {_some(names)}, {which} {no_class}"
    else:
        what = f"the images of the archive lie in {_some(filter(None, names))}, expected at least 2 class folders"
    if others := list(_other_labels(path)):
        what += f"; classes may be meant by {' or by '.join(others)}, which is not supported yet"
    what += "; sort the images into class folders (such as cat/1.jpg, dog/1.jpg)"
    if odd and len(names) > 1:
        what += f", or write prepare.classes: {_yaml({name: name for name in names})} if these folders are the classes"
    return what


def _other_labels(path: Path) -> Iterator[str]:
    """Yield the ways but folders in which an archive seems to tell classes: numbered names, and tables."""
    words: Counter[str] = Counter()
    example, table = "", ""
    for kind, entry in contents(path):
        file = PurePosixPath(entry.name)
        if kind == "image" and (found := _NUMBERED.fullmatch(file.stem)):
            words[found[1]] += 1
            example = example or entry.name
        elif kind == "other" and file.suffix.lower() in _TABLES:
            table = table or entry.name
    if 1 < len(words) <= words.total() / 2:
        yield f"the files' names ({_some(words)}, as in {example!r})"
    if table:
        yield f"the table {table!r}"


def _check_kinds(tree: _Tree, pairs: Sequence[tuple[Idx, str]]) -> None:
    if folder := next((folder for folder in tree.root.tree() if folder.images), None):
        suffix = PurePosixPath(folder.example).suffix
        raise PipelineError(
            f"the archive has images in idx files ({pairs[0][0].images.name!r}) and {tree.root.total:,} others (such "
            f"as {folder.example!r}); choose by prepare.include: '*ubyte*' or '*{suffix}'"
        )


def _check_names(names: Iterable[str], known: set[str], shown: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        raise PipelineError(f"prepare.classes names the folder {unknown[0]!r}; the archive has {_some(sorted(shown))}")


def _check_unlabelled(leaves: Sequence[Leaf], labels: Mapping[Folder, str], names: Names) -> None:
    """Ask what images are that lie beside class folders, or beside splits with other classes."""
    called = {folder: names.get(label) or label for folder, label in labels.items()}
    classes: dict[str, set[str]] = defaultdict(set)
    for folder, split, levels in leaves:
        if levels:
            classes[split].add(called[folder])
    known = set[str]().union(*(classes[split] for split in SPLITS))
    odd = {split: classes[split] for split in SPLITS if not classes[split] & (classes["train"] or known)}
    odd[""] = classes[""] - known if known else set()
    asked = [
        leaf
        for leaf in leaves
        if not leaf.levels or (called[leaf.folder] in odd.get(leaf.split, ()) and labels[leaf.folder] not in names)
    ]
    if not asked:
        return
    rest = set(leaves).difference(asked)
    images = counted(sum(leaf.folder.images for leaf in asked), "image")
    what = (
        f"{images}, such as {asked[0].folder.example!r}, beside the "
        f"class folders {_some(sorted({labels[leaf.folder] for leaf in rest}))}"
    )
    if loose := [leaf.folder for leaf in asked if leaf.folder.filled() or not leaf.folder.parent]:
        depth = 1 + len(loose[0].parts())
        raise PipelineError(
            f"the archive has {what}, in none of them; move them into class folders, or leave them out by "
            f"prepare.include: '{'*/' * depth}*'"
        )
    others = {part for leaf in rest for part in leaf.folder.parts()}
    unlike = [next((part for part in leaf.folder.parts() if part not in others), leaf.folder.name) for leaf in asked]
    own = {label: label for label in (labels.get(leaf.folder, leaf.folder.name) for leaf in asked)}
    raise PipelineError(
        f"the archive has {what}: images without labels, or a class? Leave them out by prepare.classes: "
        f"{_yaml(dict.fromkeys(unlike))}, or make them a class by prepare.classes: {_yaml(own)}"
    )


def _check_unreadable(parents: Iterable[Folder | None]) -> None:
    """Stop at a folder among the class folders that holds no image that can be read."""
    for folder in [child for parent in parents if parent for child in parent.children.values()]:
        if folder.total or official(folder.name) or any(below.unused for below in folder.tree()):
            continue
        files = sum((below.others for below in folder.tree()), Counter[str]())
        if files and files.keys() != {""} and files.keys() <= _DOCUMENTS:
            continue
        what = f"holds no image that can be read, but {_count(files)}" if files else "is empty"
        raise PipelineError(
            f"the class folder {'/'.join(folder.parts())!r} {what}; put images into it, or leave it out "
            f"by prepare.classes: {_yaml({folder.name: None})}"
        )


def _check_alike(labels: Sequence[str], names: Names) -> None:
    """Ask about classes whose names differ only in case, spaces or the form of their letters."""
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[" ".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    groups = [
        group
        for group in alike.values()
        if len({names.get(label, label) for label in group}) > 1 and not names.keys() >= {*group}
    ]
    if groups:
        same = {label: group[0] for group in groups for label in group[1:]}
        raise PipelineError(
            f"the class folders {_some(label for group in groups for label in group)} differ only in case, spaces or "
            f"the form of their letters; write prepare.classes: {_yaml(same)} if they are the same, or "
            f"{_yaml({label: label for group in groups for label in group})} if they are not"
        )


# --- idx files --------------------------------------------------------------------------------------------------------


def _idx_items(pairs: Iterable[tuple[Idx, str]], names: Names, matches: Matches) -> Iterator[Item]:
    for pair, split in pairs:
        for row, code in enumerate(pair.labels):
            path, label = f"{pair.images.name}#{row}", names.get(str(code), str(code))
            if label is not None and matches(path):
                yield Item(path, label, split, pair.images, row)


# --- words ------------------------------------------------------------------------------------------------------------


def _some(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - _NAMES:,} more" if len(distinct) > _NAMES else ""
    return ", ".join(repr(name) for name in distinct[:_NAMES]) + more


def _count(suffixes: Counter[str]) -> str:
    counts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(_NAMES)]
    return ", ".join(counts) + (", …" if len(suffixes) > _NAMES else "")


def _yaml(mapping: Mapping[str, str | None]) -> str:
    """Write a mapping as params.yaml has it, with quotes where a name is no plain word."""
    words = [tuple(map(_yaml_word, pair)) for pair in mapping.items()]
    return "{" + ", ".join(f"{folder}: {name}" for folder, name in words) + "}"


def _yaml_word(word: str | None) -> str:
    if word is None:
        return "null"
    plain = re.fullmatch(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[^\W\d][\w-]*", word, re.IGNORECASE)
    return word if plain else "'" + word.replace("'", "''") + "'"


def _short(text: str, most: int) -> str:
    """Cut a name in its middle, and show what cannot be printed as an escape."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
