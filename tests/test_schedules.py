"""The learning rate of any step, and where a longer run takes the same steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.params import Train, load_params
from src.schedules import fingerprints, learning_rate, shared_epochs

STEPS = 4


def schedule(name: str, epochs: int = 10, warmup: int = 0, decay: int = 0, lr: float = 1.0) -> Train:
    changes = {"schedule": name, "epochs": epochs, "warmup": warmup, "decay": decay, "lr": lr}
    return load_params().train.model_copy(update=changes)


def rates(params: Train, steps: int = STEPS) -> list[float]:
    epochs = range(1, params.epochs + 1)
    return [learning_rate(params, epoch=e, step=s, steps=steps) for e in epochs for s in range(1, steps + 1)]


def test_a_constant_rate_stays() -> None:
    assert rates(schedule("constant", epochs=3, lr=0.1)) == [0.1] * 3 * STEPS


@pytest.mark.parametrize("name", ["constant", "wsd", "cosine", "onecycle"])
def test_a_warm_up_grows_step_by_step_to_the_full_rate(name: str) -> None:
    found = rates(schedule(name, warmup=2))
    assert found[:8] == [step / 8 for step in range(1, 9)]
    assert found[8] == (1 if name != "onecycle" else pytest.approx(32 / 33))


def test_wsd_falls_in_a_straight_line_over_its_last_epochs_alone() -> None:
    found = rates(schedule("wsd", epochs=6, warmup=1, decay=2))
    assert set(found[4:16]) == {1.0}
    assert found[16:] == pytest.approx([1 - step / 9 for step in range(1, 9)])


def test_cosine_falls_as_half_a_cosine_from_the_full_rate_towards_zero() -> None:
    found = rates(schedule("cosine", epochs=5, warmup=1))
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)])


def test_onecycle_is_two_straight_lines_up_and_down_to_just_above_zero() -> None:
    found = rates(schedule("onecycle", epochs=5, warmup=2, lr=0.5))
    assert found[:8] == pytest.approx([0.5 * step / 8 for step in range(1, 9)])
    assert found[8:] == pytest.approx([0.5 * left / 13 for left in range(12, 0, -1)])
    assert rates(schedule("onecycle", epochs=2)) == pytest.approx([left / 9 for left in range(8, 0, -1)])


schedules = st.builds(
    schedule,
    st.sampled_from(["constant", "wsd", "cosine", "onecycle"]),
    epochs=st.integers(4, 12),
    warmup=st.integers(0, 2),
    decay=st.integers(0, 2),
    lr=st.floats(1e-6, 1),
)


@given(schedules, schedules, st.integers(1, 5))
def test_fingerprints_agree_exactly_as_long_as_all_rates_do(one: Train, other: Train, steps: int) -> None:
    pairs = zip(fingerprints(one, steps=steps), fingerprints(other, steps=steps), strict=False)
    for epoch, (mine, theirs) in enumerate(pairs):
        same = rates(one, steps)[: epoch * steps] == rates(other, steps)[: epoch * steps]
        assert (mine == theirs) == same


@pytest.mark.parametrize(
    ("name", "warmup", "decay", "shared"),
    [
        ("constant", 0, 0, 10),
        ("wsd", 2, 3, 7),
        ("cosine", 0, 0, 0),
        ("cosine", 2, 0, 2),
        ("onecycle", 0, 0, 0),
        ("onecycle", 2, 0, 2),
    ],
)
def test_a_longer_run_continues_where_its_rates_part(name: str, warmup: int, decay: int, shared: int) -> None:
    assert shared_epochs(schedule(name, warmup=warmup, decay=decay), steps=STEPS) == shared
