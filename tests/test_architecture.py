"""The house keeps its order: imports run one way, stages stay thin, and dvc.yaml names exactly what a stage uses."""

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from src import yaml12

ROOT = Path(__file__).parent.parent

ORDER = (
    "paths yaml12 provenance runtime params zipped archive sources layout images intervals split batches backbones "
    "networks optimizers schedules environment checkpoints training evaluation export figures"
).split()
WITHOUT_TORCH = {
    *("paths", "yaml12", "provenance", "runtime", "params", "zipped", "archive", "sources", "layout", "images"),
    *("intervals", "split"),
    *("schedules", "checkpoints", "figures"),
}
# Beyond the order: an evaluation that could train, or a decoder that needed a network, would be tangled, not wrong.
NEVER = {
    "backbones": {"archive", "sources", "layout", "images", "split", "batches"},
    "networks": {"batches"},
    "checkpoints": {"batches", "networks"},
    "evaluation": {"schedules", "checkpoints", "training", "figures"},
    "training": {"evaluation", "figures"},
    "sources": {"layout"},
    "split": {"archive", "sources", "layout", "images"},
    "batches": {"archive", "sources", "layout", "images", "split"},
}
LONGEST_STAGE = 60


def problems(root: Path) -> list[str]:
    """Everything about a tree that breaks the rules, one sentence each."""
    return [*_import_problems(root), *_stage_problems(root), *_dvc_problems(root)]


def _import_problems(root: Path) -> Iterator[str]:
    for file in sorted((root / "src").glob("[!_]*.py")):
        if file.stem not in ORDER:
            yield f"src/{file.name} has no place in the order of imports"
            continue
        for name in _project_imports(file):
            module = name.removeprefix("src.")
            if not name.startswith("src.") or module not in ORDER[: ORDER.index(file.stem)]:
                yield f"src/{file.name} imports {name}, which does not lie above it"
            if module in NEVER.get(file.stem, set()):
                yield f"src/{file.name} must never import {name}"
    for module in sorted(WITHOUT_TORCH):
        for code in _closure(root, root / "src" / f"{module}.py"):
            if {"torch", "torchvision", "lightning_fabric"} & _imports(root / code):
                yield f"src/{module}.py reaches torch through {code}"
    for file in sorted([*(root / "src").glob("*.py"), *(root / "stages").glob("*.py")]):
        for name, why in (("kaggle", "authenticates"), ("timm", "takes seconds")):
            if name in _imports_at_top(file):
                yield f"{file.name} imports {name} when it is imported, which {why}"


def _stage_problems(root: Path) -> Iterator[str]:
    for file in sorted((root / "stages").glob("*.py")):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_STAGE:
            yield f"stages/{file.name} has {lines} lines, more than {LONGEST_STAGE}"
        for name in _project_imports(file):
            if name.startswith("stages"):
                yield f"stages/{file.name} imports {name}"


def _dvc_problems(root: Path) -> Iterator[str]:
    stages = yaml12.read(root / "dvc.yaml")["stages"]
    scripts = {file.stem for file in (root / "stages").glob("[!_]*.py")}
    if scripts != set(stages):
        yield f"dvc.yaml and stages/ differ in {sorted(scripts ^ set(stages))}"
    for name in sorted(scripts & set(stages)):
        stage = stages[name]
        closure = _closure(root, root / "stages" / f"{name}.py")
        reads, writes = _paths_used(root, closure)
        deps = {dep for dep in _names(stage, "deps") if not dep.startswith("$")}
        code = {dep for dep in deps if dep.startswith(("src/", "stages/"))}
        outs = _names(stage, "outs") | _names(stage, "metrics") | _names(stage, "plots")
        yield from (f"{name}: {dep} is imported, but is no dep in dvc.yaml" for dep in sorted(closure - code))
        yield from (f"{name}: {dep} is a dep, but is not imported" for dep in sorted(code - closure))
        yield from _unequal(name, "read", "a dep", reads, deps - code)
        yield from _unequal(name, "written", "an out", writes, outs)
        sections = _sections(root / "stages" / f"{name}.py", root)
        if sections != _names(stage, "params"):
            yield f"{name}: uses the params {sorted(sections)}, dvc.yaml names {sorted(_names(stage, 'params'))}"
        if stage["cmd"] != f"python -m stages.{name}" or not stage.get("desc"):
            yield f"{name}: its cmd is not `python -m stages.{name}`, or it has no desc"


def _unequal(name: str, done: str, kind: str, used: set[str], declared: set[str]) -> Iterator[str]:
    """A folder that the code names covers the files below it that dvc.yaml names."""
    for path in sorted(used):
        if not any(_covers(path, other) for other in declared):
            yield f"{name}: {path} is {done}, but is not {kind} in dvc.yaml"
    for path in sorted(declared):
        if not any(_covers(other, path) for other in used):
            yield f"{name}: {path} is {kind} in dvc.yaml, but is not {done}"


def _covers(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _names(stage: dict[str, list[object]], key: str) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else str(entry) for entry in stage.get(key, [])}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module in ("src", "stages"):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def _parse(file: Path) -> ast.Module:
    return _tree(file.read_text(encoding="utf-8"))


@cache  # the copies with a mistake differ from the project in one file each
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def _project_imports(file: Path) -> list[str]:
    names = [name for node in ast.walk(_parse(file)) for name in _imported(node)]
    return [name for name in names if name.split(".")[0] in ("src", "stages", "tools", "app")]


def _imports(file: Path) -> set[str]:
    if file.suffix != ".py":
        return set()
    return {name.split(".")[0] for node in ast.walk(_parse(file)) for name in _imported(node)}


def _imports_at_top(file: Path) -> set[str]:
    return {name.split(".")[0] for node in _parse(file).body for name in _imported(node)}


def _closure(root: Path, file: Path) -> set[str]:
    """The project's files that a script is made of: itself, its packages, its imports, theirs, the templates named."""
    found: set[str] = set()
    waiting = [file, root / "src/__init__.py", *file.parent.glob("__init__.py")]
    while waiting:
        file = waiting.pop()
        if (name := file.relative_to(root).as_posix()) in found:
            continue
        found.add(name)
        if file.suffix == ".py":
            waiting += [root / f"{module.replace('.', '/')}.py" for module in _project_imports(file) if "." in module]
            words = (node.value for node in ast.walk(_parse(file)) if isinstance(node, ast.Constant))
            waiting += [file.with_name(word) for word in words if isinstance(word, str) and word.endswith(".j2")]
    return found


def _paths_used(root: Path, closure: set[str]) -> tuple[set[str], set[str]]:
    """The paths.NAME that a stage's code reads, and those it writes: what it hands to `whole` or `in_sight`."""
    values = {
        node.targets[0].id: node.value.args[0].value
        for node in _parse(root / "src/paths.py").body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.args[0], ast.Constant)
    }
    used: set[str] = set()
    written = {"ENVIRONMENT"}  # the record of the machine is for git alone
    for name in closure - {"src/params.py", "src/provenance.py", "src/runtime.py", "src/sources.py"}:
        if not name.endswith(".py"):
            continue
        for node in ast.walk(_parse(root / name)):
            used |= _path_names(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("whole", "in_sight"):
                written |= {found for part in ast.walk(node) for found in _path_names(part)}
    return {str(values[name]) for name in used - written}, {str(values[name]) for name in written - {"ENVIRONMENT"}}


def _path_names(node: ast.AST) -> set[str]:
    is_path = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "paths"
    return {node.attr} if is_path and isinstance(node, ast.Attribute) else set()


def _sections(script: Path, root: Path) -> set[str]:
    """The sections behind each `load_params().SECTION`; `load_params()` alone stands for all."""
    tree = _parse(script)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) == "load_params()"]
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.value in calls]
    if len(named) < len(calls):
        return set(yaml12.read(root / "params.yaml"))
    return {node.attr for node in named}


def test_the_project_keeps_its_rules() -> None:
    assert problems(ROOT) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the code that a test can break."""
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert problems(tmp_path) == []
    return tmp_path


def _prepend(file: Path, line: str) -> None:
    file.write_text(f"{line}\n{file.read_text(encoding='utf-8')}", encoding="utf-8")


def test_an_import_against_the_order_is_found(copy: Path) -> None:
    _prepend(copy / "src/images.py", "from src import networks")
    assert "src/images.py imports src.networks, which does not lie above it" in problems(copy)


def test_a_circle_is_found(copy: Path) -> None:
    _prepend(copy / "src/paths.py", "import src.runtime")
    _prepend(copy / "src/runtime.py", "import src.paths")
    assert "src/paths.py imports src.runtime, which does not lie above it" in problems(copy)


def test_an_import_of_training_in_evaluation_is_found(copy: Path) -> None:
    _prepend(copy / "src/evaluation.py", "from src.training import fit")
    assert "src/evaluation.py must never import src.training" in problems(copy)


def test_torch_in_a_stage_that_needs_none_is_found(copy: Path) -> None:
    _prepend(copy / "src/runtime.py", "import torch")
    assert "src/split.py reaches torch through src/runtime.py" in problems(copy)


@pytest.mark.parametrize(("name", "why"), [("kaggle", "authenticates"), ("timm", "takes seconds")])
def test_a_library_that_is_to_be_imported_late_but_is_not_is_found(copy: Path, name: str, why: str) -> None:
    _prepend(copy / "src/backbones.py", f"import {name}")
    assert f"backbones.py imports {name} when it is imported, which {why}" in problems(copy)


def test_a_stage_that_imports_a_stage_is_found(copy: Path) -> None:
    _prepend(copy / "stages/plot.py", "from stages.evaluate import main as evaluate")
    assert "stages/plot.py imports stages.evaluate" in problems(copy)


def test_a_stage_that_grows_fat_is_found(copy: Path) -> None:
    _prepend(copy / "stages/split.py", "\n" * LONGEST_STAGE)
    assert any("stages/split.py has" in problem for problem in problems(copy))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("src/batches.py", "train: src/batches.py is imported, but is no dep in dvc.yaml"),
        ("data/split.csv", "train: data/split.csv is read, but is not a dep in dvc.yaml"),
        ("models/snapshots", "train: models/snapshots is written, but is not an out in dvc.yaml"),
    ],
)
def test_a_missing_dep_or_out_is_found(copy: Path, line: str, problem: str) -> None:
    text = (copy / "dvc.yaml").read_text(encoding="utf-8")
    before, train = text.split("  train:\n")
    train = train.replace(f"      - {line}\n", "", 1)
    (copy / "dvc.yaml").write_text(f"{before}  train:\n{train}", encoding="utf-8")
    assert problem in problems(copy)


def test_a_dep_that_nothing_uses_is_found(copy: Path) -> None:
    text = (copy / "dvc.yaml").read_text(encoding="utf-8")
    (copy / "dvc.yaml").write_text(
        text.replace("      - src/figures.py\n", "      - src/figures.py\n      - src/training.py\n"), encoding="utf-8"
    )
    assert "plot: src/training.py is a dep, but is not imported" in problems(copy)


def test_a_section_of_params_that_dvc_does_not_know_is_found(copy: Path) -> None:
    file = copy / "stages/split.py"
    file.write_text(file.read_text(encoding="utf-8").replace("load_params().split", "load_params().train"))
    assert "split: uses the params ['train'], dvc.yaml names ['split']" in problems(copy)
