"""What a trained network is worth: predictions of single images, scores, and how sure the scores are."""

import math

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from tqdm import tqdm

from src.batches import Table

Probabilities = NDArray[np.float64]

SMALLEST = 2.0**-52
"""What a probability of 0 counts as in the loss, as in scikit-learn."""


def predict(network: nn.Module, table: Table, *, batch: int, flip: bool = False) -> Probabilities:
    """Give the class probabilities of each image of a table: (N, classes), each row summing to 1.

    With `flip`, they are the mean of those of the image and of its mirror image.
    """
    network = network.to(table.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    found = []
    with torch.inference_mode(), tqdm(total=len(table), desc="evaluate", unit=" images", disable=None) as bar:
        for images, _ in table.parts(batch):
            # Softmax on the CPU in double precision, which Apple's devices do not have.
            views = [images, images.flip(2)] if flip else [images]
            shares = [network(view).float().cpu().double().softmax(1) for view in views]
            found.append((sum(shares[1:], shares[0]) / len(shares)).numpy())
            bar.update(len(images))
    return np.concatenate(found)


def tabulate(places: pd.DataFrame, probabilities: Probabilities, classes: list[str]) -> pd.DataFrame:
    """Put predictions beside the truth, a row an image: row, path, actual, predicted, confidence, p_<class> each."""
    best = probabilities.argmax(axis=1)
    columns = {f"p_{name}": probabilities[:, code] for code, name in enumerate(classes)}
    predicted = {"predicted": np.array(classes)[best], "confidence": probabilities.max(axis=1)}
    known = places.rename(columns={"label": "actual"})[["path", "actual"]].assign(**predicted, **columns)
    return known.rename_axis("row").reset_index()


def score(predictions: pd.DataFrame, classes: list[str]) -> tuple[dict[str, float], pd.DataFrame]:
    """Score a table of predictions: the overall figures, and a row a class of precision, recall, f1 and images.

    The macro figures are plain means over the classes, so that a rare class counts as much as a frequent one; a class
    that is never predicted has precision 0.
    """
    actual, predicted = predictions["actual"], predictions["predicted"]
    precision, recall, f1, images = precision_recall_fscore_support(actual, predicted, labels=classes, zero_division=0)
    right = int((actual == predicted).sum())
    low, high = wilson_interval(right, len(predictions))
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
        "images": len(predictions),
    }
    columns = {"class": classes, "precision": precision, "recall": recall, "f1": f1, "images": images}
    return overall, pd.DataFrame(columns)


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on `count` images (Wilson 1927): the noise of the test set alone."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
