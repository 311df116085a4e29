"""The service as its users meet it: a process of its own on the loopback, and a model whose answers are known."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from types import TracebackType

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from tests.helpers import ROOT, environment

SIZE, SIDES = 32, ("left", "right", "top", "bottom")

LAUNCH = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file may grow: the service never writes to the disk
if sys.argv[1]:  # as systemd hands a socket over
    os.dup2(int(sys.argv[1]), 3)
    os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "app.service"])
"""


class Served:
    """A running service; `log` grows as it speaks. Ends gently where it has not ended already."""

    def __init__(self, model: Path, *, socket: int | None = None, **settings: object) -> None:
        given = {"port": 0, "drain_seconds": 0, **settings, "model": model}
        env = environment() | {f"CLASSIFIER_{name.upper()}": str(value) for name, value in given.items()}
        command = [sys.executable, "-c", LAUNCH, "" if socket is None else str(socket)]
        kept = () if socket is None else (socket,)
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, pass_fds=kept)
        self.log: list[str] = []
        self._read = 0
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()
        line = self.wait_for("serves at ")
        found = re.search(r"http://([\d.]+):(\d+)", line)
        assert found, line
        self.address = (found[1], int(found[2]))
        self.url = f"http://{found[1]}:{found[2]}"

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)

    def wait_for(self, words: str, seconds: float = 10) -> str:
        """Wait for a line of the log, after those that were waited for before, and give it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self._read < len(self.log):
                self._read += 1
                if words in self.log[self._read - 1]:
                    return self.log[self._read - 1]
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.01)
        raise AssertionError(f"no {words!r} in {self.log}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the process, and give its exit code."""
        self.process.send_signal(how)  # nothing, where it has ended
        code = self.process.wait(60)
        self._listener.join(5)
        return code

    def __enter__(self) -> "Served":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()


def replace(model: Path, content: bytes) -> None:
    """Put another file in the place of a model, at once."""
    part = model.with_suffix(".part")
    part.write_bytes(content)
    part.replace(model)


def stand_in(*, sure_from: float | None = 0.5, heat: bool = True, products: int = 0, **card: object) -> bytes:
    """A model that names the brightest side of a picture of any size; large products of matrices make it slow."""
    middle = SIZE // 2
    halves = np.zeros((SIZE, SIZE, len(SIDES)), np.float32)
    halves[:, :middle, 0] = halves[:, middle:, 1] = halves[:middle, :, 2] = halves[middle:, :, 3] = 8 / (SIZE * middle)
    constants = {
        "halves": halves.reshape(-1, len(SIDES)),
        "shape": np.array([SIZE, SIZE, 3]),
        "scale": np.float32(1 / 255),
        "flat": np.array([-1, SIZE * SIZE]),
        "grid": np.array([-1, 4, SIZE // 4, 4, SIZE // 4]),
        "colours": np.array([3]),
        "red first": np.array([1.5, 1.0, 0.5], np.float32),  # so that no two colours can be exchanged
        "cells": np.array([2, 4]),
        "all": np.array([0, 1]),
        "wide": np.full((768, 768), 1 / 768, np.float32),
        "none": np.float32(0),
    }
    nodes = [
        helper.make_node("Shape", ["images"], ["count"], end=1),
        helper.make_node("Concat", ["count", "shape"], ["sizes"], axis=0),
        helper.make_node("Resize", ["images", "", "", "sizes"], ["small"], mode="linear"),
        helper.make_node("Cast", ["small"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "scale"], ["light"]),
        helper.make_node("Mul", ["light", "red first"], ["weighed"]),
        helper.make_node("ReduceMean", ["weighed", "colours"], ["gray"], keepdims=0),
        helper.make_node("Reshape", ["gray", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "halves"], ["sums"]),
        helper.make_node("ReduceMean", ["row", "all"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["wide", "mean"], ["product 0"]),
        *(
            helper.make_node("MatMul", [f"product {number}", "wide"], [f"product {number + 1}"])
            for number in range(products)
        ),
        helper.make_node("ReduceMean", [f"product {products}", "all"], ["slow"], keepdims=0),
        helper.make_node("Mul", ["slow", "none"], ["nothing"]),
        helper.make_node("Add", ["sums", "nothing"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
        helper.make_node("Reshape", ["gray", "grid"], ["blocks"]),
        helper.make_node("ReduceMean", ["blocks", "cells"], ["heat"], keepdims=0),
    ]
    outputs = {"probabilities": ["N", len(SIDES)], **({"heat": ["N", 4, 4]} if heat else {})}
    graph = helper.make_graph(
        nodes,
        "sides",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    known = {"classes": SIDES, "size": SIZE, "channels": 3, "sure_from": sure_from, **card}
    helper.set_model_props(model, {"card": json.dumps(known)})
    return model.SerializeToString()


def bright(side: str, shape: tuple[int, int] = (60, 40)) -> Image.Image:
    """A picture of which one half is bright."""
    width, height = shape
    boxes = {"left": (0, 0, width // 2, height), "right": (width // 2, 0, width, height)}
    boxes |= {"top": (0, 0, width, height // 2), "bottom": (0, height // 2, width, height)}
    image = Image.new("RGB", shape, (20, 30, 40))
    image.paste((250, 240, 230), boxes[side])
    return image
