"""Decode every image of the archive once: data/images.npy, data/index.csv and data/rejected.csv."""

import csv

from tqdm import tqdm

from src import images, paths
from src.layout import describe, read_layout
from src.params import load_params
from src.runtime import counted, run, say, whole


def main() -> None:
    params = load_params().prepare
    with images.decoders() as pool:
        layout = read_layout(paths.RAW, params.include, params.classes, params.class_level)
        print(describe(layout), flush=True)  # before the decoding, which takes time
        count, originals = len(layout), images.Originals()
        with whole(paths.IMAGES, paths.INDEX, paths.REJECTED) as (table, index, rejected_list):
            prepared = images.prepare(
                pool, paths.RAW, layout, table, index, count=count, size=params.image_size, channels=params.channels
            )
            bar = tqdm(originals.watch(prepared), "prepare", count, unit=" images", disable=None)
            rejected = [image for image in bar if image.reason]
            images.check_rejected(rejected, count, params.max_rejected)
            with rejected_list.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["path", "reason"])
                writer.writerows([image.item.path, image.reason] for image in rejected)
    print(originals)
    prepared_images = counted(count - len(rejected), "image")
    print(f"prepared {prepared_images} of {params.image_size} px, rejected {len(rejected):,}")
    if advice := originals.advice(size=params.image_size, channels=params.channels):
        say(advice)


if __name__ == "__main__":
    run(main)
