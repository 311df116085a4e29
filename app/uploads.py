"""The images of a request, read into memory and nowhere else: Starlette's own form parser spools to the disk."""

import asyncio
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.batching import RequestError, Upload
from app.settings import Settings

MAX_NAME = 255
"""Longer names are cut."""


class Picture(BaseModel):
    """One image of the JSON form."""

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    base64: str


class Pictures(BaseModel):
    """The JSON form of a request."""

    model_config = ConfigDict(extra="forbid")

    images: list[Picture]


class Bodies:
    """Reads the bodies of requests, with bounds on bytes, files and time, and on what all of them hold together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[list[Upload]]:
        """Give the images of a request, whose bytes count as held until the block ends. Raises RequestError."""
        settings, held = self._settings, 0
        form = _form(request, settings.max_files)
        if int(request.headers.get("content-length", 0)) > settings.max_bytes:
            raise _too_long(settings.max_bytes)
        try:
            async with asyncio.timeout(settings.body_seconds) as time:
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the connection was closed before the end of the body")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    held += len(chunk)
                    self._held += len(chunk)
                    if held > settings.max_bytes:
                        raise _too_long(settings.max_bytes)
                    if self._held > settings.max_memory:
                        raise RequestError(503, "the memory for requests is full; try again", retry_after=1)
                    form.write(chunk)
            yield form.finish()
        except TimeoutError:
            if not time.expired():
                raise
            raise RequestError(408, f"the body was not there after {settings.body_seconds:g} seconds") from None
        finally:
            self._held -= held


def _too_long(limit: int) -> RequestError:
    return RequestError(413, f"the body is longer than {limit:,} bytes")


class _Form(Protocol):
    def write(self, chunk: bytes) -> None: ...

    def finish(self) -> list[Upload]: ...


def _form(request: Request, max_files: int) -> _Form:
    if encoding := request.headers.get("content-encoding"):
        raise RequestError(415, f"the content encoding is {encoding[:100]!r}; send the body as it is")
    given = request.headers.get("content-type", "")
    kind, options = parse_options_header(given)
    if kind == b"application/json":
        return _Json(max_files)
    if kind == b"multipart/form-data":
        return _Multipart(options.get(b"boundary", b""), max_files)
    raise RequestError(415, f"the content type is {given[:100]!r}; expected multipart/form-data or application/json")


class _Json:
    def __init__(self, max_files: int) -> None:
        self._max_files = max_files
        self._body = bytearray()

    def write(self, chunk: bytes) -> None:
        self._body += chunk

    def finish(self) -> list[Upload]:
        try:
            pictures = Pictures.model_validate_json(self._body).images
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the body"
            raise RequestError(
                400, f'{place}: {first["msg"]}; expected {{"images": [{{"name": …, "base64": …}}]}}'
            ) from None
        _check_count(len(pictures), self._max_files)
        return [self._decoded(number, picture) for number, picture in enumerate(pictures, 1)]

    def _decoded(self, number: int, picture: Picture) -> Upload:
        name = picture.name[:MAX_NAME] or f"image {number}"
        try:
            return Upload(name, binascii.a2b_base64(picture.base64, strict_mode=True))
        except ValueError as error:
            raise RequestError(400, f"{name!r}: no valid base64 ({error})") from None


class _Multipart:
    """Files out of a form (RFC 7578), each of which has to be called `files`."""

    def __init__(self, boundary: bytes, max_files: int) -> None:
        self._max_files = max_files
        self._uploads: list[Upload] = []
        self._ended = False
        self._field, self._value, self._data = bytearray(), bytearray(), bytearray()
        self._disposition: dict[bytes, bytes] = {}
        if not boundary:
            raise RequestError(400, "the content type names no boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._header,
                    "on_headers_finished": self._check,
                    "on_part_data": lambda data, start, end: self._data.extend(memoryview(data)[start:end]),
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except FormParserError as error:
            raise _no_form(error) from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _no_form(error) from None

    def finish(self) -> list[Upload]:
        if not self._ended:
            raise RequestError(400, "the form ends before its last boundary")
        _check_count(len(self._uploads), self._max_files)
        return self._uploads

    def _begin(self) -> None:
        _check_count(len(self._uploads) + 1, self._max_files)
        self._disposition = {}
        self._data = bytearray()

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = parse_options_header(self._value.decode("latin-1"))[1]
        self._field, self._value = bytearray(), bytearray()

    def _check(self) -> None:
        name = self._disposition.get(b"name", b"")
        if name != b"files":
            raise RequestError(400, f"a part of the form is called {_text(name)!r}; expected 'files'")

    def _end(self) -> None:
        name = _text(self._disposition.get(b"filename", b"")) or f"image {len(self._uploads) + 1}"
        self._uploads.append(Upload(name, bytes(self._data)))
        self._data = bytearray()

    def _finish(self) -> None:
        self._ended = True


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")[:MAX_NAME]


def _no_form(error: FormParserError) -> RequestError:
    return RequestError(400, f"no valid multipart form ({error})")


def _check_count(count: int, most: int) -> None:
    if not count:
        raise RequestError(400, "there is no file; expected one or several called 'files'")
    if count > most:
        raise RequestError(413, f"there are more than {most} files, the most that a request may have")
