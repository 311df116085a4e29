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
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from src import paths
from src.batches import Table
from src.networks import Card, Dropout, Mean, Network, Resize
from src.runtime import PipelineError, say

OPSET = 20
"""The oldest with all that is needed, so that older runtimes read the file: Resize knows antialias since 18."""

_LUMA = [19595, 38470, 7471]
"""Shares of red, green and blue in gray, of 65,536 (ITU-R BT.601), as Pillow computes it in whole numbers."""

TOLERANCE = 0.01
"""The largest difference of a probability that is rounding: 2e-6 on CPUs; GPUs evaluate with 10 bits (TF32), not 23."""

USEFUL = 0.95
"""The share of answers that a file of 8 bits has to keep, to be of use."""

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


class Exported(NamedTuple):
    """A model, and what torch traced it from: a graph from prepared pixels on, whose values have the same names."""

    model: onnx.ModelProto
    traced: GraphModule


def export(network: Network, card: Card, temperature: float, *, flip: bool, metadata: dict[str, Any]) -> Exported:
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
    assert program.exported_program is not None
    body = program.model_proto
    whole = onnx.compose.merge_models(preprocessing(card.size, card.channels), body, io_map=[(PREPARED, PREPARED)])
    del whole.opset_import[:]
    whole.opset_import.append(helper.make_opsetid("", OPSET))
    return Exported(finish(whole, metadata), program.exported_program.module())


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


def quantize(exported: Exported, images: Table, *, batch: int, metadata: dict[str, Any]) -> onnx.ModelProto:
    """Give the same model with weights and activations of 8 bits (static quantization, Jacob et al. 2018).

    images: of validation; up to 512 of them, from all over, give the range of each activation. Weights get 7 bits,
    since sums of products of 8 overflow on x86 CPUs without VNNI instructions. The first layer and the shortcuts stay
    as they are: with shortcuts of 8 bits, 1.3 % of 2,081 animals got another answer instead of 0.7 %. So do the
    products within an attention, whose values torch does not name.
    """
    model, traced = exported
    nodes, named = list(model.graph.node), {node.name for node in traced.graph.nodes}
    weights = {initializer.name for initializer in model.graph.initializer}
    answered = max(number for number, node in enumerate(nodes) if node.op_type == "Softmax")
    apart = {*_shortcuts(model), *(node.name for node in nodes[answered:])}  # and the heat map's
    products = [node for node in nodes if node.op_type in _PRODUCTS]
    chosen = {node.name: _activations(node) - weights for node in products[1:] if node.name not in apart}
    chosen = {name: values for name, values in chosen.items() if values <= named}
    picks = torch.linspace(0, len(images) - 1, min(len(images), 512)).long().split(batch)
    ranges = _ranges(traced, sorted(set().union(*chosen.values())), (images.take(some)[0] for some in picks))
    ready = onnx.ModelProto()
    ready.CopyFrom(model)
    helper.set_model_props(ready, {"onnx.quant.pre_process": "onnxruntime.quant"})  # torch has folded all norms
    with TemporaryDirectory() as folder:
        ranges_file, done = Path(folder, "ranges"), Path(folder, "done")
        save_tensors_data(TensorsData(quantization.CalibrationMethod.MinMax, ranges), ranges_file)
        quantization.quantize_static(
            ready,
            done,
            None,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=_PRODUCTS,
            nodes_to_exclude=[node.name for node in products if node.name not in chosen],
            calibration_cache_path=ranges_file,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
        return finish(onnx.load(done), metadata)


_PRODUCTS = ["Conv", "Gemm", "MatMul"]
"""The operators whose weights and activations get 8 bits."""


def _activations(node: onnx.NodeProto) -> set[str]:
    """Name what gets 8 bits of a product: what goes in, and what comes out.

    Not what comes out of a MatMul, whose bias is a node of its own, so that torch does not name what lies in between.
    """
    return {*node.input, *(() if node.op_type == "MatMul" else node.output)}


def _ranges(traced: GraphModule, names: Sequence[str], batches: Iterable[Tensor]) -> dict[str, tuple[Any, Any]]:
    """Find the lowest and the highest of each named value over batches of prepared pixels.

    By torch, whose sums are the same on every CPU where `settle` made them so; those of onnxruntime's calibration are
    not.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    class Watching(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.name in found:
                found[n.name] += value.aminmax()
            # A convolution may give channels_last where the trace, and so a later `view`, expects plain memory.
            return value.contiguous() if isinstance(value, Tensor) else value

    with torch.inference_mode():
        for pixels in batches:
            Watching(traced).run(pixels)
    return {name: (min(some).numpy(), max(some).numpy()) for name, some in found.items()}


def _shortcuts(model: onnx.ModelProto) -> list[str]:
    """Name the convolutions of one pixel beside another one: those of a residual block's shortcut."""
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    shapes = {initializer.name: initializer.dims for initializer in model.graph.initializer}
    beside = Counter(node.input[0] for node in convolutions)
    return [node.name for node in convolutions if beside[node.input[0]] > 1 and [*shapes[node.input[1]]][2:] == [1, 1]]


# --- what the file answers --------------------------------------------------------------------------------------------


def as_input(pixels: Tensor) -> dict[str, NDArray[np.uint8]]:
    """Give prepared pixels, (N, S, S, C), as the model's input, gray as three equal channels."""
    return {INPUT: pixels.expand(-1, -1, -1, 3).contiguous().cpu().numpy()}


def answer(file: Path, table: Table, *, batch: int, threads: int) -> NDArray[np.float64]:
    """Give the probabilities, (N, classes), that a file answers for prepared images."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # warnings of what nobody can change
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads are not OpenMP's
    session = onnxruntime.InferenceSession(file, options)
    found = [session.run([PROBABILITIES], as_input(pixels))[0] for pixels, _ in table.parts(batch)]
    return np.concatenate(found).astype(np.float64)


class Agreement(NamedTuple):
    """How a file's answers to the test images compare with the evaluated model's."""

    same: float
    """The share of images with the same most probable class."""
    difference: float
    """The largest of a probability."""
    accuracy: float

    def __str__(self) -> str:
        return (
            f"{self.same:.2%} of the test images are named as by the evaluated model, probabilities differ by at most "
            f"{self.difference:.0e}, accuracy {self.accuracy:.2%}"
        )


def agreement(found: NDArray[np.float64], evaluated: NDArray[np.float64], codes: NDArray[np.int64]) -> Agreement:
    """Compare what a file answers with what the evaluated model does: (N, classes) each, and the truth, (N,)."""
    return Agreement(
        same=float((found.argmax(1) == evaluated.argmax(1)).mean()),
        difference=float(np.abs(found - evaluated).max()),
        accuracy=float((found.argmax(1) == codes).mean()),
    )


def check(plain: Agreement, int8: Agreement) -> None:
    """Raise PipelineError where the float file is not the evaluated model, and warn of a poor one of 8 bits.

    Nothing of this is recorded, since onnxruntime's sums, and so these figures, differ between CPUs.
    """
    if not plain.difference <= TOLERANCE:  # or is no number
        raise PipelineError(
            f"{paths.ONNX} would not answer as the evaluated model: a probability differs by {plain.difference:.2g}, "
            f"at most {TOLERANCE:g} is expected; run `dvc repro --force evaluate`, in case {paths.PREDICTIONS} is of "
            "another model; if that does not help, torch.onnx exports this network wrongly: choose another model.name"
        )
    if int8.same < USEFUL:
        say(
            f"{paths.INT8} gives only {int8.same:.1%} of the test images the answer of the evaluated model (accuracy "
            f"{int8.accuracy:.1%} instead of {plain.accuracy:.1%}); this network loses too much by 8 bits, deploy "
            f"{paths.ONNX}"
        )
