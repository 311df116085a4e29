"""Backbones bring their weights, normalisation and size; frozen they do not move, and no chance is hidden."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from src import paths, yaml12
from src.backbones import layer_groups, make_backbone
from src.batches import Dataset, Table, count_steps, read_dataset
from src.checkpoints import open_store
from src.environment import settle
from src.networks import Card, Dropout, Network, Resize, load, pack, start
from src.optimizers import make_optimizer
from src.params import Params
from src.runtime import PipelineError
from src.training import Trainer, fit_from, make_fabric
from stages import evaluate as evaluate_stage
from stages import train as train_stage
from tests.helpers import ROOT, crops, encode, environment, shared, zip_of
from tests.project import clone, stages_run

# timm's own tiny backbones: a convolutional one, and a transformer that is made for one size of images.
RESNET, VIT = "timm/test_resnet", "timm/test_vit"
CLASSES = ["china", "flower", "hopper"]
CPU = torch.device("cpu")

SMALL: dict[str, dict[str, Any]] = {
    "model": {"name": RESNET, "input_size": 32, "pretrained": False},
    "train": {"epochs": 2, "batch": 10, "threads": 1, "freeze": 1, "snapshot_every": 0, "checkpoint_minutes": 0.0},
    "augment": {"shift": 0},
}
AUGMENTED = {"flip": True, "shift": 2, "crop": 0.5, "jitter": 0.2}


def settings(**sections: dict[str, Any]) -> Params:
    """The default params with a tiny backbone, its head trained first, and with changes on top."""
    values = yaml12.read(ROOT / "params.yaml")
    for section in ("model", "train"):
        values[section] |= SMALL[section] | sections.get(section, {})
    values["train"]["augment"] |= SMALL["augment"] | sections.get("augment", {})
    return Params.model_validate(values)


def save_params(params: Params) -> None:
    paths.PARAMS.write_text(yaml12.dump(params.model_dump()), encoding="utf-8")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with 48 parts of three photographs, prepared at 32 px and split."""
    monkeypatch.chdir(tmp_path)
    paths.IMAGES.parent.mkdir()
    images = [np.asarray(crop.resize((32, 32))) for crop in crops(48)]
    np.save(paths.IMAGES, np.stack(images))
    splits = ["train"] * 30 + ["validation"] * 9 + ["test"] * 9
    labels = [CLASSES[number % 3] for number in range(48)]
    places = {"path": [f"{number}.png" for number in range(48)], "label": labels, "split": splits, "group": range(48)}
    pd.DataFrame(places).to_csv(paths.SPLIT, index=False)
    save_params(settings())
    settle(settings().train)
    return tmp_path


def begun(params: Params, *, seed: int = 0, channels: int = 3, size: int = 32) -> tuple[Network, Card]:
    plain = ([0.0] * channels, [1.0] * channels)
    return start(params.model, size, channels, CLASSES, plain, Generator().manual_seed(seed))


def tables(data: Dataset) -> tuple[Table, Table]:
    return data.table("train", CPU), data.table("validation", CPU)


def make_weights(file: Path, name: str = RESNET, *, seed: int = 5, classes: int = 1000) -> dict[str, Tensor]:
    """Write weights made on the spot, such as the hub would give, and return them."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = timm.create_model(name.removeprefix("timm/"), num_classes=classes).state_dict()
    for key, value in state.items():
        if key.endswith("running_mean"):
            value += 0.01
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)
    return dict(state)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the network


def test_the_normalisation_is_the_backbones_own() -> None:
    network, _ = begun(settings(model={"name": "timm/test_efficientnet"}))
    assert network.mean.flatten().tolist() == pytest.approx([255 * x for x in (0.485, 0.456, 0.406)])
    assert network.deviation.flatten().tolist() == pytest.approx([255 * x for x in (0.229, 0.224, 0.225)])


def test_the_size_is_the_backbones_own_unless_params_say_another() -> None:
    for asked, expected in ((0, 160), (48, 48)):
        network, _ = begun(settings(model={"input_size": asked}))
        resized = network.backbone[0](torch.zeros(1, 3, 32, 32))
        assert resized.shape == (1, 3, expected, expected)


def test_resizing_is_antialiased_and_leaves_alone_what_fits() -> None:
    photo = torch.from_numpy(np.array(crops(1)[0].resize((96, 96)))).permute(2, 0, 1)[None].float()
    assert Resize(96)(photo) is photo
    small = Resize(24)(photo).round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    pillow = np.asarray(crops(1)[0].resize((96, 96)).resize((24, 24), Image.Resampling.BILINEAR))
    assert np.abs(small.astype(int) - pillow).max() <= 1


def test_the_head_has_the_widths_asked_for() -> None:
    network, _ = begun(settings(model={"head": [40, 20], "dropout": 0.5}))
    kinds = [Dropout, nn.Linear, nn.ReLU, Dropout, nn.Linear, nn.ReLU, Dropout, nn.Linear]
    assert [type(layer) for layer in network.layers] == kinds
    widths = [(layer.in_features, layer.out_features) for layer in network.layers if isinstance(layer, nn.Linear)]
    assert widths == [(96, 40), (40, 20), (20, 3)]


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", VIT, "timm/test_convnext"])
def test_the_head_fits_every_kind_of_backbone(name: str) -> None:
    network, card = begun(settings(model={"name": name, "input_size": 32 if name == VIT else 64}))
    assert network.eval()(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, len(card.classes))


def test_a_transformer_of_fixed_size_takes_its_own_and_others() -> None:
    for asked in (0, 64):
        network, _ = begun(settings(model={"name": "timm/vit_tiny_patch16_224", "input_size": asked}))
        assert network.eval()(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 3)


def test_gray_images_have_the_mean_of_the_three_normalisations() -> None:
    network, card = begun(settings(model={"name": "timm/test_efficientnet"}), channels=1)
    assert network.mean.tolist() == [[[[pytest.approx(255 * (0.485 + 0.456 + 0.406) / 3)]]]]
    assert network.eval()(torch.zeros(2, 32, 32, 1, dtype=torch.uint8)).shape == (2, 3)
    assert card.channels == 1


def test_weights_come_from_the_generator_and_no_global_chance_is_moved(here: Path) -> None:
    make_weights(here / "data/weights/test_resnet.safetensors")
    state = torch.get_rng_state()
    one, same_seed, other = (copied(begun(settings(), seed=seed)[0]) for seed in (1, 1, 2))
    begun(settings(model={"pretrained": True}))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert same(one, same_seed)
    assert same(one, copied(begun(settings(), seed=1)[0]))
    assert not torch.equal(one["backbone.1.conv1.0.weight"], other["backbone.1.conv1.0.weight"])
    assert not torch.equal(one["layers.1.weight"], other["layers.1.weight"])


@pytest.mark.parametrize("name", ["timm/repghostnet_050", "timm/tiny_vit_5m_224"])
def test_a_backbones_own_dropout_and_stochastic_depth_are_off(name: str) -> None:
    backbone = make_backbone(name, channels=3, size=64).module.train()
    state, images = torch.get_rng_state(), torch.rand(4, 3, 64, 64, generator=Generator().manual_seed(0))
    assert torch.equal(backbone(images), backbone(images))
    assert torch.equal(state, torch.get_rng_state())


# --- weights


@pytest.mark.parametrize("classes", [1000, 7, 0], ids=["as on the hub", "of one's own", "without a classifier"])
@pytest.mark.parametrize("name", [RESNET, VIT])
def test_weights_come_from_a_folder_or_a_file(here: Path, name: str, classes: int) -> None:
    known = name.removeprefix("timm/")
    state = make_weights(here / f"data/weights/{known}.safetensors", name, classes=classes)
    size = 160 if name == VIT else 32  # at another size, timm interpolates a transformer's places
    for weights in ("data/weights", str(here / f"data/weights/{known}.safetensors")):
        model = {"name": name, "pretrained": True, "weights": weights, "input_size": size}
        network, card = begun(settings(model=model))
        backbone = network.backbone[-1].state_dict()
        assert same(backbone, {key: state[key] for key in backbone})
        assert card.weights == hashlib.sha256(pack(backbone)).hexdigest()
    assert begun(settings(model={"name": name}))[1].weights == ""


def test_a_transformers_weights_fit_another_size(here: Path) -> None:
    state = make_weights(here / "data/weights/test_vit.safetensors", VIT)
    network, _ = begun(settings(model={"name": VIT, "pretrained": True, "input_size": 64}))
    backbone = network.backbone[-1].state_dict()
    assert torch.equal(backbone["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert backbone["pos_embed"].shape != state["pos_embed"].shape


def test_weights_of_another_file_make_another_card(here: Path) -> None:
    file = here / "data/weights/test_resnet.safetensors"
    found = []
    for seed in (1, 1, 2):
        make_weights(file, seed=seed)
        found.append(begun(settings(model={"pretrained": True}))[1].weights)
    assert found[0] == found[1] != found[2]


def test_gray_images_see_the_sum_of_the_colours_weights(here: Path) -> None:
    state = make_weights(here / "data/weights/test_resnet.safetensors")
    network, _ = begun(settings(model={"pretrained": True}), channels=1)
    first = network.backbone[-1].get_parameter("conv1.0.weight")
    theirs = state["conv1.0.weight"]
    assert torch.allclose(first, theirs.sum(1, keepdim=True), atol=1e-6)


def wrong_network(file: Path) -> None:
    make_weights(file, "timm/test_efficientnet")


def half_the_layers(file: Path) -> None:
    state = make_weights(file)
    save_file({key: value for key, value in state.items() if "layer4" not in key}, file)


def cut_off(file: Path) -> None:
    make_weights(file)
    file.write_bytes(file.read_bytes()[:5000])


def no_tensors(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"<!doctype html><title>Log in</title>")


@pytest.mark.parametrize("broken", [wrong_network, half_the_layers, cut_off, no_tensors])
def test_a_file_of_other_weights_is_named(here: Path, broken: Callable[[Path], None]) -> None:
    file = here / "data/weights/test_resnet.safetensors"
    broken(file)
    with pytest.raises(PipelineError, match=r"^data/weights/test_resnet.safetensors does not hold the weights of timm"):
        begun(settings(model={"pretrained": True}))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "timm/resnet50.tv9_in1k"}, "timm knows no such weights; it knows .*resnet50.tv2_in1k"),
        ({"pretrained": True, "weights": "none.safetensors"}, "model.weights is none.safetensors, but there is no"),
        ({"name": VIT, "input_size": 50}, "timm/test_vit takes no images of 3 x 50 x 50"),
    ],
)
def test_a_mistake_is_one_sentence(model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PipelineError, match=sentence) as raised:
        begun(settings(model=model))
    assert "\n" not in str(raised.value)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_weights_in_the_hubs_cache_need_no_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "hub/models--timm--test_resnet.r160_in1k"
    state = make_weights(folder / "snapshots/1234/model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    network, _ = begun(settings(model={"pretrained": True}))
    assert torch.equal(network.backbone[-1].state_dict()["bn1.weight"], state["bn1.weight"])
    other = make_weights(here / "data/weights/test_resnet.safetensors", seed=9)  # a file of one's own goes before
    network, _ = begun(settings(model={"pretrained": True}))
    backbone = network.backbone[-1].state_dict()
    assert same(backbone, {key: other[key] for key in backbone})


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a proxy that takes calls and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "silent", "offline"])
def test_without_network_and_weights_one_sentence_says_which_file_to_put_where(
    here: Path, silent: str, kind: str
) -> None:
    proxy = {"refused": "http://127.0.0.1:9", "silent": silent, "offline": silent}[kind]
    env = environment() | dict.fromkeys(["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"], proxy)
    env |= {"NO_PROXY": "", "no_proxy": "", "HF_HOME": str(here / "home"), "HF_HUB_ETAG_TIMEOUT": "3"}
    env["HF_HUB_OFFLINE"] = "1" if kind == "offline" else "0"
    code = (
        "import sys, time; from src import backbones, runtime; begun = time.monotonic()\n"
        "from src.params import load_params; from src.networks import start; from torch import Generator\n"
        "sys.argv[0] = 'stages/train.py'\n"
        "import timm, huggingface_hub; begun = time.monotonic()\n"
        "try:\n with runtime.in_one_sentence():\n"
        "  start(load_params().model, 32, 3, ['a', 'b'], ([0], [1]), Generator())\n"
        "finally: print(time.monotonic() - begun)"
    )
    save_params(settings(model={"pretrained": True}))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("train: the weights of timm/test_resnet are neither in data/weights/test_resnet.safe")
    for words in (
        "fetch https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors and save it as "
        "data/weights/test_resnet.safetensors",
        "or set model.pretrained: false",
    ):
        assert words in done.stderr
    assert float(done.stdout) < 30  # seconds; huggingface_hub itself tries for a minute and more


@pytest.mark.usefixtures("no_network")
def test_what_was_trained_needs_neither_weights_nor_network_nor_hub(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_weights(here / "data/weights/test_resnet.safetensors")
    save_params(settings(model={"pretrained": True}))
    train_stage.main()
    shutil.rmtree(here / "data/weights")
    monkeypatch.setattr("src.backbones.pretrained_weights", None)
    network, card = load(paths.MODEL)
    assert (len(card.weights), network.training) == (64, False)
    evaluate_stage.main()
    assert paths.TEST_METRICS.exists()


def test_timm_is_loaded_only_for_a_backbone() -> None:
    code = (
        "import sys, stages.train, stages.evaluate; from src.params import load_params; from torch import Generator\n"
        "from src.networks import start; from src.optimizers import make_optimizer\n"
        "network, _ = start(load_params().model, 28, 1, ['0', '1'], ([0], [1]), Generator())\n"
        "make_optimizer(network, load_params().train, fused=True)\n"
        "print({'timm', 'huggingface_hub', 'torchvision'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_weights_that_change_or_appear_during_a_run_are_recorded_nowhere(
    here: Path, monkeypatch: pytest.MonkeyPatch, sentence_of: Callable[[Callable[[], None]], str]
) -> None:
    file = here / "data/weights/test_resnet.safetensors"
    make_weights(file)
    save_params(settings(model={"pretrained": True}))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "stages/train.py")])
    shutil.copy(ROOT / "dvc.yaml", here)
    real = train_stage.fit_from

    def meanwhile(*args: Any) -> Any:
        make_weights(file, seed=8, classes=9)
        return real(*args)

    monkeypatch.setattr(train_stage, "fit_from", meanwhile)
    monkeypatch.setattr("src.training.report_few", lambda *_: None)
    assert "data/weights/test_resnet.safetensors changed during the run" in sentence_of(train_stage.main)
    assert not paths.MODEL.exists()


# --- freezing


def fitted(params: Params, *, stop: int = 10**9) -> dict[str, bytes]:
    """Train as the stage does, from where it stands, to the end or `stop` checkpoints on; give what it comes to."""
    data = read_dataset()
    train, validation = tables(data)
    network, card = begun(params)
    steps = count_steps(len(train), params.train.batch)
    with open_store(params.train, steps, {}) as store:
        saved, save = 0, store.save

        def counted(*args: Any, **values: Any) -> None:
            nonlocal saved
            save(*args, **values)
            store.wait()
            saved += 1
            if saved == stop:
                raise KeyboardInterrupt

        store.save = counted  # type: ignore[method-assign]
        trainer = Trainer(network, params.train, make_fabric(params.train))
        with suppress(KeyboardInterrupt):
            records = list(fit_from(store, trainer, train, validation, card))
            return {name: store.read(tensors) for name, tensors in store.outputs.items()} | {
                "records": repr(records).encode(),
                "last": pack(trainer.judged.state_dict()),
                "rest": pack(trainer.state()),
            }
    return {}


WAYS: list[dict[str, dict[str, Any]]] = [
    {},
    {"augment": AUGMENTED},
    {
        "model": {"dropout": 0.3, "head": [8]},
        "train": {"ema": 0.9, "optimizer": "sgd", "layer_decay": 0.7, "clip": 1.0},
    },
    {"model": {"name": VIT}, "train": {"optimizer": "adamw", "weight_decay": 0.1}},
]


@pytest.mark.parametrize("way", WAYS, ids=["features", "augmented", "averaged", "transformer"])
def test_a_kill_anywhere_costs_no_byte_also_between_frozen_and_free(here: Path, way: dict[str, dict[str, Any]]) -> None:
    params = settings(**way, **({} if "train" in way else {"train": {}}))
    values = params.train.model_dump() | {"epochs": 3, "checkpoint_minutes": 1e-9}
    params = params.model_copy(update={"train": type(params.train).model_validate(values)})
    whole = fitted(params)
    shutil.rmtree(here / ".resume")
    torch.manual_seed(1)
    assert fitted(params) == whole
    # 3 steps an epoch: within the frozen epoch, at its end, within the first free one, at its end, within the last.
    for stop in (2, 3, 4, 6, 8):
        shutil.rmtree(here / ".resume")
        assert fitted(params, stop=stop) == {}
        assert fitted(params) == whole


@pytest.mark.parametrize("augment", [{}, AUGMENTED], ids=["features", "augmented"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_frozen_does_not_move_by_a_bit_and_what_is_free_does(
    augment: dict[str, Any], optimizer: str, ema: float
) -> None:
    train = {"optimizer": optimizer, "weight_decay": 0.1, "ema": ema, "epochs": 1}
    params = settings(train=train, augment=augment)
    network, _ = begun(params)
    trainer = Trainer(network, params.train, make_fabric(params.train))
    before, head = copied(network.backbone), copied(network.layers)
    data = read_dataset()
    list(trainer.fit(*tables(data)))
    assert same(copied(trainer.judged.backbone), before)
    assert same(copied(network.backbone), before)
    assert not any(torch.equal(value, head[name]) for name, value in network.layers.state_dict().items())

    free = settings(train=train | {"freeze": 0}, augment=augment)
    network, _ = begun(free)
    list(Trainer(network, free.train, make_fabric(free.train)).fit(*tables(data)))
    moved = {name for name, value in network.backbone.state_dict().items() if not torch.equal(value, before[name])}
    # Some branches begin as zero, so that what lies before them moves later.
    assert {"1.conv1.0.weight", "1.layer4.0.bn2.weight", "1.layer4.0.bn2.running_mean"} <= moved


@pytest.mark.parametrize(
    ("augment", "seen"),
    [({}, [30 + 9, 0, 0, 30 + 9]), (AUGMENTED, [9 + 30, 30, 30, 30 + 9])],
    ids=["features", "augmented"],
)
def test_features_are_computed_once_and_anew_only_where_images_change(augment: dict[str, Any], seen: list[int]) -> None:
    params = settings(train={"epochs": 4, "freeze": 3}, augment=augment)
    network, _ = begun(params)
    trainer = Trainer(network, params.train, make_fabric(params.train))
    counts = [0]
    network.backbone[-1].register_forward_pre_hook(lambda _, given: counts.append(counts.pop() + len(given[0])))
    for progress in trainer.fit(*tables(read_dataset())):
        assert progress.record
        counts.append(0)
    assert counts[:-1] == seen


def test_features_and_pixels_train_the_same_head() -> None:
    """A shift of 0 pixels, asked for as augmentation, has the images seen anew; the weights agree up to rounding."""
    heads = []
    for augment in ({}, {"jitter": 1e-9}):
        params = settings(train={"epochs": 1, "lr": 0.01, "optimizer": "sgd"}, augment=augment)
        network, _ = begun(params)
        list(Trainer(network, params.train, make_fabric(params.train)).fit(*tables(read_dataset())))
        heads.append(network.layers.state_dict()["1.weight"])
    assert torch.allclose(heads[0], heads[1], atol=1e-5)


def test_weights_that_timm_fixes_for_good_stay_fixed() -> None:
    params = settings(train={"epochs": 2})
    network, _ = begun(params)
    network.backbone[-1].get_parameter("bn1.weight").requires_grad_(False)
    before = copied(network)["backbone.1.bn1.weight"]
    trainer = Trainer(network, params.train, make_fabric(params.train))
    list(trainer.fit(*tables(read_dataset())))
    assert torch.equal(network.state_dict()["backbone.1.bn1.weight"], before)
    assert network.backbone[-1].get_parameter("bn1.weight").grad is None


def test_earlier_layers_have_smaller_rates_and_the_head_the_whole() -> None:
    params = settings(train={"layer_decay": 0.5, "weight_decay": 0.1})
    network, _ = begun(params)
    optimizer = make_optimizer(network, params.train, fused=True)
    scales = {one: group["lr_scale"] for group in optimizer.param_groups for one in group["params"]}
    assert scales.keys() == {*network.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(scales)
    names = {name: scales[one] for name, one in network.backbone[-1].named_parameters()}
    depth = [
        next(scale for name, scale in names.items() if name.startswith(f"layer{layer}.0.")) for layer in (1, 2, 3, 4)
    ]
    assert names["bn1.weight"] < depth[0]
    assert depth == [0.0625, 0.125, 0.25, 0.5]
    assert {scales[one] for one in network.layers.parameters()} == {1.0}
    decays = {one: group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert all(decays[one] == (0.1 if one.ndim > 1 else 0.0) for one in decays)
    groups = layer_groups(network.backbone[-1], weight_decay=0.0, layer_decay=1.0)
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_each_step_is_taken_at_the_rate_of_its_layer() -> None:
    params = settings(train={"layer_decay": 0.5, "freeze": 0, "epochs": 1, "lr": 0.01, "batch": 30})
    network, _ = begun(params)
    with torch.no_grad():  # timm has the branches begin as zero, which gives what lies before them no gradient
        for name, one in network.backbone.named_parameters():
            one += 0.5 if "bn" in name and name.endswith("weight") else 0.0
    before = copied(network)
    list(Trainer(network, params.train, make_fabric(params.train)).fit(*tables(read_dataset())))
    after = network.state_dict()
    # Adam's first step moves each weight with a gradient by the learning rate.
    moved = {name: float((after[name] - before[name]).abs().max()) for name, _ in network.named_parameters()}
    assert moved["layers.1.weight"] == pytest.approx(0.01, rel=0.01)
    assert moved["backbone.1.layer4.0.conv1.weight"] == pytest.approx(0.005, rel=0.01)
    assert moved["backbone.1.layer1.0.conv1.weight"] == pytest.approx(0.000625, rel=0.01)


# --- the whole pipeline


def photographs(folder: Path, broken: int = 0) -> Path:
    """A zip in the layout of Kaggle's cats and dogs, of parts of photographs, some of them broken."""
    files = [
        (f"PetImages/{'Cat' if number % 3 else 'Dog'}/{number}.jpg", encode(crop, "JPEG"))
        for number, crop in enumerate(crops(36))
    ]
    return zip_of(folder / "photos.zip", [*files, *((f"PetImages/Cat/b{n}.jpg", b"") for n in range(broken))])


def lock_of(text: str) -> dict[str, str]:
    return {dep["path"]: dep["md5"] for dep in yaml12.parse(text)["stages"]["train"]["deps"]}


def test_dvc_reruns_training_for_other_weights_and_finds_them_in_temporary_runs(tmp_path: Path) -> None:
    project = clone(tmp_path / "project")
    archive = photographs(tmp_path)
    project.set(download__source="folder", download__path=str(archive), prepare__image_size=32, prepare__channels=3)
    project.set(model__name=RESNET, model__input_size=32, model__pretrained=True)
    project.set(train__epochs=2, train__freeze=1, train__batch=16, train__threads=1)
    file = project.folder / "data/weights/test_resnet.safetensors"
    make_weights(file)
    project.commit()
    project.dvc("exp", "run", "--temp", "--name", "aside", "plot")
    (reference,) = project.git("for-each-ref", "--format=%(refname)", "refs/exps/**/aside").split()
    aside = project.git("show", f"{reference}:dvc.lock")
    assert "train" not in stages_run(project.dvc("repro", "plot"))  # out of the run cache: the same hashes
    here = lock_of((project.folder / "dvc.lock").read_text(encoding="utf-8"))
    assert lock_of(aside) == here
    assert here["data/weights"].endswith(".dir")
    assert len(load(project.folder / paths.MODEL)[1].weights) == 64
    make_weights(file, seed=6)
    output = project.dvc("repro", "train")
    assert stages_run(output)[0] == "train"
    assert lock_of((project.folder / "dvc.lock").read_text(encoding="utf-8"))["data/weights"] != here["data/weights"]


def test_the_recipe_of_cats_and_dogs_runs_through(tmp_path: Path) -> None:
    project = clone(tmp_path / "project")
    shutil.copy(project.folder / "recipes/dogs-vs-cats.yaml", project.folder / "params.yaml")
    project.set(download__source="folder", download__path=str(photographs(tmp_path, broken=4)), prepare__image_size=64)
    project.set(model__input_size=64, train__epochs=2, train__freeze=1, train__warmup=0, train__batch=16)
    project.set(train__threads=1)
    state = make_weights(project.folder / "data/weights/resnet50.tv2_in1k.safetensors", "timm/resnet50.tv2_in1k")
    output = project.dvc("repro")
    assert stages_run(output) == ["download", "prepare", "split", "train", "evaluate", "plot", "export"]
    network, card = load(project.folder / paths.MODEL)
    assert (card.network, card.head, len(card.weights)) == ("timm/resnet50.tv2_in1k", [512], 64)
    assert network.backbone[-1].state_dict().keys() == {key for key in state if not key.startswith("fc.")}
    assert {"macro_precision", "macro_recall", "macro_f1"} <= project.json("metrics/evaluation.json").keys()


@pytest.mark.skipif(not os.environ.get("FULL"), reason="minutes; `make real` runs it")
def test_real_weights_tell_cats_from_dogs(tmp_path: Path) -> None:
    weights = ROOT.parent / "shared/weights/tf_efficientnet_lite0.safetensors"
    archive = shared("dogs-vs-cats-1000.zip")
    project = clone(tmp_path / "project")
    project.set(download__source="folder", download__path=str(archive), prepare__image_size=224, prepare__channels=3)
    project.set(model__name="timm/tf_efficientnet_lite0", model__weights=str(weights), train__freeze=20)
    began = time.monotonic()
    project.dvc("repro")
    assert project.json("metrics/test.json")["accuracy"] > 0.97
    assert time.monotonic() - began < 600
    with safe_open(project.folder / paths.MODEL, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    real = load_file(weights)
    assert torch.equal(kept["backbone.1.conv_stem.weight"], real["conv_stem.weight"])
