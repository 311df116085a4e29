"""Rows in, figures out: six PNG files and one HTML report that needs no network. The same rows give the same bytes.

Colours are Okabe and Ito's, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/); a mark or a frame
always says the same as the colour. Figures are made without pyplot: no window, no global state, a faster import.
"""

import base64
import io
import json
import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from src.intervals import FEW, wilson_interval
from src.runtime import counted

Pixels = NDArray[np.uint8]
Series = Sequence[tuple[int, float]]

TEMPLATE = Path(__file__).with_name("report.html.j2")
INK, MUTED, FAINT, PAPER = "#1c2530", "#5b6673", "#d9dde2", "#ffffff"
BLUE, ORANGE = "#0072b2", "#d55e00"
DPI, TILE, TITLE, FONT = 120, 140, 12, "DejaVu Sans"
LEFT_TO_RIGHT = "\N{LEFT-TO-RIGHT MARK}"
STYLE = {
    "font.family": [FONT],
    "font.size": 9.5,
    "text.parse_math": False,  # a class may be called $x_1
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "figure.dpi": DPI,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.titlesize": TITLE,
    "figure.titleweight": "bold",
}


@dataclass(frozen=True)
class Prediction:
    """What the network predicted for one test image: a row of data/predictions.csv without its probability columns."""

    row: int
    path: str
    actual: str
    predicted: str
    confidence: float

    @property
    def right(self) -> bool:
        return self.actual == self.predicted

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Score:
    """The scores of one class: a row of metrics/classes.csv, with NaN for an empty cell, which is 0 of 0."""

    name: str
    precision: float
    recall: float
    f1: float
    images: int


@dataclass(frozen=True)
class Results:
    """Everything that the figures show, as the earlier stages wrote it."""

    images: Pixels
    """(N, S, S, C), usually memory-mapped: only the rows that are drawn are read."""
    augmented: Pixels
    """(M, S, S, C): training images as the network saw them."""
    predictions: Sequence[Prediction]
    classes: Sequence[str]
    """The order of the network's outputs."""
    history: Mapping[str, Mapping[str, Series]]
    """loss or accuracy -> train or validation -> (epoch, value)."""
    scores: Sequence[Score]
    training: Mapping[str, Any]
    test: Mapping[str, Any]
    data: Mapping[str, Any]
    origin: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]


def style(**more: Any) -> AbstractContextManager[None]:
    """The style of all figures, through which the user's own matplotlibrc does not show."""
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE, **more}
    del settings["backend"]
    return matplotlib.rc_context(settings)


def draw(results: Results, *, seed: int, examples: int) -> dict[str, bytes]:
    """Draw every figure and the report: file name -> its bytes. `seed` draws which test images are the examples."""
    predictions, wrong = results.predictions, [found for found in results.predictions if not found.right]
    count = min(examples, len(predictions))
    drawn = np.random.default_rng(seed).choice(len(predictions), count, replace=False)
    shown = [predictions[index] for index in drawn]
    worst = sorted(wrong, key=lambda found: (-found.confidence, found.row))[:examples]
    batch = results.augmented[:examples]
    counts = tally(predictions, results.classes)
    with style(), warnings.catch_warnings():
        # DejaVu Sans lacks some scripts: boxes stand for them, and the report says so.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        names = labels(results.classes)
        right = sum(found.right for found in shown)
        figures = {
            "curves": curves(results.history, results.training["best_epoch"]),
            "confusion": confusion(counts, list(names.values())),
            "classes": class_scores(results.scores, names),
            "examples": gallery(
                [results.images[found.row] for found in shown],
                shown,
                f"{counted(count, 'test image')} drawn at random: {right:,} right (✓), {count - right:,} wrong (✗)",
                names,
            ),
            "mistakes": gallery(
                [results.images[found.row] for found in worst],
                worst,
                mistakes(len(worst), len(wrong), len(predictions)),
                names,
            ),
            "augmented": gallery(list(batch), [], f"{counted(len(batch), 'training image')} as the network sees them"),
        }
        files = {f"{name}.png": png(figure) for name, figure in figures.items()}
        boxes = sum(not _drawable(name) for name in results.classes)
    files["report.html"] = report(results, counts, shown, worst, batch, files, boxes).encode()
    return files


def mistakes(shown: int, wrong: int, tested: int) -> str:
    """The title of the figure of mistakes."""
    images = counted(tested, "test image")
    if not wrong:
        return f"No mistakes in {images}"
    if shown < wrong:
        return f"The {shown:,} most confident of {counted(wrong, 'mistake')} in {images}"
    return f"{counted(wrong, 'mistake')} in {images}{', the most confident first' if wrong > 1 else ''}"


def tally(predictions: Iterable[Prediction], classes: Sequence[str]) -> NDArray[np.int64]:
    """Count the predictions: (actual, predicted) -> (K, K)."""
    place = {name: index for index, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    for found in predictions:
        counts[place[found.actual], place[found.predicted]] += 1
    return counts


def curves(history: Mapping[str, Mapping[str, Series]], best_epoch: int) -> Figure:
    """Accuracy and loss by epoch, with the epoch whose weights are kept."""
    figure = Figure((7.6, 3.9), layout="constrained")
    best, epochs = dict(history["accuracy"]["validation"])[best_epoch], len(history["accuracy"]["validation"])
    when = f"is best in epoch {best_epoch} of {epochs}" if epochs > 1 else "after the only epoch"
    figure.suptitle(f"Validation accuracy {when}: {percent(best)}", x=0.015, ha="left")
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        axes.axvline(best_epoch, color=ORANGE, linewidth=1.2, linestyle=":", label="best epoch")
        for part, color, line, mark in (("train", MUTED, "--", "s"), ("validation", BLUE, "-", "o")):
            steps, values = zip(*history[metric][part], strict=True)
            size = 4 if len(steps) <= 30 else 0
            axes.plot(
                steps, values, line, color=color, marker=mark, markersize=size, linewidth=1.7, label=part, clip_on=False
            )
        value = dict(history[metric]["validation"])[best_epoch]
        axes.plot(
            best_epoch,
            value,
            "o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=ORANGE,
            zorder=3,
            clip_on=False,
        )
        broken = {epoch for series in history[metric].values() for epoch, found in series if not math.isfinite(found)}
        note = f"; not finite in {counted(len(broken), 'epoch')}" if broken else ""
        axes.set(title=("Accuracy" if metric == "accuracy" else "Loss (cross-entropy)") + note, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.set_xlim(0.5, epochs + 0.5)
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
            axes.set_ylim(max(0, axes.get_ylim()[0]), 1)
        else:
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def confusion(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Rows are actual classes, columns predicted ones; blue is right, orange wrong, a dark cell a large share."""
    size, totals = len(names), counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    inches = min(max(0.52 * size, 3.6), 6.8) if size <= 30 else min(0.15 * size, 30)
    cell = 72 * inches / size
    # Mistakes are rare; the square root lets a share of 4 % be seen.
    ramp = {color: LinearSegmentedColormap.from_list(color, [PAPER, color]) for color in (BLUE, ORANGE)}
    right = np.eye(size, dtype=bool)
    colors = np.where(right[..., None], ramp[BLUE](shares), ramp[ORANGE](np.sqrt(shares)))
    font = min(9.5, max(8, cell * 0.75))
    rows = [f"{name} ({images:,})" for name, images in zip(names, totals, strict=True)]
    upright = max(_width(name, font) for name in names) > cell / 72 * DPI - 4
    title = f"{np.trace(counts):,} of {counted(counts.sum(), 'test image')} classified correctly"
    beside = max(_width(row, font) for row in rows) / DPI + 0.7
    below = max(_width(name, font) for name in names) / DPI * upright + 1.45
    figure = Figure(
        (max(inches + beside, _width(title, TITLE, "bold") / DPI + 0.2), inches + below), layout="constrained"
    )
    figure.suptitle(title, x=0.015, ha="left")
    axes = figure.subplots()
    axes.imshow(colors, interpolation="nearest")
    if size <= 200:  # in smaller cells a number cannot be read
        _write_numbers(axes, counts, shares, cell, least=0.0 if size <= 30 else 0.05)
    every = math.ceil(font / (cell * 0.8))  # of more than some 200 classes, not each has room for its name
    axes.set_xticks(range(0, size, every), names[::every], rotation=90 if upright else 0, fontsize=font)
    axes.set_yticks(range(0, size, every), rows[::every], fontsize=font)
    axes.grid(visible=False)
    if size <= 200:
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    note = "\nCells under 5 % of their row have no number." if 30 < size <= 200 else ""
    axes.set_xlabel(f"predicted class\n\nDiagonal, blue: right. Elsewhere, orange: mistakes.{note}")
    axes.set_ylabel("actual class (test images)")
    return figure


def _write_numbers(
    axes: Axes, counts: NDArray[np.int64], shares: NDArray[np.float64], cell: float, least: float
) -> None:
    """Write the count into each cell from a share of `least` of its row on, with the share where the cell, of so many
    points, has room."""
    room = cell / 72 * DPI - 4
    for row, column in zip(*np.nonzero((counts > 0) & (shares >= least)), strict=True):
        lines = [f"{counts[row, column]:,}", percent(shares[row, column], 0)][: 2 if cell > 34 else 1]
        size = min(9.5, cell * (0.26 if cell > 34 else 0.5))
        size *= min(1, room / max(_width(line, size) for line in lines))
        light = row == column and shares[row, column] > 0.85  # elsewhere ink has the higher contrast
        axes.text(
            column, row, "\n".join(lines), ha="center", va="center", size=size, color=PAPER if light else INK,
            linespacing=1.3,
        )  # fmt: skip


def class_scores(scores: Sequence[Score], names: Mapping[str, str]) -> Figure:
    """F1 of each class as a bar, precision and recall as marks upon it; the weakest class comes first."""
    ordered = sorted(scores, key=lambda score: (math.isnan(score.f1), score.f1, score.name))
    columns = 1 if len(ordered) <= 40 else 2
    rows = math.ceil(len(ordered) / columns)
    figure = Figure(
        (7.6 if columns == 1 else 10, max(2.2, 1.25 + rows * (0.27 if rows <= 20 else 0.2))), layout="constrained"
    )
    weakest = f"Weakest class first: {names[ordered[0].name]}, F1"
    alike = len({score.f1 for score in ordered}) == 1
    figure.suptitle(f"{'F1 of every class:' if alike else weakest} {percent(ordered[0].f1)}", x=0.015, ha="left")
    for index, axes in enumerate(np.atleast_1d(figure.subplots(1, columns))):
        part = ordered[index * rows : (index + 1) * rows]
        places = range(len(part))
        f1, precision, recall = ([getattr(score, name) for score in part] for name in ("f1", "precision", "recall"))
        axes.barh(places, f1, color="#9ccbe6", height=0.72, label="F1 (number at the right)")
        axes.plot(precision, places, "D", color=INK, markersize=4, label="precision", clip_on=False)
        axes.plot(
            recall, places, "o", color=ORANGE, markersize=6.5, markerfacecolor="none", markeredgewidth=1.5,
            label="recall", clip_on=False,
        )  # fmt: skip
        axes.set_yticks(places, [f"{names[score.name]} ({score.images:,})" for score in part])
        for place, score in zip(places, part, strict=True):
            axes.annotate(
                percent(score.f1), (1, place), (10, 0), textcoords="offset points", va="center", size=8.5, color=INK
            )
        axes.set(xlim=(0, 1), ylim=(rows - 0.4, -0.6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK, pad=8)
        axes.grid(visible=False, axis="y")
        axes.spines[:].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def gallery(
    images: Sequence[Pixels], predictions: Sequence[Prediction], title: str, names: Mapping[str, str] | None = None
) -> Figure:
    """A grid of images, pixel for pixel; with predictions, each is captioned, and a mistake has a mark and a frame."""
    tiles = [_fit(image, TILE) for image in images]
    side, gap, line, head = len(tiles[0]) if tiles else TILE, 16, 16, 48
    captions = [_caption(found, names or {}) for found in predictions]
    caption = line * max(map(len, captions), default=0) + 8 * bool(captions)
    columns = max(1, min(len(tiles), max(5, math.isqrt(max(len(tiles) - 1, 0)) + 1)))
    rows = math.ceil(len(tiles) / columns)
    width = max(columns * (TILE + gap) + gap, round(_width(title, TITLE, "bold")) + 2 * gap)
    height = max(rows * (side + gap + caption) + gap + head, 60)
    figure = Figure((width / DPI, height / DPI))
    figure.text(gap, height - 30, title, transform=None, size=TITLE, weight="bold")
    for index, tile in enumerate(tiles):
        left = gap + index % columns * (TILE + gap)
        top = height - head - index // columns * (side + gap + caption)
        figure.figimage(tile, left, top - side, origin="upper")
        if not predictions:
            continue
        if not predictions[index].right:
            frame = Rectangle((left - 3, top - side - 3), side + 6, side + 6, fill=False, linewidth=3, edgecolor=ORANGE)
            frame.set_transform(None)
            figure.add_artist(frame)
        for number, (text, font) in enumerate(captions[index]):
            figure.text(left, top - side - 20 - line * number, text, transform=None, **font)
    return figure


def _caption(found: Prediction, names: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """The lines below an image of a gallery, each cut to its width, with their style."""
    predicted, actual = (names.get(name, name) for name in (found.predicted, found.actual))
    color, weight = (INK, "normal") if found.right else (ORANGE, "bold")
    lines = [
        (f"{'✓' if found.right else '✗'} {predicted}", color, weight),
        (f"confidence {percent(found.confidence, 0)}", MUTED, "normal"),
    ]
    if not found.right:
        lines += [(f"actual: {actual}", INK, "normal"), (found.file, MUTED, "normal")]
    styled = []
    for text, color, weight in lines:
        end = 2 if text == found.file else 1  # where files differ
        length = min(len(text), TILE // 4)  # no letter is narrower
        while length > 4 and _width(short(text, length, end), 7.5, weight) > TILE + 4:
            length -= 1
        cut = _left_to_right(short(text, length, end))
        styled.append((cut, {"color": color, "weight": weight, "size": 7.5}))
    return styled


def png(figure: Figure) -> bytes:
    """The figure as a PNG without date or name of a program. Charts have 256 colours, a third of the size; images all
    of theirs: photographs of 25 in one figure have about 250,000, and show bands in 256."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if not figure.images:
        picture = picture.quantize(256, method=Image.Quantize.MEDIANCUT)
    return _encoded(picture, "PNG", optimize=True)


def report(
    results: Results,
    counts: NDArray[np.int64],
    shown: Sequence[Prediction],
    worst: Sequence[Prediction],
    batch: Pixels,
    files: Mapping[str, bytes],
    boxes: int,
) -> str:
    """The page that tells the result in plain words; all that it shows lies inside it.

    boxes: how many names of classes the font of the charts cannot draw.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, plain=_plain, counted=counted, short=short, value=partial(json.dumps, ensure_ascii=False)
    )
    threshold = math.inf if results.test["sure_from"] is None else results.test["sure_from"]
    sure = {found.row: found.right for found in results.predictions if found.confidence >= threshold}
    totals = counts.sum(axis=1)
    mixed = [(int(counts[i, j]), i, j) for i, j in zip(*np.nonzero(counts), strict=True) if i != j]
    summary = dict(results.data)
    shares = {row["class"]: row for row in summary.pop("classes")}
    return environment.get_template(TEMPLATE.name).render(
        results=results,
        images={name.removesuffix(".png"): _data_uri(content, "png") for name, content in files.items()},
        examples=[(found, _tile(results.images[found.row])) for found in shown],
        mistakes=[(found, _tile(results.images[found.row])) for found in worst],
        augmented=[_tile(image) for image in batch],
        pixelated=results.images.shape[1] <= 64,
        right=int(np.trace(counts)),
        wrong=int(counts.sum() - np.trace(counts)),
        baseline=totals.max() / totals.sum(),
        sure=sure,
        sure_mistakes=len(sure) - sum(sure.values()),
        mixed=[
            (results.classes[i], results.classes[j], number, number / totals[i])
            for number, i, j in sorted(mixed, key=lambda cell: (-cell[0], cell[1:]))[:5]
        ],
        weakest=min((score for score in results.scores if score.images), key=lambda score: (score.recall, score.name)),
        caveats=caveats(results),
        boxes=boxes,
        shares=shares,
        counts=_flat(summary),
        origin=_flat(results.origin),
    )


def caveats(results: Results) -> list[str]:
    """What the report says first where validation or test have so few images that chance decides."""
    test, validation, tested = results.test, results.data["validation_images"], results.data["test_images"]
    chosen = "the epoch" if test["sure_from"] is None else "the epoch and of the confidence threshold"
    notes = []
    if validation < FEW:
        low, high = wilson_interval(results.training["best_validation_accuracy"] * validation, validation)
        notes.append(
            f"Only {counted(validation, 'validation image')}: the choice of {chosen} rests largely on chance, since "
            f"the 95 % interval of an accuracy on so few is {100 * (high - low):.0f} points wide."
        )
    if tested < FEW:
        notes.append(
            f"Only {counted(tested, 'test image')}: the 95 % interval of the accuracy is "
            f"{100 * (test['accuracy_high'] - test['accuracy_low']):.0f} points wide."
        )
    return notes


def percent(share: float | None, digits: int = 1) -> str:
    """0.981 -> '98.1 %'; rounds to 100 % only what is 100 %; '–' where 0 of 0 is None or NaN."""
    if share is None or math.isnan(share):
        return "–"
    most = 1.0 if share >= 1 else 1 - 10.0 ** -(digits + 2)
    return f"{100 * min(share, most):.{digits}f}\N{NO-BREAK SPACE}%"


def labels(classes: Sequence[str], length: int = 24) -> dict[str, str]:
    """Names of classes for one line of a figure, no two alike: where cutting or the font leaves a name unclear, it ends
    in the number of its class, counted from 1."""
    cut = Counter(short(name, length) for name in classes)
    names = {}
    for number, name in enumerate(classes, 1):
        text = short(name, length)
        if cut[text] > 1 or not text or not _drawable(name):
            text = f"{short(name, length - 4)} #{number}".lstrip()
        names[name] = _left_to_right(text)
    return names


def _left_to_right(text: str) -> str:
    """Keep a line with Hebrew or Arabic in it in the order of its parts: mark, name, count."""
    foreign = any(unicodedata.bidirectional(letter) in {"R", "AL"} for letter in text)
    return f"{LEFT_TO_RIGHT}{text}{LEFT_TO_RIGHT}" if foreign else text


def short(name: str, length: int, end: int = 1) -> str:
    """A name for one line: without line breaks and control characters, and cut in the middle, since ends differ too.

    end: how many thirds of the room its end gets.
    """
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    if len(name) <= length:
        return name
    tail = (length - 1) * end // 3
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def _drawable(name: str) -> bool:
    """Whether the font of the figures has all characters of a name."""
    font = get_font(findfont(FontProperties(family=FONT)))
    return all(font.get_char_index(ord(letter)) for letter in name if letter.isprintable())


@cache
def _renderer() -> Any:
    canvas: Any = FigureCanvasAgg(Figure(dpi=DPI))
    return canvas.get_renderer()


def _width(text: str, size: float, weight: str = "normal") -> float:
    """How wide a line is, in pixels, in the font of the figures; size: in points."""
    font = FontProperties(family=FONT, size=size, weight=weight)
    return float(_renderer().get_text_width_height_descent(text, font, False)[0])


def _fit(image: Pixels, side: int) -> Pixels:
    """RGB, enlarged by a whole number while it fits into `side` (pixels stay square), or else reduced to it."""
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    if len(rgb) > side:
        return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize((side, side), Image.Resampling.LANCZOS))
    return rgb.repeat(side // len(rgb), axis=0).repeat(side // len(rgb), axis=1)


def _tile(image: Pixels) -> str:
    """One image for the page: small ones exactly, larger ones as a photograph of at most 160 pixels."""
    small = len(image) <= 64
    gray = image.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if gray else image))
    picture.thumbnail((160, 160), Image.Resampling.LANCZOS)
    if small and gray:
        return _data_uri(_encoded(picture, "PNG", optimize=True), "png")
    return _data_uri(_encoded(picture, "WEBP", lossless=small, quality=80), "webp")


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _flat(record: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Nested entries as (name, value) lines: {"a": {"b_c": 1}} -> [("a: b c", 1)]."""
    lines: list[tuple[str, Any]] = []
    for name, value in record.items():
        lines += (
            _flat(value, f"{above}{name}: ")
            if isinstance(value, dict)
            else [(f"{above}{name}".replace("_", " "), value)]
        )
    return lines


def _plain(value: object) -> str:
    """A value of a JSON or YAML file in words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "–"
    return str(value) or "–"
