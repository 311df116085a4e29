"""Measure the pipeline beside the tutorial's own loop and beside what the machine allows: `make bench`.

What is compared runs by turns, round after round, so that a machine that slows down slows all of it. Each figure of
benchmarks/results.json is the median of its rounds, with the smallest and the largest.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import page, ways
from benchmarks.ways import Scene, Way
from src import paths
from src.runtime import RESUME, Parser, PipelineError, in_one_sentence, say

RESULTS = Path("benchmarks/results.json")

Figures = dict[str, list[float]]
"""The figures of all rounds, by name."""

ARTICLE = Scene("animals10-article", "animals10", images=5_120, size=128)
OURS = Scene("animals10", "animals64", images=5_120, size=80, seen=64)


def main() -> None:
    parser = Parser(prog="python -m benchmarks.bench", description="Measure speed and memory.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all, where none is named")
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    if unknown := sorted(set(words.parts) - set(PARTS)):
        raise PipelineError(f"nothing is called {unknown[0]!r}; what can be measured is {', '.join(PARTS)}")
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if words.parts and RESULTS.exists() else {}
    for part in words.parts or PARTS:
        say(f"measures {part}, {words.rounds} rounds")
        known |= {name: summary(values) for name, values in PARTS[part](words.rounds).items()}
        known["machine"] = machine()
        RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    page.write(known)


def summary(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def machine() -> dict[str, Any]:
    import torch

    from src.environment import describe

    found = describe(torch.device("cpu"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {name: found[name] for name in ("cpu", "isa", "threads")} | {"cores": os.cpu_count(), "memory": memory}


def by_turns(rounds: int, setups: dict[str, Callable[[], Way]]) -> Figures:
    """Run each way once to warm up, then `rounds` rounds of all, every other one backwards.

    Of a way that gives several figures, each is called by its own name before that of the way.
    """
    found: Figures = {}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(other_process(setup)) for name, setup in setups.items()}
        for turn in range(rounds + 1):
            for name in list(pipes) if turn % 2 else reversed(pipes):
                pipes[name].send(True)
                figures = pipes[name].recv()
                by_name = (
                    {f"{kind}_{name}": figure for kind, figure in figures.items()}
                    if isinstance(figures, dict)
                    else {name: figures}
                )
                for full, figure in by_name.items() if turn else ():
                    found.setdefault(full, []).append(figure)
                    say(f"  {full} {figure:,.4g}")
    return found


@contextmanager
def other_process(setup: Callable[[], Way]) -> Iterator[Connection]:
    """Set a way up in a new process, and give the pipe that asks it for one figure after the other."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(setup, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(False)
    except (EOFError, ConnectionError):
        raise PipelineError("a process of the benchmark ended; its error stands above") from None
    finally:
        ours.close()
        process.join()


def _serve(setup: Callable[[], Way], pipe: Connection) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        tempfile.tempdir = folder  # gigabytes of archives and tables, which go when the way ends
        measure = setup()
        while pipe.recv():
            pipe.send(measure())


def ratio(found: Figures, one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(found[one], found[other], strict=True)]


def named(found: Figures, unit: str) -> Figures:
    return {f"{name}_{unit}": values for name, values in found.items()}


# --- the parts --------------------------------------------------------------------------------------------------------


def training(rounds: int) -> Figures:
    """Our loop beside the arithmetic alone and beside the tutorial's loop, on the same photographs."""
    exact = ARTICLE._replace(changes=(("precision", "32"),))
    found = by_turns(
        rounds,
        {
            "tutorial_article128": partial(ways.tutorial_loop, ARTICLE.photographs, ARTICLE.images),
            "article128": partial(ways.loop, ARTICLE),
            "article128_32": partial(ways.loop, exact),
            "ours64": partial(ways.loop, OURS),
        },
    )
    return named(found, "images_per_second") | {
        "train_vs_bare_article128": ratio(found, "loop_article128", "bare_article128"),
        "train_vs_bare_ours64": ratio(found, "loop_ours64", "bare_ours64"),
        "epoch_vs_tutorial_article128": ratio(found, "loop_article128", "tutorial_article128"),
        "epoch32_vs_tutorial_article128": ratio(found, "loop_article128_32", "tutorial_article128"),
    }


def queueing(rounds: int) -> Figures:
    """Two trainings at once, as `dvc queue start -j 2` runs them, beside one alone."""
    found = by_turns(rounds, {"one_training": partial(ways.at_once, 1), "two_trainings": partial(ways.at_once, 2)})
    return named(found, "seconds") | {"two_trainings_vs_one": ratio(found, "two_trainings", "one_training")}


def steps(rounds: int) -> Figures:
    """Where the time of a step goes, and what compiling gives and costs."""
    compiled = OURS._replace(changes=(("compile", True),))
    upto = ("batches", "forward", "backward", "all")
    found = by_turns(rounds, {part: partial(ways.step_parts, OURS, part) for part in upto})
    rates = by_turns(rounds, {"bare": partial(ways.bare, OURS), "compiled": partial(ways.bare, compiled)})
    first = by_turns(1, {"compile_ours64": partial(ways.first_step, compiled)})
    return (
        named({f"step_ours64_{part}": values for part, values in found.items()}, "seconds")
        | named(first, "seconds")
        | {"compiled_vs_bare_ours64": ratio(rates, "compiled", "bare")}
    )


def preparing(rounds: int) -> Figures:
    """`prepare` beside Pillow on one core, and beside the decoder alone on all of them."""
    found: Figures = {}
    for name, size, count in (("animals10", 64, 100_000), ("cats", 64, 50_000)):
        rates = by_turns(
            rounds,
            {
                "pil": partial(ways.pil_one_core, name, size),
                "decoder": partial(ways.in_all_cores, name, size, ways.to_pixels),
                "jpeg": partial(ways.in_all_cores, name, size, ways.jpeg_alone),
                "prepare": partial(ways.prepare, name, size, count),
            },
        )
        found |= named({f"{way}_{name}{size}": values for way, values in rates.items()}, "images_per_second")
        for other, words in (("pil", "pil_one_core"), ("decoder", "decoder"), ("jpeg", "jpeg_alone")):
            found[f"prepare_vs_{words}_{name}"] = ratio(rates, "prepare", other)
    return found


def decoding(rounds: int) -> Figures:
    """Is a JPEG that was decoded at the smallest sufficient scale as good as one that was decoded in full?"""
    found: Figures = {}
    for name, size in (("animals10", 64), ("cats", 64), ("cats", 128)):
        found[f"decibels_{name}{size}"] = ways.decibels(name, size)
    for seed in range(rounds):
        for name, share in ways.accuracies("cats", seed).items():
            found.setdefault(f"accuracy_{name}", []).append(share)
            say(f"  accuracy {name} {share:.3f}")
    found["accuracy_drafted_minus_full"] = [
        mine - theirs
        for mine, theirs in zip(found["accuracy_drafted_on_drafted"], found["accuracy_full_on_full"], strict=True)
    ]
    return found


def downloading(rounds: int) -> Figures:
    """`download` of one's own zip beside copying and hashing it."""
    archives = ("animals10", 20_000)
    found = by_turns(rounds, {"copy": partial(ways.copy, *archives), "fetch": partial(ways.fetch, *archives)})
    return named(found, "bytes_per_second") | {"download_vs_copy": ratio(found, "fetch", "copy")}


def evaluating(rounds: int) -> Figures:
    """`predict` beside the forward passes alone."""
    found = by_turns(rounds, {"ours80": partial(ways.prediction, OURS._replace(images=2_560))})
    return named(found, "images_per_second") | {"evaluate_vs_forward": ratio(found, "predict_ours80", "forward_ours80")}


def waiting(rounds: int) -> Figures:
    """Seconds of commands that have nothing to do, and of each stage's start."""
    python, stages = sys.executable, sorted(Path("stages").glob("[!_]*.py"))
    found = by_turns(
        rounds,
        {
            "repro": partial(ways.command, python, "-m", "dvc", "repro"),
            "status": partial(ways.command, python, "-m", "dvc", "status"),
            "plot": partial(ways.command, python, "-m", "stages.plot"),
            **{f"start_{one.stem}": partial(ways.command, python, "-c", f"import stages.{one.stem}") for one in stages},
        },
    )
    return named(found, "seconds") | {
        "repro_vs_status": ratio(found, "repro", "status"),
        "report_bytes": [float(Path("plots/report.html").stat().st_size)],
    }


def scaling(rounds: int) -> Figures:
    """What images of other sizes, and more classes, cost a step of our network."""
    sizes = {f"bare_ours_{size}px": OURS._replace(images=512, size=size, seen=0) for size in (32, 64, 128, 256)}
    found = by_turns(rounds, {name: partial(ways.bare, scene, 2) for name, scene in sizes.items()})
    classes = {f"bare_ours_{count}_classes": OURS._replace(images=512, classes=count) for count in (10, 100, 1000)}
    found |= by_turns(rounds, {name: partial(ways.bare, scene, 2) for name, scene in classes.items()})
    return named(found, "images_per_second")


def growing(rounds: int) -> Figures:
    """Time and memory of prepare, split and train with 1, 4 and 16 times the photographs."""
    found: Figures = {}
    homes = {
        times: ways.lay_out("animals10-article", f"growth{times}", ways.multiplied("animals64", times), size=64)
        for times in (1, 4, 16)
    }
    for _ in range(rounds):
        for times, home in homes.items():
            shutil.rmtree(home / RESUME, ignore_errors=True)  # or training would find itself done
            for stage in ("prepare", "split", "train"):
                seconds, memory = ways.run_stage(stage, home, watch=0.1)
                say(f"  {stage} {times}x {seconds:.1f} s, {memory / 1e6:,.0f} MB")
                found.setdefault(f"{stage}_{times}x_seconds", []).append(seconds)
                found.setdefault(f"{stage}_{times}x_memory", []).append(memory)
    for times, home in homes.items():
        found[f"images_{times}x"] = [float(sum(1 for _ in (home / paths.INDEX).open("rb")) - 1)]
        shutil.rmtree(home)
    for stage in ("prepare", "train"):
        found[f"{stage}_memory_16x_vs_1x"] = ratio(found, f"{stage}_16x_memory", f"{stage}_1x_memory")
    return found


PARTS: dict[str, Callable[[int], Figures]] = {
    "training": training,
    "queueing": queueing,
    "steps": steps,
    "downloading": downloading,
    "preparing": preparing,
    "decoding": decoding,
    "evaluating": evaluating,
    "waiting": waiting,
    "scaling": scaling,
    "growing": growing,
}


if __name__ == "__main__":
    with in_one_sentence():
        main()
