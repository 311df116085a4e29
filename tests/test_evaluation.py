"""Scores are those of the textbooks, confidence is what it says, and a model is only judged on what it knows."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score
from torch import nn

from src import paths
from src.batches import Table, read_dataset
from src.evaluation import (
    calibration_error,
    fit_temperature,
    predict,
    probabilities,
    score,
    sure_from,
    tabulate,
)
from src.intervals import ONE_SIDED, report_few, wilson_interval
from src.networks import load
from src.runtime import PipelineError
from stages import evaluate as evaluate_stage
from tests.helpers import contents
from tests.project import Project

OUTPUTS = (paths.PREDICTIONS, paths.EVALUATION, paths.CLASS_METRICS)


def table_of(actual: list[str], probabilities: list[list[float]], classes: list[str]) -> pd.DataFrame:
    places = pd.DataFrame({"path": [f"{row}.png" for row in range(len(actual))], "label": actual, "split": "test"})
    return tabulate(places, np.array(probabilities), classes)


# --- scores


def test_scores_are_those_counted_by_hand() -> None:
    # Of three cats, one is taken for a dog; of two dogs, one for a cat.
    chances = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.5001, 0.4999]]
    predictions = table_of(["cat", "cat", "cat", "dog", "dog"], chances, ["cat", "dog"])
    assert predictions["predicted"].tolist() == ["cat", "cat", "dog", "dog", "cat"]
    assert predictions["confidence"].tolist() == [0.9, 0.8, 0.6, 0.7, 0.5001]
    overall, classes = score(predictions, ["cat", "dog"])
    assert overall["accuracy"] == pytest.approx(3 / 5)
    assert overall["loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.7, 0.4999]).mean())
    assert classes.to_dict("list") == {
        "class": ["cat", "dog"],
        "precision": [pytest.approx(2 / 3), pytest.approx(1 / 2)],
        "recall": [pytest.approx(2 / 3), pytest.approx(1 / 2)],
        "f1": [pytest.approx(2 / 3), pytest.approx(1 / 2)],
        "images": [3, 2],
    }
    assert overall["macro_precision"] == overall["macro_recall"] == overall["macro_f1"] == pytest.approx(7 / 12)
    assert overall["images"] == 5


def test_scores_are_those_of_scikit_learn() -> None:
    classes = ["9", "10", "a"]  # an order that sorting by letter would break
    rng = np.random.default_rng(0)
    actual = rng.choice(classes, 300, p=[0.7, 0.2, 0.1]).tolist()
    chances = rng.dirichlet([1, 1, 1], 300)
    predictions = table_of(actual, chances.tolist(), classes)
    overall, per_class = score(predictions, classes)
    predicted = predictions["predicted"].tolist()
    assert predicted == [classes[code] for code in chances.argmax(1)]
    assert overall["accuracy"] == accuracy_score(actual, predicted)
    assert overall["macro_f1"] == pytest.approx(f1_score(actual, predicted, average="macro"))
    assert overall["macro_recall"] == pytest.approx(recall_score(actual, predicted, average="macro"))
    assert per_class["recall"].tolist() == recall_score(actual, predicted, labels=classes, average=None).tolist()
    assert overall["macro_precision"] == pytest.approx(precision_score(actual, predicted, average="macro"))
    assert overall["loss"] == pytest.approx(log_loss(actual, chances[:, [1, 0, 2]], labels=["10", "9", "a"]))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_that_of_newcombes_table(right: int, count: int, low: float, high: float) -> None:
    """Newcombe (1998), Two-sided confidence intervals for the single proportion, Table I, method 3."""
    assert wilson_interval(right, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson_interval(count - right, count)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


@pytest.mark.filterwarnings("error")
def test_what_is_0_of_0_has_no_score_and_counts_in_no_mean() -> None:
    predictions = table_of(["a", "a", "b"], [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], ["a", "b", "c"])
    overall, classes = score(predictions, ["a", "b", "c"])
    assert classes["precision"].tolist() == pytest.approx([2 / 3, math.nan, math.nan], nan_ok=True)
    assert classes["recall"].tolist() == pytest.approx([1, 0, math.nan], nan_ok=True)
    assert classes["f1"].tolist() == pytest.approx([0.8, 0, math.nan], nan_ok=True)
    assert classes["images"].tolist() == [2, 1, 0]
    means = {name: overall[f"macro_{name}"] for name in ("precision", "recall", "f1")}
    assert means == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(1 / 2), "f1": pytest.approx(0.4)}
    assert (overall["sure_share"], overall["sure_accuracy"]) == (None, None)
    assert "null" in json.dumps(overall, allow_nan=False)
    assert classes.to_csv(index=False).splitlines()[3] == "c,,,,0"
    assert overall["loss"] == pytest.approx(-np.log([0.8, 0.7, 0.3]).mean())


def test_a_sure_and_wrong_answer_costs_a_finite_loss() -> None:
    overall, _ = score(table_of(["a", "b"], [[1.0, 0.0], [1.0, 0.0]], ["a", "b"]), ["a", "b"])
    assert 0 < overall["loss"] < 100


# --- confidence


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def overconfident(temperature: float, count: int = 20_000) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Logits `temperature` times as large as their answers deserve, (N, 1, 4), and the classes that were meant."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (count, 4))
    codes = np.array([rng.choice(4, p=shares) for shares in softmax(logits)])
    return torch.from_numpy(logits[:, None] * temperature), codes


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_one_by_which_the_logits_are_too_large(temperature: float) -> None:
    logits, codes = overconfident(temperature)
    found = fit_temperature(logits, codes)
    assert found == pytest.approx(temperature, rel=0.03)
    confidence, right = (probabilities(logits, found)).max(1), logits[:, 0].argmax(1).numpy() == codes
    assert calibration_error(confidence, right) < 0.01
    if temperature != 1:
        assert calibration_error(probabilities(logits).max(1), right) > 0.05


def test_the_temperature_is_fitted_to_the_mean_of_the_views() -> None:
    logits, codes = overconfident(2.0, 4_000)
    views = torch.cat([logits, logits + torch.from_numpy(np.random.default_rng(1).normal(0, 3, logits.shape))], 1)
    found = fit_temperature(views, codes)

    def loss(temperature: float) -> float:
        return float(log_loss(codes, probabilities(views, temperature)))

    assert loss(found) < min(loss(found * 1.02), loss(found / 1.02))


def test_a_temperature_is_found_where_every_answer_is_right_and_where_all_logits_are_equal() -> None:
    codes = np.array([0, 1, 1, 0])
    right = torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]], [[0.0, 9.0]], [[9.0, 0.0]]])
    confidence = probabilities(right, fit_temperature(right, codes)).max(1)
    assert confidence == pytest.approx(0.9, abs=0.02), "of four and one half of a fifth, 4.5 in 5 are right"
    assert 0.05 <= fit_temperature(torch.zeros(4, 1, 2), codes) <= 20


def answers(*groups: tuple[int, int, float]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Answers and truths of groups of so many images, of which so many are right, all with one confidence."""
    shares = [[chance, 1 - chance] for count, _, chance in groups for _ in range(count)]
    codes = [int(number >= right) for count, right, _ in groups for number in range(count)]
    return np.array(shares), np.array(codes)


@pytest.mark.parametrize(
    ("groups", "wanted", "expected"),
    [
        ([(268, 268, 0.9)], 0.99, 0.9),  # 268 / (268 + 1.645 ** 2) is just above 0.99
        ([(267, 267, 0.9)], 0.99, None),
        ([(52, 52, 0.9)], 0.95, 0.9),
        ([(51, 51, 0.9)], 0.95, None),
        ([(400, 400, 0.95), (400, 390, 0.9)], 0.99, 0.95),  # 98.75 % of all: the point and the bound are below
        ([(400, 400, 0.95), (400, 393, 0.9)], 0.99, 0.95),  # 99.1 % of all: the bound alone is below
        ([(400, 400, 0.95), (400, 399, 0.9)], 0.99, 0.9),
        ([(20, 0, 0.99), (5000, 5000, 0.9)], 0.99, 0.9),  # the most confident are wrong, all together are not
        ([(400, 400, 0.80009)], 0.99, 0.8),  # down to four digits, so that it is in
        ([(18, 18, 0.83), (20, 5, 0.6)], 0.95, None),  # a few lucky answers promise nothing
        ([(1, 1, 0.9)], 0.01, 0.9),
    ],
    ids=str,
)
def test_answers_are_sure_from_the_lowest_confidence_that_validation_can_carry(
    groups: list[tuple[int, int, float]], wanted: float, expected: float | None
) -> None:
    shares, codes = answers(*groups)
    order = np.random.default_rng(0).permutation(len(codes))
    assert sure_from(shares[order], codes[order], wanted) == expected


def test_a_promise_is_rarely_broken_by_chance() -> None:
    """Of networks that are right with 90 %, whatever their confidence, only few are called 95 % right anywhere."""
    rng, promised, point = np.random.default_rng(0), 0, 0
    for _ in range(200):
        confidence, right = rng.uniform(0.5, 1, 60), rng.random(60) < 0.9
        shares, codes = np.stack([confidence, 1 - confidence], 1), (~right).astype(np.int64)
        promised += sure_from(shares, codes, 0.95) is not None
        first = np.cumsum(right[np.argsort(-confidence)]) / np.arange(1, 61)
        point += bool((first >= 0.95).any())
    assert promised <= 10
    assert point > 150, "where the share itself counted, nearly all were"


def test_the_one_sided_bound_is_the_one_of_95_percent() -> None:
    assert NormalDist().cdf(ONE_SIDED) == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "accuracy", "words"),
    [
        (18, 0.9, "only 18 test images: an accuracy of 90 % on them has a 95 % interval of 29 points (69 to 97 %)"),
        (1, 1.0, "only 1 test image: an accuracy of 100 % on them has a 95 % interval of 79 points (21 to 100 %)"),
        (99, 0.9, "only 99 test images"),
        (100, 0.9, ""),
    ],
)
def test_a_small_part_is_reported_with_the_width_of_its_interval(
    capsys: pytest.CaptureFixture[str], count: int, accuracy: float, words: str
) -> None:
    report_few("test", count, accuracy)
    said = capsys.readouterr().err
    assert words in said
    assert bool(said) == bool(words)


def test_answers_that_are_no_numbers_are_one_sentence() -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((1, 2)).log()  # of a black image, minus infinity

    images = torch.ones(5, 2, 2, 1, dtype=torch.uint8)
    images[3] = 0
    table = Table(images, torch.arange(5), torch.zeros(5, dtype=torch.int64), 1)
    with pytest.raises(PipelineError, match="answers to 1 of 5 images are no finite numbers; train again with a small"):
        predict(Broken(), table, batch=2)


def test_scores_tell_how_many_answers_are_sure_and_how_many_of_those_are_right() -> None:
    chances = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.55, 0.45]]
    predictions = table_of(["cat", "cat", "cat", "dog", "dog"], chances, ["cat", "dog"])
    overall, _ = score(predictions, ["cat", "dog"], 0.6)
    assert (overall["sure_share"], overall["sure_accuracy"]) == (4 / 5, 3 / 4)
    overall, _ = score(predictions, ["cat", "dog"], 1.0)
    assert (overall["sure_share"], overall["sure_accuracy"]) == (0, None)
    overall, _ = score(predictions, ["cat", "dog"], 0.6)
    # Answers of 0.55 and 0.6, 0.7, 0.8, 0.9 lie in five bins: the mean of what each lacks to 0 or 1.
    assert overall["calibration_error"] == pytest.approx((0.55 + 0.6 + 0.3 + 0.2 + 0.1) / 5)


def test_the_calibration_error_is_that_counted_by_hand() -> None:
    confidence = np.array([0.61, 0.62, 0.63, 0.64, 0.99, 1.0])
    right = np.array([True, True, False, False, True, True])
    assert calibration_error(confidence, right) == pytest.approx((4 * (0.625 - 0.5) + 2 * (1 - 0.995)) / 6)


# --- predictions


@pytest.mark.usefixtures("home")
def test_probabilities_are_the_softmax_of_the_logits_and_sum_to_one() -> None:
    network, _ = load(paths.MODEL)
    table = read_dataset().table("test", torch.device("cpu"))
    found = probabilities(predict(network, table, batch=50))
    assert found.shape == (len(table), 10)
    assert np.abs(found.sum(1) - 1).max() < 1e-12
    with torch.inference_mode():
        logits = network(table.take(torch.arange(len(table)))[0]).double().numpy()
    assert np.allclose(found, softmax(logits), rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("home")
def test_with_flip_the_probabilities_are_the_mean_of_the_image_and_its_mirror_image() -> None:
    network, _ = load(paths.MODEL)
    table = read_dataset().table("test", torch.device("cpu"))
    mirrored = replace(table, images=torch.from_numpy(table.images.numpy()[:, :, ::-1].copy()))
    plain, other = (probabilities(predict(network, seen, batch=50)) for seen in (table, mirrored))
    both = probabilities(predict(network, table, batch=50, flip=True))
    assert np.abs(plain - other).max() > 0.1, "the test needs images that are not taken for the same in a mirror"
    assert np.allclose(both, (plain + other) / 2, rtol=0, atol=1e-6)
    assert np.abs(both.sum(1) - 1).max() < 1e-12
    assert np.allclose(probabilities(predict(network, mirrored, batch=50, flip=True)), both, rtol=0, atol=1e-6)


def test_the_stage_flips_where_the_params_ask_for_it(home: Project) -> None:
    chances = [f"p_{digit}" for digit in range(10)]
    found = []
    for flip in (False, True):
        home.set(evaluate__flip=flip)
        evaluate_stage.main()
        temperature = home.json(str(paths.EVALUATION))["temperature"]
        assert isinstance(temperature, float)
        found.append((pd.read_csv(paths.PREDICTIONS)[chances].to_numpy(), temperature))
    network, _ = load(paths.MODEL)
    table = read_dataset().table("test", torch.device("cpu"))
    for flip, (written, temperature) in zip((False, True), found, strict=True):
        expected = probabilities(predict(network, table, batch=512, flip=flip), temperature)
        assert np.allclose(written, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(found[0][0] - found[1][0]).max() > 0.1


@pytest.mark.usefixtures("home")
def test_predicting_turns_dropout_off() -> None:
    network, _ = load(paths.MODEL)
    table = read_dataset().table("test", torch.device("cpu"))
    still = predict(network, table, batch=50)
    assert torch.equal(predict(network.train(), table, batch=50), still)


def test_the_stage_tells_of_each_test_image_in_its_order(home: Project, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_stage.main()
    said, errors = capsys.readouterr()
    assert errors.endswith(
        ": the 58 validation images show no confidence from which 99 % of the answers are right, so no answer is "
        "called sure\n"
    )
    assert errors.count("\n") == 1
    split = pd.read_csv(paths.SPLIT, dtype=str)
    test = split[split["split"] == "test"]
    written = pd.read_csv(paths.PREDICTIONS, dtype={"actual": str, "predicted": str})
    chances = [f"p_{digit}" for digit in range(10)]
    assert written.columns.tolist() == ["row", "path", "actual", "predicted", "confidence", *chances]
    assert written["row"].tolist() == test.index.tolist()
    assert written["path"].tolist() == test["path"].tolist()
    assert written["actual"].tolist() == test["label"].tolist()
    assert written["predicted"].tolist() == [str(code) for code in written[chances].to_numpy().argmax(1)]
    assert np.allclose(written["confidence"], written[chances].max(axis=1))
    assert np.allclose(written[chances].sum(axis=1), 1, atol=1e-5)

    metrics = home.json(str(paths.EVALUATION))
    right = (written["actual"] == written["predicted"]).mean()
    assert metrics["accuracy"] == right
    assert metrics["images"] == len(test)
    assert f"test accuracy {right:.2%} (95 % interval" in said
    # These columns of `dvc exp show`, in this order; more of them would push the changed params out of sight.
    shown, training = home.json(str(paths.TEST_METRICS)), home.json("metrics/train/metrics.json")
    assert list(shown) == ["accuracy", "macro_f1", "val_acc"]
    assert shown["accuracy"] == right
    assert shown["macro_f1"] == metrics["macro_f1"]
    assert shown["val_acc"] == pytest.approx(training["best_validation_accuracy"])
    classes = pd.read_csv(paths.CLASS_METRICS)
    assert classes["class"].tolist() == list(range(10))
    assert classes["images"].sum() == len(test)


@pytest.mark.usefixtures("home")
def test_training_images_judge_nothing() -> None:
    evaluate_stage.main()
    before = [file.read_bytes() for file in OUTPUTS]
    images = np.load(paths.IMAGES)
    images[pd.read_csv(paths.SPLIT)["split"] == "train"] = 0
    np.save(paths.IMAGES, images)
    evaluate_stage.main()
    assert [file.read_bytes() for file in OUTPUTS] == before


def test_temperature_and_threshold_come_from_validation_alone(home: Project) -> None:
    home.set(evaluate__sure=0.6)
    evaluate_stage.main()
    before = home.json(str(paths.EVALUATION))
    network, _ = load(paths.MODEL)
    table = read_dataset().table("validation", torch.device("cpu"))
    logits, codes = predict(network, table, batch=512), table.labels.numpy()
    temperature = fit_temperature(logits, codes)
    assert before["temperature"] == temperature
    sure = sure_from(probabilities(logits, temperature), codes, 0.6)
    assert before["sure_from"] == sure is not None
    images = np.load(paths.IMAGES)
    images[pd.read_csv(paths.SPLIT)["split"] == "test"] = 0
    np.save(paths.IMAGES, images)
    evaluate_stage.main()
    after = home.json(str(paths.EVALUATION))
    assert after["accuracy"] != before["accuracy"]
    assert [after[name] for name in ("temperature", "sure_from")] == [
        before[name] for name in ("temperature", "sure_from")
    ]


def test_the_size_of_a_batch_changes_nothing_that_matters(home: Project) -> None:
    found = []
    for batch in (512, 1, 7):
        home.set(evaluate__batch=batch)
        evaluate_stage.main()
        found.append((pd.read_csv(paths.PREDICTIONS), home.json(str(paths.EVALUATION))))
    chances = [f"p_{digit}" for digit in range(10)]
    for written, metrics in found[1:]:
        assert written["predicted"].equals(found[0][0]["predicted"])
        assert np.allclose(written[chances], found[0][0][chances], rtol=2e-5, atol=1e-7)
        assert metrics == {name: value and pytest.approx(value, rel=1e-6) for name, value in found[0][1].items()}


def test_judging_twice_gives_the_same_bytes(home: Project) -> None:
    evaluate_stage.main()
    before = contents(home.folder)
    evaluate_stage.main()
    assert contents(home.folder) == before


def test_names_of_classes_may_hold_commas_quotes_and_newlines(tmp_path: Path) -> None:
    names = ["a, b", 'the "c"', "d\ne", "été"]
    chances = np.eye(4) * 0.6 + 0.1
    predictions = table_of(names, chances.tolist(), names)
    overall, classes = score(predictions, names)
    assert overall["accuracy"] == 1
    for number, table in enumerate((predictions, classes)):
        file = tmp_path / f"{number}.csv"
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        assert [row["actual" if number == 0 else "class"] for row in rows] == names
    assert list(predictions.columns[5:]) == [f"p_{name}" for name in names]


# --- mistakes


def rename_a_class(home: Project) -> None:
    split = home.folder / paths.SPLIT
    split.write_text(split.read_text().replace(",9,", ",nine,"))


def enlarge(home: Project) -> None:
    images = home.folder / paths.IMAGES
    np.save(images, np.load(images).repeat(2, axis=1).repeat(2, axis=2))


def colour(home: Project) -> None:
    images = home.folder / paths.IMAGES
    np.save(images, np.load(images).repeat(3, axis=3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_a_class, "models/model.safetensors was trained on other classes than data/split.csv has"),
        (enlarge, "models/model.safetensors was trained on images of another shape than data/images.npy"),
        (colour, "models/model.safetensors was trained on images of another shape than data/images.npy"),
        (lambda home: (home.folder / paths.MODEL).write_bytes(b""), "model.safetensors is no model of this pipeline"),
        (lambda home: home.set(evaluate__device="mps"), "the device 'mps' is asked for, but torch finds none"),
    ],
    ids=["classes", "size", "channels", "damaged", "device"],
)
def test_what_cannot_be_judged_is_one_sentence_and_costs_no_older_output(
    home: Project,
    sentence_of: Callable[[Callable[[], None]], str],
    change: Callable[[Project], object],
    words: str,
) -> None:
    if "'mps'" in words and torch.backends.mps.is_available():
        pytest.skip("there is an MPS device")
    evaluate_stage.main()
    change(home)
    before = contents(home.folder)
    assert words in sentence_of(evaluate_stage.main)
    assert contents(home.folder) == before
