"""Divide the prepared images: data/split.csv and metrics/data.json."""

import numpy as np
import pandas as pd

from src import paths
from src.intervals import report_few
from src.params import load_params
from src.runtime import counted, run, say, whole, write_json
from src.split import assign, cautions, summarize


def main() -> None:
    params = load_params().split
    index = pd.read_csv(paths.INDEX, dtype=str, keep_default_na=False)
    images = np.load(paths.IMAGES, mmap_mode="r")
    rejected = len(pd.read_csv(paths.REJECTED))

    table = assign(index, images, params)
    summary = summarize(index, table, params, rejected)
    for sentence in cautions(table):
        say(sentence)
    for part in ("validation", "test"):
        report_few(part, summary[f"{part}_images"])
    with whole(paths.SPLIT, paths.DATA_METRICS) as (split, metrics):
        table.to_csv(split, index=False, lineterminator="\n")
        write_json(metrics, summary)
    counts = ", ".join(f"{count:,} {name}" for name, count in table["split"].value_counts().items())
    leaks = counted(summary["groups_that_would_have_leaked"], "group")
    print(f"split {counted(len(table), 'image')}: {counts}; {leaks} kept from leaking")


if __name__ == "__main__":
    run(main)
