"""The networks are the tutorials', their chance comes from generators alone, and a model file describes itself."""

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Generator, Tensor, nn

from src.networks import Card, Dropout, Network, build, count_parameters, initialize, load, make_card, pack
from src.params import load_params
from src.runtime import PipelineError
from tests.helpers import ROOT

ARTICLE = Card(network="article", dropout=0.0, size=128, channels=3, classes=list("abcdefghij"))
MNIST = Card(network="keras_mnist", dropout=0.0, size=28, channels=1, classes=list("0123456789"))
SMALL = replace(ARTICLE, size=32, classes=["été", "Größe", '象, "big"\n'])


def make(card: Card, seed: int = 0) -> Network:
    network = build(card, mean=[100.0] * card.channels, deviation=[50.0] * card.channels)
    initialize(network, Generator().manual_seed(seed))
    return network


def pixels(card: Card, count: int = 4) -> Tensor:
    shape = (count, card.size, card.size, card.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=Generator().manual_seed(0))


def shapes(network: Network, card: Card) -> list[tuple[str, tuple[int, ...]]]:
    """The kind of each layer, and the shape that one image has behind it."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for layer in network.layers:
        layer.register_forward_hook(lambda layer, _, out: seen.append((type(layer).__name__, tuple(out.shape[1:]))))
    network(pixels(card, 1))
    return seen


# --- the layers


def test_the_article_is_the_tutorials_network() -> None:
    network = make(ARTICLE)
    assert count_parameters(network) == 2_232_554
    expected: list[tuple[str, tuple[int, ...]]] = []
    for width, side in ((16, 128), (32, 64), (64, 32), (128, 16), (256, 8)):
        half = (width, side // 2, side // 2)
        expected += [("Conv2d", (width, side, side)), ("MaxPool2d", half), ("ReLU", half)]
    head = [("Flatten", (256 * 4 * 4,)), ("Dropout", (4096,)), ("Linear", (448,)), ("ReLU", (448,)), ("Linear", (10,))]
    assert shapes(network, ARTICLE) == expected + head
    convolutions = [layer for layer in network.layers if isinstance(layer, nn.Conv2d)]
    assert {(conv.kernel_size, conv.stride, conv.padding) for conv in convolutions} == {((3, 3), (1, 1), (1, 1))}


def test_keras_mnist_is_the_tutorials_network() -> None:
    network = make(MNIST)
    assert count_parameters(network) == 225_034
    assert shapes(network, MNIST) == [
        ("Conv2d", (32, 26, 26)),
        ("MaxPool2d", (32, 13, 13)),
        ("ReLU", (32, 13, 13)),
        ("Conv2d", (64, 11, 11)),
        ("MaxPool2d", (64, 5, 5)),
        ("ReLU", (64, 5, 5)),
        ("Flatten", (1600,)),
        ("Dropout", (1600,)),
        ("Linear", (128,)),
        ("ReLU", (128,)),
        ("Linear", (10,)),
    ]


@pytest.mark.parametrize("card", [replace(ARTICLE, size=70), MNIST], ids=["article", "keras_mnist"])
def test_pooling_before_the_relu_gives_the_tutorials_numbers(card: Card) -> None:
    network = make(card)
    layers = list(network.layers)
    for place in [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]:
        assert isinstance(layers[place + 1], nn.ReLU)
        layers[place], layers[place + 1] = layers[place + 1], layers[place]
    tutorial = Network(layers, mean=[100.0] * card.channels, deviation=[50.0] * card.channels)
    assert torch.equal(network.eval()(pixels(card)), tutorial.eval()(pixels(card)))


def test_pixels_are_normalized_by_the_networks_own_statistics() -> None:
    card = replace(ARTICLE, size=32)
    network = build(card, mean=[10.0, 20.0, 30.0], deviation=[1.0, 2.0, 4.0])
    seen: list[Tensor] = []
    network.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(torch.full((2, 32, 32, 3), 50, dtype=torch.uint8))
    assert seen[0][0, :, 0, 0].tolist() == [40.0, 15.0, 5.0]


def test_prepared_pixels_arrive_as_channels_last_without_being_laid_out_anew() -> None:
    network, given = make(replace(ARTICLE, size=32)), pixels(replace(ARTICLE, size=32))
    seen: list[Tensor] = []
    network.layers[0].register_forward_pre_hook(lambda _, arrived: seen.append(arrived[0]))
    logits = network(given)
    assert (logits.shape, logits.dtype) == ((4, 10), torch.float32)
    assert seen[0].shape == (4, 3, 32, 32)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (replace(ARTICLE, network="resnet"), "model.name is 'resnet', expected one of article, keras_mnist"),
        (replace(ARTICLE, size=31), "prepare.size is 31, but article expects at least 32"),
        (replace(MNIST, size=9), "prepare.size is 9, but keras_mnist expects at least 10"),
    ],
    ids=["unknown", "article", "keras_mnist"],
)
def test_a_network_that_cannot_be_built_is_one_sentence(card: Card, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        make(card)


@pytest.mark.parametrize("card", [replace(ARTICLE, size=32), replace(MNIST, size=10)], ids=["article", "keras_mnist"])
def test_the_smallest_images_and_two_classes_are_enough(card: Card) -> None:
    assert make(replace(card, classes=["a", "b"]))(pixels(card)).shape == (4, 2)


def test_a_card_says_what_the_params_ask_for() -> None:
    params = load_params().model.model_copy(update={"name": "article", "dropout": 0.3})
    card = make_card(params, size=64, channels=3, classes=["b", "a"])
    assert card == Card(network="article", dropout=0.3, size=64, channels=3, classes=["b", "a"])
    (dropout,) = (layer for layer in make(card).layers if isinstance(layer, Dropout))
    assert dropout.share == 0.3


# --- chance


def test_the_initial_weights_are_a_pure_function_of_the_generator() -> None:
    torch.manual_seed(0)
    first = pack(make(MNIST, seed=1).state_dict(), MNIST)
    torch.manual_seed(1)
    network = build(MNIST, mean=[100.0], deviation=[50.0])
    state = torch.get_rng_state()
    initialize(network, Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert pack(network.state_dict(), MNIST) == first
    assert pack(make(MNIST, seed=2).state_dict(), MNIST) != first


@pytest.mark.parametrize("card", [ARTICLE, MNIST], ids=["article", "keras_mnist"])
def test_the_initial_weights_are_distributed_as_torchs_own(card: Card) -> None:
    torchs = build(card, mean=[0.0] * card.channels, deviation=[1.0] * card.channels)  # drawn by torch when it is built
    for (name, mine), theirs in zip(make(card).named_parameters(), torchs.parameters(), strict=True):
        weight = theirs if mine.dim() > 1 else dict(torchs.named_parameters())[name.replace("bias", "weight")]
        bound = 1 / math.sqrt(weight[0].numel())
        for drawn in (mine.detach(), theirs.detach()):
            assert drawn.abs().max() <= bound
            if drawn.numel() > 1_000:
                assert drawn.abs().max() > 0.98 * bound
                assert drawn.mean().abs() < 0.1 * bound
                assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not torch.equal(mine, theirs)


def test_dropout_zeroes_its_share_and_keeps_the_expectation() -> None:
    dropped = Dropout(0.3).train()(torch.ones(1_000, 200), Generator().manual_seed(0))
    assert (dropped == 0).double().mean() == pytest.approx(0.3, abs=0.01)
    assert dropped[dropped != 0].unique().tolist() == [pytest.approx(1 / 0.7)]
    assert (dropped == 0).double().mean(0).max() < 0.4  # each feature of each image by its own coin


def test_dropout_is_off_in_evaluation_and_at_share_zero() -> None:
    ones = torch.ones(10, 10)
    assert torch.equal(Dropout(0.3).eval()(ones, None), ones)
    assert torch.equal(Dropout(0.0).train()(ones, None), ones)


def test_dropout_is_a_function_of_its_generator() -> None:
    network = make(replace(MNIST, dropout=0.5)).train()
    state = torch.get_rng_state()
    first, again, other = (network(pixels(MNIST), Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- the model file


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    network = make(SMALL).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    (tmp_path / "model").write_bytes(pack(network.state_dict(), SMALL))
    loaded, card = load(tmp_path / "model")
    assert card == SMALL
    assert not loaded.training
    assert pack(loaded.state_dict(), card) == (tmp_path / "model").read_bytes()
    assert torch.allclose(loaded(pixels(SMALL)), network.eval()(pixels(SMALL)), atol=1e-6)


def test_a_model_packs_to_the_same_bytes_in_every_process() -> None:
    script = (
        "import hashlib; from tests.test_networks import SMALL, make, pack; "
        "print(hashlib.sha256(pack(make(SMALL).state_dict(), SMALL)).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    here = [hashlib.sha256(pack(make(SMALL).state_dict(), SMALL)).hexdigest() for _ in range(5)]
    assert {*here} == {fresh.stdout.strip()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"no model at all",
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:4] + b"\xff" + whole[5:],
        lambda _: save({"mean": torch.zeros(1)}),
        lambda _: save({"mean": torch.zeros(1)}, metadata={"format": "pt"}),
        lambda _: save({"mean": torch.zeros(1)}, metadata={"card": "{}"}),
        lambda _: save({"mean": torch.zeros(1)}, metadata={"card": "no JSON"}),
        lambda _: pack(make(SMALL).state_dict(), replace(SMALL, size=64)),
        lambda _: pack(make(SMALL).state_dict(), replace(SMALL, network="keras_mnist")),
    ],
    ids="empty,text,a byte short,half,header,no card,another's card,empty card,no JSON,other size,other name".split(
        ","
    ),
)
def test_a_damaged_model_is_one_sentence(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    whole = pack(make(SMALL).state_dict(), SMALL)
    (tmp_path / "model").write_bytes(damage(whole))
    with pytest.raises(PipelineError, match="model is no model of this pipeline"):
        load(tmp_path / "model")


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="model is missing; `dvc repro train` makes it"):
        load(tmp_path / "model")
