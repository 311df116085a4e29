"""What a trained network is worth: predictions of single images, how far to trust each, scores, and their noise."""

import math

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn
from tqdm import tqdm

from src.batches import Table

Codes = NDArray[np.int64]
Probabilities = NDArray[np.float64]

SMALLEST = 2.0**-52
"""What a probability of 0 counts as in the loss, as in scikit-learn."""


def predict(network: nn.Module, table: Table, *, batch: int, flip: bool = False) -> Tensor:
    """Give the logits of each image of a table: (N, views, classes), float32 on the CPU.

    The views are the image and, with `flip`, its mirror image.
    """
    network = network.to(table.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    found = []
    with torch.inference_mode(), tqdm(total=len(table), desc="evaluate", unit=" images", disable=None) as bar:
        for images, _ in table.parts(batch):
            views = [images, images.flip(2)] if flip else [images]
            found.append(torch.stack([network(view).float().cpu() for view in views], 1))
            bar.update(len(images))
    return torch.cat(found)


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


def sure_from(shares: Probabilities, codes: Codes, wanted: float) -> float:
    """Find the lowest confidence from which on at least the share `wanted` of the answers is right; 1 if there is none.

    shares: (N, classes) of images that were not learned, codes: (N,) of their classes.
    """
    confidence = shares.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    right = np.cumsum(shares.argmax(axis=1)[order] == codes[order])
    counts = np.arange(1, len(codes) + 1)
    last_of_its_kind = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero((right >= wanted * counts) & last_of_its_kind)
    # Down to the next of four digits, so that the last one is in, on every machine.
    return math.floor(1e4 * confidence[order][enough[-1]]) / 1e4 if len(enough) else 1.0


def tabulate(places: pd.DataFrame, probabilities: Probabilities, classes: list[str]) -> pd.DataFrame:
    """Put predictions beside the truth, a row an image: row, path, actual, predicted, confidence, p_<class> each."""
    best = probabilities.argmax(axis=1)
    columns = {f"p_{name}": probabilities[:, code] for code, name in enumerate(classes)}
    predicted = {"predicted": np.array(classes)[best], "confidence": probabilities.max(axis=1)}
    known = places.rename(columns={"label": "actual"})[["path", "actual"]].assign(**predicted, **columns)
    return known.rename_axis("row").reset_index()


def score(predictions: pd.DataFrame, classes: list[str], sure: float = 0.0) -> tuple[dict[str, float], pd.DataFrame]:
    """Score a table of predictions: the overall figures, and a row a class of precision, recall, f1 and images.

    The macro figures are plain means over the classes, so that a rare class counts as much as a frequent one; a class
    that is never predicted has precision 0. An answer counts as sure from the confidence `sure` on; the accuracy of no
    sure answer is 0.
    """
    actual, predicted = predictions["actual"], predictions["predicted"]
    precision, recall, f1, images = precision_recall_fscore_support(actual, predicted, labels=classes, zero_division=0)
    hits, confidence = (actual == predicted).to_numpy(), predictions["confidence"].to_numpy()
    low, high = wilson_interval(right := int(hits.sum()), len(predictions))
    firm = confidence >= sure
    codes = pd.Categorical(actual, categories=classes).codes
    given = predictions[[f"p_{name}" for name in classes]].to_numpy()[np.arange(len(codes)), codes]
    overall = {
        "accuracy": right / len(predictions),
        "accuracy_low": low,
        "accuracy_high": high,
        # Not numpy's log, whose last bit depends on the CPU.
        "loss": -math.fsum(math.log(max(share, SMALLEST)) for share in given.tolist()) / len(given),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "calibration_error": calibration_error(confidence, hits),
        "sure_share": float(firm.mean()),
        "sure_accuracy": float(hits[firm].mean()) if firm.any() else 0.0,
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


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on `count` images (Wilson 1927): the noise of the test set alone."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
