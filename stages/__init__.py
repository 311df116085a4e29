"""One script for each stage of dvc.yaml."""

import src  # noqa: F401 - its settings of the process come before any other import
