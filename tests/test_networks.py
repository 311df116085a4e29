"""The networks are the tutorials', their chance comes from generators alone, and a model file describes itself."""

import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Generator, Tensor, nn

from src.networks import (
    Card,
    Dropout,
    Head,
    Network,
    Residual,
    build,
    count_parameters,
    initialize,
    load,
    make_card,
    pack,
    start,
)
from src.params import load_params
from src.runtime import PipelineError
from tests.helpers import ROOT

ARTICLE = Card(
    network="article",
    widths=[8, 16, 32],
    depth=1,
    dropout=0.0,
    head=[],
    input_size=0,
    size=128,
    channels=3,
    classes=list("abcdefghij"),
)
MNIST = replace(ARTICLE, network="keras_mnist", size=28, channels=1, classes=list("0123456789"))
RESIDUAL = replace(ARTICLE, network="residual", size=32)
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


@pytest.mark.parametrize("card", [replace(ARTICLE, size=32), MNIST, RESIDUAL], ids=["article", "mnist", "residual"])
def test_pixels_are_uint8_with_their_channels_last_and_nothing_else(card: Card) -> None:
    network, given = make(card).eval(), pixels(card)
    with torch.inference_mode():
        features = network.forward_features(given)
        assert torch.equal(network.forward_head(features), network(given))
        assert torch.equal(Head(network)(features), network(given))
    first, floats = given.permute(0, 3, 1, 2), features.permute(0, 2, 3, 1)
    for wrong in (features, floats, given.float(), given.long(), first, first.float() / 255):
        for call in (network, network.forward_features):
            with pytest.raises(TypeError, match=rf"expected uint8 pixels, \(N, S, S, {card.channels}\), found torch\."):
                call(wrong)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (replace(ARTICLE, size=31), "the images have 31 px, but article expects at least 32"),
        (replace(MNIST, size=9), "the images have 9 px, but keras_mnist expects at least 10"),
        (replace(RESIDUAL, size=15), "the images have 15 px, but residual expects at least 16"),
    ],
    ids=["article", "keras_mnist", "residual"],
)
def test_a_network_that_cannot_be_built_is_one_sentence(card: Card, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        make(card)


@pytest.mark.parametrize(
    "card",
    [replace(ARTICLE, size=32), replace(MNIST, size=10), replace(RESIDUAL, size=16)],
    ids=["article", "keras_mnist", "residual"],
)
def test_the_smallest_images_and_two_classes_are_enough(card: Card) -> None:
    assert make(replace(card, classes=["a", "b"]))(pixels(card)).shape == (4, 2)


def test_a_card_says_what_the_params_ask_for() -> None:
    asked = {"name": "article", "widths": [12], "depth": 3, "dropout": 0.3, "head": [7], "input_size": 96}
    params = load_params().model.model_copy(update=asked)
    card = make_card(params, size=64, channels=3, classes=["b", "a"])
    shape = {"size": 64, "channels": 3, "classes": ["b", "a"]}
    assert card == Card(
        network="article", widths=[12], depth=3, dropout=0.3, head=[7], input_size=96, **shape, weights=""
    )
    (dropout,) = (layer for layer in make(card).layers if isinstance(layer, Dropout))
    assert dropout.share == 0.3


# --- the residual network


def test_the_residual_network_halves_the_image_in_each_stage() -> None:
    card = replace(RESIDUAL, size=32, widths=[16, 32, 64], depth=2)
    stages = [
        (kind, (wide if kind == "Residual" else narrow, side, side))
        for narrow, wide, side in ((8, 16, 16), (16, 32, 8), (32, 64, 4))
        for kind in ("AvgPool2d", "Residual", "Residual")
    ]
    stem = [(kind, (8, 32, 32)) for kind in ("Conv2d", "BatchNorm2d", "ReLU")]
    assert shapes(make(card), card) == [*stem, *stages, ("Mean", (64,)), ("Dropout", (64,)), ("Linear", (10,))]


@pytest.mark.parametrize(
    ("widths", "depth", "channels"),
    [([8, 16, 32], 1, 3), ([64, 128, 192, 256], 1, 3), ([16, 24], 3, 1), ([10, 10], 2, 3)],
)
def test_widths_and_depth_give_the_number_of_its_parameters(widths: list[int], depth: int, channels: int) -> None:
    def block(narrow: int, wide: int) -> int:
        shortcut = narrow * wide + 2 * wide if narrow != wide else 0
        excitation = 2 * wide * -(-wide // 8) + wide + -(-wide // 8)
        return 9 * narrow * wide + 9 * wide * wide + 4 * wide + excitation + shortcut

    stem = widths[0] // 2
    expected = 9 * channels * stem + 2 * stem + widths[-1] * 10 + 10
    for narrow, wide in pairwise([stem, *widths]):
        expected += block(narrow, wide) + (depth - 1) * block(wide, wide)
    assert count_parameters(make(replace(RESIDUAL, widths=widths, depth=depth, channels=channels))) == expected


@pytest.mark.parametrize("size", [16, 17, 28, 31, 64, 128, 256])
def test_the_residual_network_takes_images_of_any_size(size: int) -> None:
    card = replace(RESIDUAL, size=size)
    network = make(card).train()
    logits = network(pixels(card))
    assert logits.shape == (4, 10)
    logits.sum().backward()
    assert torch.isfinite(network.eval()(pixels(card))).all()


def multiplications(size: int) -> int:
    card, found = replace(RESIDUAL, size=size), [0]
    network = make(card).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda conv, _, out: found.append(out.numel() * conv.weight[0].numel()))
    network(pixels(card, 1))
    return sum(found)


def test_larger_images_cost_about_as_much_as_small_ones() -> None:
    small = multiplications(64)
    assert multiplications(128) < 1.01 * small
    # Almost four times as many just before the stem takes a longer step, and more in the stem itself after that.
    assert all(small * 0.99 < multiplications(size) < 5 * small for size in (100, 127, 191, 512))


def test_a_block_begins_as_its_shortcut() -> None:
    features = torch.rand(2, 6, 8, 8, generator=Generator().manual_seed(0))
    keeps, widens = Residual(6, 6), Residual(6, 12).eval()
    assert torch.equal(keeps(features), features)
    assert torch.equal(widens(features), widens.shortcut(features).relu())
    assert widens(features).shape == (2, 12, 8, 8)


def test_the_residual_network_knows_an_image_that_moved_by_a_pixel() -> None:
    card = replace(RESIDUAL, size=64)
    network = make(card).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(pixels(card, 16).permute(0, 3, 1, 2).float(), 4, 1, 2)[:, :, :64, :64]
    images = blurred.permute(0, 2, 3, 1).to(torch.uint8)
    logits = network(images)
    moved, other = (network(images.roll(shift, 1)) for shift in (1, 32))
    assert (moved - logits).norm() < 0.5 * (other - logits).norm()


def test_a_gradient_reaches_each_parameter_once_a_block_is_more_than_its_shortcut() -> None:
    card = replace(RESIDUAL, widths=[64, 128], depth=2)
    network = make(card).train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=Generator().manual_seed(0))
    nn.functional.cross_entropy(network(pixels(card, 8)), torch.arange(8)).backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


# --- chance


def test_a_network_starts_alike_in_any_process_whatever_was_drawn_before() -> None:
    params = load_params().model.model_copy(update={"name": "residual", "widths": [8, 16], "depth": 2, "dropout": 0.1})
    started = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn = Generator().manual_seed(7)
        network, card = start(params, 28, 1, ["a", "b"], ([33.0], [78.0]), drawn)
        started.append(pack(network.state_dict(), card))
        assert card == make_card(params, size=28, channels=1, classes=["a", "b"])
    assert started[0] == started[1]
    assert (network.mean.flatten().tolist(), network.deviation.flatten().tolist()) == ([33.0], [78.0])
    other, _ = start(params, 28, 1, ["a", "b"], ([33.0], [78.0]), Generator().manual_seed(8))
    convolutions = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    others = [layer.weight for layer in other.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(convolutions) == 1 + 2 * (3 + 2 + 2 + 2) + 1
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(convolutions, others, strict=True))
    assert all(weight.abs().max() <= 1 / math.sqrt(weight[0].numel()) for weight in convolutions)


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


@pytest.mark.parametrize("card", [MNIST, RESIDUAL], ids=["keras_mnist", "residual"])
def test_dropout_is_a_function_of_its_generator(card: Card) -> None:
    network = make(replace(card, dropout=0.5)).train()
    state = torch.get_rng_state()
    first, again, other = (network(pixels(card), Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- the model file


@pytest.mark.parametrize("kept", [SMALL, replace(RESIDUAL, depth=2, dropout=0.5)], ids=["article", "residual"])
def test_a_model_comes_back_as_it_was(tmp_path: Path, kept: Card) -> None:
    network = make(kept).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()(pixels(kept), Generator())  # which moves the statistics of normalisation
    (tmp_path / "model").write_bytes(pack(network.state_dict(), kept))
    loaded, card = load(tmp_path / "model")
    assert card == kept
    assert not loaded.training
    assert pack(loaded.state_dict(), card) == (tmp_path / "model").read_bytes()
    assert torch.allclose(loaded(pixels(kept)), network.eval()(pixels(kept)), atol=1e-6)


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
