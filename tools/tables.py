"""The tables of the recorded runs: docs/results.md, its chart, and the README's short one; no figure is ever typed."""

import io
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from src.runtime import counted, remove, say, whole

RESULTS, PAGE, CHART = Path("docs/results"), Path("docs/results.md"), Path("docs/results.svg")
README = Path("README.md")
MARKS = "<!-- results -->", "<!-- /results -->"

SHORT, LONG = "short", "long"
"""Label of the short runs of a whole recipe; without a part they are `short-no-mixup` and their like.

Those of a recipe's own length, which have no label, are beside `long-no-mixup` and their like.
"""

Runs = list[dict[str, Any]]
Groups = dict[tuple[str, str], Runs]
"""Records, and records by recipe and data."""


class Tutorial(NamedTuple):
    """What others report. best: its highest accuracy, 0 to 1; figures: all that it says; source: as Markdown."""

    best: float
    figures: str
    source: str


_ARTICLE = "https://medium.com/swlh/deep-learning-for-image-classification-creating-cnn-from-scratch-using-pytorch-d9eeb7039c12"
ANIMALS10 = Tutorial(
    0.78, "75 % after 50 epochs, 78 % after 100; 2,232,554 parameters", f"[the Animals-10 article]({_ARTICLE})"
)
MNIST = Tutorial(
    0.992, "99.2 % after 12 to 15 epochs", "[keras-io, mnist_convnet](https://keras.io/examples/vision/mnist_convnet/)"
)
TUTORIALS = {
    "animals10": ANIMALS10,
    "animals10-article": ANIMALS10,
    "dogs-vs-cats": Tutorial(0.9965, "99.65 %, ResNet-50 with test-time augmentation", "fastai, dogs_cats example"),
    "mnist": MNIST,
    "mnist-keras": MNIST,
}

DATA_SETS = {
    "animals64": "10,450 photographs of 64 px in 10 classes, cut from Tiny ImageNet: smaller, fewer and of other "
    "animals than the 26,179 of Animals-10",
    "dogs-vs-cats-1000": "1,000 of the 25,000 photographs of Dogs vs Cats, half of them cats",
    "mnist": "all 70,000 digits of MNIST, the same as the tutorial's",
    "sample": "5,000 digits of MNIST, which come with a Python package",
}
"""What each is, and how it differs from what the tutorials used."""


def write() -> None:
    """Write the page, its chart and the README's table; the same records give the same bytes."""
    runs = read()
    for path, content in ((PAGE, page(runs).encode()), (CHART, chart(runs))):
        if content is None:
            remove(path)
            continue
        with whole(path) as (part,):
            part.write_bytes(content)
    begin, end = MARKS
    before, mark, rest = README.read_text(encoding="utf-8").partition(begin)
    _, close, after = rest.partition(end)
    if not (mark and close):
        say(f"{README} has no {begin} and {end} around a table, and stays as it is")
        return
    with whole(README) as (part,):
        part.write_text(f"{before}{begin}\n{short_table(runs)}\n{end}{after}", encoding="utf-8")


def read() -> Runs:
    """Read all records, ordered by what they are of."""
    runs = [json.loads(file.read_text(encoding="utf-8")) | {"name": file.stem} for file in RESULTS.glob("*.json")]
    return sorted(runs, key=lambda run: [run[key] for key in ("recipe", "data", "label", "split_seed", "seed", "name")])


def page(runs: Runs) -> str:
    """Give docs/results.md."""
    paragraphs = [
        "# Results",
        "`python -m tools.results write` makes this page of the records in `docs/results/`, and a test holds it to "
        "them: no figure here was typed.",
    ]
    if not runs:
        return "\n\n".join([*paragraphs, "No run is recorded yet.", ""])
    if recipes := group(runs):
        paragraphs += [
            "## Recipes",
            "Accuracy on test images that neither trained nor chose the network: the mean ± the standard deviation "
            "(n − 1) over n runs with other seeds. The minutes are those of training, in the mean. The command is that "
            "of the first run.",
            f"![Test errors of each recipe, a dot a run]({CHART.name})",
            recipe_table(recipes),
        ]
    paragraphs += ["## What the tutorials report", *tutorials({run["data"] for run in runs})]
    if cats := {key: found for key, found in recipes.items() if key[0] == "dogs-vs-cats"}:
        paragraphs += ["## Dogs vs cats", "The plain means of both classes' figures.", class_table(cats)]
    if parts := ablations(runs, SHORT, SHORT):
        paragraphs += [
            "## What each part gives",
            f"Short runs of the whole recipe (label `{SHORT}`), and the same without one part. A difference is the "
            f"part's mean minus that of `{SHORT}`, in percentage points; within two standard deviations of `{SHORT}`'s "
            "own runs it is within the noise.",
            *parts,
        ]
    if parts := ablations(runs, "", LONG):
        paragraphs += [
            "## The same at full length",
            "Beside the recipe's own runs. What regularises may cost accuracy in short runs and give it in long ones, "
            "so these decide what stays in the recipe.",
            *parts,
        ]
    return "\n\n".join([*paragraphs, "## Every run", run_table(runs), ""])


def group(runs: Runs, label: str = "") -> Groups:
    """Put the runs of one label together by recipe and data."""
    groups: Groups = {}
    for run in runs:
        if run["label"] == label:
            groups.setdefault((run["recipe"], run["data"]), []).append(run)
    return groups


def recipe_table(recipes: Groups) -> str:
    rows = [
        [
            *key,
            spread(runs, "test_accuracy"),
            TUTORIALS[key[0]].figures if key[0] in TUTORIALS else "—",
            different(f"{run['parameters']:,}" for run in runs),
            different(str(run["epochs"]) for run in runs),
            f"{mean(run['minutes'] for run in runs):.1f}",
            different(machine(run) for run in runs),
            f"`{runs[0]['command']}`",
        ]
        for key, runs in recipes.items()
    ]
    heads = "recipe, data, test accuracy, the tutorial's, parameters, epochs, minutes, machine, command".split(", ")
    return table(heads, rows, numbers={"parameters", "epochs", "minutes"})


def tutorials(data: set[str]) -> list[str]:
    rows = [[recipe, tutorial.figures, tutorial.source] for recipe, tutorial in TUTORIALS.items()]
    known = [f"- `{name}`: {DATA_SETS[name]}." for name in sorted(data) if name in DATA_SETS]
    return [
        table(["recipe", "reported", "source"], rows),
        "Animals-10 and all of Dogs vs Cats could not be had on the machine where this was measured; other data stand "
        "in for them. **Figures of different images do not compare: there, neither is better for being higher.**",
        *(["\n".join(known)] if known else []),
    ]


def class_table(recipes: Groups) -> str:
    names = ("precision", "recall", "f1")
    rows = [[*key, *(spread(runs, f"macro_{name}") for name in names)] for key, runs in recipes.items()]
    return table(["recipe", "data", "precision", "recall", "F1"], rows)


def ablations(runs: Runs, whole: str, prefix: str) -> list[str]:
    """Give, for each recipe and data, a table of the parts beside the runs of the whole, by their labels."""
    found = []
    parted = [run for run in runs if run["label"] == prefix or run["label"].startswith(f"{prefix}-")]
    for recipe, data in sorted({(run["recipe"], run["data"]) for run in parted}):
        labels = sorted({run["label"] for run in parted} | {whole})
        groups = {label: group(runs, label).get((recipe, data), []) for label in labels}
        parts = {label: part for label, part in groups.items() if part}
        rows = [
            [
                "the whole" if label == whole else label.removeprefix(f"{prefix}-"),
                *(
                    cell
                    for key in ("test_accuracy", "validation_accuracy")
                    for cell in (spread(part, key), difference(part, parts.get(whole, []), key))
                ),
            ]
            for label, part in parts.items()
        ]
        heads = ["part", "test accuracy", "difference", "validation accuracy", "difference"]
        these = [run for part in parts.values() for run in part]
        epochs, images = (different(f"{run[key]:,}" for run in these) for key in ("epochs", "train_images"))
        minutes = f"{min(run['minutes'] for run in these):.0f} to {max(run['minutes'] for run in these):.0f}"
        machines = different(machine(run) for run in these)
        size = f"{epochs} epochs of {images} training images, {minutes} minutes a run; {machines}."
        found += [f"### {recipe} on {data}", size, table(heads, rows)]
    return found


def difference(part: Runs, base: Runs, key: str) -> str:
    """Tell by how much a part's mean differs from that of the whole, and whether that is more than noise."""
    if part == base or not base:
        return "" if base else "—"
    values = [run[key] for run in base]
    found = mean(run[key] for run in part) - mean(values)
    noise = 2 * stdev(values) if len(values) > 1 else None
    note = "noise not known" if noise is None else "within the noise" if abs(found) <= noise else ""
    return f"{100 * found:+.2f}".replace("-", "−") + (f", {note}" if note else "")


def run_table(runs: Runs) -> str:
    rows = [
        [
            f"[{run['name']}]({RESULTS.name}/{run['name']}.json)",
            f"{run['test_accuracy']:.2%} ({run['accuracy_low']:.2%} to {run['accuracy_high']:.2%})".replace("%", " %"),
            f"{run['test_images']:,}",
            f"{100 * run['validation_accuracy']:.2f} %",
            f"{run['best_epoch']} of {run['epochs']}",
            *(f"{run[name]:.1f}" for name in ("minutes", "total_minutes")),
            run["date"],
            run["code"][:8],
        ]
        for run in runs
    ]
    heads = "run, test accuracy (95 % interval), test images, validation, best epoch, minutes, in all, date, code"
    return table(heads.split(", "), rows, numbers={"test images", "minutes", "in all"})


def short_table(runs: Runs) -> str:
    """Give the README's table."""
    rows = [
        [*key, spread(found, "test_accuracy"), TUTORIALS[key[0]].figures if key[0] in TUTORIALS else "—"]
        for key, found in group(runs).items()
    ]
    return table(["recipe", "data", "here", "the tutorial, on its own data"], rows)


def table(heads: list[str], rows: list[list[str]], numbers: Collection[str] = ()) -> str:
    rules = ["---:" if head in numbers else "---" for head in heads]
    lines = ([cell.replace("|", r"\|") for cell in row] for row in [heads, rules, *rows])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(runs: Runs, key: str) -> str:
    values = [100 * run[key] for run in runs]
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation} % (n = {len(values)})"


def different(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def machine(run: dict[str, Any]) -> str:
    found = run["machine"]
    cores, threads = counted(found["cores"], "core"), counted(found["threads"], "thread")
    return f"{found['gpu'] or found['cpu']}, {cores}, {threads}, {found['isa']}"


def chart(runs: Runs) -> bytes | None:
    """Draw each recipe's test error, a dot a run, and that of the tutorial's best as a line; SVG.

    The scale is that of ratios, on which half the errors is the same step everywhere.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    from src.figures import BLUE, INK, ORANGE, STYLE, style

    if not (recipes := group(runs)):
        return None
    with style(**{"svg.hashsalt": "results"}):
        figure = Figure(figsize=(8, 1.1 + 0.45 * len(recipes)), layout="constrained")
        axes = figure.subplots()
        for row, ((recipe, _), found) in enumerate(recipes.items()):
            # An error of none has no logarithm: half an image of the test set stands for it.
            errors = [max(1 - run["test_accuracy"], 0.5 / run["test_images"]) for run in found]
            accuracy = f"{mean(run['test_accuracy'] for run in found):.2%}".replace("%", " %")
            if recipe in TUTORIALS:
                axes.plot([1 - TUTORIALS[recipe].best] * 2, [row - 0.35, row + 0.35], color=ORANGE)
            axes.plot(errors, [row] * len(errors), "o", color=BLUE, markersize=5, alpha=0.7)
            axes.annotate(f"  {accuracy}", (1, row), xycoords=axes.get_yaxis_transform(), va="center", color=INK)
        axes.set_yticks(range(len(recipes)), [f"{recipe} on {data}" for recipe, data in recipes])
        axes.set_ylim(len(recipes) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xscale("log")
        axes.set_xlabel("error on the test images (logarithmic)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        title = "Dots: runs; orange bars: the tutorial, on its own data; at the right: mean accuracy"
        figure.suptitle(title, x=0.01, ha="left", size=STYLE["axes.titlesize"])
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.xaxis.set_minor_formatter(NullFormatter())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
