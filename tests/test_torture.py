"""Whatever moment a run is killed at, the same command typed again goes on and ends in the same bytes."""

from pathlib import Path

import pytest

from tests.torture import RENAME, STEP, WRITE, Trial, Undisturbed, leave_alone, torture


@pytest.fixture(scope="module")
def undisturbed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What a run of four epochs comes to that nobody kills."""
    return leave_alone(trained, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    "trial",
    [
        Trial("dvc repro", (WRITE,)),
        Trial("dvc exp run --temp", (STEP,)),
        Trial("dvc exp run --queue", (RENAME,)),
    ],
    ids=lambda trial: f"{trial.place}, {' and '.join(trial.moments)}",
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    trial: Trial, trained: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    done = torture(trained, tmp_path / "trial", undisturbed, trial, seed=0)
    assert done.problems == [], done
