"""The learning-rate finder tells a rate at which the network learns, and touches nothing but its picture."""

from pathlib import Path

import pytest

from src.runtime import PipelineError
from tests.project import Project
from tools.find_lr import Trial, suggest


def test_the_suggested_rate_lies_where_the_loss_falls_fastest() -> None:
    losses = [2.3] * 20 + [2.3 - 0.2 * step for step in range(10)] + [0.4, 0.3, 0.3, 0.5, 1.0]
    trials = [Trial(10.0 ** (place - 30), loss) for place, loss in enumerate(losses)]
    assert trials[20].rate <= suggest(trials) <= trials[30].rate


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    with pytest.raises(PipelineError, match="the loss did not fall; begin with a smaller --lowest"):
        suggest([Trial(10.0**place, float(place + 1)) for place in range(20)])


def test_the_finder_draws_the_same_picture_twice_and_changes_nothing_else(project: Project) -> None:
    before = project.git("status", "--porcelain")
    command = ("python", "-m", "tools.find_lr", "--steps", "40", "--lowest", "1e-4", "--out", "found.png")
    first = project.run(*command)
    picture = project.bytes("found.png")
    rate = float(first.partition("train.lr=")[2].split(";")[0])
    assert 1e-4 < rate < 1e-1
    assert project.run(*command).splitlines()[-1] == first.splitlines()[-1]
    assert project.bytes("found.png") == picture
    (project.folder / "found.png").unlink()
    assert project.git("status", "--porcelain") == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--lowest", "1", "--highest", "0.1"), "expected 0 < --lowest < --highest, and at least 10 --steps"),
        (("--steps", "3"), "expected 0 < --lowest < --highest, and at least 10 --steps"),
    ],
    ids=["turned round", "too few"],
)
def test_a_range_that_is_none_is_refused(project: Project, words: tuple[str, ...], sentence: str) -> None:
    printed = project.run("python", "-m", "tools.find_lr", *words, code=1)
    assert sentence in printed
    assert "Traceback" not in printed
    assert not Path(project.folder, "lr.png").exists()
