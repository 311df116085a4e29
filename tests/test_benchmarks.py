"""The benchmarks compare like with like, and the page says what they found and nothing else."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import bench, page, tutorial, ways
from src import images
from src.figures import style
from src.runtime import PipelineError
from tests.helpers import ROOT


def test_the_committed_page_and_pictures_are_what_write_makes_of_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = json.loads((ROOT / bench.RESULTS).read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    page.write(known)
    written = sorted(Path("docs").iterdir())
    assert len(written) == 4
    assert [file for file in written if file.read_bytes() != (ROOT / file).read_bytes()] == []


@pytest.mark.parametrize("draw", [page.rates, page.step])
def test_no_axis_or_grid_line_runs_through_a_label_above_a_bar(draw: Callable[[page.Known], Figure]) -> None:
    with style():
        figure = draw(json.loads((ROOT / bench.RESULTS).read_text(encoding="utf-8")))
        figure.draw_without_rendering()
    for axes in figure.axes:
        lines = [*axes.spines.values(), *axes.get_xgridlines(), *axes.get_ygridlines()]
        boxes = [line.get_window_extent() for line in lines if line.get_visible()]
        crossed = [
            text.get_text() for text in axes.texts if any(text.get_window_extent().overlaps(box) for box in boxes)
        ]
        assert (len(axes.texts) > 1, crossed) == (True, [])


def test_every_ratio_that_is_wanted_was_measured_five_times() -> None:
    known = json.loads((ROOT / bench.RESULTS).read_text(encoding="utf-8"))
    assert page.WANTED.keys() - known.keys() == set()
    assert [name for name in page.WANTED if known[name]["rounds"] < 5] == []


def test_the_readme_says_what_was_measured() -> None:
    known = json.loads((ROOT / bench.RESULTS).read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, words in {
        "epoch_vs_tutorial_article128": "{:.1f} times as fast as the tutorial's own loop",
        "train_vs_bare_article128": "{:.0%} of what its arithmetic alone allows",
    }.items():
        assert words.format(known[name]["median"]).replace("%", " %") in readme


def test_the_yardstick_is_the_articles_network() -> None:
    assert sum(parameter.numel() for parameter in tutorial.network(10).parameters()) == 2_232_554


def test_multiplied_photographs_are_different_pictures_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "SETS", dict.fromkeys(ways.SETS, Path("nowhere")))  # those that scikit-learn ships
    few = ways.photographs("cats")[:5]
    monkeypatch.setattr(ways, "photographs", lambda _: few)
    files = list(ways.multiplied("cats", 4))
    assert files == list(ways.multiplied("cats", 4))
    pixels = np.stack([images.decode(content, size=64, channels=3) for _, content in files])
    hashes = [int(text, 16) for text in images.picture_hashes(pixels)]
    apart = [(one ^ other).bit_count() for number, one in enumerate(hashes) for other in hashes[:number]]
    assert len(files) == 20
    assert min(apart) > 4


def counting(start: float) -> ways.Way:
    numbers = iter(np.arange(start, start + 100))
    return lambda: float(next(numbers))


def failing() -> ways.Way:
    raise ValueError("no way")


def test_ways_run_by_turns_each_in_one_process_after_a_warm_up() -> None:
    found = bench.by_turns(3, {"one": partial(counting, 0), "other": partial(counting, 50)})
    assert found == {"one": [1, 2, 3], "other": [51, 52, 53]}


def test_a_way_that_fails_ends_the_benchmark_in_one_sentence() -> None:
    with pytest.raises(PipelineError, match="a process of the benchmark ended"):
        bench.by_turns(1, {"one": failing})
