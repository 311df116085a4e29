"""Put the model into files for its deployment, models/*.onnx, and check that they answer as it does."""

import json
from dataclasses import asdict

import pandas as pd

from src import paths
from src.batches import choose_device, read_dataset
from src.environment import settle
from src.export import agreement, answer, check, export, quantize
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
    validation, test = (data.table(split, choose_device("cpu")) for split in ("validation", "test"))
    columns = [f"p_{name}" for name in card.classes]
    if len(evaluated) != len(test) or not {*columns} <= {*evaluated}:
        raise PipelineError(f"{paths.PREDICTIONS} is not of this model and split; `dvc repro evaluate` makes it again")

    made_of, told = inputs_of("export"), ("temperature", "sure_from", "accuracy", "accuracy_low", "accuracy_high")
    metadata = asdict(card) | {name: scores[name] for name in told} | {"test_images": len(test), "flip": params.flip}
    metadata |= {"model": made_of[str(paths.MODEL)], "data": {str(path): made_of[str(path)] for path in DATA}}
    exported = export(network, card, scores["temperature"], flip=params.flip, metadata=metadata)
    models = (exported.model, quantize(exported, validation, batch=params.batch, metadata=metadata))

    compared = []
    with whole(paths.ONNX, paths.INT8) as files:
        for model, file, target in zip(models, files, (paths.ONNX, paths.INT8), strict=True):
            file.write_bytes(model.SerializeToString(deterministic=True))
            found = answer(file, test, batch=params.batch, threads=threads)
            compared.append(agreement(found, evaluated[columns].to_numpy(), test.labels.numpy()))
            print(f"{target}, {file.stat().st_size:,} bytes: {compared[-1]}")
        check(*compared)


if __name__ == "__main__":
    run(main)
