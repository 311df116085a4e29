"""A stand-in for Kaggle on the loopback, which the unmodified client (2.2.4) talks to as to a proxy.

    with KaggleServer(dataset="owner/slug", versions={2: path_of_a_zip}) as server:
        subprocess.run(command, env=server.env)

`server.fail` is what goes wrong, `server.seen` is what was asked.
"""

import hashlib
import json
import os
import threading
import time
from base64 import b64encode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

STORAGE = "/storage"


@dataclass
class Fail:
    """Each mishap that the stand-in can play; as it is made, none."""

    api: int = 0
    """Status with which the API refuses the download."""
    about: int = 0
    """Status with which the API refuses to tell about the data set."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of a refusal."""
    storage: list[int] = field(default_factory=list)
    """Statuses of the next answers to Range requests; used up one by one."""
    cut: list[int] = field(default_factory=list)
    """The next bodies are cut after so many bytes; used up one by one."""
    rate: int = 0
    """Bytes a second; 0 sends as fast as it can."""
    silent: bool = False
    """Never answer the API."""
    html: bool = False
    """A log-in page in the place of the zip."""
    md5: str = ""
    """Another MD5 than the file's."""


@dataclass(frozen=True)
class Seen:
    """One request: its path, its headers, and its body."""

    path: str
    headers: dict[str, str]
    body: dict[str, object]


class KaggleServer:
    """Serves the versions of one public data set; `env` is the environment for it: no credentials, an empty HOME."""

    def __init__(self, *, dataset: str, versions: dict[int, Path], token: str = "") -> None:
        self.owner, self.slug = dataset.split("/")
        self.versions = versions
        self.token = token
        self.fail = Fail()
        self.seen: list[Seen] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        address = f"http://127.0.0.1:{self._server.server_port}"
        self._home = TemporaryDirectory()
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE_", "XDG_"))} | {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",  # the client then asks http://localhost, through the proxy
            **dict.fromkeys(["HTTP_PROXY", "http_proxy"], address),
            **dict.fromkeys(["NO_PROXY", "no_proxy"], ""),
            "HOME": self._home.name,
        }

    def __enter__(self) -> "KaggleServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    @property
    def ranges(self) -> list[str]:
        """The Range headers seen, in their order."""
        return [seen.headers["Range"] for seen in self.seen if "Range" in seen.headers]


def _handler(server: KaggleServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._note(body)
            call = self.path.rpartition("/")[2]
            known = (body.get("ownerSlug"), body.get("datasetSlug")) == (server.owner, server.slug)
            sent = self.headers.get("Authorization")
            if server.fail.silent:
                time.sleep(60)
            elif call == "IntrospectToken":
                good = body.get("token") == server.token
                self._json(200 if good else 404, {"active": good, "username": "someone"} if good else {})
            elif sent and sent.startswith("Bearer ") and sent != f"Bearer {server.token}":
                self._json(401, {"code": 401, "message": "Unauthorized access"})
            elif call == "GetDataset" and server.fail.about:
                self._json(server.fail.about, {"code": server.fail.about, "message": "refused"})
            elif call == "DownloadDataset" and server.fail.api:
                self._json(server.fail.api, {"code": server.fail.api, "message": "refused"})
            elif not known or (call == "DownloadDataset" and body["datasetVersionNumber"] not in server.versions):
                self._json(404, {"code": 404, "message": "Not found"})
            elif call == "GetDataset":
                self._json(200, _about(server))
            elif call == "GetDatasetMetadata":
                self._json(200, {"info": {"datasetSlug": server.slug, "licenses": [{"name": "CC0-1.0"}]}})
            else:
                self.send_response(302)
                self.send_header("Location", f"http://localhost{STORAGE}/{body['datasetVersionNumber']}?signed=yes")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_GET(self) -> None:
            self._note({})
            if server.fail.html:
                self._send(200, b"<!doctype html><title>Log in</title>", {"Content-Type": "text/html; charset=utf-8"})
                return
            content = server.versions[int(self.path.partition("?")[0].rpartition("/")[2])].read_bytes()
            md5 = b64encode(hashlib.md5(content).digest()).decode()
            tag = f'"{hashlib.md5(content).hexdigest()}"'
            headers = {
                "Content-Type": "application/zip",
                "Accept-Ranges": "bytes",
                "ETag": tag,
                "Last-Modified": "Mon, 05 Jan 2026 10:00:00 GMT",
                "x-goog-hash": f"crc32c=AAAAAA==,md5={server.fail.md5 or md5}",
            }
            asked = self.headers.get("Range")
            if asked and server.fail.storage:
                self._json(server.fail.storage.pop(0), {"message": "an error, and no part of a zip"})
            elif asked and self.headers.get("If-Range", tag) == tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._send(206, content[start:], headers)
            else:
                self._send(200, content, headers)

        def _note(self, body: dict[str, object]) -> None:
            server.seen.append(Seen(self.path, dict(self.headers), body))

        def _json(self, status: int, answer: dict[str, object]) -> None:
            headers = {"Content-Type": "application/json", **(server.fail.headers if status >= 400 else {})}
            self._send(status, json.dumps(answer).encode(), headers)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.path.startswith(f"http://localhost{STORAGE}") and status < 300 and server.fail.cut:
                content = content[: server.fail.cut.pop(0)]
            piece = server.fail.rate // 20 or len(content) or 1
            try:
                for start in range(0, len(content), piece):
                    self.wfile.write(content[start : start + piece])
                    time.sleep(0.05 if server.fail.rate else 0)
            except OSError:  # the client has gone
                pass
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def _about(server: KaggleServer) -> dict[str, object]:
    return {
        "ref": f"{server.owner}/{server.slug}",
        "title": "Digits",
        "licenseName": "CC0: Public Domain",
        "currentVersionNumber": max(server.versions),
        "versions": [
            {"versionNumber": version, "creationDate": f"2025-01-{version:02}T10:00:00Z", "status": "Ready"}
            for version in server.versions
        ],
    }
