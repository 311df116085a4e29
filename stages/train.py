"""Train the network: models/, metrics/train/, metrics/environment.json and data/training_batch.npy."""

from dataclasses import asdict

import numpy as np
from dvclive.live import Live

from src import paths
from src.batches import batches, channel_statistics, count_steps, read_dataset, step_generator
from src.checkpoints import Record, open_store
from src.environment import bits, describe, keep_record, settle
from src.networks import count_parameters, start
from src.params import load_params
from src.provenance import hash_file, inputs_of
from src.runtime import in_sight, run, whole
from src.training import Trainer, fit_from, make_fabric

SEEN = 25


def main() -> None:
    params = load_params().train
    settle(params)
    data = read_dataset()
    fabric = make_fabric(params)
    train, validation = (data.table(split, fabric.device) for split in ("train", "validation"))
    model, drawn = load_params().model, step_generator("weights", params.seed)
    network, card = start(model, data.size, data.channels, data.classes, channel_statistics(train), drawn)
    print(f"{card.network}, {count_parameters(network):,} parameters, on {len(train):,} images, {fabric.device}")
    machine, steps = describe(fabric.device), count_steps(len(train), params.batch)
    made_of = {"model": asdict(card), "inputs": inputs_of("train"), "machine": bits(machine, params)}
    with (
        open_store(params, steps, made_of) as store,
        in_sight(paths.TRAIN_LOG) as folder,
        whole(paths.MODEL, paths.SNAPSHOTS, paths.TRAINING_BATCH) as (best, snapshots, batch),
        batch.open("wb") as seen,
        Live(str(folder), dvcyaml=None, report=None, save_dvc_exp=False) as live,
    ):
        np.save(seen, next(batches(train, params, 1))[0][:SEEN].cpu().numpy())
        live.summary |= {"parameters": count_parameters(network), "train_images": len(train)}
        for ended in fit_from(store, Trainer(network, params, fabric), train, validation, card):
            log(live, ended)
        store.write_outputs(best, snapshots)
    keep_record(paths.ENVIRONMENT, machine, model=hash_file(paths.MODEL))


def log(live: Live, record: Record) -> None:
    live.step = record.epoch
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        live.log_metric(name.replace("_", "/"), getattr(record, name))
    if record.best:
        live.summary |= {"best_epoch": record.epoch, "best_validation_accuracy": record.validation_accuracy}
    live.make_summary()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    run(main)
