"""Outputs appear whole or not at all, and what goes wrong for the user's reasons is one sentence."""

import ast
import errno
import io
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src import yaml12
from src.runtime import PipelineError, alone, in_sight, run, whole
from tests.helpers import ROOT

STAGES = sorted(file.stem for file in (ROOT / "stages").glob("[!_]*.py"))
TOOLS = ["tools.find_lr", "tools.results", "tools.search", "tools.verify", "benchmarks.bench", "app.service"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_targets_appear_together(tmp_path: Path) -> None:
    file, folder = tmp_path / "new/a.txt", tmp_path / "b"
    write(folder / "old.txt", "old")
    with whole(file, folder) as (part, parts):
        write(part, "a")
        write(parts / "new.txt", "new")
        assert not file.exists()
        assert (folder / "old.txt").exists()
    assert file.read_text() == "a"
    assert names(folder) == ["new.txt"]
    assert names(tmp_path) == ["b", "new"]


def test_a_failure_leaves_every_target_as_it_was(tmp_path: Path) -> None:
    file, folder = write(tmp_path / "a.txt", "old"), write(tmp_path / "b/c.txt", "old").parent
    with pytest.raises(KeyboardInterrupt), whole(file, folder) as (part, parts):  # noqa: PT012
        write(part, "new")
        write(parts / "c.txt", "new")
        raise KeyboardInterrupt
    assert (file.read_text(), (folder / "c.txt").read_text()) == ("old", "old")
    assert names(tmp_path) == ["a.txt", "b"]


def test_a_watched_folder_grows_in_its_place_and_a_failure_brings_the_former_back(tmp_path: Path) -> None:
    log = write(tmp_path / "log/a.txt", "old").parent
    with pytest.raises(PipelineError), in_sight(log) as folder:  # noqa: PT012
        write(folder / "b.txt", "new")
        assert names(log) == ["b.txt"]
        raise PipelineError
    assert (log / "a.txt").read_text() == "old"
    with in_sight(log) as folder:
        write(folder / "b.txt", "new")
    assert names(log) == ["b.txt"]
    assert names(tmp_path) == ["log"]


def test_the_former_folder_of_a_killed_run_is_not_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write(tmp_path / ".log.part/a.txt", "old")  # where a kill leaves the former one,
    write(log / "a.txt", "half")  # and what it had begun
    with pytest.raises(PipelineError), in_sight(log):
        raise PipelineError
    assert (log / "a.txt").read_text() == "old"


def test_what_one_run_watched_does_not_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stages/plot.py"])
    run(lambda: None)
    monkeypatch.chdir(tmp_path)  # where there are no params, which would count as changed
    with whole(tmp_path / "a.txt") as (part,):
        write(part, "a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = threading.Event()
    order: list[str] = []

    def first() -> None:
        with alone(tmp_path / "new/lock", "someone is here"):
            inside.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with alone(tmp_path / "new/lock", "someone is here"):
        order.append("second")
    thread.join(10)
    assert order == ["first", "second"]
    assert capsys.readouterr().err.endswith(": someone is here; waiting for it to end\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PipelineError("the words\nof an error"), "the words of an error"),
        (OSError(errno.ENOSPC, "full", "data/x"), "the disk is full at data/x; free some space"),
        (PermissionError(errno.EACCES, "denied", "data/x"), "no permission at data/x (denied)"),
        (MemoryError(), "the memory is full; use a smaller train.batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "the memory is full; use a smaller"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory is full; use a smaller train.batch"),
        (KeyboardInterrupt(), "interrupted; nothing was half-written"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_one_sentence(
    error: BaseException, words: str, sentence_of: Callable[[Callable[[], None]], str]
) -> None:
    def main() -> None:
        raise error

    assert words in sentence_of(main)


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main)


def script(monkeypatch: pytest.MonkeyPatch, module: str, *words: str) -> object:
    """Run a script as `python -m` does, but in this process, and give its exit code."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(sys.modules, module, raising=False)  # another test may have imported it
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return stop.value.code


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_names_what_it_reads_and_writes_and_its_params(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(monkeypatch, f"stages.{stage}", "--help") == 0
    said = capsys.readouterr().out
    entry = yaml12.read(ROOT / "dvc.yaml")["stages"][stage]
    wanted = [dep for dep in entry["deps"] if not dep.startswith(("src/", "stages/"))] + entry["params"]
    wanted += [next(iter(out)) if isinstance(out, dict) else out for out in entry["outs"]]
    assert [word for word in wanted if word not in said] == []
    assert f"python -m stages.{stage}" in said


@pytest.mark.parametrize("tool", TOOLS)
def test_the_help_of_a_tool_helps(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(monkeypatch, tool, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {tool} [-h]")


@pytest.mark.parametrize("module", [*(f"stages.{stage}" for stage in STAGES), *TOOLS])
def test_an_unknown_argument_is_one_sentence(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(monkeypatch, module, "--epochs", "3") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{module.rpartition('.')[2]}: ")
    assert said.err.endswith(f"; `python -m {module} --help` lists the arguments\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_name_that_the_console_lacks_is_printed_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main() -> None:
        print("class 猫")
        raise PipelineError("the folder 猫 is empty")

    with pytest.raises(SystemExit):
        run(main)
    printed = {name: stream.buffer.getvalue() for name, stream in streams.items() if not stream.flush()}  # type: ignore[attr-defined]
    assert printed["stdout"].endswith(b"class \\u732b\n")
    assert printed["stderr"].endswith(b"the folder \\u732b is empty\n")


def _calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def _opens_text_by_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text in an encoding that it does not name."""
    (mode,) = [ast.unparse(arg) for arg in call.args[:1]] or ["''"]
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    text = method in ("read_text", "write_text") or (method == "open" and mode[0] in "'" and "b" not in mode)
    return text and "encoding" not in {keyword.arg for keyword in call.keywords}


@pytest.mark.parametrize("folder", ["src", "stages", "tools", "app", "benchmarks"])
def test_every_script_fails_in_sentences_and_names_the_encoding_of_its_files(folder: str) -> None:
    for file in (ROOT / folder).glob("*.py"):
        assert [ast.unparse(call) for call in _calls(file) if _opens_text_by_locale(call)] == [], file
        if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8") and file.stem != "tutorial":
            assert {"run", "in_one_sentence"} & {ast.unparse(call.func) for call in _calls(file)}, file


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a params.yaml, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    write(tmp_path / "params.yaml", "train: {lr: 0.1, lrs: 1, augment: {flip: true}}\n")
    name = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "params.yaml"], [*name, "commit", "-qm", "state"]):
        subprocess.run(["git", *words], check=True)
    return tmp_path / "params.yaml"


UNDO = "; `git checkout params.yaml` undoes your edits there, and those of a failed `dvc exp run -S`\n"


@pytest.mark.parametrize(
    ("edited", "sentence", "told"),
    [
        ("train: {lr: 9, lrs: 1, augment: {flip: true}}", "train.lr is 9, expected less", True),
        ("train: {lr: 0.1, lrs: 1, augment: {flip: no}}", "params.yaml: train.augment.flip is 'no'", True),
        ("train: {lr: 0.1, lrs: 1, augment: {flip: true}, epoch: 3}", "train.epoch is unknown", True),
        ("train: {lr: 0.1, lrs: 2, augment: {flip: true}}", "train.lr is 0.1", False),
        ("train: {lr: 9, lrs: 1, augment: {flip: true}}", "the archive is damaged", False),
        ("train: [", "train.lr is 9", False),
    ],
)
def test_a_failure_for_an_edited_param_says_how_to_undo_it(
    edited: str, sentence: str, told: bool, committed: Path, sentence_of: Callable[[Callable[[], None]], str]
) -> None:
    def main() -> None:
        raise PipelineError(sentence)

    committed.write_text(edited, encoding="utf-8")
    assert sentence_of(main).partition(": ")[2] == sentence + (UNDO if told else "\n")


def test_a_failure_needs_no_git_and_a_run_aside_has_nothing_to_undo(
    committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence_of: Callable[[Callable[[], None]], str]
) -> None:
    def main() -> None:
        raise PipelineError("train.lr is 9")

    committed.write_text("train: {lr: 9}", encoding="utf-8")
    assert UNDO in sentence_of(main)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path.parent))
    assert UNDO not in sentence_of(main)
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.setenv("PATH", "")
    assert UNDO not in sentence_of(main)
