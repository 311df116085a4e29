"""Draw the figures and the report: plots/*.png and plots/report.html."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from src import figures, paths
from src.params import Params, load_params
from src.runtime import PipelineError, run, whole


def main() -> None:
    params = load_params()
    try:
        results = read(params)
    except FileNotFoundError as error:
        raise PipelineError(f"{error.filename} is missing; `dvc repro` makes it") from None
    files = figures.draw(results, seed=params.plot.seed, examples=params.plot.examples)
    with whole(*(paths.PLOTS / name for name in files)) as parts:
        for part, content in zip(parts, files.values(), strict=True):
            part.write_bytes(content)


def read(params: Params) -> figures.Results:
    """Collect what the earlier stages wrote."""
    rows = _table(paths.PREDICTIONS, row=int, confidence=float)
    shares: dict[str, Any] = dict.fromkeys(("precision", "recall", "f1"), lambda cell: float(cell or "nan"))
    return figures.Results(
        images=np.load(paths.IMAGES, mmap_mode="r"),
        augmented=np.load(paths.TRAINING_BATCH),
        predictions=[figures.Prediction(*list(row.values())[:5]) for row in rows],
        classes=[column.removeprefix("p_") for column in rows[0] if column.startswith("p_")],
        history={metric: _curves(metric) for metric in ("accuracy", "loss")},
        scores=[figures.Score(row.pop("class"), **row) for row in _table(paths.CLASS_METRICS, images=int, **shares)],
        training=json.loads((paths.TRAIN_LOG / "metrics.json").read_bytes()),
        test=json.loads(paths.EVALUATION.read_bytes()),
        data=json.loads(paths.DATA_METRICS.read_bytes()),
        origin=json.loads(paths.ORIGIN.read_bytes()),
        settings=params.model_dump(),
    )


def _curves(metric: str) -> dict[str, list[tuple[int, float]]]:
    files = {split: paths.TRAIN_LOG / f"plots/metrics/{split}/{metric}.tsv" for split in ("train", "validation")}
    return {split: [(int(row["step"]), float(row[metric])) for row in _table(file)] for split, file in files.items()}


def _table(path: Path, **kinds: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The rows of a CSV or TSV file; a column without a kind stays text."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        return [row | {name: kind(row[name]) for name, kind in kinds.items()} for row in rows]


if __name__ == "__main__":
    run(main)
