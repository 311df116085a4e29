"""Decode every image of the archive once: data/images.npy, data/index.csv and data/rejected.csv."""

import csv

from tqdm import tqdm

from src import images, paths
from src.archive import list_items, select
from src.params import load_params
from src.runtime import counted, run, whole


def main() -> None:
    params = load_params().prepare
    with images.decoders() as pool:
        listing = list_items(paths.RAW, params.include)
        items = select(listing, classes=params.classes)
        if others := listing.others:
            print(f"left aside, since no images by their names: {counted(len(others), 'file')}, such as {others[0]!r}")
        with whole(paths.IMAGES, paths.INDEX, paths.REJECTED) as (table, index, rejected_list):
            prepared = images.prepare(
                pool, paths.RAW, items, table, index, size=params.image_size, channels=params.channels
            )
            bar = tqdm(prepared, "prepare", len(items), unit=" images", disable=None)
            rejected = [image for image in bar if image.reason]
            images.check_rejected(rejected, len(items), params.max_rejected)
            with rejected_list.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["path", "reason"])
                writer.writerows([image.item.path, image.reason] for image in rejected)
    count = counted(len(items) - len(rejected), "image")
    print(f"prepared {count} of {params.image_size} px, rejected {len(rejected):,}")


if __name__ == "__main__":
    run(main)
