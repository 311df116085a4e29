"""Train the network: models/model.safetensors, models/snapshots/, metrics/train/ and data/augmented.npy."""

import numpy as np
import torch
from dvclive.live import Live
from tqdm import tqdm

from src import paths
from src.batches import batches, channel_statistics, read_dataset, step_generator
from src.networks import build, count_parameters, initialize, make_card, pack
from src.params import load_params
from src.runtime import in_sight, run, whole
from src.training import Record, fit, make_fabric

SEEN = 25


def main() -> None:
    params, model_params = load_params().train, load_params().model
    data = read_dataset()
    fabric = make_fabric(params)
    train, validation = (data.table(split, fabric.device) for split in ("train", "validation"))
    card = make_card(model_params, size=data.images.shape[1], channels=data.images.shape[3], classes=data.classes)
    mean, deviation = channel_statistics(train)
    network = build(card, mean=mean, deviation=deviation)
    initialize(network, step_generator(params.seed, 0, 0, torch.device("cpu")))
    print(f"{card.network}, {count_parameters(network):,} parameters, on {len(train):,} images, {fabric.device}")

    with (
        whole(paths.MODEL, paths.SNAPSHOTS, paths.AUGMENTED) as (model, snapshots, augmented),
        in_sight(paths.TRAIN_LOG) as log,
        Live(str(log), dvcyaml=None, report=None, save_dvc_exp=False) as live,
    ):
        np.save(augmented.open("wb"), next(batches(train, params, 1))[0][:SEEN].cpu().numpy())
        live.summary |= {"parameters": count_parameters(network), "train_images": len(train)}
        snapshots.mkdir()
        for record in fit(network, train, validation, params, fabric):
            write_record(live, record)
            weights = pack(network.state_dict(), card)
            if record.best:
                model.write_bytes(weights)
            if params.snapshot_every and record.epoch % params.snapshot_every == 0:
                (snapshots / f"epoch-{record.epoch:04}.safetensors").write_bytes(weights)


def write_record(live: Live, record: Record) -> None:
    """Log an epoch for DVC, and tell it to the user."""
    live.step = record.epoch
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"):
        live.log_metric(name.replace("_", "/"), getattr(record, name))
    if record.best:
        live.summary |= {"best_epoch": record.epoch, "best_validation_accuracy": record.validation_accuracy}
    live.make_summary()  # type: ignore[no-untyped-call]
    train = f"loss {record.train_loss:.4f}, accuracy {record.train_accuracy:.2%}"
    validation = f"loss {record.validation_loss:.4f}, accuracy {record.validation_accuracy:.2%}"
    tqdm.write(f"epoch {record.epoch}: train {train}; validation {validation}{' *' if record.best else ''}")


if __name__ == "__main__":
    run(main)
