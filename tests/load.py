"""What the service bears: `python -m tests.load`, or only some of its sections: load, bad, kill, growth.

Each prints a table; a bound that is missed ends the whole with exit code 1. The client shares the cores with the
service, so that the figures count against it, and with whatever else runs: close that, and expect a quarter of an hour.
"""

import argparse
import asyncio
import io
import json
import random
import signal
import socket
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import psutil
import torch

from src import networks
from src.export import export
from src.images import cores, decode
from tests.helpers import crops, encode, photos
from tests.served import Served, replace

SHARE = 0.8
"""Least share of bare onnxruntime's images a second, decoding included."""

SLOWER = 5.0
"""Most times the latency of a request alone that 99 % stay below at half the load."""

GROWTH = 0.05
"""Most share by which the memory may grow after the first minute, or after the first half of the bad requests."""

CONNECTIONS = 32


# --- models and requests ----------------------------------------------------------------------------------------------


def make_model(path: Path, *, network: str, size: int, channels: int, widths: list[int], seed: int = 0) -> Path:
    """A network with random weights, as the pipeline exports it."""
    classes = [f"class {number}" for number in range(10)]
    card = networks.Card(network, widths, 2, 0.0, [], 0, size, channels, classes)
    built = networks.build(card, mean=[127.0] * channels, deviation=[60.0] * channels)
    networks.initialize(built.layers, torch.Generator().manual_seed(seed))
    metadata = {"classes": classes, "size": size, "channels": channels, "sure_from": 0.5}
    path.write_bytes(export(built, card, 1.0, flip=False, metadata=metadata).model.SerializeToString())
    return path


def small(path: Path, seed: int = 0) -> Path:
    """0.15 ms an image."""
    return make_model(path, network="keras_mnist", size=28, channels=1, widths=[], seed=seed)


def usual(path: Path) -> Path:
    """9 ms an image: what is served is mostly the network."""
    return make_model(path, network="residual", size=128, channels=3, widths=[64, 128, 256])


def photographs() -> list[bytes]:
    """JPEGs of 10 to 100 kB."""
    return [encode(crop, "JPEG", quality=90) for crop in crops(30)]


def request(data: bytes, kind: str = "files", path: str = "/predict") -> bytes:
    """One file as a whole request."""
    head = f'--edge\r\nContent-Disposition: form-data; name="{kind}"; filename="photo.jpg"\r\n\r\n'.encode()
    return post(head + data + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge", path)


def post(body: bytes, kind: str, path: str = "/predict") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# --- a client that costs little ---------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection, which asks one thing at a time."""

    def __init__(self) -> None:
        self.received = b""
        self.open = False
        self.answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        if self.answer and not self.answer.done():
            self.answer.set_exception(ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end or not self.answer or self.answer.done():
            return
        lines = head.lower().split(b"\r\n")
        (length,) = (int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        if len(body) >= length:
            self.received = b""
            if b"connection: close" in lines:
                self.open = False
                self.transport.close()
            self.answer.set_result(int(head[9:12]))

    async def ask(self, content: bytes) -> int:
        """Send a request, and give the status of its answer. Raises OSError where there is none."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(content)
        async with asyncio.timeout(30):
            return await self.answer


async def connect(address: tuple[str, int]) -> Client:
    return (await asyncio.get_running_loop().create_connection(Client, *address))[1]


@dataclass
class Run:
    """What became of the requests of a run: how many of which kind, and the seconds of each that was answered."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0

    def __getitem__(self, kind: str) -> int:
        return self.counts[kind]

    @property
    def rate(self) -> float:
        return self["answered"] / self.elapsed

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


async def ask_on(
    address: tuple[str, int],
    ends: Callable[[], bool],
    contents: list[bytes],
    run: Run,
    *,
    number: int,
    fresh: bool,
    pause: float,
) -> None:
    """Ask one after the other, on one connection or on a fresh one each, with pauses of random length."""
    dice, client = random.Random(number), None
    for turn in range(number, 10**9):
        if ends():
            break
        began = time.perf_counter()
        try:
            if client is None or not client.open:
                client = await connect(address)
            status = await client.ask(contents[turn % len(contents)])
        except ConnectionRefusedError:
            run.counts["refused"] += 1
            await asyncio.sleep(0.02)
            continue
        except OSError:
            run.counts["lost"] += 1
            client = None
            continue
        run.counts["answered" if status == 200 else "refused" if status == 503 else f"status {status}"] += 1
        run.seconds.append(time.perf_counter() - began)
        if fresh:
            client.transport.close()
            client = None
        if pause or status == 503:
            await asyncio.sleep(dice.uniform(0, 2 * pause or 0.1))
    if client:
        client.transport.close()


def saturate(address: tuple[str, int], contents: list[bytes], *, connections: int, seconds: float) -> Run:
    """As many requests as the service answers on some connections."""
    run, began = Run(), time.perf_counter()

    async def all_of_them() -> None:
        end = began + seconds
        tasks = [
            ask_on(address, lambda: time.perf_counter() > end, contents, run, number=number, fresh=False, pause=0)
            for number in range(connections)
        ]
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    run.elapsed = time.perf_counter() - began
    return run


def arrive(address: tuple[str, int], contents: list[bytes], *, rate: float, seconds: float, seed: int = 0) -> Run:
    """Requests that come at random, on average so many a second, whether the former are answered or not (Poisson)."""
    run, dice, idle = Run(), random.Random(seed), list[Client]()
    began = time.perf_counter()

    async def one(due: float, content: bytes) -> None:
        client = idle.pop() if idle else await connect(address)
        status = await client.ask(content)
        run.counts["answered" if status == 200 else f"status {status}"] += 1
        run.seconds.append(time.perf_counter() - due)
        if client.open:
            idle.append(client)

    async def all_of_them() -> None:
        due, tasks = began, set()
        while (due := due + dice.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            tasks.add(asyncio.create_task(one(due, contents[len(tasks) % len(contents)])))
        await asyncio.gather(*tasks)
        for client in idle:
            client.transport.close()

    asyncio.run(all_of_them())
    run.elapsed = time.perf_counter() - began
    return run


# --- tables and bounds ------------------------------------------------------------------------------------------------

missed: list[str] = []


def table(title: str, rows: list[tuple[str, str]]) -> None:
    print(f"\n| {title} | |\n| :-- | --: |")
    for name, value in rows:
        print(f"| {name} | {value} |", flush=True)


def bound(holds: bool, what: str) -> None:
    if not holds:
        missed.append(what)


def spread(values: list[float], form: str = "{:.0f}") -> str:
    """The median, and the least and largest."""
    found = [form.format(value) for value in (float(np.median(values)), min(values), max(values))]
    return f"{found[0]} ({found[1]} to {found[2]})"


def memory(service: Served) -> float:
    """Megabytes that the service holds."""
    return psutil.Process(service.process.pid).memory_info().rss / 2**20


def cpu(service: Served) -> float:
    times = psutil.Process(service.process.pid).cpu_times()
    return times.user + times.system


# --- load -------------------------------------------------------------------------------------------------------------


def bare(model: Path, files: list[bytes], *, batch: int, seconds: float) -> float:
    """Images a second of onnxruntime and decoding alone, a thread a core, in batches of one size."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    card = json.loads(session.get_modelmeta().custom_metadata_map["card"])
    counts = [0] * cores()
    began = time.perf_counter()

    def work(thread: int) -> None:
        while time.perf_counter() < began + seconds:
            some = [files[(thread + counts[thread] + number) % len(files)] for number in range(batch)]
            pixels = np.stack([decode(data, size=card["size"], channels=card["channels"]) for data in some])
            session.run(["probabilities"], {"images": np.broadcast_to(pixels, (*pixels.shape[:3], 3))})
            counts[thread] += batch

    with ThreadPoolExecutor(len(counts)) as pool:
        list(pool.map(work, range(len(counts))))
    return sum(counts) / (time.perf_counter() - began)


def measure_load(folder: Path, *, rounds: int, seconds: float) -> None:
    """Images a second beside bare onnxruntime, by turns, and latencies at half of that."""
    files = photographs()
    contents = [request(data) for data in files]
    for name, model, counts in (
        ("9 ms an image", usual(folder / "usual.onnx"), True),
        ("0.15 ms an image", small(folder / "small.onnx"), False),
    ):
        with Served(model) as service:
            saturate(service.address, contents, connections=CONNECTIONS, seconds=2)
            found: dict[str, list[float]] = {
                key: [] for key in ("bare", "served", "share", "client", "alone", "p99", "times")
            }
            for number in range(rounds):
                direct = max(bare(model, files, batch=batch, seconds=seconds / 2) for batch in (1, 8))
                spent = time.process_time()
                run = saturate(service.address, contents, connections=CONNECTIONS, seconds=seconds)
                found["client"].append((time.process_time() - spent) / run.elapsed)
                alone = saturate(service.address, contents, connections=1, seconds=seconds / 2).quantile(0.5)
                half = arrive(service.address, contents, rate=run.rate / 2, seconds=seconds, seed=number)
                bound(run["answered"] == sum(run.counts.values()), f"{name}: at saturation {dict(run.counts)}")
                bound(half["answered"] == sum(half.counts.values()), f"{name}: at half the load {dict(half.counts)}")
                values = (
                    direct,
                    run.rate,
                    run.rate / direct,
                    1000 * alone,
                    1000 * half.quantile(0.99),
                    half.quantile(0.99) / alone,
                )
                for key, value in zip(("bare", "served", "share", "alone", "p99", "times"), values, strict=True):
                    found[key].append(value)
        share, times = float(np.median(found["share"])), float(np.median(found["times"]))
        if counts:
            bound(share >= SHARE, f"{name}: {share:.2f} of bare onnxruntime, at least {SHARE}")
            bound(times <= SLOWER, f"{name}: p99 is {times:.1f} times the latency alone, at most {SLOWER:g}")
        table(
            f"{name}, {cores()} cores, {rounds} rounds: median (range)",
            [
                ("bare onnxruntime with decoding, images/s", spread(found["bare"])),
                (f"served, {CONNECTIONS} connections, images/s", spread(found["served"])),
                ("share", spread(found["share"], "{:.2f}")),
                ("cores that the client took meanwhile", spread(found["client"], "{:.2f}")),
                ("latency of a request alone, median, ms", spread(found["alone"], "{:.1f}")),
                ("latency at half of the load, p99, ms", spread(found["p99"], "{:.1f}")),
                ("p99 beside alone", spread(found["times"], "{:.1f}")),
            ],
        )


# --- bad requests -----------------------------------------------------------------------------------------------------


def whole_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("cat.jpg", b"cat" * 100)
    return file.getvalue()


def huge(kind: str) -> bytes:
    """The header of an image of 20,000 x 20,000 pixels, and nothing after it."""
    side = (20_000).to_bytes(4, "big")
    png = b"IHDR" + side + side + b"\x08\x02\x00\x00\x00"
    return {
        "png": b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + png + zlib.crc32(png).to_bytes(4, "big") + bytes(100),
        "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08"
        + side[2:]
        + side[2:]
        + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
        + bytes(100),
        "gif": b"GIF89a" + side[:1:-1] * 2 + bytes(100),
        "bmp": b"BM" + bytes(12) + b"\x28\0\0\0" + side[::-1] + side[::-1] + b"\x01\0\x18\0" + bytes(100),
    }[kind]


def fuzzed(data: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, cut out or doubled."""
    found = bytearray(data)
    for _ in range(dice.randint(1, 20)):
        place, length = dice.randrange(len(found)), dice.randint(1, 50)
        match dice.randrange(4):
            case 0:
                found[place] = dice.randrange(256)
            case 1:
                del found[place : place + length]
            case 2:
                found[place:place] = found[place : place + length]
            case _:
                found[place : place + length] = dice.randbytes(length)
        if not found:
            return b"x"
    return bytes(found)


def bad_requests(count: int, seed: int = 0) -> Iterator[tuple[str, list[bytes], float]]:
    """Kinds of bad requests, by turns: the name, the pieces to send, and the seconds between these."""
    dice = random.Random(seed)
    portrait = photos()[2].resize((200, 234))
    good = {
        kind: encode(portrait, kind)
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
    }
    good["progressive"] = encode(portrait, "JPEG", progressive=True)
    disguised = {
        "zip": whole_zip(),
        "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "HTML": b"<!doctype html><script>alert(1)</script>",
        "PDF": b"%PDF-1.7\n1 0 obj <<>> endobj",
        "ELF": b"\x7fELF" + bytes(60),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    paths = (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/ort/..%2f..%2fservice.py",
        "//etc/passwd",
        "/%00",
        "/\xff",
        "/model.onnx/../../params.yaml",
        "/" + "a/" * 3000,
        "/page/./../service.py",
    )
    documents = (
        b"{",
        b"[]",
        b"null",
        b'{"images": 1}',
        b'{"images": [{}]}',
        b'{"images": [{"base64": "####"}]}',
        b'{"images": [{"base64": 5}]}',
        b"[" * 50_000,
        b'{"images": [{"base64": "' + b"A" * 40_000,
        b"\xff\xfe{}",
        b'{"images": [{"base64": "aGVsbG8="}], "more": 1}',
        b'{"images": [' + b'{"base64": ""},' * 999 + b"{}]}",
    )
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=edge\r\n"

    def endless() -> list[bytes]:
        return [f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *[b"10000\r\n" + bytes(2**16) + b"\r\n"] * 400]

    kinds: dict[str, Callable[[], tuple[list[bytes], float]]] = {
        "truncated": lambda: (
            [request((data := dice.choice(list(good.values())))[: dice.randrange(1, len(data) * 9 // 10)])],
            0,
        ),
        "fuzzed JPEG": lambda: ([request(fuzzed(good[dice.choice(["JPEG", "progressive"])], dice))], 0),
        "another fuzzed image": lambda: ([request(fuzzed(dice.choice(list(good.values())), dice))], 0),
        "20,000 x 20,000": lambda: ([request(huge(dice.choice(["png", "jpeg", "gif", "bmp"])))], 0),
        "in disguise": lambda: ([request(dice.choice(list(disguised.values())))], 0),
        "empty": lambda: (
            [
                dice.choice(
                    [request(b""), post(b"", "application/json"), post(b"", "multipart/form-data; boundary=edge")]
                )
            ],
            0,
        ),
        "wrong type": lambda: (
            [
                post(
                    good["JPEG"],
                    dice.choice(["image/jpeg", "text/html", "", "application/x-www-form-urlencoded", "a/" + "b" * 500]),
                )
            ],
            0,
        ),
        "wrong JSON": lambda: ([post(dice.choice(documents), "application/json")], 0),
        "path trick": lambda: ([f"GET {dice.choice(paths)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1")], 0),
        "wrong form": lambda: (
            [
                post(
                    fuzzed(request(good["JPEG"]).partition(b"\r\n\r\n")[2][:300], dice),
                    "multipart/form-data; boundary=edge",
                )
            ],
            0,
        ),
        "wrong name": lambda: ([request(good["JPEG"], kind=dice.choice(["file", "", "files[]", "x" * 3000]))], 0),
        "wrong query": lambda: (
            [
                request(
                    good["JPEG"],
                    path="/predict?"
                    + dice.choice(["top=0", "top=-1", "top=x", "top=1e9", "heat=2", "top=" + "9" * 5000]),
                )
            ],
            0,
        ),
        "fuzzed HTTP": lambda: ([fuzzed(request(b"")[:200], dice) + b"\r\n\r\n"], 0),
        "too long, as it says": lambda: (
            [f"{head}Content-Length: {dice.choice([20_000_001, 10**15])}\r\n\r\n".encode()],
            0,
        ),
        "stops in the middle": lambda: ([request(good["JPEG"])[: dice.randrange(20, 3000)]], 0),
        "endless body": lambda: (
            endless() if dice.random() < 0.3 else [f"GET / HTTP/1.1\r\nx: {'y' * 70_000}".encode()],
            0,
        ),
        "slow body": lambda: ([request(good["JPEG"])[:500], *[b"x"] * 30], 0.05),
    }
    for number, name in zip(range(count), list(kinds) * count, strict=False):
        pieces, pause = kinds[name]()
        yield f"{name} #{number}", pieces, pause


def send(address: tuple[str, int], pieces: list[bytes], pause: float) -> tuple[int, bytes]:
    """Send pieces until the service answers, and give the status, or 0 where it only closes, and the answer."""
    received, length = b"", 0
    with socket.create_connection(address, timeout=15) as connection:
        with suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        with suppress(ConnectionResetError):
            while len(received.partition(b"\r\n\r\n")[2]) < length or not length:
                piece = connection.recv(2**16)
                if not piece:
                    break
                received += piece
                if b"\r\n\r\n" in received:
                    length = int(received.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    return int(received[9:12] or 0), received.partition(b"\r\n\r\n")[2]


def judge(service: Served, name: str, pieces: list[bytes], pause: float, good: bytes) -> str:
    """Send a bad request and then a good one; give what came of the first."""
    status, body = send(service.address, pieces, pause)
    expected = 400 <= status < 500 and isinstance(json.loads(body)["detail"], str)
    lucky = status == 200 and name.startswith(("fuzzed", "another fuzzed", "truncated"))  # still an image
    silent = status == 0 and name.startswith("fuzzed HTTP")  # no whole request: closed when its time was over
    bound(expected or lucky or silent, f"{name}: {status} {body[:200]!r}")
    after, _ = send(service.address, [good], 0)
    bound(after == 200, f"the good request after {name}: {after}")
    return f"{status}" if status else "closed"


def measure_bad(folder: Path, *, count: int) -> None:
    """Bad requests of all kinds, eight at a time, each followed by a good one; and as many again."""
    good = request(encode(photos()[0], "JPEG"))
    with Served(small(folder / "small.onnx"), head_seconds=1, body_seconds=1) as service:
        held = []
        for seed in (0, 1):
            with ThreadPoolExecutor(8) as pool:
                found = Counter(pool.map(lambda bad: judge(service, *bad, good), bad_requests(count, seed)))
            held.append(memory(service))
            table(f"{count} bad requests, seed {seed}", [(key, str(number)) for key, number in sorted(found.items())])
        bound(held[1] <= (1 + GROWTH) * held[0], f"bad requests: {held[0]:.0f} MB grew to {held[1]:.0f}")
        table("memory after them", [(f"seed {seed}", f"{value:.0f} MB") for seed, value in enumerate(held)])
        service.stop()
        bound(not [line for line in service.log if "Traceback" in line], f"the log: {''.join(service.log)[:2000]}")


# --- kill, stop and replacement ---------------------------------------------------------------------------------------


WAYS = [{"fresh": False, "pause": 0}, {"fresh": False, "pause": 0.02}, {"fresh": True, "pause": 0}] * 4
"""Twelve clients: on one connection without and with pauses, and on a fresh one for each request."""


@contextmanager
def clients(address: tuple[str, int], contents: list[bytes], ways: Sequence[dict[str, float]] = WAYS) -> Iterator[Run]:
    """Clients that ask all the while."""
    run, ends = Run(), threading.Event()

    async def all_of_them() -> None:
        tasks = [ask_on(address, ends.is_set, contents, run, number=number, **way) for number, way in enumerate(ways)]
        await asyncio.gather(*tasks)

    thread = threading.Thread(target=asyncio.run, args=(all_of_them(),))
    thread.start()
    try:
        yield run
    finally:
        ends.set()
        thread.join()


def measure_kill(folder: Path, *, times: int) -> None:
    """What is answered, refused and lost while the service is killed, stopped and given other models."""
    contents = [request(data) for data in photographs()]
    first, second = (small(folder / f"small {seed}.onnx", seed).read_bytes() for seed in (0, 1))
    model = folder / "model.onnx"
    model.write_bytes(first)
    rows = []

    def tell(what: str, run: Run, *kinds: str) -> None:
        rows.append((what, ", ".join(f"{kind} {number}" for kind, number in sorted(run.counts.items()))))
        for kind in run.counts.keys() - {"answered", *kinds}:
            bound(False, f"{what}: {kind} {run[kind]}")
        bound(run["answered"] > 0, f"{what}: none answered")

    for what, how, inherits, kinds in (
        ("kill -9 and a new start", signal.SIGKILL, False, ("refused", "lost")),
        ("a gentle stop and a new start", signal.SIGTERM, False, ("refused",)),
        ("the same on a socket of systemd", signal.SIGTERM, True, ()),
    ):
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
            address = listener.getsockname()
            given = {"socket": listener.fileno()} if inherits else {"port": address[1]}
            if not inherits:
                listener.close()
            service = Served(model, drain_seconds=0.5, **given)
            with clients(address, contents) as run:
                for _ in range(times):
                    time.sleep(1)
                    service.stop(how)
                    service = Served(model, drain_seconds=0.5, **given)
                time.sleep(1)
            service.stop()
        tell(f"{what}, {times} times", run, *kinds)

    health, counts = [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], Counter[str]()
    for _ in range(4 * times):
        with Served(model, drain_seconds=0.2) as service, clients(service.address, health, 40 * WAYS[2:3]) as run:
            time.sleep(0.6)
            service.stop()
        counts += run.counts
    tell(f"a gentle stop while 40 clients connect for each request, {4 * times} times", Run(counts), "refused")

    with Served(model) as service, clients(service.address, contents) as run:
        for number in range(times):
            replace(model, (second, first)[number % 2])
            service.wait_for("loaded ")
            time.sleep(0.5)
            model.write_bytes(first[:-5000])
            service.wait_for("the former model goes on")
    tell(f"another model and a damaged one, {times} times each", run)
    table("requests, of twelve clients if not told otherwise", rows)


# --- growth -----------------------------------------------------------------------------------------------------------


def measure_growth(folder: Path, *, minutes: int, seconds: float) -> None:
    """Memory, minute by minute, at saturation."""
    contents = [request(data) for data in photographs()]
    with Served(usual(folder / "usual.onnx")) as service:
        rows, held = [], []
        for minute in range(1, minutes + 1):
            run = saturate(service.address, contents, connections=CONNECTIONS, seconds=seconds)
            bound(run["answered"] == sum(run.counts.values()), f"minute {minute}: {dict(run.counts)}")
            held.append(memory(service))
            rows.append((f"{minute}, {run.rate:.0f} images/s", f"{held[-1]:.0f} MB"))
        table("minute at saturation", rows)
        bound(max(held) <= (1 + GROWTH) * held[0], f"memory: {held[0]:.0f} MB grew to {max(held):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[[], "load", "bad", "kill", "growth"], default=[])
    parser.add_argument("--brief", action="store_true", help="a tenth of the time, to see that it works")
    given = parser.parse_args()
    sections = given.sections or ["load", "bad", "kill", "growth"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        if "load" in sections:
            measure_load(folder, rounds=1 if given.brief else 7, seconds=4 if given.brief else 10)
        if "bad" in sections:
            measure_bad(folder, count=50 if given.brief else 500)
        if "kill" in sections:
            measure_kill(folder, times=1 if given.brief else 5)
        if "growth" in sections:
            measure_growth(folder, minutes=3 if given.brief else 10, seconds=6 if given.brief else 60)
    for what in missed:
        print(f"missed: {what}")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
