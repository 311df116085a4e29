"""The resume store: what was kept is found again, whole, by those runs alone that would have come to the same."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src import checkpoints
from src.checkpoints import BYTES, DAYS, Checkpoint, Progress, Record, Store, open_store
from src.params import Train, load_params

STEPS = 5
TOP = Path(".resume/checkpoints")


PARAMS = load_params().train.model_copy(update={"epochs": 6})


def params(**changes: object) -> Train:
    return PARAMS.model_copy(update=changes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def progress(epoch: int, step: int = 0) -> Progress:
    history = tuple(Record(number, 1.0, 0.5, 1.0, 0.5, best=number == 1) for number in range(1, epoch + 1))
    return Progress(history, step, (0.5 * step, 0.0))


def keep(store: Store, epoch: int, step: int = 0, outputs: list[str] | None = None) -> None:
    """Keep a state whose tensors tell where it stands."""
    place = f"{epoch}/{step}"
    weights, rest = f"weights {place}".encode(), f"rest {place}".encode()
    store.save(progress(epoch, step), weights=weights, rest=rest, outputs=outputs or [])
    store.wait()


def found(parts: dict[str, object] | None = None, **changes: object) -> Checkpoint | None:
    with open_store(PARAMS.model_copy(update=changes), STEPS, parts or {}) as store:
        return store.newest()


def places() -> list[tuple[int, int]]:
    return [(int(path.name[:6]), int(path.name[7:16])) for path in sorted(TOP.glob("*/*.json"))]


# --- found again


def test_the_newest_state_is_found_with_its_tensors_and_outputs() -> None:
    with open_store(PARAMS, STEPS, {}) as store:
        assert store.newest() is None
        keep(store, 1, outputs=["model", "epoch-0001.safetensors"])
        keep(store, 2)
        keep(store, 2, step=3)
    with open_store(PARAMS, STEPS, {}) as store:
        newest = store.newest()
        assert newest
        assert (newest.position, newest.progress) == ((2, 3), progress(2, 3))
        assert (store.read(newest.weights), store.read(newest.rest)) == (b"weights 2/3", b"rest 2/3")
        assert {name: store.read(at) for name, at in store.outputs.items()} == {
            "model": b"weights 1/0",
            "epoch-0001.safetensors": b"weights 1/0",
        }


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 7},
        {"seed": 1},
        {"augment": PARAMS.augment.model_copy(update={"mixup": 0.1})},
        {"ema": 0.5},
        {"weight_decay": 0.1},
        {"snapshot_every": 3},
        {"patience": 2},
        {"precision": "bf16"},
        {"lr": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_with_another_param_begins_anew(changes: dict[str, object]) -> None:
    with open_store(PARAMS, STEPS, {}) as store:
        keep(store, 1)
    assert found(**changes) is None
    assert found() is not None


def test_a_run_on_other_code_data_or_machine_begins_anew() -> None:
    with open_store(PARAMS, STEPS, {"code": "a"}) as store:
        keep(store, 1)
    assert found({"code": "b"}) is None
    assert found({"code": "a"}) is not None


def test_how_often_states_are_kept_changes_no_key() -> None:
    with open_store(PARAMS, STEPS, {}) as store:
        keep(store, 1)
    assert found(checkpoint_minutes=0.5) is not None


# --- longer and shorter


def test_a_longer_run_goes_on_at_the_end_of_a_shorter_one_and_a_shorter_never_gets_a_longer_ones() -> None:
    with open_store(params(epochs=3), STEPS, {}) as store:
        for epoch in (1, 2, 3):
            keep(store, epoch)
    longer = found(epochs=6)
    assert longer
    assert longer.progress.epoch == 3
    shorter = found(epochs=2)
    assert shorter
    assert shorter.progress.epoch == 2
    assert found(epochs=1) is None


def test_states_within_the_epoch_after_the_last_are_no_shorter_runs() -> None:
    with open_store(params(epochs=3), STEPS, {}) as store:
        keep(store, 2)
        keep(store, 2, step=4)
    shorter = found(epochs=2)
    assert shorter
    assert shorter.position == (2, 0)


def test_wsd_goes_on_from_the_end_of_its_stable_part_and_cosine_begins_anew() -> None:
    for schedule, decay, expected in (("wsd", 2, 2), ("cosine", 0, None)):
        short = {"schedule": schedule, "decay": decay, "epochs": 4}
        with open_store(params(**short), STEPS, {}) as store:
            for epoch in (1, 2, 3, 4):
                keep(store, epoch)
        longer = found(**{**short, "epochs": 6})
        assert (longer.progress.epoch if longer else None) == expected
        same = found(**short)
        assert same
        assert same.progress.epoch == 4


def test_a_shorter_run_in_between_costs_the_longer_one_nothing() -> None:
    with open_store(params(epochs=6), STEPS, {}) as store:
        for epoch in (1, 2, 3, 4, 5, 6):
            keep(store, epoch)
    with open_store(params(epochs=2), STEPS, {}) as store:
        for epoch in (1, 2):
            keep(store, epoch)
    assert places() == [(1, 0), (2, 0), (5, 0), (6, 0)]
    longer = found(epochs=6)
    assert longer
    assert longer.progress.epoch == 6


# --- what is thrown away


def test_two_states_stay_and_no_tensor_that_nothing_needs() -> None:
    with open_store(PARAMS, STEPS, {}) as store:
        keep(store, 1, outputs=["model"])
        for epoch in (2, 3, 4):
            keep(store, epoch)
    assert places() == [(3, 0), (4, 0)]
    contents = sorted(path.read_bytes() for path in TOP.glob("*/*.safetensors"))
    assert contents == [b"rest 3/0", b"rest 4/0", b"weights 1/0", b"weights 3/0", b"weights 4/0"]


def test_keys_are_removed_by_age_and_then_by_size_but_never_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, days in (("aged", DAYS + 1), ("recent", 2), ("older", 3), ("in use", DAYS + 2)):
        with open_store(PARAMS, STEPS, {"name": name}) as store:
            keep(store, 1)
            (store.folder / "name").write_text(name)
        past = time.time() - days * 86400
        os.utime(store.folder, (past, past))
        if name == "in use":
            used = store.folder
    size = sum(file.stat().st_size for file in used.iterdir())

    def left() -> set[str]:
        return {path.read_text() for path in TOP.glob("*/name")}

    with open_store(PARAMS, STEPS, {"name": "in use"}):  # which is its own today, so that it counts as the newest
        assert left() == {"recent", "older", "in use"}
        monkeypatch.setattr(checkpoints, "BYTES", 2 * size + 10)
        with open_store(PARAMS, STEPS, {"name": "recent"}):
            past = time.time() - 9 * 86400
            os.utime(used, (past, past))
            monkeypatch.setattr(checkpoints, "BYTES", size + 10)
            with open_store(PARAMS, STEPS, {"name": "another"}):
                pass
            assert left() == {"recent", "in use"}  # the one in use is the oldest now, and stays all the same
    assert BYTES > 10**9


# --- damage


@pytest.fixture
def three() -> Path:
    """A folder with the states after epochs 2 and 3, the weights of epoch 1 being the model."""
    with open_store(PARAMS, STEPS, {}) as store:
        keep(store, 1, outputs=["model"])
        keep(store, 2)
        keep(store, 3)
    return store.folder


@pytest.mark.parametrize("kind", [b"weights 3/0", b"rest 3/0", "json", "cut json", "missing"])
def test_a_damaged_state_is_told_and_the_one_before_it_taken(
    three: Path, capsys: pytest.CaptureFixture[str], kind: bytes | str
) -> None:
    newest = three / sorted(path.name for path in three.glob("*.json"))[-1]
    if isinstance(kind, bytes):
        (file,) = (path for path in three.glob("*.safetensors") if path.read_bytes() == kind)
        file.write_bytes(kind[:-1] + b"\xff")
    elif kind == "missing":
        next(path for path in three.glob("*.safetensors") if path.read_bytes() == b"rest 3/0").unlink()
    else:
        content = newest.read_bytes()
        newest.write_bytes(content[:-9] if kind == "cut json" else content.replace(b'"step": 0', b'"step": 1'))
    older = found()
    assert older
    assert older.progress.epoch == 2
    assert f"the checkpoint {newest} is damaged and left out" in " ".join(capsys.readouterr().err.split())
    assert not newest.exists()


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint, with the hash that belongs to what it says then."""
    values = json.loads(file.read_bytes().partition(b"\n")[2])
    change(values)
    text = json.dumps(values)
    file.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "weights": lambda values: values.update(weights="../../../victim"),
    "rest": lambda values: values.update(rest="../../../victim"),
    "an output's tensors": lambda values: values["outputs"].update(model="../../../victim"),
    "an output": lambda values: values["outputs"].update({"../../../victim": values["weights"]}),
    "an absolute path": lambda values: values.update(rest="/etc/hostname"),
    "a newline": lambda values: values.update(rest=values["rest"] + "\n"),
    "a number as a name": lambda values: values.update(rest=7),
    "a key missing": lambda values: values.pop("rest"),
    "a key too many": lambda values: values.update(epoch=3),
    "progress": lambda values: values.update(progress=[]),
    "a step of text": lambda values: values["progress"].update(step="0"),
    "a step below 0": lambda values: values["progress"].update(step=-1),
    "a huge step": lambda values: values["progress"].update(step=10**400),
    "a sum too few": lambda values: values["progress"].update(sums=[1.0]),
    "a loss that is no number": lambda values: values["progress"]["history"][0].update(train_loss=math.nan),
    "an infinite loss": lambda values: values["progress"]["history"][0].update(train_loss=math.inf),
    "a loss of text": lambda values: values["progress"]["history"][0].update(train_loss="1"),
    "a record without best": lambda values: values["progress"]["history"][0].pop("best"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_that_says_what_none_can_is_damaged_and_reaches_no_file_outside(
    three: Path, folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object]
) -> None:
    victim = folder / "victim.safetensors"
    victim.write_text("mine")
    newest = max(three.glob("*.json"))
    assert (three / "../../../victim.safetensors").resolve() == victim
    rewrite(newest, change)
    older = found()
    assert older
    assert older.progress.epoch == 2
    assert f"{newest} is damaged and left out" in " ".join(capsys.readouterr().err.split())
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(("step", "expected"), [(0, (2, 0)), (STEPS, (2, 0)), (STEPS - 1, (2, STEPS - 1))])
def test_a_history_or_step_of_another_length_is_not_on_the_way(
    three: Path, step: int, expected: tuple[int, int]
) -> None:
    def change(values: dict[str, Any]) -> None:
        values["progress"]["history"].pop()
        values["progress"]["step"] = step

    rewrite(max(three.glob("*.json")), change)
    older = found()
    assert older
    assert older.position == expected


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link"])
@pytest.mark.parametrize("what", ["000009-000000000-00000000.json", "0.json.part", "0.safetensors", "tensors"])
def test_folders_and_links_in_the_place_of_files_are_removed_and_followed_nowhere(
    three: Path, folder: Path, what: str, kind: str
) -> None:
    if what == "tensors":
        what = next(path.name for path in three.glob("*.safetensors") if path.read_bytes() == b"rest 3/0")
        (three / what).unlink()
    outside = folder / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    if kind == "folder":
        (three / what).mkdir()
    else:
        (three / what).symlink_to(outside if kind == "link" else folder / "nowhere")
    newest = found()
    assert newest
    assert newest.progress.epoch == (2 if len(what) > 70 else 3)
    with open_store(PARAMS, STEPS, {}) as store:
        store.newest()
        keep(store, 4)
    assert sorted(path.name for path in folder.glob("*/*")) == ["checkpoints", "file"]
    again = found()
    assert again
    assert again.progress.epoch == 4
    assert not os.path.lexists(three / what)


def test_without_the_weights_of_an_output_no_state_is_whole(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (path for path in three.glob("*.safetensors") if path.read_bytes() == b"weights 1/0")
    file.write_bytes(b"something else")
    assert found() is None
    assert capsys.readouterr().err.count("is damaged") == 2
    with open_store(PARAMS, STEPS, {}) as store:
        keep(store, 1, outputs=["model"])
    again = found()
    assert again
    assert again.progress.epoch == 1


def test_a_half_written_file_is_no_state_and_is_tidied_up(three: Path) -> None:
    (three / "000004-000000000-abcdefgh.json.part").write_bytes(b"half")
    newest = found()
    assert newest
    assert newest.progress.epoch == 3
    assert not list(three.glob("*.part"))


def test_a_full_disk_costs_no_state_and_is_told_at_the_next_one(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), open_store(PARAMS, STEPS, {}) as store:  # noqa: PT012
        store.newest()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            keep(store, 4)
    assert not list(three.glob("*.part"))
    newest = found()
    assert newest
    assert newest.progress.epoch == 3


# --- one process


def _hold(seconds: float, entered: "multiprocessing.synchronize.Event") -> None:
    with open_store(PARAMS, STEPS, {}) as store:
        entered.set()
        time.sleep(seconds)
        keep(store, 1)


def test_a_second_process_says_so_waits_and_finds_what_the_first_kept(capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=_hold, args=(1.0, entered))
    process.start()
    assert entered.wait(60)
    newest = found()
    process.join(60)
    assert newest
    assert newest.progress.epoch == 1
    assert "another process trains exactly this; waiting for it to end" in capsys.readouterr().err


def test_temporary_and_queued_runs_share_the_store_of_the_repository(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(PARAMS, STEPS, {}) as store:
        keep(store, 1)
    (folder / "copy").mkdir()
    monkeypatch.chdir(folder / "copy")
    monkeypatch.setenv("DVC_ROOT", str(folder))
    assert found() is not None
    assert not (folder / "copy/.resume").exists()
