"""The deployed file answers as the evaluated model does, for prepared images and for photographs of any size."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from src import paths
from src.batches import Table, read_dataset
from src.environment import settle
from src.evaluation import predict, probabilities
from src.export import Agreement, Deployed, Exported, agreement, answer, check, export, preprocessing, quantize
from src.images import decode
from src.networks import Card, Network, build, initialize, load
from src.params import load_params
from src.runtime import PipelineError
from stages import export as export_stage
from tests.helpers import ROOT, crops, encode, run_stage
from tests.project import Project

OUTPUTS = (paths.ONNX, paths.INT8)
TEMPERATURE = 1.7


def made(name: str, size: int = 64, channels: int = 3, **more: list[int]) -> tuple[Network, Card]:
    """A network with weights drawn, and norms as uneven as training leaves them."""
    some = {"widths": [16, 32], "head": [], "classes": ["a", "b", "c"]} | more
    input_size = size if name.startswith("timm/") else 0
    card = Card(network=name, depth=1, dropout=0.2, input_size=input_size, size=size, channels=channels, **some)
    generator = torch.Generator().manual_seed(0)
    network = build(card, mean=[120.0] * channels, deviation=[60.0] * channels, generator=generator)
    initialize(network.layers, generator)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 2, generator=generator)
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval(), card


@cache
def exported(name: str, size: int = 64, channels: int = 3, flip: bool = False) -> tuple[Network, Exported]:
    network, card = made(name, size, channels)
    return network, export(network, card, TEMPERATURE, flip=flip, metadata={"classes": card.classes})


def run(model: onnx.ModelProto, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def table_of(pixels: NDArray[np.uint8]) -> Table:
    count = torch.arange(len(pixels))
    return Table(torch.from_numpy(pixels), count, torch.zeros_like(count), 3)


def evaluated(network: Network, pixels: NDArray[np.uint8], flip: bool = False) -> NDArray[np.float64]:
    return probabilities(predict(network, table_of(pixels), batch=4, flip=flip), TEMPERATURE)


def photographs(count: int, size: int, channels: int) -> tuple[list[Image.Image], NDArray[np.uint8]]:
    """Photographs of many shapes, and the same as `prepare` sees them."""
    found = crops(count)
    return found, np.stack([decode(encode(photo), size=size, channels=channels) for photo in found])


# --- the network


@pytest.mark.parametrize(
    ("name", "size", "channels", "flip", "heated"),
    [
        ("article", 64, 3, False, (2, 2)),
        ("keras_mnist", 28, 1, False, (5, 5)),
        ("residual", 64, 3, True, (16, 16)),
        ("timm/test_resnet", 64, 3, True, (2, 2)),
        ("timm/test_vit", 160, 3, False, None),
    ],
)
def test_a_batch_of_prepared_images_is_answered_as_by_the_evaluated_model(
    name: str, size: int, channels: int, flip: bool, heated: tuple[int, int] | None
) -> None:
    network, (model, _) = exported(name, size, channels, flip)
    _, prepared = photographs(5, size, channels)
    found = run(model, np.repeat(prepared, 3 // channels, axis=3))
    assert np.abs(found["probabilities"] - evaluated(network, prepared, flip)).max() < 1e-5
    assert found["probabilities"].std(axis=0).max() > 1e-4, "the network answers the same for every image"
    if heated is None:
        assert "heat" not in found
    else:
        assert found["heat"].shape == (5, *heated)
        assert found["heat"].min() >= 0
        assert found["heat"].max() <= 1


def test_the_heat_is_what_each_place_adds_to_the_most_probable_class() -> None:
    """Autograd knows by itself how the head goes on from the map: HiResCAM is features times gradient."""
    for name, head in (("residual", []), ("article", []), ("timm/test_resnet", [8, 5])):
        network, card = made(name, head=head)
        deployed = Deployed(network, temperature=1.0, flip=False)
        _, prepared = photographs(4, card.size, 3)
        _, heat = deployed(torch.from_numpy(prepared))
        features = deployed._features(torch.from_numpy(prepared)).detach().requires_grad_()
        logits = features
        for layer in deployed.head:
            logits = layer(logits)
        logits.max(1).values.sum().backward()
        assert features.grad is not None
        expected = (features * features.grad).sum(1).relu()
        expected /= expected.amax((1, 2), keepdim=True).clamp_min(1e-12)
        assert torch.allclose(heat, expected, atol=1e-4)
        assert heat.amax() > 0.99


# --- photographs


@pytest.mark.parametrize(("name", "size", "channels"), [("residual", 64, 3), ("keras_mnist", 28, 1)])
def test_a_photograph_of_any_size_is_answered_as_if_prepared(name: str, size: int, channels: int) -> None:
    network, (model, _) = exported(name, size, channels, flip=name == "residual")
    photos, prepared = photographs(12, size, channels)
    photos += [photos[0].resize(shape) for shape in ((size, 3 * size), (9, 40), (size + 1, size), (700, 64))]
    prepared = np.stack([decode(encode(photo), size=size, channels=channels) for photo in photos])
    found = np.concatenate([run(model, np.asarray(photo)[None])["probabilities"] for photo in photos])
    assert np.abs(found - evaluated(network, prepared, flip=name == "residual")).max() < 1e-3


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (64, 3), (160, 3)])
def test_pixels_come_out_as_prepare_makes_them_but_for_the_last_bit(size: int, channels: int) -> None:
    session = onnxruntime.InferenceSession(preprocessing(size, channels).SerializeToString())
    photos, prepared = photographs(12, size, channels)
    for photo, expected in zip(photos, prepared, strict=True):
        (found,) = session.run(None, {"images": np.asarray(photo)[None]})[0]
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.25
    whole = np.repeat(prepared, 3 // channels, axis=3)
    assert np.array_equal(session.run(None, {"images": whole})[0], prepared), "what is prepared stays as it is"


# --- 8 bits


@pytest.mark.parametrize(
    ("name", "size", "channels", "flip", "share"),
    [
        ("residual", 64, 3, True, 0.6),
        ("keras_mnist", 28, 1, False, 0.3),
        ("timm/test_resnet", 64, 3, True, 0.5),
        ("timm/test_vit", 160, 3, False, 0.5),
    ],
)
def test_eight_bits_take_less_space_and_answer_nearly_the_same(
    name: str, size: int, channels: int, flip: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, given = exported(name, size, channels, flip)
    before = given.model.SerializeToString()
    _, prepared = photographs(24, size, channels)
    table = table_of(prepared)
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", None)  # its sums, which differ between CPUs, are not asked
        small = quantize(given, table, batch=7, metadata={"classes": ["a", "b", "c"]})
        assert quantize(given, table, batch=7, metadata={"classes": ["a", "b", "c"]}) == small
    assert given.model.SerializeToString() == before, "the given model is as it was"
    (tmp_path / "small.onnx").write_bytes(small.SerializeToString())
    assert len(small.SerializeToString()) < share * len(before)
    kinds = {node.op_type for node in small.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    found = answer(tmp_path / "small.onnx", table, batch=5, threads=1)
    assert 1e-6 < np.abs(found - evaluated(network, prepared, flip=flip)).max() < 0.05


def test_threads_of_onnxruntime_sleep_while_they_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(exported("keras_mnist", 28, 1)[1].model.SerializeToString())
    made = onnxruntime.InferenceSession
    given: list[onnxruntime.SessionOptions] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *words: given.append(words[1]) or made(*words))
    answer(file, table_of(np.zeros((2, 28, 28, 1), np.uint8)), batch=2, threads=2)
    assert [options.get_session_config_entry("session.intra_op.allow_spinning") for options in given] == ["0"]


# --- the stage


def test_agreement_counts() -> None:
    evaluated = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.51, 0.49]])
    found = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.49, 0.51]])
    counted = agreement(found, evaluated, np.array([0, 1, 1, 1]))
    assert counted == (0.75, pytest.approx(0.02), 0.75)
    assert str(counted) == (
        "75.00% of the test images are named as by the evaluated model, probabilities differ by at most 2e-02, "
        "accuracy 75.00%"
    )


@pytest.mark.parametrize("difference", [0.02, 1.0, float("nan")])
def test_a_file_that_is_not_the_evaluated_model_is_refused(difference: float) -> None:
    with pytest.raises(
        PipelineError, match=r"model\.onnx would not answer as the evaluated model: a probability differs"
    ):
        check(Agreement(1.0, difference, 0.9), Agreement(1.0, 0.04, 0.9))


@pytest.mark.parametrize(("same", "warned"), [(0.95, False), (0.9, True)])
def test_a_poor_file_of_eight_bits_is_said_to_be(same: float, warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    check(Agreement(1.0, 1e-6, 0.8), Agreement(same, 0.3, 0.7))
    said = capsys.readouterr().err
    words = "gives only 90.0% of the test images the answer of the evaluated model (accuracy 70.0% instead of 80.0%)"
    assert (words in said) is warned
    assert bool(said) is warned


def test_the_stage_puts_the_evaluated_model_into_files_and_says_how_far_they_agree(
    home: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    home.set(evaluate__flip=True)
    assert run_stage(home.folder, "evaluate", evaluate={"flip": True}).returncode == 0
    settle(load_params().train)
    export_stage.main()
    session = onnxruntime.InferenceSession(paths.ONNX)
    card = json.loads(session.get_modelmeta().custom_metadata_map["card"])
    scores, printed = home.json(str(paths.EVALUATION)), capsys.readouterr().out.splitlines()
    assert {name: card[name] for name in ("temperature", "sure_from", "accuracy")} == {
        name: scores[name] for name in ("temperature", "sure_from", "accuracy")
    }
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert (card["size"], card["channels"], card["network"], card["flip"]) == (28, 1, "keras_mnist", True)
    size, small = paths.ONNX.stat().st_size, paths.INT8.stat().st_size
    assert printed[0].startswith(f"models/model.onnx, {size:,} bytes: 100.00% of the test images")
    assert printed[0].endswith(f"accuracy {scores['accuracy']:.2%}")
    assert printed[1].startswith(f"models/model.int8.onnx, {small:,} bytes: ")
    assert small < 0.4 * size

    written = pd.read_csv(paths.PREDICTIONS)
    test = read_dataset().table("test", torch.device("cpu"))
    found = answer(paths.ONNX, test, batch=3, threads=1)
    assert np.allclose(found, written[[f"p_{digit}" for digit in range(10)]], atol=5e-6)

    before = [file.read_bytes() for file in OUTPUTS]
    assert str(ROOT).encode() not in before[0] + before[1], "the file tells where it was made"
    assert b"site-packages" not in before[0] + before[1]
    done = run_stage(home.folder, "export", evaluate={"flip": True})
    assert done.returncode == 0, done.stderr
    assert [file.read_bytes() for file in OUTPUTS] == before
    assert done.stderr == ""


def without_predictions(home: Project) -> None:
    (home.folder / paths.PREDICTIONS).unlink()


def without_scores(home: Project) -> None:
    (home.folder / paths.EVALUATION).unlink()


def fewer_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    return predictions[1:]


def predictions_of_other_classes(predictions: pd.DataFrame) -> pd.DataFrame:
    return predictions.rename(columns={"p_0": "p_zero"})


def predictions_of_another_model(predictions: pd.DataFrame) -> pd.DataFrame:
    return predictions.assign(p_0=predictions["p_1"], p_1=predictions["p_0"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fewer_predictions, "is not of this model and split; `dvc repro evaluate`"),
        (predictions_of_other_classes, "is not of this model and split; `dvc repro evaluate`"),
        (predictions_of_another_model, "would not answer as the evaluated model: a probability differs by"),
    ],
)
def test_what_was_evaluated_is_what_is_exported_or_nothing_is(
    home: Project,
    sentence_of: Callable[[Callable[[], None]], str],
    change: Callable[[pd.DataFrame], pd.DataFrame],
    words: str,
) -> None:
    assert run_stage(home.folder, "evaluate").returncode == 0
    change(pd.read_csv(paths.PREDICTIONS)).to_csv(paths.PREDICTIONS, index=False)
    assert words in sentence_of(export_stage.main)
    assert not paths.ONNX.exists()


@pytest.mark.parametrize("change", [without_predictions, without_scores])
def test_what_was_never_evaluated_is_not_exported(
    home: Project, sentence_of: Callable[[Callable[[], None]], str], change: Callable[[Project], None]
) -> None:
    (home.folder / paths.EVALUATION).parent.mkdir(exist_ok=True)
    for file in (paths.PREDICTIONS, paths.EVALUATION):
        (home.folder / file).write_text("{}")
    change(home)
    assert "is missing; `dvc repro evaluate` makes it" in sentence_of(export_stage.main)
    assert not paths.ONNX.exists()


def test_a_model_that_was_loaded_again_is_exported_the_same(home: Project) -> None:
    files = []
    for _ in range(2):
        network, card = load(paths.MODEL)
        files.append(export(network, card, TEMPERATURE, flip=False, metadata={}).model.SerializeToString())
    assert files[0] == files[1]
    assert home.folder.name.encode() not in files[0]
