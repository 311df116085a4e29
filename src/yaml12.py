"""YAML 1.2 as DVC reads and writes it: `yes` is text, 1e-4 a number, 010 ten, and a key that appears twice an error."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError


def read(path: Path) -> Any:
    """Read a file. Raises OSError, and ValueError as `parse` does."""
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> Any:
    """Read one document. Raises ValueError with one sentence that names the line and the column."""
    try:
        # The very reader of DVC 3.67 (dvc/utils/serialize/_yaml.py), so that both see the same values.
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except (YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def dump(value: Any) -> str:
    """Write one document in the order of its keys."""
    writer, text = YAML(), io.StringIO()
    writer.default_flow_style = False
    writer.dump(value, text)
    return text.getvalue()


def flatten(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give each value of nested sections by its dotted name, as `dvc exp run -S` takes it."""
    flat = dict[str, Any]()
    for key, value in params.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
