"""The plot stage: six figures and a report that stand alone, for any classes, the same bytes at every run."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from src import figures, paths
from src.params import load_params
from src.runtime import counted
from tests.helpers import ROOT, assert_fails, contents, digits, run_stage

NAMES = ["curves.png", "confusion.png", "classes.png", "examples.png", "mistakes.png", "augmented.png", "report.html"]
HOSTILE = ["<b>bold</b>", "a&b", "$x_1", "two\nlines", "long " * 60, "été \"quoted\" 'name'", "犬", "tab\there", "כלב"]


def results_of(classes: Sequence[str], right: float = 0.9, epochs: int = 3, channels: int = 3) -> figures.Results:
    """Real digits under the given classes' names, in turn, of which a share is named correctly."""
    count = max(60, len(classes))
    random = np.random.default_rng(0)
    images = np.repeat(digits()[0][:: 5000 // count][:count, ..., None], channels, axis=3)
    predictions = [
        figures.Prediction(row, f"{actual}/{row}.png", actual, actual if hit else classes[place - 1], float(sure))
        for row, (hit, sure) in enumerate(zip(random.random(count) < right, random.uniform(0.4, 1, count), strict=True))
        for place in [row % len(classes)]
        for actual in [classes[place]]
    ]
    hits = sum(found.right for found in predictions)
    curve = [(epoch, epoch / (epochs + 1)) for epoch in range(1, epochs + 1)]
    settings = load_params(ROOT / paths.PARAMS).model_dump()
    settings["train"]["threads"] = 1  # as run_stage has it
    return figures.Results(
        images=images,
        augmented=images[:8],
        predictions=predictions,
        classes=classes,
        history={metric: {"train": curve, "validation": curve} for metric in ("accuracy", "loss")},
        scores=[figures.Score(name, 0.9, 0.8, 0.85, 6) for name in classes],
        training={"best_epoch": epochs, "best_validation_accuracy": 0.75, "parameters": 1234, "train_images": 4000},
        test={
            **{"accuracy": hits / count, "accuracy_low": 0.7, "accuracy_high": 0.95, "macro_f1": 0.9, "images": count},
            **{"sure_from": 0.8, "sure_share": 0.3, "sure_accuracy": 0.97},
        },
        data={
            **{"rejected": 7, "validation_images": 502, "test_images": 1026},
            "classes": [{"class": name, "train": 5, "validation": 1, "test": 2} for name in classes],
        },
        origin={"source": "folder", "licence": "CC-BY <4.0>", "url": "https://example.org/?a=1&b=2"},
        settings=settings,
    )


@cache
def drawn(
    *classes: str, right: float = 0.9, epochs: int = 3, channels: int = 3, examples: int = 25
) -> dict[str, bytes]:
    return figures.draw(results_of(classes, right, epochs, channels), seed=0, examples=examples)


def changed(results: figures.Results, **records: dict[str, object]) -> figures.Results:
    """Results with some entries of a record replaced."""
    news = {name: {**getattr(results, name), **entries} for name, entries in records.items()}
    return dataclasses.replace(results, **news)  # type: ignore[arg-type]


def words(files: dict[str, bytes]) -> str:
    """The text of the report, in which each space is one plain space."""
    return " ".join(Page(files["report.html"]).text.split())


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write_inputs(folder: Path, results: figures.Results) -> None:
    """Write what the earlier stages would have written."""
    for name in (
        paths.TRAIN_LOG / "plots/metrics/train",
        paths.TRAIN_LOG / "plots/metrics/validation",
        paths.IMAGES.parent,
    ):
        (folder / name).mkdir(parents=True)
    np.save(folder / paths.IMAGES, results.images)
    np.save(folder / paths.TRAINING_BATCH, results.augmented)
    with (folder / paths.PREDICTIONS).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = [field.name for field in dataclasses.fields(figures.Prediction)]
        table.writerow(columns + [f"p_{name}" for name in results.classes])
        table.writerows([*dataclasses.astuple(found), *(0.1 for _ in results.classes)] for found in results.predictions)
    with (folder / paths.CLASS_METRICS).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["class", "precision", "recall", "f1", "images"])
        table.writerows(dataclasses.astuple(score) for score in results.scores)
    for metric, parts in results.history.items():
        for part, curve in parts.items():
            lines = [f"step\t{metric}", *(f"{epoch}\t{value}" for epoch, value in curve)]
            (folder / paths.TRAIN_LOG / f"plots/metrics/{part}/{metric}.tsv").write_text("\n".join(lines) + "\n")
    (folder / paths.TRAIN_LOG / "metrics.json").write_text(json.dumps(results.training))
    for path, record in (
        (paths.EVALUATION, results.test),
        (paths.DATA_METRICS, results.data),
        (paths.ORIGIN, results.origin),
    ):
        (folder / path).write_text(json.dumps(record))


@pytest.fixture(autouse=True)
def styled() -> Iterator[None]:
    """Parts of the figures are drawn as in the whole."""
    with figures.style():
        yield


@pytest.fixture(scope="module")
def plotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stage has run on classes with the worst names."""
    folder = tmp_path_factory.mktemp("plotted")
    write_inputs(folder, results_of(HOSTILE))
    done = run_stage(folder, "plot")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def test_the_stage_writes_every_figure_and_the_report(plotted: Path) -> None:
    assert sorted(path.name for path in (plotted / paths.PLOTS).iterdir()) == sorted(NAMES)


def test_what_the_stage_reads_is_what_was_written(plotted: Path) -> None:
    assert {name: (plotted / paths.PLOTS / name).read_bytes() for name in NAMES} == drawn(*HOSTILE)


def test_another_run_gives_the_same_bytes_whatever_the_users_matplotlib_is_set_to(
    plotted: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(plotted, again)
    shutil.rmtree(again / paths.PLOTS)
    (again / "matplotlibrc").write_text("axes.facecolor: black\nfont.size: 20\nlines.linewidth: 9\n")
    assert run_stage(again, "plot").returncode == 0
    assert contents(again / paths.PLOTS) == contents(plotted / paths.PLOTS)


def test_a_missing_input_is_one_sentence_and_older_plots_stay(plotted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plotted, folder)
    (folder / paths.PREDICTIONS).unlink()
    assert_fails(folder, "plot", "data/predictions.csv is missing", "dvc repro")


def test_a_run_that_is_interrupted_while_writing_leaves_the_older_plots(plotted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plotted, folder)
    full = "import pathlib\nwrite = pathlib.Path.write_bytes\ndef stop(path, content):\n"
    full += "    if 'report' in path.name: raise OSError(28, 'No space left on device', str(path))\n"
    full += "    return write(path, content)\npathlib.Path.write_bytes = stop"
    assert_fails(folder, "plot", "disk is full", before=full, plot={"seed": 5})


def test_the_stage_never_imports_torch_or_pandas(plotted: Path) -> None:
    check = "import atexit, sys\nheavy = {'torch', 'pandas', 'matplotlib.pyplot'}\n"
    check += "atexit.register(lambda: print(heavy & set(sys.modules)))"
    assert run_stage(plotted, "plot", before=check).stdout.strip() == "set()"


def test_the_report_loads_nothing_from_anywhere() -> None:
    page = drawn(*HOSTILE)["report.html"]
    loaded = [
        value or ""
        for _, found in Page(page).tags
        for name, value in found.items()
        if name in {"src", "srcset", "href"}
    ]
    assert loaded
    assert [value for value in loaded if not value.startswith(("data:image/", "#"))] == []
    assert not re.search(rb"url\(|@import|<script|<link|<iframe", page)
    assert b"default-src 'none'" in page


def test_each_picture_of_the_report_says_what_it_shows() -> None:
    pictures = [found for tag, found in Page(drawn("cat", "dog")["report.html"]).tags if tag == "img"]
    assert len(pictures) > 25
    assert all(found.get("alt") for found in pictures)


def test_the_report_says_the_result_the_settings_and_the_origin() -> None:
    results = results_of(["cat", "dog"])
    text = words(drawn("cat", "dog"))
    accuracy = f"{results.test['accuracy']:.1%}".replace("%", " %")
    for expected in (
        accuracy,
        "70.0 %",
        "95.0 %",
        "60",
        "1,234",
        "CC-BY <4.0>",
        "max_rejected",
        "augment.cutmix",
        "dvc repro",
        "rejected",
    ):
        assert expected in text, expected


def test_hostile_names_are_shown_as_they_are_and_never_become_markup() -> None:
    page = Page(drawn(*HOSTILE)["report.html"])
    text = " ".join(page.text.split())
    assert [name for name in HOSTILE if " ".join(name.split()) not in text] == []
    assert sum(tag == "b" for tag, _ in page.tags) <= 3  # the report's own
    assert "lacks characters of 1 class name" in text
    assert "quoted" not in {name for _, found in page.tags for name in found}


@pytest.mark.parametrize("count", [2, 60])
def test_few_and_many_classes_are_drawn(count: int) -> None:
    files = drawn(*(f"class number {place}" for place in range(count)))
    width, height = Image.open(io.BytesIO(files["confusion.png"])).size
    assert (width > 1000) == (height > 1000) == (count == 60)
    assert list(files) == NAMES


def test_scores_that_are_undefined_are_a_dash_and_the_weakest_class_is_one_that_was_tested(tmp_path: Path) -> None:
    results = results_of(["a", "b", "c"])
    scores = [figures.Score("a", math.nan, 0.0, 0.0, 6), figures.Score("b", math.nan, math.nan, math.nan, 0)]
    results = dataclasses.replace(results, scores=[*scores, *results.scores[2:]])
    page = figures.draw(results, seed=0, examples=4)["report.html"].decode()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<td>–</td><td>–</td><td>–</td><td>0</td>" in page
    assert "The hardest class is <b><bdi>a</bdi></b>: 0.0" in page
    write_inputs(tmp_path, results)
    table = tmp_path / paths.CLASS_METRICS
    table.write_text(table.read_text().replace("nan", ""))
    done = run_stage(tmp_path, "plot", plot={"examples": 4})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / paths.PLOTS / "classes.png").read_bytes() == figures.draw(results, seed=0, examples=4)[
        "classes.png"
    ]


def test_a_perfect_network_of_one_epoch_on_gray_images_has_a_complete_report() -> None:
    files = drawn("cat", "dog", right=1, epochs=1, channels=1)
    assert list(files) == NAMES
    assert "There are none in 60 test images." in words(files)
    alts = " ".join(found["alt"] or "" for tag, found in Page(files["report.html"]).tags if tag == "img")
    assert "60 images on the diagonal classified correctly, 0 elsewhere" in alts
    assert "most frequent mix-ups" not in alts  # a table that is not there


def test_right_and_wrong_differ_without_colour() -> None:
    image = results_of(["cat", "dog"]).images[0]
    found = [figures.Prediction(0, "a.png", "cat", predicted, 0.7) for predicted in ("cat", "dog")]
    right, wrong = (figures.gallery([image], [one], "one") for one in found)
    lines = [[text.get_text() for text in figure.texts[1:]] for figure in (right, wrong)]
    assert lines == [["✓ cat", "confidence 70 %"], ["✗ dog", "confidence 70 %", "actual: cat", "a.png"]]
    assert [len(figure.artists) for figure in (right, wrong)] == [0, 1]  # the frame


@pytest.mark.parametrize("side", [8, 28, 71, 300])
def test_a_caption_ends_before_the_next_image_and_keeps_the_end_of_its_file(side: int) -> None:
    image, long = np.zeros((side, side, 3), np.uint8), "WWWWWW" * 10
    found = figures.Prediction(0, f"train/{long}_0001.jpeg", long, f"{long}x", 0.7)
    figure = figures.gallery([image] * 2, [found] * 2, "two")
    boxes = [text.get_window_extent() for text in figure.texts[1:]]
    assert max(box.x1 for box in boxes[:4]) < min(box.x0 for box in boxes[4:])
    assert figure.texts[4].get_text().endswith("0001.jpeg")


def test_mistakes_come_with_the_most_confident_first() -> None:
    results = results_of(["cat", "dog"], right=0.5)
    page = Page(drawn("cat", "dog", right=0.5, examples=3)["report.html"])
    wrong = sorted((found for found in results.predictions if not found.right), key=lambda found: -found.confidence)
    shown = [found["title"] for tag, found in page.tags if tag == "img" and "title" in found]
    assert shown[-3:] == [found.path for found in wrong[:3]]


def test_the_seed_draws_the_examples() -> None:
    other = figures.draw(results_of(["cat", "dog"]), seed=1, examples=25)
    differing = {name for name, content in drawn("cat", "dog").items() if other[name] != content}
    assert differing == {"examples.png", "report.html"}


@pytest.mark.parametrize("side", [28, 128, 300])
def test_images_of_any_size_become_tiles_of_like_size(side: int) -> None:
    image = np.full((side, side, 1), 200, np.uint8)
    width, height = figures.gallery([image] * 25, [], "tiles").get_size_inches() * figures.DPI
    assert 700 < width < 850
    assert 700 < height < 900


def test_a_percentage_says_100_only_where_all_is_right() -> None:
    shown = [figures.percent(share) for share in (1, 0.99996, 0.5, 0, None, float("nan"))]
    assert shown == ["100.0\xa0%", "99.9\xa0%", "50.0\xa0%", "0.0\xa0%", "–", "–"]


@pytest.mark.parametrize(
    ("name", "shown"), [("a\nb\x07c", "a b c"), ("x" * 9, "x" * 9), ("front and back", "front…ck")]
)
def test_a_name_is_shortened_to_one_line_in_the_middle(name: str, shown: str) -> None:
    assert figures.short(name, 8 if " " in name else 9) == shown


def test_names_that_are_alike_when_cut_or_in_boxes_end_in_the_number_of_their_class() -> None:
    names = figures.labels(
        ["Tomato___Tomato_Yellow_Leaf_Curl_Virus", "犬", "Tomato___Tomato_Yellow_Leaf_Roll_Virus", "ok"]
    )
    assert list(names.values()) == ["Tomato___Toma…_Virus #1", "犬 #2", "Tomato___Toma…_Virus #3", "ok"]


def test_what_stands_beside_a_hebrew_name_stays_at_its_side() -> None:
    assert figures.labels(["כלב", "cat"]) == {"כלב": "\u200eכלב\u200e", "cat": "cat"}


# --- photographs ------------------------------------------------------------------------------------------------------


def test_a_photograph_keeps_all_its_colours_and_a_chart_stays_small() -> None:
    photograph = load_sample_image("flower.jpg")[:128, 200:328]
    picture = Image.open(io.BytesIO(figures.png(figures.gallery([photograph], [], "a flower"))))
    assert np.array_equal(np.asarray(picture)[48:176, 16:144], photograph)
    assert Image.open(io.BytesIO(drawn("cat", "dog")["curves.png"])).mode == "P"


# --- what is true of few images, few answers and few classes ----------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"validation_images": 100, "test_images": 100}, []),
        (
            {"validation_images": 18},
            ["Only 18 validation images: the choice of the epoch and of the confidence threshold"],
        ),
        ({"validation_images": 1, "test_images": 1}, ["Only 1 validation image: ", "Only 1 test image: "]),
    ],
)
def test_the_report_says_first_that_a_part_is_so_small_that_chance_decides(
    data: dict[str, object], expected: list[str]
) -> None:
    results = changed(results_of(["cat", "dog"]), data=data)
    notes = figures.caveats(results)
    assert [note[: len(start)] for note, start in zip(notes, expected, strict=True)] == expected
    text = words(figures.draw(results, seed=0, examples=1))
    assert all(text.index(note) < text.index("It distinguishes") for note in notes)


def test_the_width_of_the_interval_is_in_points() -> None:
    results = changed(results_of(["cat", "dog"]), data={"validation_images": 18, "test_images": 40})
    assert [note.split("is ")[-1] for note in figures.caveats(results)] == ["37 points wide.", "25 points wide."]


def test_only_an_answer_from_the_threshold_on_is_called_sure() -> None:
    results = results_of(["cat", "dog"], right=0.5)
    files = figures.draw(results, seed=0, examples=60)
    wrong = [found for found in results.predictions if not found.right]
    sure = [found for found in wrong if found.confidence >= 0.8]
    assert 0 < len(sure) < len(wrong)
    assert f"of all {len(wrong)} mistakes, {len(sure)} were made with a sure answer" in words(files)
    mistakes = words(files).partition("The most confident mistakes")[2].partition("What training sees")[0]
    assert mistakes.count(" %, sure") == len(sure)


def test_without_a_threshold_no_answer_is_called_sure_and_the_report_says_why() -> None:
    nothing: dict[str, object] = dict.fromkeys(("sure_from", "sure_share", "sure_accuracy"))
    results = changed(results_of(["cat", "dog"]), test=nothing, data={"validation_images": 18})
    text = words(figures.draw(results, seed=0, examples=25))
    assert "No answer counts as sure: the 18 validation images cannot show a confidence from which 99 % of" in text
    assert "%, sure" not in text
    assert "confidence threshold" not in text


def test_zero_of_zero_is_a_dash_and_never_the_weakest() -> None:
    nan = float("nan")
    scores = [figures.Score("dog", nan, nan, nan, 0), figures.Score("cat", nan, 0.0, 0.0, 1)]
    results = dataclasses.replace(results_of(["cat", "dog"]), scores=scores)
    text = words(figures.draw(changed(results, test={"sure_accuracy": None}), seed=0, examples=1))
    assert "dog–––0 cat–0.0 %0.0 %1" in text
    assert "The hardest class is cat" in text
    title = figures.class_scores(scores, {"cat": "cat", "dog": "dog"}).get_suptitle()
    assert title == "Weakest class first: cat, F1 0.0\xa0%"


def test_one_is_singular_everywhere() -> None:
    assert [counted(1, "image"), counted(1026, "image"), counted(2, "class")] == [
        "1 image",
        "1,026 images",
        "2 classes",
    ]
    results = results_of(["cat", "dog"], epochs=1)
    found = figures.Prediction(0, "a.png", "cat", "dog", 0.5)
    one = dataclasses.replace(results, predictions=[found], augmented=results.augmented[:1])
    one = changed(one, test={"images": 1}, training={"parameters": 1, "train_images": 1})
    text = words(figures.draw(one, seed=0, examples=25))
    assert "accuracy on 1 test image that" in text
    assert re.findall(r"(?<![\d.,])1 (?:test |class )?(?:images|mistakes|times|classes|parameters|epochs)", text) == []
    counts = figures.tally([found], ["cat", "dog"])
    assert figures.confusion(counts, ["cat", "dog"]).get_suptitle() == "0 of 1 test image classified correctly"
    assert figures.curves(one.history, 1).get_suptitle() == "Validation accuracy after the only epoch: 50.0\xa0%"
    assert [figures.mistakes(*numbers) for numbers in ((1, 1, 1), (0, 0, 1), (2, 1026, 5000), (2, 2, 9))] == [
        "1 mistake in 1 test image",
        "No mistakes in 1 test image",
        "The 2 most confident of 1,026 mistakes in 5,000 test images",
        "2 mistakes in 9 test images, the most confident first",
    ]


def test_a_loss_that_is_not_finite_is_said_in_the_curves() -> None:
    curve = [(1, 0.5), (2, 0.75)]
    losses = {"train": curve, "validation": [(1, float("inf")), (2, float("nan"))]}
    figure = figures.curves({"accuracy": {"train": curve, "validation": curve}, "loss": losses}, 2)
    assert figure.axes[1].get_title(loc="left") == "Loss (cross-entropy); not finite in 2 epochs"


def test_an_accuracy_of_0_needs_no_axis_below_0() -> None:
    curve = {part: [(1, 0.0), (2, 0.0)] for part in ("train", "validation")}
    assert figures.curves({"accuracy": curve, "loss": curve}, 1).axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize("size", [2, 10, 31])
def test_numbers_of_the_confusion_matrix_fit_their_cells_and_names_do_not_touch(size: int) -> None:
    counts = np.eye(size, dtype=np.int64) * 12_345_678
    figure = figures.confusion(counts, ["W" * (1 + number % 15) for number in range(size)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    names = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert min(after.x0 - before.x1 for before, after in pairwise(names)) > -1
    assert len(axes.texts) == size
    assert max(text.get_window_extent().width for text in axes.texts) < axes.bbox.width / size


def test_of_very_many_classes_some_names_stand_for_all() -> None:
    axes = figures.confusion(np.eye(500, dtype=np.int64), [f"class {number}" for number in range(500)]).axes[0]
    assert (len(axes.texts), len(axes.get_xticklabels())) == (0, 167)


def test_the_line_of_the_most_frequent_class_lies_where_it_says() -> None:
    results = results_of(["cat", "dog"])
    mostly = [dataclasses.replace(found, actual="cat") for found in results.predictions[:9]] + [results.predictions[1]]
    page = figures.draw(dataclasses.replace(results, predictions=mostly), seed=0, examples=1)["report.html"].decode()
    assert 'class="base" style="left:90.0%"' in page
