"""Bring the images as one archive, and write down where they come from."""

from src import paths
from src.params import load_params
from src.runtime import run, whole, write_json
from src.sources import fetch


def main() -> None:
    params = load_params().download
    with whole(paths.RAW, paths.ORIGIN) as (raw, origin):
        record = fetch(params, raw)
        write_json(origin, record)


if __name__ == "__main__":
    run(main)
