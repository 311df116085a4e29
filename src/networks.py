"""The networks, as lists that one can read. Adding one is a function here and its name in NETWORKS.

Every network takes uint8 pixels as prepared, (N, S, S, C), and gives logits, (N, classes): normalisation is its first
layer, so that training, evaluation and deployment share one contract.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from src import backbones
from src.params import TIMM, Model, smallest_image
from src.runtime import PipelineError, mirror


@dataclass(frozen=True)
class Card:
    """What has to be known to build a network again; kept in the model file.

    network, widths, depth, dropout, head, input_size: as in params.yaml under model; size, channels: of the prepared
    images; classes: in the order of the logits; weights: the SHA-256 of the pretrained weights it began with, or ''.
    """

    network: str
    widths: list[int]
    depth: int
    dropout: float
    head: list[int]
    input_size: int
    size: int
    channels: int
    classes: list[str]
    weights: str = ""


def article(card: Card) -> list[nn.Module]:
    """The Animals-10 tutorial's network: 2,232,554 parameters at 128 px, RGB and 10 classes."""
    widths = [card.channels, 16, 32, 64, 128, 256]
    # The tutorial pools after the ReLU. The two commute; pooled first, the ReLU touches a quarter of the memory.
    blocks = [[nn.Conv2d(narrow, wide, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()] for narrow, wide in pairwise(widths)]
    return [
        *(layer for block in blocks for layer in block),
        nn.Flatten(),
        Dropout(card.dropout),
        nn.Linear(256 * (card.size // 32) ** 2, 448),
        nn.ReLU(),
        nn.Linear(448, len(card.classes)),
    ]


def keras_mnist(card: Card) -> list[nn.Module]:
    """The Keras MNIST tutorial's network: 225,034 parameters at 28 px, gray and 10 classes."""
    side = ((card.size - 2) // 2 - 2) // 2
    return [
        nn.Conv2d(card.channels, 32, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        Dropout(card.dropout),
        nn.Linear(64 * side**2, 128),
        nn.ReLU(),
        nn.Linear(128, len(card.classes)),
    ]


def residual(card: Card) -> list[nn.Module]:
    """A residual network (He et al. 2016): a stem, then a stage for each of `widths`, of `depth` blocks.

    Each stage halves the image first, by averages, since strided convolutions alias (Zhang 2019). The stem takes large
    images down to 64 pixels or more, so that any size costs about the same. The end is an average over all places, so
    that a network may see images of other sizes than it was trained on.
    """
    widths, stride = [max(1, card.widths[0] // 2), *card.widths], max(1, card.size // 64)
    layers = [*convolution(card.channels, widths[0], side=max(3, 2 * stride - 1), stride=stride), nn.ReLU()]
    for narrow, wide in pairwise(widths):
        layers += [nn.AvgPool2d(2, ceil_mode=True), Residual(narrow, wide)]
        layers += [Residual(wide, wide) for _ in range(card.depth - 1)]
    return [*layers, Mean(), Dropout(card.dropout), nn.Linear(widths[-1], len(card.classes))]


NETWORKS: dict[str, Callable[[Card], list[nn.Module]]] = {
    "article": article,
    "keras_mnist": keras_mnist,
    "residual": residual,
}


def convolution(narrow: int, wide: int, *, side: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution and its normalisation (Ioffe and Szegedy 2015), which makes a bias of its own needless."""
    return [nn.Conv2d(narrow, wide, side, stride, side // 2, bias=False), nn.BatchNorm2d(wide)]


class Residual(nn.Module):
    """Two convolutions, their channels weighed, and a shortcut: (N, narrow, S, S) -> (N, wide, S, S)."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        first, second = convolution(narrow, wide), convolution(wide, wide)
        nn.init.constant_(second[-1].get_parameter("weight"), 0)  # it begins as its shortcut (Goyal et al. 2017)
        self.body = nn.Sequential(*first, nn.ReLU(), *second, Excitation(wide))
        self.shortcut = nn.Sequential(*(convolution(narrow, wide, side=1) if narrow != wide else []))

    def forward(self, features: Tensor) -> Tensor:
        """Add what the body finds to what was there."""
        return F.relu(self.body(features) + self.shortcut(features))


class Excitation(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): weighs each channel by what all of them say of the whole image."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(wide, math.ceil(wide / 8)), nn.Linear(math.ceil(wide / 8), wide)

    def forward(self, features: Tensor) -> Tensor:
        """Weigh the channels: (N, F, S, S) -> same."""
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(features.mean((2, 3))))))
        return features * weights[:, :, None, None]


class Mean(nn.Module):
    """Global average pooling: (N, F, S, S) -> (N, F). AdaptiveAvgPool2d does not repeat its bits on CUDA."""

    def forward(self, features: Tensor) -> Tensor:
        """Average over all places."""
        return features.mean((2, 3))


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that draws from the generator of its step, never from hidden state."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, features: Tensor, generator: Generator | None) -> Tensor:
        """Zero a share of the features in training, and scale up the rest. (N, F) -> same."""
        if not self.training or self.share == 0:
            return features
        kept = torch.rand(features.shape, generator=generator, device=features.device) >= self.share
        return features * kept / (1 - self.share)


class Resize(nn.Module):
    """Bilinear with antialiasing, as `prepare` does it: (N, C, S, S) -> (N, C, size, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = (size, size)

    def forward(self, features: Tensor) -> Tensor:
        """Resize, unless it has the size already."""
        if features.shape[2:] == self.size:
            return features
        return F.interpolate(features, self.size, mode="bilinear", antialias=True, align_corners=False)


class Network(nn.Module):
    """Pixels in, logits out: normalisation, a pretrained backbone if there is one, then the layers in their order."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        mean: Sequence[float],
        deviation: Sequence[float],
        backbone: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32).view(1, -1, 1, 1))
        self.backbone = nn.Sequential(*backbone)
        self.layers = nn.ModuleList(layers)

    def forward(self, pixels: Tensor, generator: Generator | None = None) -> Tensor:
        """Give the logits, (N, classes), of uint8 pixels, (N, S, S, C). Dropout draws from `generator` in training."""
        return self.forward_head(self.forward_features(pixels), generator)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Give the backbone's features, (N, F), of uint8 pixels, (N, S, S, C); without one, the normalised pixels.

        Raises TypeError for anything but uint8, since pixels normalised twice would give plausible logits.
        """
        if pixels.dtype != torch.uint8 or pixels.shape[-1] != self.mean.numel():
            found = f"{pixels.dtype} of shape {tuple(pixels.shape)}"
            raise TypeError(f"expected uint8 pixels, (N, S, S, {self.mean.numel()}), found {found}")
        # By rows, in which the channels repeat: on a CPU six times as fast as one mean for each channel.
        mean, deviation = (values.flatten().repeat(pixels.shape[2]) for values in (self.mean, self.deviation))
        rows = pixels.flatten(2).float().sub_(mean).div_(deviation)
        # Seen as (N, C, S, S), this memory is what torch calls channels_last: nothing is copied.
        features: Tensor = self.backbone(rows.view(pixels.shape).permute(0, 3, 1, 2))
        return features

    def forward_head(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        """Give the logits, (N, classes), of what `forward_features` gave."""
        for layer in self.layers:
            features = layer(features, generator) if isinstance(layer, Dropout) else layer(features)
        return features


class Head(nn.Module):
    """A network that is called with its backbone's features, computed before: `forward_head` as a module."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        """Give the logits, (N, classes), of features, (N, F)."""
        return self.network.forward_head(features, generator)


@torch.random.fork_rng(devices=[])  # torch's layers draw weights when they are made, which nothing uses
def build(
    card: Card, *, mean: Sequence[float], deviation: Sequence[float], generator: Generator | None = None
) -> Network:
    """Build a network whose weights are yet to be drawn or loaded; a backbone brings its own mean and deviation.

    Raises PipelineError for images that are too small for the network.
    """
    if card.network.startswith(TIMM):
        found = backbones.make_backbone(card.network, channels=card.channels, size=card.input_size, generator=generator)
        head: list[nn.Module] = []
        for narrow, wide in pairwise([found.features, *card.head]):
            head += [Dropout(card.dropout), nn.Linear(narrow, wide), nn.ReLU()]
        head += [Dropout(card.dropout), nn.Linear([found.features, *card.head][-1], len(card.classes))]
        body = [Resize(found.size), found.module]
        return Network(head, mean=found.mean, deviation=found.deviation, backbone=body)
    if card.size < (smallest := smallest_image(card.network, card.widths)):
        raise PipelineError(f"the images have {card.size} px, but {card.network} expects at least {smallest}")
    return Network(NETWORKS[card.network](card), mean=mean, deviation=deviation)


def start(
    params: Model,
    size: int,
    channels: int,
    classes: list[str],
    statistics: tuple[list[float], list[float]],
    generator: Generator,
) -> tuple[Network, Card]:
    """Build the network that the params ask for, with its card.

    Its weights are drawn from the generator, but for those of a pretrained backbone; statistics: mean and standard
    deviation of each channel, 0 to 255, by which a network without a backbone normalises.
    """
    mirror(Path(params.weights))  # for any network: DVC hashes them
    card = make_card(params, size=size, channels=channels, classes=classes)
    network = build(card, mean=statistics[0], deviation=statistics[1], generator=generator)
    initialize(network.layers, generator)
    if len(network.backbone) and params.pretrained:
        resize, backbone = network.backbone
        assert isinstance(resize, Resize)
        weights = backbones.pretrained_weights(params, backbone, channels=channels, size=resize.size[0])
        backbone.load_state_dict(weights)
        card = replace(card, weights=hashlib.sha256(pack(weights)).hexdigest())
    return network, card


def make_card(params: Model, *, size: int, channels: int, classes: list[str]) -> Card:
    """Describe the network that the params ask for."""
    return Card(
        network=params.name,
        widths=list(params.widths),
        depth=params.depth,
        dropout=params.dropout,
        head=list(params.head),
        input_size=params.input_size,
        size=size,
        channels=channels,
        classes=classes,
    )


def initialize(network: nn.Module, generator: Generator) -> None:
    """Draw the initial weights from the generator, as torch's own layers do: uniform within 1/sqrt(fan-in)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def count_parameters(network: nn.Module) -> int:
    """Count the trained numbers."""
    return sum(parameter.numel() for parameter in network.parameters())


def pack(state: dict[str, Tensor], card: Card | None = None) -> bytes:
    """Pack tensors, and a card, as the bytes of a safetensors file, the same for the same tensors.

    The card is one string under one key, since safetensors writes several keys in random order.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(
        tensors, metadata={"card": json.dumps(asdict(card), sort_keys=True, ensure_ascii=False)} if card else None
    )


def load(path: Path) -> tuple[Network, Card]:
    """Load a network, in evaluation mode, with its card. Raises PipelineError where the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            card = Card(**json.loads(file.metadata()["card"]))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = build(card, mean=[0.0] * card.channels, deviation=[1.0] * card.channels)
        network.load_state_dict(state)
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing; `dvc repro train` makes it") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise PipelineError(f"{path} is no model of this pipeline ({reason}); `dvc repro -f train` makes it") from None
    return network.eval(), card
