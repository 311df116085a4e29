"""The service's settings, out of environment variables: CLASSIFIER_PORT=9000, CLASSIFIER_API_KEY=…, and so on."""

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from src import paths
from src.images import cores
from src.runtime import PipelineError

PREFIX = "CLASSIFIER_"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """No change after reading. The defaults suit one small machine behind a proxy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all. Unused where systemd hands over a socket."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one. Unused where systemd hands over a socket."""
    model: Path = paths.ONNX
    """The model file. It is loaded anew when it was replaced."""
    api_key: SecretStr = SecretStr("")
    """What /predict and /model.onnx want as `Authorization: Bearer …`; empty leaves them open."""
    trusted_proxies: str = "127.0.0.1,::1"
    """Addresses and networks, by commas, whose X-Forwarded-For tells who the client is."""

    max_bytes: Count = 20_000_000
    """Largest body of a request, in bytes."""
    max_files: Count = 16
    """Most images of a request."""
    max_pixels: Count = 50_000_000
    """Largest image, in pixels as its header tells, before anything is decoded."""
    max_memory: Count = 200_000_000
    """Most bytes of bodies that are held at once, over all requests."""
    max_connections: Count = 1000
    """Most connections at once."""
    rate: SecondsOrNone = 0.0
    """Requests for predictions that a client may make a second, on average; 0 is no limit."""
    burst: Count = 20
    """Requests that a client may make at once, before the rate counts."""

    head_seconds: Seconds = 10.0
    """Time in which a request's line and headers have to be there."""
    body_seconds: Seconds = 30.0
    """Time in which its body has to be there."""
    answer_seconds: Seconds = 10.0
    """Time in which it has to be answered from then on."""
    drain_seconds: SecondsOrNone = 2.0
    """Time for which a stopping service still takes requests, while /readyz already sends new ones elsewhere."""

    workers: Count = cores()
    """Threads that decode and predict, a core each."""
    batch: Count = 8
    """Most images that a thread predicts at once."""
    queue: Count = 64
    """Most images that wait or are worked on; further requests are refused."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_files > self.queue:
            raise ValueError(f"MAX_FILES is {self.max_files}: at most {PREFIX}QUEUE, which is {self.queue}")
        if self.max_bytes > self.max_memory:
            raise ValueError(f"MAX_BYTES is {self.max_bytes}: at most {PREFIX}MAX_MEMORY, which is {self.max_memory}")
        return self


def load_settings() -> Settings:
    """Read the environment. Raises PipelineError with the name of the variable, its value and what was expected."""
    given = {name.removeprefix(PREFIX).lower(): value for name, value in os.environ.items() if name.startswith(PREFIX)}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise PipelineError(f"{PREFIX}{message}") from None
        name = f"{PREFIX}{first['loc'][0]}".upper()
        if first["type"] == "extra_forbidden":
            known = ", ".join(f"{PREFIX}{field}".upper() for field in Settings.model_fields)
            raise PipelineError(f"{name} is unknown; known are {known}") from None
        raise PipelineError(f"{name} is {first['input']!r}: {message[0].lower()}{message[1:]}") from None
