"""Answers pictures with classes over HTTP: `python -m app.service`. Its settings are those of app/settings.py."""

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app.batching import Batcher, Prediction, RequestError
from app.edge import Edge, Rate
from app.model import Model, Watched
from app.server import Server, listen
from app.settings import PREFIX, Settings, load_settings
from app.uploads import Bodies, Pictures
from src.runtime import Parser, in_one_sentence, say

HERE = Path(__file__).resolve().parent
PAGE, RUNTIME = HERE / "page", HERE / "node_modules/onnxruntime-web/dist"

PIECE = 2**18
"""Bytes of the model file that are sent at once, so that a slow client holds no more."""


class Share(BaseModel):
    """A class and its probability."""

    name: str = Field(alias="class")
    probability: float


class Answer(BaseModel):
    """What the model says of one image: its likeliest classes, best first."""

    name: str
    sure: bool | None = Field(description="null where the model has no confidence from which answers are sure")
    classes: list[Share]
    heat: list[list[float]] | None = Field(default=None, description="where the image speaks for its class, 0 to 1")


class Answers(BaseModel):
    """The images in the order sent."""

    model: str = Field(description="SHA-256 of the model file")
    predictions: list[Answer]


class Problem(BaseModel):
    """What was found, and what was expected."""

    detail: str


class Limits(BaseModel):
    """Most bytes of a body, files of a request, and pixels of an image."""

    bytes: int
    files: int
    pixels: int


class About(BaseModel):
    """The model and the limits."""

    sha256: str
    bytes: int
    heat: bool
    limits: Limits
    card: dict[str, Any]


FORM = {
    "type": "object",
    "required": ["files"],
    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM},
        "application/json": {"schema": Pictures.model_json_schema()},
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "No image, a damaged one, or no valid form"},
    401: {"description": "API key missing or wrong"},
    408: {"description": "The body came too slowly"},
    413: {"description": "Too many bytes, files or pixels"},
    415: {"description": "Another content type"},
    422: {"description": "A wrong value in the query"},
    429: {"description": "Over the rate; see Retry-After"},
    503: {"description": "Overloaded, stopping, or out of time; see Retry-After"},
}


class Service:
    """The endpoints, and what they share."""

    def __init__(self, settings: Settings, watched: Watched, stopping: Event, registry: CollectorRegistry) -> None:
        self.settings, self.watched, self.stopping, self.registry = settings, watched, stopping, registry
        self.bodies = Bodies(settings)
        self.rate = Rate(settings.rate, settings.burst)
        self.batcher: Batcher  # from `run` on, since it belongs to the event loop

    @asynccontextmanager
    async def run(self, _: FastAPI) -> AsyncIterator[None]:
        """Work on images and watch the model file for as long as the application runs."""
        settings = self.settings
        self.batcher = Batcher(
            workers=settings.workers,
            batch=settings.batch,
            queue=settings.queue,
            max_pixels=settings.max_pixels,
            registry=self.registry,
        )
        watch = asyncio.create_task(self.watched.watch())
        yield
        watch.cancel()
        self.batcher.close(settings.answer_seconds)

    async def keyed(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        """Let pass who has the key."""
        key = self.settings.api_key.get_secret_value()
        if key and not hmac.compare_digest(given.credentials.encode("latin-1") if given else b"", key.encode()):
            raise RequestError(401, "the API key is missing or wrong; expected `Authorization: Bearer …`")

    async def rated(self, request: Request) -> None:
        """Let pass who does not come too often."""
        if wait := self.rate.wait(request.client.host if request.client else ""):
            detail = f"more than {self.settings.rate:g} requests a second; try again in {wait:.1f} seconds"
            raise RequestError(429, detail, retry_after=math.ceil(wait))

    async def predict(
        self, request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5, heat: bool = False
    ) -> Response:
        """Tell what pictures show."""
        self.batcher.check_room(1)
        async with self.bodies.read(request) as uploads:
            model, seconds = self.watched.model, self.settings.answer_seconds
            try:
                async with asyncio.timeout(seconds):
                    found = await self.batcher.predict(uploads, model, heat=heat)
            except TimeoutError:
                raise RequestError(503, f"not answered within {seconds:g} seconds; try again", retry_after=1) from None
            answers = [
                {"name": upload.name, **describe(prediction, model, top=top, heat=heat)}
                for upload, prediction in zip(uploads, found, strict=True)
            ]
        return JSONResponse({"model": model.sha256, "predictions": answers})

    async def about(self) -> Response:
        """Tell about the model and the limits."""
        model, settings = self.watched.model, self.settings
        limits = {"bytes": settings.max_bytes, "files": settings.max_files, "pixels": settings.max_pixels}
        about = {"sha256": model.sha256, "bytes": len(model.content), "heat": model.offers_heat, "limits": limits}
        return JSONResponse({**about, "card": model.metadata})

    async def file(self, request: Request) -> Response:
        """Give the model file: the very bytes that answer here."""
        model = self.watched.model
        headers = {"ETag": f'"{model.sha256}"', "Cache-Control": "no-cache"}
        if model.sha256 in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        headers["Content-Length"] = str(len(model.content))
        return StreamingResponse(pieces(model), media_type="application/octet-stream", headers=headers)

    async def alive(self) -> Response:
        """Tell that the process is alive."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        """Tell whether to send requests here."""
        if self.stopping.is_set():
            raise RequestError(503, "the service is stopping", retry_after=1)
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Give counts and times for Prometheus."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


def describe(prediction: Prediction, model: Model, *, top: int, heat: bool) -> dict[str, Any]:
    """Put a prediction into words and round numbers."""
    shares = prediction.probabilities
    best = (-shares).argsort(kind="stable")[:top]
    classes = [{"class": model.card.classes[code], "probability": round(float(shares[code]), 6)} for code in best]
    threshold = model.card.sure_from
    sure = None if threshold is None else bool(shares[best[0]] >= threshold)
    answer: dict[str, Any] = {"sure": sure, "classes": classes}
    if heat and prediction.heat is not None:
        answer["heat"] = prediction.heat.astype(float).round(3).tolist()
    return answer


async def pieces(model: Model) -> AsyncIterator[bytes]:
    """Give a model's file piece by piece."""
    for start in range(0, len(model.content), PIECE):
        yield model.content[start : start + PIECE]


def application(service: Service) -> FastAPI:
    """Put the endpoints together, and what is answered where one fails."""
    app = FastAPI(
        title="Image classifier",
        docs_url=None,  # Swagger's page comes from a foreign host
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.run,
        exception_handlers={
            RequestError: refuse,
            HTTPException: refuse_path,
            RequestValidationError: refuse_query,
            Exception: fail,
        },
        responses={"default": {"model": Problem, "description": "What was found, and what was expected"}},
    )
    keyed, rated = Depends(service.keyed), Depends(service.rated)
    app.add_api_route(
        "/predict",
        service.predict,
        methods=["POST"],
        dependencies=[rated, keyed],
        response_model=Answers,
        responses={status: {**about, "model": Problem} for status, about in REFUSALS.items()},
        openapi_extra={"requestBody": BODY},
    )
    app.add_api_route("/model", service.about, response_model=About)
    app.add_api_route("/model.onnx", service.file, dependencies=[keyed], response_class=StreamingResponse)
    app.add_api_route("/healthz", service.alive)
    app.add_api_route("/readyz", service.ready)
    app.add_api_route("/metrics", service.metrics)
    for path, directory in (("/ort", RUNTIME), ("/", PAGE)):
        if directory.is_dir():
            app.frontend(path, directory=directory, fallback=None)
    return app


async def refuse(_: Request, refusal: RequestError) -> Response:
    """Answer with the reason of a refusal."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"detail": refusal.detail}, refusal.status, headers)


async def refuse_path(request: Request, error: HTTPException) -> Response:
    """Answer where there is no such path or method."""
    path, headers = request.url.path[:200], error.headers or {}
    details = {404: f"there is nothing at {path}", 405: f"{path} takes {headers.get('Allow')}, not {request.method}"}
    return JSONResponse({"detail": details.get(error.status_code, error.detail)}, error.status_code, headers)


async def refuse_query(_: Request, error: RequestValidationError) -> Response:
    """Answer where the query does not fit, with the first reason."""
    first = error.errors()[0]
    return JSONResponse({"detail": f"{first['loc'][-1]} is {str(first['input'])[:100]!r}: {first['msg']}"}, 422)


async def fail(_request: Request, _error: Exception) -> Response:
    """Answer where the service is at fault; uvicorn logs the traceback."""
    return JSONResponse({"detail": "the service failed; its log tells why"}, 500)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # its warnings are about what clients send
    with in_one_sentence():
        variables = ", ".join(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
        notes = f"It has no arguments; the environment sets it, as docs/deploy.md explains: {variables}."
        Parser("python -m app.service", description="Serve models/model.onnx over HTTP.", epilog=notes).parse_args()
        settings, stopping, registry = load_settings(), Event(), CollectorRegistry()
        ProcessCollector(registry=registry)
        watched = Watched(settings.model, registry)
        service = Service(settings, watched, stopping, registry)
        listener = listen(settings)
        say(f"loaded {settings.model}, {watched.model.sha256}")
        Server(Edge(application(service), stopping, registry), settings, stopping).run(sockets=[listener])
        say("stopped")


if __name__ == "__main__":
    main()
