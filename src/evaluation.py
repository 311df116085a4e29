"""What a trained network is worth: predictions of single images, how far to trust each, scores, and their noise."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn
from tqdm import tqdm

from src.batches import Table
from src.intervals import ONE_SIDED, wilson_interval
from src.runtime import PipelineError

Codes = NDArray[np.int64]
Probabilities = NDArray[np.float64]

SMALLEST = 2.0**-52
"""What a probability of 0 counts as in the loss, as in scikit-learn."""


def predict(network: nn.Module, table: Table, *, batch: int, flip: bool = False) -> Tensor:
    """Give the logits of each image of a table: (N, views, classes), float32 on the CPU.

    The views are the image and, with `flip`, its mirror image. Raises PipelineError where a logit is no finite number.
    """
    network = network.to(table.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    found = []
    with torch.inference_mode(), tqdm(total=len(table), desc="evaluate", unit=" images", disable=None) as bar:
        for images, _ in table.parts(batch):
            views = [images, images.flip(2)] if flip else [images]
            found.append(torch.stack([network(view).float().cpu() for view in views], 1))
            bar.update(len(images))
    logits = torch.cat(found)
    if broken := len(logits) - int(logits.isfinite().all(2).all(1).sum()):
        raise PipelineError(
            f"the network's answers to {broken:,} of {len(logits):,} images are no finite numbers; "
            "train again with a smaller train.lr"
        )
    return logits


def probabilities(logits: Tensor, temperature: float = 1.0) -> Probabilities:
    """Give class probabilities, (N, classes), each row summing to 1: the mean over the views of the softmax of each."""
    # On the CPU in double precision, which Apple's devices do not have.
    shares: Probabilities = (logits.double() / temperature).softmax(2).mean(1).numpy()
    return shares


def fit_temperature(logits: Tensor, codes: Codes) -> float:
    """Find the number by which to divide logits so that probabilities are as often right as they say (Guo et al. 2017).

    It minimizes the cross entropy on images of which it has not learned, (N, views, classes) and (N,), and changes no
    answer. One image more that may be of any class keeps it finite where all answers are right (Platt 1999). Four
    digits, which are the same on every machine.
    """
    logits, right = logits.double(), torch.from_numpy(codes)[:, None]
    unknown = 1 / (len(codes) + 1)

    def loss(exponent: float) -> float:
        views = (logits / math.exp(exponent)).log_softmax(2)
        shares = views.logsumexp(1) - math.log(views.shape[1])
        known = shares.gather(1, right)[:, 0]
        return -float(((1 - unknown) * known + unknown * shares.mean(1)).mean())

    found = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded", options={"xatol": 1e-6})
    return float(f"{math.exp(found.x):.4g}")


def sure_from(shares: Probabilities, codes: Codes, wanted: float) -> float | None:
    """Find the lowest confidence from which on the share `wanted` of the answers is right with 95 % confidence.

    shares: (N, classes) of images that were not learned, codes: (N,) of their classes. The lower bound of the share
    counts (Wilson 1927, one-sided), not the share itself, which a few lucky answers reach. None where no confidence
    has enough answers: at best, all of them right, it takes 52 for 0.95, 268 for 0.99.
    """
    confidence = shares.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    right = np.cumsum(shares.argmax(axis=1)[order] == codes[order])
    last_of_its_kind = np.append(np.diff(confidence[order]) != 0, True)
    for place in reversed(np.flatnonzero(last_of_its_kind).tolist()):
        if wilson_interval(int(right[place]), place + 1, ONE_SIDED)[0] >= wanted:
            # Down to the next of four digits, so that the last one is in, on every machine.
            return math.floor(1e4 * float(confidence[order[place]])) / 1e4
    return None


def tabulate(places: pd.DataFrame, probabilities: Probabilities, classes: list[str]) -> pd.DataFrame:
    """Put predictions beside the truth, a row an image: row, path, actual, predicted, confidence, p_<class> each."""
    best = probabilities.argmax(axis=1)
    columns = {f"p_{name}": probabilities[:, code] for code, name in enumerate(classes)}
    predicted = {"predicted": np.array(classes)[best], "confidence": probabilities.max(axis=1)}
    known = places.rename(columns={"label": "actual"})[["path", "actual"]].assign(**predicted, **columns)
    return known.rename_axis("row").reset_index()


def score(
    predictions: pd.DataFrame, classes: list[str], sure: float | None = None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score a table of predictions: the overall figures, and a row a class of precision, recall, f1 and images.

    An answer counts as sure from the confidence `sure` on. What would be 0 of 0 is undefined, None in the figures and
    NaN in the rows: the precision of a class that is never predicted, the recall of one without an image, the accuracy
    of no sure answers, and their share where no confidence is `sure`. The macro figures are plain means over the
    classes where they are defined, so that a rare class counts as much as a frequent one.
    """
    actual, predicted = predictions["actual"], predictions["predicted"]
    precision, recall, f1, images = precision_recall_fscore_support(
        actual, predicted, labels=classes, zero_division=np.nan
    )
    hits, confidence = (actual == predicted).to_numpy(), predictions["confidence"].to_numpy()
    low, high = wilson_interval(right := int(hits.sum()), len(predictions))
    firm = confidence >= (math.inf if sure is None else sure)
    codes = pd.Categorical(actual, categories=classes).codes
    given = predictions[[f"p_{name}" for name in classes]].to_numpy()[np.arange(len(codes)), codes]
    overall = {
        "accuracy": right / len(predictions),
        "accuracy_low": low,
        "accuracy_high": high,
        # Not numpy's log, whose last bit depends on the CPU.
        "loss": -math.fsum(math.log(max(share, SMALLEST)) for share in given.tolist()) / len(given),
        "macro_precision": float(np.nanmean(precision)),
        "macro_recall": float(np.nanmean(recall)),
        "macro_f1": float(np.nanmean(f1)),
        "calibration_error": calibration_error(confidence, hits),
        "sure_share": None if sure is None else float(firm.mean()),
        "sure_accuracy": float(hits[firm].mean()) if firm.any() else None,
        "images": len(predictions),
    }
    columns = {"class": classes, "precision": precision, "recall": recall, "f1": f1, "images": images}
    return overall, pd.DataFrame(columns)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error (Naeini et al. 2015; 15 bins as in Guo et al. 2017): how far confidence, (N,), is from
    the share that is right, on average over answers of like confidence."""
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(right))
