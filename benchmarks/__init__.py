"""Speed and memory, measured beside the limits of the machine."""

import src  # noqa: F401 - its settings of the process come before any other import
