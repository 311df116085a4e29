"""Put the model into files for its deployment, and compare them: models/*.onnx and metrics/export.json."""

import json
from dataclasses import asdict

import pandas as pd
import torch

from src import paths
from src.batches import read_dataset
from src.environment import settle
from src.export import agreement, answer, export, quantize
from src.networks import load
from src.params import load_params
from src.provenance import inputs_of
from src.runtime import PipelineError, run, whole

DATA = (paths.IMAGES, paths.SPLIT)


def main() -> None:
    params, threads = load_params().evaluate, load_params().train.threads
    settle(load_params().train)
    network, card = load(paths.MODEL)
    data = read_dataset()
    try:
        evaluated, scores = pd.read_csv(paths.PREDICTIONS), json.loads(paths.EVALUATION.read_bytes())
    except FileNotFoundError as error:
        raise PipelineError(f"{error.filename} is missing; `dvc repro evaluate` makes it") from None
    validation, test = (data.table(split, torch.device("cpu")) for split in ("validation", "test"))
    shares, codes = evaluated[[f"p_{name}" for name in card.classes]].to_numpy(), test.labels.numpy()

    made_of, told = inputs_of("export"), ("temperature", "sure_from", "accuracy", "accuracy_low", "accuracy_high")
    metadata = asdict(card) | {name: scores[name] for name in told} | {"test_images": len(test), "flip": params.flip}
    metadata |= {"model": made_of[str(paths.MODEL)], "data": {str(path): made_of[str(path)] for path in DATA}}
    plain = export(network, card, scores["temperature"], flip=params.flip, metadata=metadata)
    models = {"onnx": plain, "int8": quantize(plain, validation, batch=params.batch, metadata=metadata)}

    metrics = {}
    with whole(paths.ONNX, paths.INT8, paths.EXPORT_METRICS) as (*files, metrics_file):
        for (name, model), file in zip(models.items(), files, strict=True):
            file.write_bytes(model.SerializeToString(deterministic=True))
            found = answer(file, test, batch=params.batch, threads=threads)
            metrics[name] = {"bytes": file.stat().st_size} | agreement(found, shares, codes)
            print(f"{name}: {metrics[name]['same_top1']:.2%} of the test images are named as by the evaluated model")
        metrics_file.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
