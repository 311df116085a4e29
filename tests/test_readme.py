"""What the README says is what the project does."""

import json
import re
from typing import Any

import pandas as pd
import pytest

from src.evaluation import wilson_interval
from src.params import load_params
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_call_that_recomputes_a_step_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(README.split("```python\n")[1].split("```")[0], names)
    assert len(names["picks"]) == len(names["drawn"].shift) == load_params().train.batch
    assert 0 <= min(names["picks"]) < max(names["picks"]) < 3_472


def test_the_result_that_it_tells_is_the_committed_one() -> None:
    accuracy = json.loads((ROOT / "metrics/test.json").read_text(encoding="utf-8"))["accuracy"]
    images = int(pd.read_csv(ROOT / "metrics/classes.csv")["images"].sum())
    interval = wilson_interval(round(accuracy * images), images)
    share, low, high = (f"{100 * value:.1f}" for value in (accuracy, *interval))
    assert f"{share} % of {images:,} test images right (95 % interval {low} to {high} %)" in README


def test_every_file_that_it_names_is_there() -> None:
    names = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", README)
    assert len(names) > 5
    assert [name for pair in names for name in pair if name and not (ROOT / name).exists()] == []
