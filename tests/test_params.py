"""Every mistake in params.yaml is one sentence with the key, the value found and what was expected."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from src.params import Params, load_params
from src.runtime import PipelineError
from tests.helpers import ROOT, assert_fails, merged, run_stage

KAGGLE = {"source": "kaggle", "dataset": "someone/digits", "version": 1}


def load(folder: Path, **sections: dict[str, Any]) -> Params:
    """The default parameters with changes, where ... removes a key."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params = without_dots(merged(params, sections))
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return load_params(folder / "params.yaml")


def without_dots(section: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if value is not ...}
    return {key: without_dots(value) if isinstance(value, dict) else value for key, value in kept.items()}


def complaint(folder: Path, **sections: dict[str, Any]) -> str:
    with pytest.raises(PipelineError) as caught:
        load(folder, **sections)
    assert str(caught.value).startswith(str(folder / "params.yaml"))
    return str(caught.value).removeprefix(f"{folder / 'params.yaml'}: ")


def complaint_about(folder: Path, text: str | bytes) -> str:
    path = folder / "params.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PipelineError) as caught:
        load_params(path)
    return str(caught.value)


def test_the_default_is_valid(tmp_path: Path) -> None:
    assert load_params(ROOT / "params.yaml") == load(tmp_path)


def test_sections_cannot_be_changed(tmp_path: Path) -> None:
    params = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        params.train.epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        params.train = params.train


def test_an_unknown_key_is_named_with_what_is_known(tmp_path: Path) -> None:
    said = complaint(tmp_path, train={"learning_rate": 0.1})
    assert said.startswith("train.learning_rate is unknown; known in its place: ")
    known = said.rpartition(": ")[2].split(", ")
    assert {"lr", "epochs", "seed"} < set(known)
    assert "image_size" not in known


def test_an_unknown_key_below_a_section_is_named_with_what_is_known_there(tmp_path: Path) -> None:
    said = complaint(tmp_path, train={"augment": {"flipp": True}})
    known = "crop, cutmix, erase, flip, image_size, jitter, mixup, rotate, shift, stretch"
    assert said == f"train.augment.flipp is unknown; known in its place: {known}"
    said = complaint(tmp_path, train={"augment": {"crop": ..., "cropp": 0.5}})
    assert said.startswith("train.augment.cropp is unknown")


def test_an_augmentation_outside_of_its_section_is_unknown(tmp_path: Path) -> None:
    said = complaint(tmp_path, train={"flip": True})
    assert said.startswith("train.flip is unknown; known in its place: augment, ")


def test_a_missing_key_below_a_section_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, train={"augment": {"crop": ...}}).startswith("train.augment.crop is missing; add it")
    assert complaint(tmp_path, train={"augment": ...}).startswith("train.augment is missing; add it")


def test_mixup_and_cutmix_share_the_images_between_them(tmp_path: Path) -> None:
    assert load(tmp_path, train={"augment": {"mixup": 0.7, "cutmix": 0.3}}).train.augment.cutmix == 0.3
    said = complaint(tmp_path, train={"augment": {"mixup": 0.6, "cutmix": 0.5}})
    assert said == "train.augment.mixup + cutmix is 1.1, expected at most 1"


def test_an_unknown_section_is_named_with_the_sections(tmp_path: Path) -> None:
    assert complaint(tmp_path, training={}).endswith("download, evaluate, model, plot, prepare, split, train")


def test_of_a_misspelt_key_the_unknown_one_is_told_not_the_missing_one(tmp_path: Path) -> None:
    assert complaint(tmp_path, train={"epochs": ..., "epoch": 3}).startswith("train.epoch is unknown")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, prepare={"image_size": ...}).startswith("prepare.image_size is missing; add it")


@pytest.mark.parametrize("text", ["1e-4", "1e-05", "1E-4", "+2e-4", "1.5e-4", "1.0e-4", "0.0001", "3.e-4"])
def test_a_rate_is_a_number_however_it_is_written_as_it_is_to_dvc(tmp_path: Path, text: str) -> None:
    default = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(default.replace("lr: 1.0e-3", f"lr: {text}"), encoding="utf-8")
    assert load_params(tmp_path / "params.yaml").train.lr == float(text)


def test_what_only_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    default = (ROOT / "params.yaml").read_text(encoding="utf-8")
    said = complaint_about(tmp_path, default.replace("lr: 1.0e-3", "lr: 1e-4x"))
    assert "train.lr is '1e-4x' (str)" in said


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "lr", 0, "train.lr is 0 (int): input should be greater than 0"),
        ("train", "lr", -1e-3, "train.lr is -0.001 (float): input should be greater than 0"),
        ("train", "lr", float("nan"), "train.lr is nan (float): input should be"),
        ("train", "lr", float("inf"), "train.lr is inf (float): input should be a finite number"),
        ("train", "lr", None, "train.lr is None (NoneType): input should be a valid number"),
        ("train", "epochs", 0, "train.epochs is 0 (int): input should be greater than or equal to 1"),
        ("train", "epochs", -1, "train.epochs is -1 (int): input should be greater than or equal to 1"),
        ("train", "epochs", True, "train.epochs is True (bool): input should be a valid integer"),
        ("train", "epochs", 1.5, "train.epochs is 1.5 (float): input should be a valid integer"),
        ("train", "epochs", "20", "train.epochs is '20' (str): input should be a valid integer"),
        ("train", "augment", {"flip": 1}, "train.augment.flip is 1 (int): input should be a valid boolean"),
        ("train", "augment", {"shift": -1}, "train.augment.shift is -1 (int): input should be greater than or"),
        ("train", "augment", {"shift": 1.5}, "train.augment.shift is 1.5 (float): input should be a valid integer"),
        ("train", "augment", {"rotate": 181}, "train.augment.rotate is 181 (int): input should be less than or"),
        ("train", "augment", {"rotate": -1.0}, "train.augment.rotate is -1.0 (float): input should be greater than or"),
        ("train", "augment", {"crop": 0}, "train.augment.crop is 0 (int): input should be greater than 0"),
        ("train", "augment", {"crop": 1.1}, "train.augment.crop is 1.1 (float): input should be less than or"),
        ("train", "augment", {"stretch": 0.5}, "train.augment.stretch is 0.5 (float): input should be greater than or"),
        ("train", "augment", {"jitter": 1}, "train.augment.jitter is 1 (int): input should be less than 1"),
        ("train", "augment", {"erase": "0.1"}, "train.augment.erase is '0.1' (str): input should be a valid number"),
        ("train", "augment", {"mixup": float("nan")}, "train.augment.mixup is nan (float): input should be"),
        ("train", "augment", {"cutmix": None}, "train.augment.cutmix is None (NoneType): input should be"),
        ("train", "augment", 3, "train.augment is 3 (int): input should be a valid dictionary"),
        (
            "train",
            "optimizer",
            "lamb",
            "train.optimizer is 'lamb' (str): input should be 'adam', 'adamw', 'muon' or 'sgd'",
        ),
        ("train", "schedule", "step", "train.schedule is 'step' (str): input should be 'constant', 'wsd', 'cosine' or"),
        ("train", "weight_decay", -0.1, "train.weight_decay is -0.1 (float): input should be greater than or"),
        ("train", "clip", float("inf"), "train.clip is inf (float): input should be a finite number"),
        ("train", "ema", 1, "train.ema is 1 (int): input should be less than 1"),
        ("train", "label_smoothing", 1.0, "train.label_smoothing is 1.0 (float): input should be less than 1"),
        ("train", "class_weights", 1, "train.class_weights is 1 (int): input should be a valid boolean"),
        ("train", "freeze", -1, "train.freeze is -1 (int): input should be greater than or equal to 0"),
        ("train", "layer_decay", 0, "train.layer_decay is 0 (int): input should be greater than 0"),
        ("model", "widths", [], "model.widths is [] (list): list should have at least 1 item after validation, not 0"),
        ("model", "depth", 0, "model.depth is 0 (int): input should be greater than or equal to 1"),
        ("model", "head", [448, 0], "model.head.1 is 0 (int): input should be greater than or equal to 1"),
        ("model", "head", 448, "model.head is 448 (int): input should be a valid list"),
        ("evaluate", "flip", "yes", "evaluate.flip is 'yes' (str): input should be a valid boolean"),
        ("train", "seed", 2**32, "train.seed is 4294967296 (int): input should be less than 4294967296"),
        ("train", "precision", 32, "train.precision is 32 (int): input should be 'auto', '32', 'bf16' or '16'"),
        ("train", "device", "gpu", "train.device is 'gpu' (str): input should be 'auto', 'cuda', 'mps' or 'cpu'"),
        ("model", "dropout", 1, "model.dropout is 1 (int): input should be less than 1"),
        ("model", "dropout", -0.1, "model.dropout is -0.1 (float): input should be greater than or equal to 0"),
        ("split", "test", 1.2, "split.test is 1.2 (float): input should be less than 1"),
        ("split", "test", 0, "split.test is 0 (int): input should be greater than 0"),
        ("split", "validation", -0.1, "split.validation is -0.1 (float): input should be greater than 0"),
        ("split", "validation", float("nan"), "split.validation is nan (float): input should be"),
        ("split", "test", 0.9, "split.validation + test is 1, expected less than 1"),
        ("prepare", "max_rejected", float("nan"), "prepare.max_rejected is nan (float): input should be"),
        ("prepare", "image_size", 7, "prepare.image_size is 7 (int): input should be greater than or equal to 8"),
        ("prepare", "channels", 2, "prepare.channels is 2 (int): input should be 1 or 3"),
        ("prepare", "classes", {0: None}, "prepare.classes.0"),
        ("prepare", "classes", {"cane": 3}, "prepare.classes.cane is 3 (int): input should be a valid string"),
        ("download", "source", "web", "download.source is 'web' (str): input should be 'sample', 'kaggle' or 'folder'"),
        ("download", "sha256", "ABC", "download.sha256 is 'ABC' (str): string should match pattern"),
        ("download", "sha256", "A" * 64, f"download.sha256 is '{'A' * 64}' (str): string should match pattern"),
        ("download", "sha256", "a" * 64 + "\n", "download.sha256 is 'aaaa"),
        ("plot", "examples", 101, "plot.examples is 101 (int): input should be less than or equal to 100"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(
    tmp_path: Path, section: str, key: str, value: object, said: str
) -> None:
    assert complaint(tmp_path, **{section: {key: value}}).startswith(said)


@pytest.mark.parametrize("dataset", ["", "digits", "/digits", "someone/", "a/b/c"])
def test_a_kaggle_data_set_needs_owner_and_slug(tmp_path: Path, dataset: str) -> None:
    said = complaint(tmp_path, download=KAGGLE | {"dataset": dataset})
    assert said == "download.dataset: expected owner/slug, such as alessiocorrado99/animals10"


def test_a_kaggle_data_set_needs_a_version(tmp_path: Path) -> None:
    said = complaint(tmp_path, download=KAGGLE | {"version": 0})
    assert said.startswith("download.version: expected the data set's version, 1 or more")


def test_kaggle_with_owner_slug_version_and_digest_is_valid(tmp_path: Path) -> None:
    assert load(tmp_path, download=KAGGLE | {"sha256": "0a" * 32}).download.version == 1


def test_an_official_split_does_not_care_for_the_sum_of_the_shares(tmp_path: Path) -> None:
    assert load(tmp_path, split={"official": True, "test": 0.95}).split.official


@pytest.mark.parametrize("text", ["train: [", "a: b: c", "\tx: 1", b"\xff\xfe\x00", "x: !!python/object:os.system {}"])
def test_what_is_no_yaml_is_told(tmp_path: Path, text: str | bytes) -> None:
    assert "params.yaml is not valid YAML: " in complaint_about(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "found"), [("", "None (NoneType)"), ("# nothing", "None (NoneType)"), ("- 1\n- 2", "[1, 2] (list)")]
)
def test_what_is_no_mapping_is_told(tmp_path: Path, text: str, found: str) -> None:
    assert f"params.yaml: the file is {found}: input should be a valid dictionary" in complaint_about(tmp_path, text)


def test_a_section_that_is_no_mapping_is_told(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").partition("plot:")[0] + "plot: 3\n"
    assert "plot is 3 (int): input should be a valid dictionary" in complaint_about(tmp_path, text)


@pytest.mark.parametrize("stage", ["prepare", "split"])
def test_a_stage_tells_it_in_one_line(tmp_path: Path, stage: str) -> None:
    words = ("params.yaml: train.epochs is 0 (int)", "greater than or equal to 1")
    assert_fails(tmp_path, stage, *words, train={"epochs": 0})


def test_a_stage_tells_many_lines_of_a_yaml_error_in_one(tmp_path: Path) -> None:
    write = "import pathlib; pathlib.Path('params.yaml').write_text('train: [')"
    assert_fails(tmp_path, "split", "params.yaml is not valid YAML", before=write)


def test_a_stage_without_params_says_how_to_get_them_back(tmp_path: Path) -> None:
    remove = "import os; os.remove('params.yaml')"
    done = run_stage(tmp_path, "prepare", remove)
    assert done.stderr == "prepare: params.yaml is missing; `git checkout params.yaml` brings the default back\n"
