"""The model file: what it says of itself, what it answers to prepared images, and what becomes of it when replaced."""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Info
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from src.images import Pixels
from src.runtime import PipelineError, say

Values = NDArray[np.float32]

LOOK_EVERY = 0.25
"""Seconds between looks at the file."""

PROBABILITIES, HEAT = "probabilities", "heat"


class Card(BaseModel):
    """What the service needs of the card in the file's metadata; there is more, which /model passes on."""

    model_config = ConfigDict(frozen=True)

    classes: tuple[str, ...] = Field(min_length=1)
    size: int = Field(ge=1)
    channels: int = Field(ge=1, le=3)
    sure_from: float | None
    """The least probability of the best class at which an answer is sure; None where the validation images were too few
    to find one."""


@dataclass(frozen=True, eq=False)
class Model:
    """A file's bytes, their SHA-256, its card, and the session that answers. Safe to use from several threads."""

    content: bytes
    sha256: str
    card: Card
    metadata: dict[str, Any]
    """The whole card."""
    offers_heat: bool
    session: onnxruntime.InferenceSession

    def predict(self, images: Pixels, *, heat: bool) -> tuple[Values, Values | None]:
        """Give the probabilities of prepared images, (N, size, size, channels) uint8 -> (N, classes), and their heat.

        The heat, (N, h, w), is None where it is not asked for or the model has none.
        """
        if images.shape[3] == 1:
            images = images.repeat(3, axis=3)
        wanted = [PROBABILITIES, HEAT] if heat and self.offers_heat else [PROBABILITIES]
        found = self.session.run(wanted, {"images": images})
        return found[0], found[1] if len(found) > 1 else None


def load(path: Path) -> Model:
    """Load a model file and try it. Raises PipelineError where it is missing, damaged, or no model of this project."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PipelineError(f"{path} cannot be read ({error.strerror}); `dvc repro` makes it") from None
    try:
        session = onnxruntime.InferenceSession(content, _options(), providers=["CPUExecutionProvider"])
        metadata = json.loads(session.get_modelmeta().custom_metadata_map["card"])
        card = Card.model_validate(metadata)
    except (KeyError, ValueError, ValidationError) as error:
        raise PipelineError(f"{path} has no card that can be used ({_first_line(error)}); export it again") from None
    except Exception as error:  # onnxruntime's errors have no class in common but this one
        raise PipelineError(f"{path} is no whole ONNX file ({_first_line(error)}); export it again") from None
    outputs = {output.name for output in session.get_outputs()}
    model = Model(content, hashlib.sha256(content).hexdigest(), card, metadata, HEAT in outputs, session)
    _try(model, path)
    return model


def _options() -> onnxruntime.SessionOptions:
    # Each thread of the service predicts for itself: a batch that several share waits for the slowest of them.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, too
    return options


def _try(model: Model, path: Path) -> None:
    """See that the outputs are what the card says, which also makes the first request as fast as the others."""
    blank = np.zeros((1, model.card.size, model.card.size, model.card.channels), np.uint8)
    try:
        found, _ = model.predict(blank, heat=True)
    except Exception as error:
        raise PipelineError(f"{path} cannot predict ({_first_line(error)}); export it again") from None
    if found.shape != (1, len(model.card.classes)) or not np.isfinite(found).all():
        raise PipelineError(f"{path} answers {found.shape} for {len(model.card.classes)} classes; export it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Watched:
    """The model that answers now. A file that replaces it is loaded beside it, and a damaged one is not taken."""

    def __init__(self, path: Path, registry: CollectorRegistry) -> None:
        self._path = path
        self._loaded = _identity(path)
        self._info = Info("classifier_model", "The model that answers.", registry=registry)
        self._reloads = Counter("classifier_reloads", "Replaced model files.", ["outcome"], registry=registry)
        for outcome in ("loaded", "failed"):
            self._reloads.labels(outcome)
        self._take(load(path))

    def _take(self, model: Model) -> None:
        self.model = model
        self._info.info({"sha256": model.sha256})

    async def watch(self) -> None:
        """Look at the file for ever. It is loaded when two looks find it the same: not while it is being written."""
        former = self._loaded
        while True:
            await asyncio.sleep(LOOK_EVERY)
            found = _identity(self._path)
            if found and found == former != self._loaded:
                self._loaded = found
                await self._reload()
            former = found

    async def _reload(self) -> None:
        try:
            model = await asyncio.to_thread(load, self._path)
        except Exception as error:
            self._reloads.labels("failed").inc()
            say(f"{error}; the former model goes on answering")
            return
        if model.sha256 != self.model.sha256:
            self._take(model)
            self._reloads.labels("loaded").inc()
            say(f"loaded {self._path}, {model.sha256}")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Tell a file from another one in its place, or that there is none, as while DVC rewrites it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
