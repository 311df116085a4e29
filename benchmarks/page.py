"""Write docs/performance.md and its pictures from benchmarks/results.json: no figure is ever typed."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.figures import BLUE, FAINT, INK, MUTED, ORANGE, style
from src.runtime import whole

DOCS = Path("docs")
PAGE = DOCS / "performance.md"

Known = dict[str, Any]
"""results.json: by name, the median, smallest and largest of the rounds; and the machine."""

WANTED = {
    "train_vs_bare_article128": ("training, the article's network at 128 px", "its arithmetic alone", 0.95),
    "train_vs_bare_ours64": ("training, our network at 64 px", "its arithmetic alone", 0.95),
    "epoch_vs_tutorial_article128": ("an epoch of the article's network", "the tutorial's loop", 2.5),
    "epoch32_vs_tutorial_article128": ("the same, without bf16", "the tutorial's loop", None),
    "compiled_vs_bare_ours64": ("`train.compile`, our network", "the same without", None),
    "two_trainings_vs_one": ("seconds of two trainings at once, as of a queue", "one alone", 2.2),
    "prepare_vs_pil_one_core_animals10": ("prepare, Animals-10 to 64 px", "Pillow on one core", 3.0),
    "prepare_vs_pil_one_core_cats": ("prepare, Dogs vs Cats to 64 px", "Pillow on one core", 3.0),
    "prepare_vs_decoder_animals10": ("prepare, Animals-10 to 64 px", "decoding and resizing alone, all cores", 0.9),
    "prepare_vs_decoder_cats": ("prepare, Dogs vs Cats to 64 px", "decoding and resizing alone, all cores", 0.9),
    "prepare_vs_jpeg_alone_animals10": ("prepare, Animals-10 to 64 px", "decoding the JPEGs alone, all cores", None),
    "prepare_vs_jpeg_alone_cats": ("prepare, Dogs vs Cats to 64 px", "decoding the JPEGs alone, all cores", None),
    "download_vs_copy": ("download of one's own zip, checked", "copying and hashing it", None),
    "evaluate_vs_forward": ("evaluate", "its forward passes alone", 0.9),
    "repro_vs_status": ("seconds of `dvc repro` with nothing to do", "`dvc status`", 1.2),
    "prepare_memory_16x_vs_1x": ("peak memory of prepare with 16 times the images", "with 1 time", 1.1),
    "train_memory_16x_vs_1x": ("peak memory of train with 16 times the images", "with 1 time", 1.1),
}
"""Each ratio: of what, to what, and the least that is wanted; the most, of seconds and of memory."""

WHY = {
    "repro_vs_status": "`dvc repro` builds the graph of the stages, for which DVC imports networkx, and locks each "
    "stage; status needs neither. Reading YAML was the project's share, and a C parser (ruamel-yaml-clib) has taken a "
    "quarter of the time off both commands; what is left is DVC's own.",
    "prepare_vs_decoder": "Beside decoding, an image is read from the archive, its checksum tested, its bytes hashed "
    "(SHA-256), its picture hashed, and its row written; a third process, which lists the archive and writes the "
    "index, shares the cores; and all processes have to start.",
    "prepare_vs_pil_one_core": "This cannot be more than what decoding and resizing alone reach on these cores, which "
    "stands in the next chart beside it.",
    "train_vs_bare": "What is left is gathering and augmenting the batch, the metrics and the checkpoint, as the chart "
    "below shows.",
    "evaluate_vs_forward": "What is left is gathering the batch.",
    "two_trainings_vs_one": "Both want all cores: threads that wait for one another do so without a core "
    "(`OMP_WAIT_POLICY=passive`), but each change between the two costs time.",
    "memory": "It is what the system counts for the processes, pages of files that it shares with them among them.",
}
"""What is said of a ratio that misses what is wanted, by how its name begins, or by a part of it."""

LESS = {name for name in WANTED if name.startswith(("repro", "two")) or "memory" in name}

RATES = {
    "The article's network, 128 px": {
        "the tutorial's loop": "tutorial_article128",
        "our loop": "loop_article128",
        "the arithmetic alone": "bare_article128",
    },
    "Our network, 64 px": {"our loop": "loop_ours64", "the arithmetic alone": "bare_ours64"},
    "prepare, Animals-10 to 64 px": {
        "Pillow, one core": "pil_animals1064",
        "prepare": "prepare_animals1064",
        "decoding and resizing alone": "decoder_animals1064",
    },
    "prepare, Dogs vs Cats to 64 px": {
        "Pillow, one core": "pil_cats64",
        "prepare": "prepare_cats64",
        "decoding and resizing alone": "decoder_cats64",
    },
}

WITH_TORCH = ("train", "evaluate")
STAGES = ("download", "prepare", "split", "train", "evaluate", "plot")
SETS = {"Animals-10": 26_179, "ImageNet": 1_281_167, "a hundred million": 100_000_000}
SIDE = 128
"""Pixels of the images in the table of what large data sets cost."""


def write(known: Known) -> None:
    """Write the page and its pictures of all that was measured."""
    pictures = {"rates": rates, "step": step, "growth": growth}
    files = {PAGE: page(known).encode()}
    for name, draw in pictures.items():
        files[DOCS / f"performance-{name}.svg"] = picture(draw, known)
    with whole(*files) as parts:
        for part, content in zip(parts, files.values(), strict=True):
            part.write_bytes(content)


def page(known: Known) -> str:
    """Give docs/performance.md."""
    machine = known["machine"]
    rounds = f"{known['train_vs_bare_article128']['rounds']:.0f}"
    return "\n\n".join(
        [
            "# Performance",
            f"Measured by `make bench` on {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, "
            f"{machine['memory'] / 2**30:.0f} GiB, no GPU; each ratio in one run, by turns, medians of {rounds} "
            "rounds, in brackets the smallest and the largest. No GPU was there, so nothing here says what one "
            "would do.",
            "## Ratios",
            ratios(known),
            *missed(known),
            "![Images a second of the tutorial's loop, of ours, and of the arithmetic alone](performance-rates.svg)",
            "## Where the time of a step goes",
            "Our network at 64 px, a batch of 128, with all that its recipe asks for.",
            "![Parts of a step of training](performance-step.svg)",
            compiling(known),
            "## JPEGs at the smallest sufficient scale",
            decoding(known),
            "## What people wait for",
            seconds(known),
            "## How cost grows",
            "animals64, multiplied with shifts and noise; the article's network at 64 px, one epoch.",
            "![Seconds and memory of prepare, split and train at 1, 4 and 16 times the images](performance-growth.svg)",
            grown(known),
            "By pixels and classes, bare steps alone; our network's stem takes large images down to 64 px or more at "
            "once, so that all of them cost about the same.",
            sizes(known),
            "## What large data sets cost",
            *large(known),
            "",
        ]
    )


def ratios(known: Known) -> str:
    rows = []
    for name, (what, beside, wanted) in WANTED.items():
        if found := known.get(name):
            limit = "—" if wanted is None else f"at {'most' if name in LESS else 'least'} {wanted:g}"
            rows.append([what, beside, f"**{found['median']:.2f}** ({found['min']:.2f} to {found['max']:.2f})", limit])
    return table(["what", "beside", "ratio", "wanted"], rows)


def missed(known: Known) -> list[str]:
    """Say of each kind of ratio that misses what is wanted by how much, and why."""
    found: dict[str, list[str]] = {}
    for name, (what, beside, wanted) in WANTED.items():
        if wanted is None:
            continue
        median = known[name]["median"]
        if median > wanted if name in LESS else median < wanted:
            reason = next((why for part, why in WHY.items() if part in name), "")
            found.setdefault(reason, []).append(f"{what} beside {beside}, {median:.2f} instead of {wanted:g}")
    return [f"**Missed**: {'; '.join(ones)}. {reason}" for reason, ones in found.items()]


def decoding(known: Known) -> str:
    """Tell how near images at a smaller scale are to those that were decoded in full, by pixels and by accuracy."""
    near = [
        [what, f"{found['median']:.1f} dB", f"{found['min']:.1f} dB"]
        for what, found in (
            ("Animals-10 to 64 px", known["decibels_animals1064"]),
            ("Dogs vs Cats to 64 px", known["decibels_cats64"]),
            ("Dogs vs Cats to 128 px", known["decibels_cats128"]),
        )
    ]
    kinds = {"drafted": "at the smallest scale", "full": "in full"}
    right = [
        [trained, *(percent(known[f"accuracy_{way}_on_{judged}"]) for judged in kinds)]
        for way, trained in kinds.items()
    ]
    apart, seeds = known["accuracy_drafted_minus_full"], known["accuracy_full_on_full"]
    return "\n\n".join(
        [
            "JPEGs are decoded at the smallest of the scales 1/8, 1/4, 1/2 and 1 that is at least as large as needed, "
            "and then resized. How near that is to decoding all pixels and then resizing (peak signal-to-noise ratio):",
            table(["photographs", "median", "the worst image"], near),
            "The article's network on Dogs vs Cats at 64 px, 700 images, 20 epochs, and its accuracy on the other 300, "
            f"median of {apart['rounds']:.0f} seeds (smallest to largest):",
            table(
                ["trained on images decoded", *(f"tested on images decoded {kind}" for kind in kinds.values())], right
            ),
            f"With one seed, each its own way, the difference is {100 * apart['median']:+.1f} points in the median "
            f"({100 * apart['min']:+.1f} to {100 * apart['max']:+.1f}); seeds alone make up to "
            f"{100 * (seeds['max'] - seeds['min']):.1f} points.",
        ]
    )


def percent(found: dict[str, float]) -> str:
    return f"{100 * found['median']:.1f} % ({100 * found['min']:.1f} to {100 * found['max']:.1f})"


def compiling(known: Known) -> str:
    gain, cost = known["compiled_vs_bare_ours64"]["median"], known["compile_ours64_seconds"]["median"]
    saved = (1 - 1 / gain) / known["bare_ours64_images_per_second"]["median"]
    return (
        f"`train.compile: true` makes a step {100 * (gain - 1):.0f} % faster, and costs {cost:.0f} s at the first "
        f"start, for which it needs a C++ compiler: here it pays for itself after {cost / saved:,.0f} images."
    )


def seconds(known: Known) -> str:
    words = {
        "repro": "`dvc repro` with nothing to do",
        "status": "`dvc status`",
        "plot": "`python -m stages.plot`",
        **{f"start_{stage}": f"start of {stage}" for stage in STAGES},
    }
    rows = []
    for name, what in words.items():
        found = known[f"{name}_seconds"]
        limit = "—"
        if name.startswith("start") and name[6:] not in WITH_TORCH:
            limit = "under 0.7 s" if found["median"] < 0.7 else "under 0.7 s: **missed**"
        rows.append([what, f"{found['median']:.2f} s ({found['min']:.2f} to {found['max']:.2f})", limit])
    report = f"{known['report_bytes']['median'] / 1e3:,.0f} kB"
    return table(["what", "median", "wanted"], [*rows, ["`plots/report.html`, which is one file", report, "—"]])


def grown(known: Known) -> str:
    rows = [
        [
            f"{known[f'images_{times}x']['median']:,.0f}",
            *(
                f"{known[f'{stage}_{times}x_seconds']['median']:.1f} s, "
                f"{known[f'{stage}_{times}x_memory']['median'] / 1e6:,.0f} MB"
                for stage in ("prepare", "split", "train")
            ),
        ]
        for times in (1, 4, 16)
    ]
    return table(["images", "prepare", "split", "train, one epoch"], rows)


def sizes(known: Known) -> str:
    ways = {f"{side} px, 10 classes": f"{side}px" for side in (32, 64, 128, 256)}
    ways |= {f"64 px, {count:,} classes": f"{count}_classes" for count in (10, 100, 1000)}
    rows = [[what, f"{known[f'bare_ours_{name}_images_per_second']['median']:,.0f}"] for what, name in ways.items()]
    return table(["our network", "images a second in training"], rows)


def large(known: Known) -> list[str]:
    """Reckon what data sets of other sizes would cost, and say what of it was measured."""
    decoded = known["prepare_cats64_images_per_second"]["median"]
    trained = known["loop_article128_images_per_second"]["median"]
    row = SIDE * SIDE * 3
    apart = known["images_16x"]["median"] - known["images_1x"]["median"]
    slope = {
        stage: max(0.0, known[f"{stage}_16x_memory"]["median"] - known[f"{stage}_1x_memory"]["median"]) / apart
        for stage in ("prepare", "split", "train")
    }
    split = (known["split_16x_seconds"]["median"] - known["split_1x_seconds"]["median"]) / apart
    rows = [
        [
            f"{name}, {count:,}",
            span(count / decoded),
            span(count * split),
            span(count / trained),
            volume(count * row),
            volume(count * slope["split"]),
            volume(count * slope["train"]),
            f"{span(count / 20_000)}, {volume(20_000 * row)}/s",
            f"{span(count / 200_000)}, {volume(200_000 * row)}/s",
        ]
        for name, count in SETS.items()
    ]
    heads = [
        "images",
        "prepare",
        "split",
        "an epoch, the article's network",
        f"table at {SIDE} px",
        "split adds to memory",
        "train adds to memory",
        "an epoch at 20,000 images/s, which reads",
        "at 200,000 images/s",
    ]
    memory = known["machine"]["memory"]
    return [
        "From the rates above, in proportion: prepare at the rate of Dogs vs Cats' photographs, which have the size of "
        "ImageNet's; memory by what 16 times the images added. The last two columns measure nothing: they say what "
        "eight GPUs, and a cluster, would have to read if they trained that fast together.",
        table(heads, rows),
        f"What gives way first, here: from {memory / row:,.0f} images on, the table no longer fits the "
        f"{memory / 2**30:.0f} GiB of memory, and batches come from the disk, rows of {row / 1e3:.0f} kB in random "
        f"order; from {memory / max(slope['split'], 1):,.0f} images on, split needs more than there is. On eight GPUs "
        "the same, unless the table lies in their memory, which training says at its start. On a cluster: the one "
        "file, which each machine must reach, and split, which runs on one of them.",
    ]


def span(found: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if found >= 2 * length:
            return f"{found / length:,.1f} {unit}"
    return f"{found:.1f} s"


def volume(found: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if found >= size:
            return f"{found / size:,.1f} {unit}"
    return f"{found / 1e3:,.0f} kB"


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture(draw: Callable[[Known], Figure], known: Known) -> bytes:
    """Give a figure as SVG, the same bytes for the same figures."""
    with style(**{"svg.hashsalt": "performance"}):
        file = io.BytesIO()
        draw(known).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def rates(known: Known) -> Figure:
    """Draw images a second: what others reach, what we reach, what can be reached."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    for axes, (title, ways) in zip(figure.subplots(2, 2).flat, RATES.items(), strict=True):
        for place, (label, name) in enumerate(ways.items()):
            found = known[f"{name}_images_per_second"]
            colour = BLUE if label in ("our loop", "prepare") else FAINT if "alone" in label else ORANGE
            axes.barh(place, found["median"], color=colour, height=0.4)
            axes.plot([found["min"], found["max"]], [place, place], color=INK, linewidth=1)
            axes.annotate(
                f"{label}: {found['median']:,.0f}", (0, place - 0.2), (0, 4), textcoords="offset points", color=INK
            )
        plain(axes)
        axes.set_ylim(len(ways) - 0.7, -0.7)
        axes.set(title=title, xlabel="images per second")
    return figure


def step(known: Known) -> Figure:
    """Draw the parts of a step side by side, as shares of it."""
    figure = Figure(figsize=(8, 1.5), layout="constrained")
    axes: Axes = figure.subplots()
    found = {part: known[f"step_ours64_{part}_seconds"]["median"] for part in ("batches", "forward", "backward", "all")}
    labels = ("gather and\naugment", "forward", "backward", "optimizer")
    begin, whole_step = 0.0, found["all"]
    for label, end, colour in zip(labels, found.values(), (ORANGE, "#9ccbe6", BLUE, FAINT), strict=True):
        end = max(begin, end)
        axes.barh(0, end - begin, left=begin, color=colour)
        share = f"{label}\n{(end - begin) / whole_step:.0%}".replace("%", " %")
        axes.annotate(share, ((begin + end) / 2, 0.42), ha="center", va="bottom", color=INK)
        begin = end
    plain(axes)
    axes.set(xlim=(0, whole_step), ylim=(-0.4, 1.5), xlabel="seconds")
    return figure


def plain(axes: Axes) -> None:
    """Leave only the axis of the numbers, so that no line runs through a label above a bar."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter("{x:,g}")


def growth(known: Known) -> Figure:
    """Draw seconds and memory of the stages over the number of images."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    images = [known[f"images_{times}x"]["median"] for times in (1, 4, 16)]
    kinds = {"seconds": ("Time", "s", 1), "memory": ("Peak memory", "MB", 1e-6)}
    for axes, (kind, (title, unit, scale)) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        for stage, colour in (("prepare", BLUE), ("split", MUTED), ("train", ORANGE)):
            values = [known[f"{stage}_{times}x_{kind}"]["median"] * scale for times in (1, 4, 16)]
            axes.plot(images, values, "o-", color=colour)
            axes.annotate(
                stage, (images[-1], values[-1]), (7, 0), textcoords="offset points", color=colour, va="center"
            )
        axes.set_ylim(0)
        axes.margins(x=0.15)
        axes.set(title=title, xlabel="images", ylabel=unit)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
    return figure
