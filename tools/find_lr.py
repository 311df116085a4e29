"""Find a learning rate: `python -m tools.find_lr` trains some steps with ever higher rates and draws the losses.

The learning-rate range test of Smith 2015 (https://arxiv.org/abs/1506.01186): while the rate grows, the loss falls
faster and faster until the training breaks. It takes data, network, batch and everything else from params.yaml, needs
what `dvc repro split` makes, and changes nothing but the picture.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from src.batches import Table, batches, channel_statistics, read_dataset, step_generator
from src.environment import settle
from src.networks import start
from src.params import Train, load_params
from src.runtime import Parser, PipelineError, in_one_sentence, whole
from src.training import Trainer, make_fabric

MEMORY = 0.95
"""Share of itself that the running average of the losses keeps in each step."""
BROKEN = 4.0
"""The training has broken when the average loss is so many times the lowest one."""


@dataclass(frozen=True)
class Trial:
    """One step: its learning rate, and the average loss by then."""

    rate: float
    loss: float


def main() -> None:
    parser = Parser(prog="python -m tools.find_lr", description="Try ever higher learning rates.")
    parser.add_argument("--lowest", type=float, default=1e-6, help="the first rate, %(default)s")
    parser.add_argument("--highest", type=float, default=1.0, help="the last rate, %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="how many, %(default)s")
    parser.add_argument("--out", type=Path, default=Path("lr.png"), help="the picture, %(default)s")
    options = parser.parse_args()
    if not 0 < options.lowest < options.highest or options.steps < 10:
        raise PipelineError("expected 0 < --lowest < --highest, and at least 10 --steps")
    trials = list(sweep(options.lowest, options.highest, options.steps))
    best = suggest(trials)
    with whole(options.out) as (picture,):
        draw(trials, best, picture)
    print(
        f"the loss falls fastest around train.lr={best:.1e}; it was lowest at {lowest(trials).rate:.1e} ({options.out})"
    )


def sweep(first: float, last: float, steps: int) -> Iterator[Trial]:
    """Train with rates that grow by the same factor in each step, until the training breaks."""
    params = load_params().train
    settle(params)
    data = read_dataset()
    fabric = make_fabric(params)
    table = data.table("train", fabric.device)
    drawn = step_generator("weights", params.seed)
    network, _ = start(load_params().model, data.size, data.channels, data.classes, channel_statistics(table), drawn)
    trainer, average, best = Trainer(network, params, fabric), 0.0, math.inf
    trainer.model.train()
    for count, batch in enumerate(tqdm(itertools.islice(endless(table, params), steps), total=steps, disable=None)):
        rate = first * (last / first) ** (count / (steps - 1))
        generator = step_generator("dropout", params.seed, 1, count + 1, fabric.device)
        loss = trainer.step(trainer.model, *batch, rate, generator)[0].item() / len(batch[0])
        average = MEMORY * average + (1 - MEMORY) * loss
        smooth = average / (1 - MEMORY ** (count + 1))
        best = min(best, smooth)
        if not smooth < BROKEN * best:
            return
        yield Trial(rate, smooth)


def endless(table: Table, params: Train) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after the other."""
    for epoch in itertools.count(1):
        yield from batches(table, params, epoch)


def lowest(trials: list[Trial]) -> Trial:
    """Give the trial of the lowest loss."""
    return min(trials, key=lambda trial: trial.loss)


def suggest(trials: list[Trial]) -> float:
    """Give the rate where the loss falls most within a tenth of the steps, before it is lowest."""
    reach = max(1, len(trials) // 10)
    falling = trials[: trials.index(lowest(trials)) + 1]
    if len(falling) <= reach:
        raise PipelineError("the loss did not fall; begin with a smaller --lowest")
    falls = [falling[place].loss - falling[place + reach].loss for place in range(len(falling) - reach)]
    return falling[falls.index(max(falls)) + reach // 2].rate


def draw(trials: list[Trial], best: float, picture: Path) -> None:
    """Draw the loss over the learning rate."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.semilogx([trial.rate for trial in trials], [trial.loss for trial in trials], color="#0072b2")
    axes.axvline(best, color="#d55e00", linestyle="--", label=f"falls fastest: {best:.1e}")
    axes.set(xlabel="learning rate", ylabel="running average of the training loss", title="Learning-rate range test")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, format="png", metadata={"Software": None})


if __name__ == "__main__":
    with in_one_sentence():
        main()
