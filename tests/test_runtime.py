"""Outputs appear whole or not at all, and what goes wrong for the user's reasons is one sentence."""

import errno
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.runtime import PipelineError, alone, in_sight, run, whole


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
