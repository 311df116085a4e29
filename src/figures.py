"""Rows in, figures out: six PNG files and one HTML report that needs no network. The same rows give the same bytes.

Colours are Okabe and Ito's, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/); a mark or a frame
always says the same as the colour. Figures are made without pyplot: no window, no global state, a faster import.
"""

import base64
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Series = Sequence[tuple[int, float]]

TEMPLATE = Path(__file__).with_name("report.html.j2")
INK, MUTED, FAINT, PAPER = "#1c2530", "#5b6673", "#d9dde2", "#ffffff"
BLUE, ORANGE = "#0072b2", "#d55e00"
DPI, TILE = 120, 140
STYLE = {
    "font.family": ["DejaVu Sans"],
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
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
}


@dataclass(frozen=True)
class Prediction:
    """What the network said of one test image: a row of data/predictions.csv without its probability columns."""

    row: int
    path: str
    actual: str
    predicted: str
    confidence: float

    @property
    def right(self) -> bool:
        return self.actual == self.predicted


@dataclass(frozen=True)
class Score:
    """How well one class is known: a row of metrics/classes.csv, with NaN for an empty cell."""

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


def draw(results: Results, *, seed: int, examples: int) -> dict[str, bytes]:
    """Draw every figure and the report: file name -> its bytes. `seed` draws which test images are the examples."""
    predictions, wrong = results.predictions, [found for found in results.predictions if not found.right]
    count = min(examples, len(predictions))
    drawn = np.random.default_rng(seed).choice(len(predictions), count, replace=False)
    shown = [predictions[index] for index in drawn]
    worst = sorted(wrong, key=lambda found: (-found.confidence, found.row))[:examples]
    batch = results.augmented[:examples]
    counts = tally(predictions, results.classes)
    # The user's own matplotlibrc must not show through, and DejaVu Sans lacks some scripts: a box is fine there.
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
    del style["backend"]
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figures = {
            "curves": curves(results.history, results.training["best_epoch"]),
            "confusion": confusion(counts, results.classes),
            "classes": class_scores(results.scores),
            "examples": gallery(
                [results.images[found.row] for found in shown],
                shown,
                f"{count:,} test images drawn at random: {sum(found.right for found in shown):,} right (✓), "
                f"{sum(not found.right for found in shown):,} wrong (✗)",
            ),
            "mistakes": gallery(
                [results.images[found.row] for found in worst],
                worst,
                f"The {len(worst):,} most confident of {len(wrong):,} mistakes in {len(predictions):,} test images"
                if wrong
                else f"No mistakes: all {len(predictions):,} test images are named correctly",
            ),
            "augmented": gallery(list(batch), [], f"{len(batch):,} training images as the network sees them"),
        }
        files = {f"{name}.png": png(figure) for name, figure in figures.items()}
    files["report.html"] = report(results, counts, shown, worst, batch, files).encode()
    return files


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
    figure.suptitle(
        f"Validation accuracy is best in epoch {best_epoch} of {epochs}: {percent(best)}", x=0.015, ha="left"
    )
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
        axes.set(title="Accuracy" if metric == "accuracy" else "Loss (cross-entropy)", xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.set_xlim(0.5, epochs + 0.5)
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
            axes.set_ylim(top=1)
        else:
            axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Rows are what the images are, columns what was said; blue is right, orange wrong, a dark cell a large share."""
    size, totals = len(classes), counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    inches = min(max(0.52 * size, 3.0), 6.8) if size <= 30 else 0.15 * size
    cell = 72 * inches / size
    # Mistakes are rare; the square root lets a share of 4 % be seen.
    ramp = {color: LinearSegmentedColormap.from_list(color, [PAPER, color]) for color in (BLUE, ORANGE)}
    right = np.eye(size, dtype=bool)
    colors = np.where(right[..., None], ramp[BLUE](shares), ramp[ORANGE](np.sqrt(shares)))
    figure = Figure((inches + 2.6, inches + 2.3), layout="constrained")
    figure.suptitle(f"{np.trace(counts):,} of {counts.sum():,} test images are named correctly", x=0.015, ha="left")
    axes = figure.subplots()
    axes.imshow(colors, interpolation="nearest")
    least = 0.0 if size <= 30 else 0.05
    for row, column in zip(*np.nonzero((counts > 0) & (shares >= least)), strict=True):
        light = (shares[row, column] if row == column else math.sqrt(shares[row, column])) > 0.6
        text = f"{counts[row, column]:,}"
        if cell > 34:
            text += f"\n{percent(shares[row, column], 0)}"
        font = min(9.5, cell * (0.26 if cell > 34 else 0.5))
        axes.text(
            column, row, text, ha="center", va="center", size=font, color=PAPER if light else INK, linespacing=1.3
        )
    names = [short(name, 18) for name in classes]
    font = min(9.5, cell * 0.75)
    upright = max(map(len, names)) * 0.62 * font > cell
    axes.set_xticks(range(size), names, rotation=90 if upright else 0, fontsize=font)
    axes.set_yticks(range(size), [f"{name} ({n:,})" for name, n in zip(names, totals, strict=True)], fontsize=font)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    blank = "" if size <= 30 else "\nCells under 5 % of their row carry no number."
    axes.set_xlabel(f"predicted class\n\nDiagonal, blue: right. Elsewhere, orange: mistakes.{blank}")
    axes.set_ylabel("actual class (test images)")
    return figure


def class_scores(scores: Sequence[Score]) -> Figure:
    """F1 of each class as a bar, precision and recall as marks upon it; the weakest class comes first."""
    ordered = sorted(scores, key=lambda score: (math.isnan(score.f1), score.f1, score.name))
    columns = 1 if len(ordered) <= 40 else 2
    rows = math.ceil(len(ordered) / columns)
    figure = Figure(
        (7.6 if columns == 1 else 10, max(2.2, 1.25 + rows * (0.27 if rows <= 20 else 0.2))), layout="constrained"
    )
    figure.suptitle(
        f"Weakest class first: {short(ordered[0].name, 30)}, F1 {percent(ordered[0].f1)}", x=0.015, ha="left"
    )
    for index, axes in enumerate(np.atleast_1d(figure.subplots(1, columns))):
        part = ordered[index * rows : (index + 1) * rows]
        places = range(len(part))
        axes.barh(places, [score.f1 for score in part], color="#9ccbe6", height=0.72, label="F1 (number at the right)")
        axes.plot([score.precision for score in part], places, "D", color=INK, markersize=4, label="precision")
        axes.plot(
            [score.recall for score in part], places, "o", color=ORANGE, markersize=6.5, markerfacecolor="none",
            markeredgewidth=1.5, label="recall",
        )  # fmt: skip
        axes.set_yticks(places, [f"{short(score.name, 22)} ({score.images:,})" for score in part])
        for place, score in zip(places, part, strict=True):
            axes.text(1.03, place, percent(score.f1), va="center", ha="left", size=8.5, color=INK)
        axes.set(xlim=(0, 1.015), ylim=(rows - 0.4, -0.6))
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.spines[:].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def gallery(images: Sequence[Pixels], predictions: Sequence[Prediction], title: str) -> Figure:
    """A grid of images, pixel for pixel; with predictions, each is captioned, and a mistake has a mark and a frame."""
    tiles = [_fit(image, TILE) for image in images]
    side, gap, caption, head = (
        (len(tiles[0]) if tiles else TILE),
        16,
        (56 if any(not found.right for found in predictions) else 40) * bool(predictions),
        48,
    )
    columns = max(1, min(len(tiles), max(5, math.isqrt(max(len(tiles) - 1, 0)) + 1)))
    rows = math.ceil(len(tiles) / columns)
    width, height = max(columns * (side + gap) + gap, 760), max(rows * (side + gap + caption) + gap + head, 110)
    figure = Figure((width / DPI, height / DPI))
    figure.text(gap, height - 30, title, transform=None, size=12, weight="bold")
    for index, tile in enumerate(tiles):
        left = gap + index % columns * (side + gap)
        top = height - head - index // columns * (side + gap + caption)
        figure.figimage(tile, left, top - side, origin="upper")
        if not predictions:
            continue
        found = predictions[index]
        color, weight = (INK, "normal") if found.right else (ORANGE, "bold")
        lines = [(f"{'✓' if found.right else '✗'} {short(found.predicted, 16)}", color, weight)]
        lines += [(f"{percent(found.confidence, 0)} sure", MUTED, "normal")]
        if not found.right:
            frame = Rectangle((left - 3, top - side - 3), side + 6, side + 6, fill=False, linewidth=3, edgecolor=ORANGE)
            frame.set_transform(None)
            figure.add_artist(frame)
            lines += [(f"is {short(found.actual, 16)}", INK, "normal")]
        for line, (text, color, weight) in enumerate(lines):
            label = figure.text(
                left, top - side - 20 - 16 * line, text, transform=None, size=7.5, color=color, weight=weight
            )
            label.set_clip_box(Bbox.from_extents(left, 0, left + side + gap / 2, height))
            label.set_clip_on(True)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG of at most 256 colours: a third of the size, no date, no name of a program."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return _encoded(picture.quantize(256, method=Image.Quantize.MEDIANCUT), "PNG", optimize=True)


def report(
    results: Results,
    counts: NDArray[np.int64],
    shown: Sequence[Prediction],
    worst: Sequence[Prediction],
    batch: Pixels,
    files: Mapping[str, bytes],
) -> str:
    """The page that tells the result in plain words; all that it shows lies inside it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, plain=_plain, value=partial(json.dumps, ensure_ascii=False))
    totals = counts.sum(axis=1)
    mixed = [(int(counts[i, j]), i, j) for i, j in zip(*np.nonzero(counts), strict=True) if i != j]
    counted = dict(results.data)
    shares = {row["class"]: row for row in counted.pop("classes")}
    return environment.get_template(TEMPLATE.name).render(
        results=results,
        images={name.removesuffix(".png"): _data_uri(content, "png") for name, content in files.items()},
        examples=[(found, _tile(results.images[found.row])) for found in shown],
        mistakes=[(found, _tile(results.images[found.row])) for found in worst],
        augmented=[_tile(image) for image in batch],
        pixelated=results.images.shape[1] <= 64,
        right=int(np.trace(counts)),
        wrong=int(counts.sum() - np.trace(counts)),
        common=Counter(found.actual for found in results.predictions).most_common(1)[0],
        mixed=[
            (results.classes[i], results.classes[j], number, number / totals[i])
            for number, i, j in sorted(mixed, key=lambda cell: (-cell[0], cell[1:]))[:5]
        ],
        weakest=min((score for score in results.scores if score.images), key=lambda score: (score.recall, score.name)),
        shares=shares,
        counts=_flat(counted),
        origin=_flat(results.origin),
    )


def percent(share: float, digits: int = 1) -> str:
    """0.981 -> '98.1 %'; rounds to 100 % only what is 100 %; '–' where 0 of 0 would be NaN."""
    if math.isnan(share):
        return "–"
    most = 1.0 if share >= 1 else 1 - 10.0 ** -(digits + 2)
    return f"{100 * min(share, most):.{digits}f}\N{NO-BREAK SPACE}%"


def short(name: str, length: int) -> str:
    """A name for one line: without line breaks and control characters, cut in the middle, since ends differ too."""
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    if len(name) <= length:
        return name
    tail = (length - 1) // 3
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


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
