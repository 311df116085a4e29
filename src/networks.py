"""The networks, as lists that one can read. Adding one is a function here and its name in NETWORKS.

Every network takes uint8 pixels as prepared, (N, S, S, C), and gives logits, (N, classes): normalisation is its first
layer, so that training, evaluation and deployment share one contract.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn

from src.params import Model
from src.runtime import PipelineError


@dataclass(frozen=True)
class Card:
    """What has to be known to build a network again; kept in the model file."""

    network: str
    dropout: float
    size: int
    channels: int
    classes: list[str]


def article(*, size: int, channels: int, classes: int, dropout: float) -> list[nn.Module]:
    """The Animals-10 tutorial's network: 2,232,554 parameters at 128 px, RGB and 10 classes."""
    _needs(size >= 32, "article", size, "at least 32, since it halves the image five times")
    widths = [channels, 16, 32, 64, 128, 256]
    # The tutorial pools after the ReLU. The two commute; pooled first, the ReLU touches a quarter of the memory.
    blocks = [[nn.Conv2d(narrow, wide, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()] for narrow, wide in pairwise(widths)]
    return [
        *(layer for block in blocks for layer in block),
        nn.Flatten(),
        Dropout(dropout),
        nn.Linear(256 * (size // 32) ** 2, 448),
        nn.ReLU(),
        nn.Linear(448, classes),
    ]


def keras_mnist(*, size: int, channels: int, classes: int, dropout: float) -> list[nn.Module]:
    """The Keras MNIST tutorial's network: 225,034 parameters at 28 px, gray and 10 classes."""
    _needs(size >= 10, "keras_mnist", size, "at least 10")
    side = ((size - 2) // 2 - 2) // 2
    return [
        nn.Conv2d(channels, 32, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        Dropout(dropout),
        nn.Linear(64 * side**2, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    ]


NETWORKS: dict[str, Callable[..., list[nn.Module]]] = {"article": article, "keras_mnist": keras_mnist}


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


class Network(nn.Module):
    """Pixels in, logits out: normalisation, then the layers in their order."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: Sequence[nn.Module], *, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32).view(1, -1, 1, 1))
        self.layers = nn.ModuleList(layers)

    def forward(self, pixels: Tensor, generator: Generator | None = None) -> Tensor:
        """Give the logits, (N, classes), of uint8 pixels, (N, S, S, C); dropout draws from `generator` in training."""
        # Seen as (N, C, S, S), this memory is what torch calls channels_last: nothing is copied.
        features = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.deviation
        for layer in self.layers:
            features = layer(features, generator) if isinstance(layer, Dropout) else layer(features)
        return features


def build(card: Card, *, mean: Sequence[float], deviation: Sequence[float]) -> Network:
    """Build a network with weights yet to be drawn or loaded. Raises PipelineError for an unknown name."""
    if card.network not in NETWORKS:
        raise PipelineError(f"model.name is {card.network!r}, expected one of {', '.join(NETWORKS)}")
    layers = NETWORKS[card.network](
        size=card.size, channels=card.channels, classes=len(card.classes), dropout=card.dropout
    )
    return Network(layers, mean=mean, deviation=deviation)


def start(card: Card, mean: Sequence[float], deviation: Sequence[float], generator: Generator) -> Network:
    """Build a network with weights drawn from the generator."""
    network = build(card, mean=mean, deviation=deviation)
    initialize(network, generator)
    return network


def make_card(params: Model, *, size: int, channels: int, classes: list[str]) -> Card:
    """Describe the network that the params ask for."""
    return Card(network=params.name, dropout=params.dropout, size=size, channels=channels, classes=classes)


def initialize(network: Network, generator: Generator) -> None:
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


def _needs(fulfilled: bool, name: str, size: int, expected: str) -> None:
    if not fulfilled:
        raise PipelineError(f"prepare.size is {size}, but {name} expects {expected}")
