"""The learning rate of each step, as a pure function of the params."""

import hashlib
import math
import struct

from src.params import Train

FIELDS = frozenset(["epochs", "lr", "schedule", "warmup", "decay"])
"""The params of which the learning rates are made, and nothing else."""


def learning_rate(params: Train, *, epoch: int, step: int, steps: int) -> float:
    """Give the learning rate of step `step` (from 1, of `steps` an epoch) of epoch `epoch` (from 1).

    Warm-up and linear decay as in warmup-stable-decay (Hu et al. 2024, MiniCPM), cosine as in SGDR (Loshchilov and
    Hutter 2017) without restarts, one-cycle as two straight lines (Smith 2018). Only `wsd` in its decay, and `cosine`
    and `onecycle` after their warm-up, look at `params.epochs`.
    """
    done = (epoch - 1) * steps + step
    warmup, total = params.warmup * steps, params.epochs * steps
    if done <= warmup:
        return params.lr * done / warmup
    if params.schedule == "cosine":
        return params.lr * (1 + math.cos(math.pi * (done - 1 - warmup) / (total - warmup))) / 2
    if params.schedule == "onecycle":
        return params.lr * (total - done + 1) / (total - warmup + 1)
    if params.schedule == "wsd" and done > total - params.decay * steps:
        return params.lr * (total - done + 1) / (params.decay * steps + 1)
    return params.lr


def fingerprints(params: Train, *, steps: int) -> list[str]:
    """Give, for each epoch from 0 to the last, a hash of all learning rates up to its end.

    Two runs that agree in everything but schedule and length stand at the same weights after epoch e where their
    fingerprints of e agree: that is where one may continue the other.
    """
    digest = hashlib.sha256()
    found = [digest.hexdigest()]
    for epoch in range(1, params.epochs + 1):
        rates = [learning_rate(params, epoch=epoch, step=step, steps=steps) for step in range(1, steps + 1)]
        digest.update(struct.pack(f"<{steps}d", *rates))
        found.append(digest.hexdigest())
    return found


def shared_epochs(params: Train, *, steps: int) -> int:
    """Give the epoch up to which a longer run takes the same steps, so that it can continue from there."""
    longer = params.model_copy(update={"epochs": params.epochs + 1})
    pairs = zip(fingerprints(params, steps=steps), fingerprints(longer, steps=steps), strict=False)
    return sum(mine == theirs for mine, theirs in pairs) - 1
