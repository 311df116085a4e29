"""A recorded revision is made again, and whatever is not what dvc.lock says is found and named."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from src import paths, yaml12
from src.environment import describe
from tests.helpers import is_one_sentence
from tests.project import Project, stages_run
from tools.difference import difference, digest
from tools.verify import Output, Scene, check_out, compare_machines, resolve

VERIFY = (sys.executable, "-m", "tools.verify")
STAGES = ["download", "prepare", "split", "train", "evaluate", "plot", "export"]
OTHER_MACHINE = "0.0.1"


class Verified(NamedTuple):
    """One run of verify: what it printed, and the state of the project before and after it."""

    project: Project
    output: str
    before: dict[str, str]
    after: dict[str, str]
    left: list[str]

    def status(self) -> dict[str, str]:
        """What the table says of each output."""
        table = self.output.partition("made again:\n")[2].splitlines()
        rows = [line.split(maxsplit=2) for line in table if line.startswith("  ") and line[2] != " "]
        return {row[1]: row[2] for row in rows if row[0] in STAGES}

    def notes(self, path: str) -> list[str]:
        """What the table says below an output."""
        lines = self.output.partition("made again:\n")[2].splitlines()
        start = next(number for number, line in enumerate(lines) if line.split()[1:2] == [path]) + 1
        end = next(number for number in range(start, len(lines)) if not lines[number].startswith("      "))
        return [line[6:] for line in lines[start:end]]

    def rows(self) -> list[str]:
        """All lines, however wide their columns are."""
        return [" ".join(line.split()) for line in self.output.splitlines()]

    def last(self) -> str:
        return self.output.splitlines()[-1]

    def left_no_trace(self) -> bool:
        assert self.after == self.before
        assert self.left == []
        return True


def state(project: Project) -> dict[str, str]:
    """All files but the tools' own notes, with their hashes, and what git knows."""
    apart = {".git", "tmp", "__pycache__", ".resume"}
    files = [path for path in project.folder.rglob("*") if path.is_file()]
    names = [path.relative_to(project.folder) for path in files]
    hashes = {str(name): str(digest(project.folder / name)) for name in names if not apart & set(name.parts)}
    commands = (["status", "--short", "--branch"], ["stash", "list"], ["for-each-ref"], ["rev-parse", "HEAD"])
    return hashes | {str(words): project.git(*words) for words in commands}


def verify(project: Project, *words: str, code: int, **env: str) -> Verified:
    temporary = project.folder.with_name(f"{project.folder.name}.tmp")
    temporary.mkdir()
    before = state(project)
    output = project.run(*VERIFY, *words, code=code, TMPDIR=str(temporary), **env)
    return Verified(project, output, before, state(project), [path.name for path in temporary.iterdir()])


def shell(path: Path, lines: str) -> str:
    """A shell for DVC to run the stages with, which does something of its own before each."""
    path.write_text(f'#!/bin/sh\n{lines}\nexec /bin/sh "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # it may be a link into DVC's cache
    path.write_bytes(content)


def edit(path: Path, **values: object) -> None:
    """Change values of a JSON file; a__b is key b of a."""
    document = json.loads(path.read_bytes())
    for name, value in values.items():
        *above, key = name.split("__")
        inner = document
        for part in above:
            inner = inner[part]
        inner[key] = value
    rewrite(path, json.dumps(document, indent=2).encode())


def add_to_a_weight(path: Path, amount: float) -> str:
    """Change the first weight of one tensor, and give the tensor's name."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = max(name for name in header if header[name].get("dtype") == "F32")
    at = 8 + length + header[name]["data_offsets"][0]
    struct.pack_into("<f", raw, at, struct.unpack_from("<f", raw, at)[0] + amount)
    rewrite(path, bytes(raw))
    return str(name)


@pytest.fixture(scope="session")
def copy(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """A way to copy the trained clone for runs that several tests look at."""

    def make(name: str) -> Project:
        folder = tmp_path_factory.mktemp(name) / "project"
        shutil.copytree(trained, folder, symlinks=True)
        return Project(folder)

    return make


@pytest.fixture(scope="session")
def sound(copy: Callable[[str], Project]) -> Verified:
    """A committed state that another machine recorded, verified where every way back to former results is open."""
    project = copy("sound")
    sets = ["avx", "avx2", "fma3"]
    edit(project.folder / "metrics/environment.json", packages__numpy=OTHER_MACHINE, instruction_sets=sets)
    edit(project.folder / "metrics/environment.json", cpu_model="AuthenticAMD, family 25, model 1")
    project.dvc("commit", "--force")
    project.commit()
    aside = project.folder.parent
    (aside / "config").mkdir()
    (aside / "config/config").write_text(f"[cache]\n    dir = {project.folder}/.dvc/cache\n", encoding="utf-8")
    (aside / "memory").mkdir()
    return verify(
        project,
        code=0,
        SHELL=shell(aside / "shell", f'echo "$DVC_STAGE $DVC_ROOT" >> {aside}/roots'),
        DVC_ROOT=str(project.folder),
        DVC_GLOBAL_CONFIG_DIR=str(aside / "config"),
        DVC_SITE_CACHE_DIR=str(aside / "memory"),
        GIT_DIR=str(project.folder / ".git"),
    )


@pytest.fixture(scope="session")
def tampered_here(copy: Callable[[str], Project]) -> tuple[Verified, str]:
    """A model and a metric that somebody changed in the workspace, and the name of the changed tensor."""
    project = copy("here")
    name = add_to_a_weight(project.folder / "models/model.safetensors", 0.5)
    edit(project.folder / "metrics/test.json", accuracy=1.0)
    return verify(project, code=1), name


@pytest.fixture(scope="session")
def tampered_then(copy: Callable[[str], Project]) -> tuple[Verified, str]:
    """A revision whose wrong model was recorded, of an archive that is at hand; the workspace has gone on."""
    project = copy("then")
    project.set(download__source="folder")
    name = add_to_a_weight(project.folder / "models/model.safetensors", 0.25)
    augmented = project.folder / "data/training_batch.npy"
    np.save(augmented, np.load(augmented)[1:])
    project.dvc("commit", "--force")
    classes = project.folder / "metrics/classes.csv"
    rewrite(classes, classes.read_bytes().replace(b"0.", b"1.", 1))
    project.commit()
    project.git("tag", "boasting")
    md5 = str(digest(augmented))
    (project.folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()
    for gone in ("data/training_batch.npy", "data/raw.zip", "models/model.safetensors"):
        (project.folder / gone).unlink()
    (project.folder / "params.yaml").write_text("nothing that a run could use", encoding="utf-8")
    return verify(project, "boasting", code=1), name


def test_a_committed_state_is_made_again_and_each_output_is_the_same(sound: Verified) -> None:
    lock = yaml12.read(sound.project.folder / "dvc.lock")["stages"]
    outputs = {out["path"]: "same" for stage in STAGES for out in lock[stage]["outs"]}
    assert {"models/model.safetensors", "metrics/train", "plots/curves.png", "plots/report.html"} <= set(outputs)
    assert sound.status() == outputs


def test_every_stage_runs_in_the_clone_and_none_comes_from_a_cache(sound: Verified) -> None:
    assert stages_run(sound.output) == STAGES
    roots = dict(line.split() for line in (sound.project.folder.parent / "roots").read_text().splitlines())
    assert list(roots) == STAGES
    assert [root for root in roots.values() if not root.startswith(f"{sound.project.folder}.tmp/verify-")] == []


def test_another_machine_is_named_and_does_not_count(sound: Verified) -> None:
    assert f"packages.numpy recorded {OTHER_MACHINE} here {np.__version__}" in sound.rows()
    assert sound.last().endswith("outputs the same, environment different")


def test_another_kind_of_cpu_is_named_where_its_name_is_the_same(sound: Verified) -> None:
    here = describe(torch.device("cpu"))
    assert f"cpu_model recorded AuthenticAMD, family 25, model 1 here {here['cpu_model']}" in sound.rows()
    others = set(here["instruction_sets"]) - {"avx", "avx2", "fma3"}
    assert {f"instruction_sets.{name} recorded nothing here yes" for name in others} <= set(sound.rows())


def test_nothing_is_left_behind(sound: Verified) -> None:
    assert sound.left_no_trace()
    assert list((sound.project.folder.parent / "memory").iterdir()) == []


def test_a_model_that_was_changed_in_the_workspace_is_named(tampered_here: tuple[Verified, str]) -> None:
    verified, tensor = tampered_here
    sentence, largest = verified.notes("models/model.safetensors")
    assert sentence == "the file here is not the one of dvc.lock"
    assert largest.startswith(f"largest weight difference 0.5 in {tensor}; 1 of ")


def test_a_metric_that_was_changed_in_the_workspace_is_shown_beside_the_true_one(
    tampered_here: tuple[Verified, str], trained: Path
) -> None:
    accuracy = Project(trained).json("metrics/test.json")["accuracy"]
    notes = tampered_here[0].notes("metrics/test.json")
    assert notes == ["the file here is not the one of dvc.lock", f"accuracy  here 1.0  rerun {accuracy}"]


def test_only_what_was_changed_is_different(tampered_here: tuple[Verified, str]) -> None:
    verified, _ = tampered_here
    different = {path for path, status in verified.status().items() if status != "same"}
    assert different == {"models/model.safetensors", "metrics/test.json"}
    assert verified.last().startswith("the working tree: 2 of ")
    assert verified.last().endswith("outputs different, environment the same")


def test_differences_in_the_workspace_are_left_as_they_are(tampered_here: tuple[Verified, str]) -> None:
    assert tampered_here[0].left_no_trace()


def test_a_wrong_model_that_was_recorded_is_found_by_running_again(tampered_then: tuple[Verified, str]) -> None:
    verified, tensor = tampered_then
    (largest,) = verified.notes("models/model.safetensors")
    assert largest.startswith(f"largest weight difference 0.25 in {tensor}; 1 of ")


def test_a_recorded_file_that_is_nowhere_any_more_is_said_to_be(tampered_then: tuple[Verified, str]) -> None:
    assert tampered_then[0].notes("data/training_batch.npy") == ["the recorded file is not at hand"]


def test_a_metric_that_was_changed_in_a_commit_is_named(tampered_then: tuple[Verified, str]) -> None:
    notes = tampered_then[0].notes("metrics/classes.csv")
    assert notes[0] == "the file in git is not the one of dvc.lock"
    assert notes[1].startswith("1 of 11 lines differ")
    assert [note.split()[0] for note in notes[2:]] == ["in", "rerun"]


def test_an_archive_that_is_at_hand_is_not_fetched_again(tampered_then: tuple[Verified, str]) -> None:
    verified, _ = tampered_then
    assert stages_run(verified.output) == STAGES[1:]
    assert verified.status()["data/raw.zip"] == verified.status()["data/raw.json"] == "given"
    assert verified.status()["data/images.npy"] == "same"


def test_a_workspace_that_has_gone_on_is_left_as_it_is(tampered_then: tuple[Verified, str]) -> None:
    assert tampered_then[0].left_no_trace()


def test_the_first_stage_that_fails_is_named(project: Project, tmp_path: Path) -> None:
    fails = shell(tmp_path / "shell", '[ "$DVC_STAGE" = prepare ] && exit 3')
    output = project.run(*VERIFY, code=1, SHELL=fails)
    assert output.endswith("verify: the working tree cannot be made again: prepare failed, for the reason above\n")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_stage_and_leaves_no_clone(
    project: Project, tmp_path: Path, stop: signal.Signals
) -> None:
    waits = shell(tmp_path / "shell", f"echo $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/stage; exec sleep 100")
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "SHELL": waits, "TMPDIR": str(tmp_path / "temporary")}
    child = subprocess.Popen(VERIFY, cwd=project.folder, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stage").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(stop)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 1
    assert errors.splitlines()[-1].startswith("verify: interrupted")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not Path("/proc", (tmp_path / "stage").read_text().strip()).exists()


def _change_a_source(project: Project) -> None:
    with (project.folder / "src/figures.py").open("a", encoding="utf-8") as file:
        file.write("# a change\n")


def _change_a_param(project: Project) -> None:
    project.set(train__lr=0.5)


def _edit_the_lock(project: Project) -> None:
    text = project.bytes("dvc.lock")
    md5 = str(digest(project.folder / "models/model.safetensors")).encode()
    rewrite(project.folder / "dvc.lock", text.replace(md5, md5[::-1], 1))


def _forget_the_lock(project: Project) -> None:
    project.git("rm", "--quiet", "dvc.lock")


def _break_the_pipeline(project: Project) -> None:
    (project.folder / "dvc.yaml").write_text("stages: nonsense", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change_a_source, ["the working tree: dvc.lock", "src/figures.py of plot; `dvc repro`"]),
        (_change_a_param, ["params.yaml train of train, params.yaml train of"]),
        (_edit_the_lock, ["models/model.safetensors of "]),
        (_forget_the_lock, ["the working tree has no dvc.lock"]),
        (_break_the_pipeline, ["the working tree is no pipeline that DVC can read", "dvc.yaml"]),
    ],
)
def test_a_state_that_is_not_a_result_is_one_sentence(
    project: Project, change: Callable[[Project], None], words: list[str]
) -> None:
    change(project)
    assert is_one_sentence("verify", 1, project.run(*VERIFY, code=1), *words)


def test_an_unknown_revision_is_one_sentence(project: Project) -> None:
    sentence = project.run(*VERIFY, "never", code=1)
    assert is_one_sentence("verify", 1, sentence, "never is no revision of this repository")


def test_a_folder_without_git_is_one_sentence(project: Project) -> None:
    shutil.rmtree(project.folder / ".git")
    sentence = project.run(*VERIFY, code=1, GIT_CEILING_DIRECTORIES=str(project.folder.parent))
    assert is_one_sentence("verify", 1, sentence, "project is no git repository")


def test_a_shallow_clone_with_changes_is_checked_out_without_its_results(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.git("commit", "--quiet", "--allow-empty", "--message", "a second one")
    project.git("clone", "--quiet", "--depth", "1", project.folder.as_uri(), str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    Path("README.md").write_text("changed", encoding="utf-8")
    commit, name = resolve(None)
    scene = Scene(name, commit, tmp_path / "clone", tmp_path / "committed", tmp_path / "fetched")
    assert set(check_out(scene)) == set(STAGES)
    assert (tmp_path / "clone/README.md").read_text(encoding="utf-8") == "changed"
    # A result that came with git could pass for one that was made again, as where a stage is frozen.
    assert not (tmp_path / "clone/plots/report.html").exists()
    assert (tmp_path / "committed/plots/report.html").exists()


def test_digests_are_those_of_dvc(trained: Path) -> None:
    lock = yaml12.read(trained / "dvc.lock")["stages"]
    outs = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    assert {path: digest(trained / path) for path in outs} == outs
    assert digest(trained / "nothing") is None


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


_ZEROS, _ONE = np.zeros((2, 3), np.uint8), np.eye(2, 3, dtype=np.uint8)
_F32 = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        (
            "a.json",
            b'{"a": {"b": 1, "list": [1, 2]}, "same": 0}',
            b'{"a": {"list": [1, 3]}, "same": 0}',
            ["a.b       old 1  new nothing", "a.list.1  old 2  new 3"],
        ),
        (
            "a.json",
            b'[{"cpu": {"sets": ["avx2", "fma3"]}}]',
            b'[{"cpu": {"sets": ["avx2", "avx512_f", "fma3"]}}]',
            ["cpu.sets.avx512_f  old nothing  new yes"],
        ),
        ("spaces.json", b'{"a":1}', b'{"a": 1}', ["old 7 bytes, new 8 bytes; the first 5 are the same"]),
        ("a.csv", b"a\n1\n", b"a\n2\n3\n", ["2 of 3 lines differ, the first is line 2:", "  old 1", "  new 2"]),
        ("a.tsv", b"a\n", b"a\n2\n", ["1 of 2 lines differ, the first is line 2:", "  old nothing", "  new 2"]),
        ("a.png", b"abcd", b"abXd", ["old 4 bytes, new 4 bytes; the first 2 are the same"]),
        (
            "a.zip",
            bytes(2**20) + b"a",
            bytes(2**20),
            ["old 1,048,577 bytes, new 1,048,576 bytes; the first 1,048,576 are the same"],
        ),
        ("a.npy", _npy(_ZEROS), _npy(_ONE * 7), ["largest difference 7; 2 of 6 elements differ"]),
        ("a.npy", _npy(_F32), _npy(_F32 * np.nan), ["largest difference inf; 3 of 3 elements differ"]),
        ("a.npy", _npy(_ZEROS), _npy(_ZEROS.T), ["shape  old (2, 3)  new (3, 2)"]),
        ("a.npy", _npy(_ZEROS), b"no array", ["old 134 bytes, new 8 bytes; the first 0 are the same"]),
        (
            "a.safetensors",
            save({"stem": _F32, "head": _F32}),
            save({"stem": _F32 + 1, "head": _F32 - np.arange(3, dtype=np.float32)}),
            ["largest weight difference 2 in head; 5 of 6 differ"],
        ),
        (
            "a.safetensors",
            save({"stem": _F32, "head": _F32}),
            save({"stem": _F32[:2]}),
            ["head  old (3,) torch.float32  new nothing", "stem  old (3,) torch.float32  new (2,) torch.float32"],
        ),
        ("a.safetensors", b"abc", b"abd", ["old 3 bytes, new 3 bytes; the first 2 are the same"]),
    ],
)
def test_a_difference_is_told_in_the_terms_of_the_file(
    tmp_path: Path, name: str, old: bytes, new: bytes, expected: list[str]
) -> None:
    for folder, content in (("old", old), ("new", new)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    assert difference(tmp_path / "old" / name, tmp_path / "new" / name, ("old", "new")) == expected
    assert difference(tmp_path / "old", tmp_path / "new", ("old", "new"))[0] == f"{name}: {expected[0]}"
    assert difference(tmp_path / "old", tmp_path / "old", ("old", "new")) == []


def test_a_folder_that_lacks_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "old/epochs").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "old/epochs/1").write_text("a", encoding="utf-8")
    assert difference(tmp_path / "old", tmp_path / "new", ("old", "new")) == ["epochs/1: new: no such file"]


@pytest.mark.parametrize(
    ("recorded", "here", "verdict"),
    [
        ({"model": "a", "cpu": "old"}, {"model": "a", "cpu": "old"}, ("the same", 0)),
        ({"model": "a", "cpu": "old"}, {"model": "a", "cpu": "new"}, ("different", 1)),
        ({"model": "b", "cpu": "old"}, {"model": "a", "cpu": "new"}, ("recorded for another model", 1)),
        (None, {"model": "a", "cpu": "new"}, ("not recorded", 0)),
    ],
)
def test_a_record_of_another_model_or_none_is_told_from_another_machine(
    tmp_path: Path, recorded: object, here: object, verdict: tuple[str, int]
) -> None:
    scene = Scene("now", "commit", tmp_path / "clone", tmp_path / "committed", tmp_path / "fetched")
    for folder, record in ((scene.clone, here), (scene.committed, recorded)):
        (folder / "metrics").mkdir(parents=True)
        if record:
            (folder / paths.ENVIRONMENT).write_text(json.dumps(record), encoding="utf-8")
    model = scene.clone / paths.MODEL
    model.parent.mkdir()
    model.write_bytes(b"the weights that dvc.lock names")
    state, lines = compare_machines(scene, [Output("train", str(paths.MODEL), str(digest(model)))])
    assert (state, len(lines)) == verdict
