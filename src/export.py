"""The trained network as one ONNX file that takes photographs as they are, and answers as the evaluated model does.

The file holds all of it: gray where the network is gray, resize and crop as in `src.images`, normalisation, network,
mirror image, temperature and softmax. What is in no graph is in its metadata, as one JSON string under `card`.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.calibrate import save_tensors_data
from torch import Tensor, nn
from torch.nn import functional as F

from src.batches import Table
from src.networks import Card, Dropout, Mean, Network, Resize

OPSET = 20
"""The oldest with all that is needed, so that older runtimes read the file: Resize knows antialias since 18."""

_LUMA = [19595, 38470, 7471]
"""Shares of red, green and blue in gray, of 65,536 (ITU-R BT.601), as Pillow computes it in whole numbers."""

INPUT, PREPARED, PROBABILITIES, HEAT = "images", "prepared", "probabilities", "heat"


# --- the network ------------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """Prepared pixels, (N, S, S, C) uint8, to probabilities, (N, classes), and a heat map, (N, h, w), if there is one.

    The heat is how much each place of the last feature map adds to the most probable class, as a share of the largest:
    HiResCAM (Draelos and Carin 2020), which is CAM (Zhou et al. 2016) where the network ends in a mean over all places.
    """

    def __init__(self, network: Network, *, temperature: float, flip: bool) -> None:
        super().__init__()
        self.network, self.temperature, self.flip = network, temperature, flip
        layers = [layer for layer in network.layers if not isinstance(layer, Dropout)]
        parts: Sequence[Callable[[Tensor], Tensor]] = list(network.backbone)
        if pools := [number for number, layer in enumerate(layers) if isinstance(layer, Mean | nn.Flatten)]:
            parts, layers = layers[: pools[0]], layers[pools[0] :]
        elif mapped := _before_mean(network):
            parts, layers = [parts[0], mapped], [Mean(), *layers]
        self.parts, self.head, self.heated = parts, nn.ModuleList(layers), isinstance(layers[0], Mean | nn.Flatten)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Answer for a batch."""
        count = pixels.shape[0]
        features = self._features(torch.cat([pixels, pixels.flip(2)]) if self.flip else pixels)
        steps = [features]
        for layer in self.head:
            steps.append(layer(steps[-1]))
        shares = (steps[-1] / self.temperature).softmax(1)
        if self.flip:
            shares = (shares[:count] + shares[count:]) / 2
        if not self.heated:
            return (shares,)
        return shares, self._heat([step[:count] for step in steps], F.one_hot(shares.argmax(1), shares.shape[1]))

    def _features(self, pixels: Tensor) -> Tensor:
        values: Tensor = (pixels.permute(0, 3, 1, 2).float() - self.network.mean) / self.network.deviation
        for part in self.parts:
            values = part(values)
        return values

    def _heat(self, steps: Sequence[Tensor], slope: Tensor) -> Tensor:
        """Follow the class back through the head, whose layers are linear or cut at 0, to each place of the map."""
        slope = slope.float()
        for layer, before in zip(reversed(self.head), reversed(steps[:-1]), strict=True):
            if isinstance(layer, nn.Linear):
                slope = slope @ layer.weight
            elif isinstance(layer, nn.ReLU):
                slope = slope * (before > 0)
            elif isinstance(layer, nn.Flatten):
                slope = slope.view(-1, *before.shape[1:])
            else:
                slope = slope[:, :, None, None]
        heat = (steps[0] * slope).sum(1).relu()
        return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)


def _before_mean(network: Network) -> Callable[[Tensor], Tensor] | None:
    """Find what gives the map, (N, F, h, w), whose means are a backbone's features, as most convolutional ones' are.

    None where a look at some pixels shows that they are not.
    """
    resize, backbone = network.backbone
    mapped: Callable[[Tensor], Tensor] | None = getattr(backbone, "forward_features", None)
    if not isinstance(resize, Resize) or mapped is None:
        return None
    pixels = torch.linspace(-1, 1, network.mean.numel() * math.prod(resize.size)).view(1, -1, *resize.size)
    with torch.inference_mode():
        places, given = mapped(pixels), backbone(pixels)
    alike = places.dim() == 4 and places.shape[:2] == given.shape
    return mapped if alike and torch.allclose(places.mean((2, 3)), given, rtol=1e-4, atol=1e-5) else None


# --- the file ---------------------------------------------------------------------------------------------------------


def export(
    network: Network, card: Card, temperature: float, *, flip: bool, metadata: dict[str, Any]
) -> onnx.ModelProto:
    """Put a network, in evaluation mode, and its preprocessing into one graph; the same bytes for the same weights.

    Input `images`: (N, H, W, 3) uint8, RGB, upright, of any size; a batch of prepared ones passes the resize as it is.
    Outputs: `probabilities`, (N, classes) float32, and `heat`, (N, h, w) float32, 0 to 1, if the network offers it.
    """
    deployed = Deployed(network.cpu().float(), temperature=temperature, flip=flip).eval()
    pixels = torch.zeros(2, card.size, card.size, card.channels, dtype=torch.uint8)
    with torch.inference_mode():
        names = [PROBABILITIES, HEAT][: len(deployed(pixels))]
    program = torch.onnx.export(
        deployed,
        (pixels,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("N")},),
        input_names=[PREPARED],
        output_names=names,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    body = program.model_proto
    whole = onnx.compose.merge_models(preprocessing(card.size, card.channels), body, io_map=[(PREPARED, PREPARED)])
    del whole.opset_import[:]
    whole.opset_import.append(helper.make_opsetid("", OPSET))
    return finish(whole, metadata)


def preprocessing(size: int, channels: int) -> onnx.ModelProto:
    """Build what `src.images` does to upright pixels: (N, H, W, 3) uint8 to `prepared`, (N, size, size, C) uint8."""
    # Resize of onnxruntime 1.31 needs all four sizes: with `axes`, its optimizer loses them. It and Pillow both round
    # after each of the two passes, but Pillow does not always begin with the rows: then a sixth of all values differ by
    # 1, and else one of some hundred.
    constants = {"size": np.array([size]), "half": np.array([0.5], np.float32), "sides": np.array([1, 2])}
    pixels, gray = INPUT, ""
    if channels == 1:
        constants |= {"luma": np.array(_LUMA, np.int32), "unit": np.array(2**16, np.int32), "channel": np.array([3])}
        constants |= {"rounding": np.array(2**15, np.int32)}
        pixels = "gray"
        gray = f"""
            wide = Cast <to: int = 6> ({INPUT})
            weighed = Mul (wide, luma)
            summed = ReduceSum (weighed, channel)
            rounded = Add (summed, rounding)
            shifted = Div (rounded, unit)
            gray = Cast <to: int = 2> (shifted)
        """
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {OPSET}]>
        preprocessing (uint8[N, H, W, 3] {INPUT}) => (uint8[N, {size}, {size}, {channels}] {PREPARED}) {{
            {gray}
            around = Shape <start: int = 1, end: int = 3> ({pixels})
            short = ReduceMin (around)
            scaled = Mul (around, size)
            resized = Div (scaled, short)
            count = Shape <end: int = 1> ({pixels})
            depth = Shape <start: int = 3> ({pixels})
            sizes = Concat <axis: int = 0> (count, resized, depth)
            small = Resize <mode: string = "linear", antialias: int = 1, exclude_outside: int = 1> ({pixels}, , , sizes)
            over = Sub (resized, size)
            real = Cast <to: int = 1> (over)
            halved = Mul (real, half)
            even = Round (halved)
            corner = Cast <to: int = 7> (even)
            end = Add (corner, size)
            {PREPARED} = Slice (small, corner, end, sides)
        }}
    """)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def finish(model: onnx.ModelProto, metadata: dict[str, Any]) -> onnx.ModelProto:
    """Take away what is of this machine, such as paths, and write the card."""
    graph = model.graph
    del graph.value_info[:]  # every runtime infers the shapes in between by itself
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    graph.name, model.doc_string = "classifier", ""
    model.producer_name, model.producer_version = "torch", torch.__version__.partition("+")[0]
    del model.metadata_props[:]
    helper.set_model_props(model, {"card": json.dumps(metadata, sort_keys=True, ensure_ascii=False)})
    onnx.checker.check_model(model, full_check=True)
    return model


def quantize(model: onnx.ModelProto, images: Table, *, batch: int, metadata: dict[str, Any]) -> onnx.ModelProto:
    """Give the same model with weights and activations of 8 bits (static quantization, Jacob et al. 2018).

    images: of validation; up to 512 of them, from all over, tell the range of each activation. Weights get 7 bits,
    since sums of products of 8 overflow on x86 CPUs without VNNI instructions. The first layer and the shortcuts stay
    as they are: with shortcuts of 8 bits, 1.3 % of 2,081 animals got another answer instead of 0.7 %.
    """
    kinds = ["Conv", "Gemm", "MatMul"]
    nodes = list(model.graph.node)
    first = next(node.name for node in nodes if node.op_type in kinds)
    answered = max(number for number, node in enumerate(nodes) if node.op_type == "Softmax")
    kept = [first, *_shortcuts(model), *(node.name for node in nodes[answered:])]  # and the heat map's
    picks = torch.linspace(0, len(images) - 1, min(len(images), 512)).long().split(batch)
    with TemporaryDirectory() as folder:
        plain, augmented, ranges_file, done = (Path(folder, name) for name in ("plain", "augmented", "ranges", "done"))
        ready = onnx.ModelProto()
        ready.CopyFrom(model)
        helper.set_model_props(ready, {"onnx.quant.pre_process": "onnxruntime.quant"})  # torch has folded all norms
        onnx.save(ready, plain)
        calibrator = quantization.create_calibrator(plain, kinds, augmented.as_posix())
        calibrator.collect_data(_Reader([as_input(images.take(some)[0]) for some in picks]))
        ranges = calibrator.compute_data()
        for found in ranges.values():
            # Three digits, which are the same whatever instructions the CPU has.
            found.lowest, found.highest = (
                np.array(f"{bound.item():.2e}", np.float32) for bound in (found.lowest, found.highest)
            )
        save_tensors_data(ranges, ranges_file)
        quantization.quantize_static(
            plain,
            done,
            None,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=kinds,
            nodes_to_exclude=kept,
            calibration_cache_path=ranges_file,
        )
        return finish(onnx.load(done), metadata)


def _shortcuts(model: onnx.ModelProto) -> list[str]:
    """Name the convolutions of one pixel beside another one: those of a residual block's shortcut."""
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    shapes = {initializer.name: initializer.dims for initializer in model.graph.initializer}
    beside = Counter(node.input[0] for node in convolutions)
    return [node.name for node in convolutions if beside[node.input[0]] > 1 and [*shapes[node.input[1]]][2:] == [1, 1]]


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Hands batches to onnxruntime's calibration."""

    def __init__(self, batches: Iterable[dict[str, NDArray[np.uint8]]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Give the next batch, or None."""
        return next(self.batches, None)


# --- what the file answers --------------------------------------------------------------------------------------------


def as_input(pixels: Tensor) -> dict[str, NDArray[np.uint8]]:
    """Give prepared pixels, (N, S, S, C), as the model's input, gray as three equal channels."""
    return {INPUT: pixels.expand(-1, -1, -1, 3).contiguous().cpu().numpy()}


def answer(file: Path, table: Table, *, batch: int, threads: int) -> NDArray[np.float64]:
    """Give the probabilities, (N, classes), that a file answers for prepared images."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # warnings of what nobody can change
    session = onnxruntime.InferenceSession(file, options)
    found = [session.run([PROBABILITIES], as_input(pixels))[0] for pixels, _ in table.parts(batch)]
    return np.concatenate(found).astype(np.float64)


def agreement(found: NDArray[np.float64], evaluated: NDArray[np.float64], codes: NDArray[np.int64]) -> dict[str, float]:
    """Compare what a file answers with what the evaluated model does: (N, classes) each, and the truth, (N,).

    The largest difference is rounded up to one digit, and at least a millionth, since the CPU's kind changes the rest.
    """
    largest = max(float(np.abs(found - evaluated).max()), 1e-6)
    digit = 10.0 ** math.floor(math.log10(largest))
    return {
        "same_top1": float((found.argmax(1) == evaluated.argmax(1)).mean()),
        "max_probability_difference": float(f"{math.ceil(largest / digit - 1e-9) * digit:.0e}"),
        "accuracy": float((found.argmax(1) == codes).mean()),
    }
