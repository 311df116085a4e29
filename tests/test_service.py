"""The web service as its clients meet it: real processes on the loopback, and a model whose answer is known."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image

from app.batching import Prediction
from app.model import load
from app.server import SAFE_HEADERS
from app.service import Answer, describe
from app.settings import load_settings
from src import images
from src.runtime import PipelineError
from tests.helpers import ROOT, crops, encode, environment
from tests.served import SIDES, SIZE, Served, bright, stand_in

LIMITS = {"max_bytes": 3_000_000, "max_files": 4, "max_pixels": 400_000, "head_seconds": 1, "body_seconds": 1}


def expected(data: bytes) -> NDArray[np.float64]:
    """What the stand-in has to answer: the probabilities of the four sides."""
    light = images.decode(data, size=SIZE, channels=3) @ np.array([3, 2, 1]) / 6 / 255  # red counts most
    middle = SIZE // 2
    halves = [light[:, :middle], light[:, middle:], light[:middle], light[middle:]]
    powers = np.exp([8 * half.mean() for half in halves])
    return powers / powers.sum()


PICTURE = encode(bright("left"), "JPEG")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    path.write_bytes(stand_in())
    return path


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes some 0.3 s an answer on one core."""
    path = tmp_path_factory.mktemp("slow") / "model.onnx"
    path.write_bytes(stand_in(products=12))
    return path


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with Served(model, **LIMITS) as service:
        yield service


def post(service: Served, *files: bytes, query: str = "", **more: Any) -> requests.Response:
    """Send files as a form."""
    parts = [("files", (f"{number}.jpg", data)) for number, data in enumerate(files)]
    return requests.post(f"{service.url}/predict{query}", files=parts, timeout=30, **more)


def best(answer: requests.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [prediction["classes"][0]["class"] for prediction in answer.json()["predictions"]]


def raw(service: Served, *pieces: bytes, pause: float = 0.0, seconds: float = 5) -> bytes:
    """Send bytes as they are, and give all that comes back until the service closes or is silent."""
    received = b""
    with socket.create_connection(service.address, timeout=seconds) as connection:
        with suppress(OSError):  # closed while more was sent
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        with suppress(TimeoutError):
            while piece := connection.recv(65536):
                received += piece
    return received


def reason(answer: requests.Response) -> str:
    """The one sentence of a refusal."""
    assert list(answer.json()) == ["detail"]
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert "\n" not in detail
    return detail


# --- predictions ------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_models_for_the_pixels_that_training_sees(served: Served) -> None:
    photos = crops(4)
    files = [
        encode(photos[0], "JPEG"),
        encode(photos[1]),
        encode(photos[2].convert("L"), "WEBP"),
        encode(photos[3], "BMP"),
    ]
    answer = post(served, *files).json()
    assert [prediction["name"] for prediction in answer["predictions"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    for data, prediction in zip(files, answer["predictions"], strict=True):
        known = dict(zip(SIDES, expected(data), strict=True))
        found = {share["class"]: share["probability"] for share in prediction["classes"]}
        assert list(found) == sorted(known, key=lambda side: -known[side])
        assert found == pytest.approx(known, abs=2e-6)
        assert prediction["sure"] == (max(known.values()) >= 0.5)
        assert "heat" not in prediction


def test_a_picture_is_turned_as_its_camera_was_held(served: Served) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera's right side was down: what is left in the file is the top
    assert best(post(served, PICTURE, encode(bright("left"), "JPEG", exif=turned))) == ["left", "top"]


def test_json_is_answered_as_a_form_is(served: Served) -> None:
    files = [encode(bright(side)) for side in SIDES]
    pictures: list[dict[str, str]] = [{"base64": base64.b64encode(data).decode()} for data in files]
    pictures[1]["name"] = "кот.png"
    answer = requests.post(f"{served.url}/predict", json={"images": pictures}, timeout=30)
    assert best(answer) == list(SIDES) == best(post(served, *files))
    names = [prediction["name"] for prediction in answer.json()["predictions"]]
    assert names == ["image 1", "кот.png", "image 3", "image 4"]


def test_top_and_heat_are_given_as_asked_for(served: Served) -> None:
    (prediction,) = post(served, PICTURE, query="?top=2&heat=true").json()["predictions"]
    assert [share["class"] for share in prediction["classes"]] == [
        SIDES[code] for code in (-expected(PICTURE)).argsort(kind="stable")[:2]
    ]
    heat = np.array(prediction["heat"])
    assert heat.shape == (4, 4)
    assert (heat[:, :2] > 0.9).all()
    assert (heat[:, 2:] < 0.2).all()
    assert np.array_equal(heat, heat.round(3))
    (prediction,) = post(served, PICTURE, query="?top=1000").json()["predictions"]
    assert len(prediction["classes"]) == len(SIDES)


def test_a_picture_of_nothing_is_not_sure(served: Served) -> None:
    (prediction,) = post(served, encode(Image.new("RGB", (50, 50), "gray"))).json()["predictions"]
    assert prediction["sure"] is False
    assert [share["probability"] for share in prediction["classes"]] == [0.25] * 4


def test_without_a_confidence_to_be_sure_from_an_answer_is_neither_sure_nor_not(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(stand_in(sure_from=None))
    answer = describe(Prediction(np.array([0.1, 0.7, 0.1, 0.1], np.float32), None), load(file), top=1, heat=False)
    assert answer == {"sure": None, "classes": [{"class": SIDES[1], "probability": 0.7}]}
    assert Answer.model_validate({"name": "a", **answer}).sure is None


def test_the_model_and_the_limits_are_told_and_the_file_is_given(served: Served, model: Path) -> None:
    about = requests.get(f"{served.url}/model", timeout=5).json()
    assert about["card"]["classes"] == list(SIDES)
    assert about["limits"] == {"bytes": 3_000_000, "files": 4, "pixels": 400_000}
    assert (about["bytes"], about["heat"]) == (model.stat().st_size, True)
    given = requests.get(f"{served.url}/model.onnx", timeout=5)
    assert given.content == model.read_bytes()
    assert given.headers["ETag"] == f'"{about["sha256"]}"'
    same = requests.get(f"{served.url}/model.onnx", headers={"If-None-Match": given.headers["ETag"]}, timeout=5)
    assert (same.status_code, same.content) == (304, b"")
    assert post(served, PICTURE).json()["model"] == about["sha256"]


# --- refusals ---------------------------------------------------------------------------------------------------------

PNG = encode(bright("left"))
HEADER = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + PNG[24:29]
HUGE = PNG[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + PNG[33:]
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
JSON = {"Content-Type": "application/json"}


def form(name: str, content: bytes) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode()
    return head + content + b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("status", "words", "query", "headers", "body"),
    [
        (400, "empty", "", FORM, form("files", b"")),
        (400, "known format", "", FORM, form("files", b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
        (400, "'x'", "", FORM, form("files", PICTURE[: len(PICTURE) // 2])),
        (400, "scans", "", FORM, form("files", PICTURE + b"\xff\xda" * 200)),
        (400, "'cats'", "", FORM, form("cats", PICTURE)),
        (400, "no file", "", FORM, b"--b--\r\n"),
        (400, "boundary", "", FORM, form("files", PICTURE)[:-10]),
        (400, "form", "", FORM, b"nonsense"),
        (400, "boundary", "", {"Content-Type": "multipart/form-data"}, form("files", PICTURE)),
        (400, "no file", "", JSON, b'{"images": []}'),
        (400, "images.0.base64", "", JSON, b'{"images": [{"name": "x"}]}'),
        (400, "base64", "", JSON, b'{"images": [{"base64": "!!!!"}]}'),
        (400, "images", "", JSON, b'{"pictures": []}'),
        (400, "the body", "", JSON, b"[" * 100_000),
        (400, "the body", "", JSON, b"\xff\xfe"),
        (413, "pixels", "", FORM, form("files", HUGE)),
        (413, "pixels", "", FORM, form("files", encode(Image.new("L", (1000, 401)), "JPEG"))),
        (413, "4 files", "", FORM, form("files", PICTURE)[:-5] + b"\r\n" + 4 * (form("files", PICTURE)[:-5] + b"\r\n")),
        (413, "4 files", "", JSON, json.dumps({"images": [{"base64": ""}] * 5}).encode()),
        (413, "3,000,000", "", FORM, form("files", bytes(9_000_000))),
        (415, "text/plain", "", {"Content-Type": "text/plain"}, b"cat"),
        (415, "content type", "", {}, b"cat"),
        (415, "gzip", "", {**FORM, "Content-Encoding": "gzip"}, form("files", PICTURE)),
        (422, "top", "?top=0", FORM, form("files", PICTURE)),
        (422, "top", "?top=1001", FORM, form("files", PICTURE)),
        (422, "heat", "?heat=warm", FORM, form("files", PICTURE)),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(
    served: Served, status: int, words: str, query: str, headers: dict[str, str], body: bytes
) -> None:
    answer = requests.post(f"{served.url}/predict{query}", data=body, headers=headers, timeout=10)
    assert (answer.status_code, words in reason(answer)) == (status, True), answer.text
    assert best(post(served, PICTURE)) == ["left"]


@pytest.mark.parametrize("path", ["/nothing", "/docs", "/%00", "/..%2f..%2fetc%2fpasswd", "/model/", "/" + "x" * 5000])
def test_a_path_that_is_none_is_not_found(served: Served, path: str) -> None:
    answer = requests.get(served.url + path, timeout=5)
    assert (answer.status_code, "there is nothing" in reason(answer)) == (404, True)


def test_another_method_is_refused(served: Served) -> None:
    answer = requests.get(f"{served.url}/predict", timeout=5)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert reason(answer) == "/predict takes POST, not GET"


def test_a_body_that_is_told_to_be_too_long_is_not_waited_for(served: Served) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 3000001\r\n\r\n"
    began = time.monotonic()
    with socket.create_connection(served.address, timeout=5) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - began < 0.5


def test_an_endless_body_ends_at_the_limit(served: Served) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    assert raw(served, head, *[chunk] * 100).startswith(b"HTTP/1.1 413 ")


def test_who_is_still_sending_when_refused_is_heard_to_the_end(served: Served) -> None:
    with socket.create_connection(served.address, timeout=5) as connection:
        body = bytes(20_000_000)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)  # fails where the connection is reset meanwhile
        assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")


def test_a_slow_body_and_a_slow_head_end_in_time(served: Served) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    with ThreadPoolExecutor(3) as pool:
        began = time.monotonic()
        slow = [
            pool.submit(raw, served, head + b"\r\n", *[b"x"] * 14, pause=0.1),
            pool.submit(raw, served, *(head[place : place + 1] for place in range(14)), pause=0.1),
            pool.submit(raw, served),  # a connection that never says anything
        ]
        body, line, silence = (answer.result() for answer in slow)
    assert body.startswith(b"HTTP/1.1 408 ")
    assert b"1 seconds" in body
    assert line.startswith(b"HTTP/1.1 408 ")
    assert b"1 seconds" in line
    assert silence == b""
    assert 1 < time.monotonic() - began < 4.5  # a refused body is waited for a little


def test_an_endless_head_and_what_is_no_http_are_refused(served: Served) -> None:
    endless = raw(served, b"GET / HTTP/1.1\r\n", *[b"x: " + b"y" * 1000 + b"\r\n"] * 64)
    assert endless.startswith(b"HTTP/1.1 431 ")
    endless = raw(served, b"GET / HTTP/1.1\r\nx: ", *[b"y" * 1000] * 64)
    assert endless.startswith(b"HTTP/1.1 431 ")
    assert json.loads(raw(served, b"\x16\x03\x01 hello\r\n\r\n").partition(b"\r\n\r\n")[2])["detail"]


def test_safe_headers_are_on_every_answer(served: Served) -> None:
    answers = [requests.get(served.url + path, timeout=5) for path in ("/model", "/metrics", "/nothing", "/predict")]
    answers += [post(served, PICTURE), post(served, b"no picture")]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 405, 200, 400]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in SAFE_HEADERS} == SAFE_HEADERS
        assert "server" not in answer.headers
    refused = raw(served, b"no HTTP\r\n\r\n").decode()
    assert [
        name
        for name, value in SAFE_HEADERS.items()
        if f"{name.lower()}: {value}\r\n" not in refused.replace(name, name.lower())
    ] == []


def test_the_openapi_tells_the_forms_and_names_no_host(served: Served) -> None:
    answer = requests.get(f"{served.url}/openapi.json", timeout=5)
    assert "://" not in answer.text
    predict = answer.json()["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert {"200", "400", "401", "408", "413", "415", "422", "429", "503"} <= set(predict["responses"])


def test_metrics_count_and_their_labels_stay_few(served: Served) -> None:
    def count(status: int) -> float:
        found = re.search(rf'requests_total{{path="/predict",status="{status}"}} (\S+)', metrics())
        return float(found[1]) if found else 0

    def metrics() -> str:
        return requests.get(f"{served.url}/metrics", timeout=5).text

    good, bad = count(200), count(400)
    post(served, PICTURE)
    post(served, b"no picture")
    requests.get(f"{served.url}/some/path", timeout=5)
    assert (count(200), count(400)) == (good + 1, bad + 1)
    assert set(re.findall(r'path="([^"]*)"', metrics())) <= {
        "/predict",
        "/model",
        "/model.onnx",
        "/metrics",
        "/openapi.json",
        "page",
    }
    assert "classifier_queue_images 0.0" in metrics()


# --- keys, rates, and the queue ---------------------------------------------------------------------------------------


def test_with_a_key_the_model_and_its_answers_are_for_who_has_it(model: Path) -> None:
    with Served(model, api_key="geheim ✓", rate=0.01, burst=4) as service:
        right = {"Authorization": "Bearer geheim ✓".encode()}
        assert [requests.get(service.url + path, timeout=5).status_code for path in ("/model", "/healthz")] == [
            200,
            200,
        ]
        for path, method in (("/model.onnx", "GET"), ("/predict", "POST")):

            def status(headers: dict[str, Any], path: str = path, method: str = method) -> int:
                files = [("files", PICTURE)] if method == "POST" else None
                answer = requests.request(method, service.url + path, headers=headers, files=files, timeout=5)
                assert answer.status_code == 200 or "API key" in reason(answer)
                assert ("WWW-Authenticate" in answer.headers) == (answer.status_code == 401)
                return answer.status_code

            tried = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic geheim"}, right)
            assert [status(headers) for headers in tried] == [401, 401, 401, 200]
        over = post(service, PICTURE, headers=right)  # the rate counts wrong keys, too
        assert (over.status_code, 1 <= int(over.headers["Retry-After"]) <= 100) == (429, True)
        assert "0.01 requests a second" in reason(over)
        other = {**right, "X-Forwarded-For": "198.51.100.7"}
        assert post(service, PICTURE, headers=other).status_code == 200  # another client, says a proxy that is trusted


def test_who_is_no_trusted_proxy_cannot_say_that_they_are_someone_else(model: Path) -> None:
    with Served(model, rate=0.01, burst=1, trusted_proxies="192.0.2.1") as service:
        codes = [
            post(service, PICTURE, headers={"X-Forwarded-For": f"198.51.100.{number}"}).status_code for number in (1, 2)
        ]
        assert codes == [200, 429]


def together(count: int, send: Callable[[int], Any]) -> list[Any]:
    """Send requests at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(send, range(count)))


def timed(service: Served, *files: bytes, **more: Any) -> tuple[requests.Response, float]:
    began = time.monotonic()
    return post(service, *files, **more), time.monotonic() - began


def predicted(service: Served) -> int:
    """Count the images that a service has predicted."""
    found = re.search(r"batch_images_sum (\S+)", requests.get(f"{service.url}/metrics", timeout=5).text)
    assert found
    return int(float(found[1]))


def test_a_full_queue_refuses_at_once(slow_model: Path) -> None:
    with Served(slow_model, workers=1, batch=1, queue=3, max_files=3, answer_seconds=30) as service:
        answers = together(8, lambda _: timed(service, PICTURE))
        assert sorted(answer.status_code for answer, _ in answers) == [200] * 3 + [503] * 5
        slowest = max(seconds for answer, seconds in answers if answer.status_code == 200)
        for answer, seconds in answers:
            if answer.status_code == 503:
                assert seconds < slowest
                assert answer.headers["Retry-After"] == "1"
                assert "wait" in reason(answer)
        assert best(post(service, PICTURE)) == ["left"]


def test_images_that_nobody_waits_for_any_more_are_not_worked_on(slow_model: Path) -> None:
    with Served(slow_model, workers=1, batch=1, queue=32, answer_seconds=0.3, max_files=16) as service:
        late = post(service, *[PICTURE] * 16)
        assert (late.status_code, late.headers["Retry-After"]) == (503, "1")
        assert "0.3 seconds" in reason(late)
        assert post(service, b"no picture", *[PICTURE] * 15).status_code == 400
        time.sleep(1)
        assert predicted(service) < 8  # some 3, which were begun, of 31


# --- replacement and stop ---------------------------------------------------------------------------------------------


def test_a_replaced_model_answers_without_a_failed_request_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    versions = {number: stand_in(classes=[f"{number} {side}" for side in SIDES]) for number in range(3)}
    path.write_bytes(versions[0])
    with Served(path) as service:
        ends, found = threading.Event(), []

        def fire(_: int) -> None:
            with requests.Session() as session:
                while not ends.is_set():
                    files = [("files", ("x", PICTURE))] * 2
                    found.append(session.post(f"{service.url}/predict", files=files, timeout=10))

        with ThreadPoolExecutor(3) as pool:
            shots = [pool.submit(fire, number) for number in range(3)]
            try:
                for number in (1, 2):
                    path.unlink()  # as DVC does
                    time.sleep(0.7)
                    path.write_bytes(versions[number])
                    service.wait_for(f"loaded {path}")
                for damaged in (versions[1][:-1000], stand_in(classes=["too", "few"])):
                    path.write_bytes(damaged)
                    service.wait_for("the former model goes on")
            finally:
                ends.set()
        assert [shot.result() for shot in shots] == [None] * 3
        assert {answer.status_code for answer in found} == {200}
        names = {(answer.json()["model"], name.split()[0]) for answer in found for name in best(answer)}
        assert sorted(name for _, name in names) == ["0", "1", "2"]  # each answer is of one model, and says of which
        metrics = requests.get(f"{service.url}/metrics", timeout=5).text
        assert 'reloads_total{outcome="loaded"} 2.0' in metrics
        assert 'reloads_total{outcome="failed"} 2.0' in metrics
        assert best(post(service, PICTURE)) == ["2 left"]


def hear(connection: socket.socket) -> bytes:
    """Receive one short answer, whose head and body may come apart."""
    received = b""
    while not received.endswith(b"}"):
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def test_a_stop_answers_all_that_was_sent(slow_model: Path) -> None:
    with ExitStack() as stack:
        service = stack.enter_context(Served(slow_model, workers=1, batch=1, drain_seconds=0.5))
        idle, pool = stack.enter_context(requests.Session()), stack.enter_context(ThreadPoolExecutor(4))
        assert idle.get(f"{service.url}/readyz", timeout=5).json() == {"status": "ready"}
        new, begun = (stack.enter_context(socket.create_connection(service.address, timeout=5)) for _ in range(2))
        begun.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert hear(begun).startswith(b"HTTP/1.1 200 ")
        begun.sendall(b"GET /healthz HTTP/1.1\r\n")
        sent = [pool.submit(post, service, PICTURE) for _ in range(4)]
        time.sleep(0.2)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        leaving = idle.get(f"{service.url}/readyz", timeout=5)
        late = post(service, PICTURE)
        time.sleep(max(0, 0.8 - late.elapsed.total_seconds()))  # now nothing new is accepted any more
        new.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        begun.sendall(b"Host: x\r\n\r\n")
        for connection in (new, begun):
            answer = hear(connection)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in answer
        assert [best(answer.result()) for answer in sent] == [["left"]] * 4
        assert best(late) == ["left"]
        assert (leaving.status_code, leaving.headers["Connection"]) == (503, "close")
        assert "stopping" in reason(leaving)
        assert service.stop() == 0
        assert service.log[-1] == "service: stopped\n"


def test_a_socket_that_is_handed_over_outlives_a_restart(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with Served(model, socket=listener.fileno()) as first:
            assert first.address == address
            assert first.stop() == 0
        with ThreadPoolExecutor(1) as pool:
            meanwhile = pool.submit(requests.get, f"{first.url}/readyz", timeout=10)
            with Served(model, socket=listener.fileno()):
                assert meanwhile.result().status_code == 200


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CLASSIFIER_PORT", "many", "CLASSIFIER_PORT is 'many'"),
        ("CLASSIFIER_QUEUE", "0", "greater than or equal to 1"),
        ("CLASSIFIER_MAX_FILES", "65", "CLASSIFIER_MAX_FILES is 65: at most CLASSIFIER_QUEUE"),
        ("CLASSIFIER_PROT", "8000", "CLASSIFIER_PROT is unknown; known are CLASSIFIER_HOST, CLASSIFIER_PORT"),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=re.escape(words)) as error:
        load_settings()
    assert "\n" not in str(error.value)


def starts(model: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Start a service that should not start."""
    given = {f"CLASSIFIER_{name.upper()}": str(value) for name, value in {**settings, "model": model}.items()}
    command = [sys.executable, "-m", "app.service"]
    return subprocess.run(command, cwd=ROOT, env=environment() | given, capture_output=True, text=True, timeout=30)


def test_a_missing_model_and_a_port_that_is_taken_are_told_in_one_sentence(
    served: Served, model: Path, tmp_path: Path
) -> None:
    for done, words in (
        (starts(tmp_path / "none.onnx"), ("none.onnx cannot be read", "`dvc repro`")),
        (starts(model, port=served.address[1]), ("cannot listen at", "CLASSIFIER_PORT")),
    ):
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert [word for word in ("service: ", *words) if word not in done.stderr] == []


def test_the_service_needs_only_what_its_own_requirements_name() -> None:
    pins = [
        (ROOT / name).read_text(encoding="utf-8").splitlines() for name in ("app/requirements.txt", "requirements.txt")
    ]
    own, all_of_them = ({line.partition(" ;")[0] for line in lines if "==" in line} for lines in pins)
    assert own <= all_of_them
    code = "import sys, app.service; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert {"onnxruntime", "fastapi"} <= loaded
    assert not {"torch", "pandas", "sklearn", "matplotlib", "dvc", "onnx"} & loaded
