"""Bring the images as one archive, and write down where they come from."""

import json

from src import paths
from src.params import load_params
from src.runtime import run, whole
from src.sources import fetch


def main() -> None:
    params = load_params().download
    with whole(paths.RAW, paths.ORIGIN) as (raw, origin):
        record = fetch(params, raw)
        origin.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
