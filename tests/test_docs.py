"""What docs/ tells to type works as typed."""

import re
from pathlib import Path
from typing import Any

import pytest

from app.settings import PREFIX, Settings
from src import yaml12
from tests.helpers import ROOT
from tests.project import Project


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, without the indentation of the list in which they stand."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def test_a_network_of_ones_own_is_one_function_and_one_line(project: Project) -> None:
    function, line = blocks("network.md", "python")
    (commands,) = blocks("network.md", "sh")
    file = project.folder / "src/networks.py"
    head, registry, tail = file.read_text(encoding="utf-8").partition("NETWORKS: dict")
    named, _, rest = tail.partition("}\n")
    file.write_text(f"{head}{function}\n\n{registry}{named}{line}}}\n{rest}", encoding="utf-8")
    printed = [project.run(*command.split()) for command in commands.splitlines()]
    assert "shallow" in printed[1]
    lines = [row.split() for row in printed[2].splitlines() if "test.json" in row]
    assert any(row[1] == "accuracy" for row in lines)
    params = yaml12.read(project.folder / "params.yaml")
    assert params["model"]["name"] == "shallow"
    # 5x5 convolution and its norm, then the block: two 3x3 convolutions, a 1x1 shortcut, their norms, and what weighs
    # the channels; then the classes.
    expected = 25 * 16 + 32 + (32 * 4 + 4 + 4 * 32 + 32) + 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 3 * 64 + 32 * 10 + 10
    assert project.json("metrics/train/metrics.json")["parameters"] == expected


def test_the_model_file_is_asked_as_the_page_says(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    names: dict[str, Any] = {}
    exec(blocks("deploy.md", "python")[0], names)
    assert names["probabilities"].shape == (1, 10)
    assert names["probabilities"].sum() == pytest.approx(1, abs=1e-5)


def test_every_setting_and_file_that_the_page_names_is_there() -> None:
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    named = re.findall(rf"{PREFIX}([A-Z_]+)", text)
    assert len(named) >= 3
    assert [name for name in named if name.lower() not in Settings.model_fields] == []
    files = re.findall(r"\]\(\.\./([^)]+)\)", text)
    assert len(files) >= 4
    assert [name for name in files if not (ROOT / name).exists()] == []
