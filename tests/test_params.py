"""Every mistake in params.yaml is one sentence with the key, the value found and what was expected."""

from pathlib import Path
from typing import Any

import pytest
import timm
from dvc.utils.serialize import load_yaml
from pydantic import ValidationError

from src import params, yaml12
from src.networks import NETWORKS
from src.params import Params, load_params
from src.runtime import PipelineError
from tests.helpers import ROOT, assert_fails, merged, run_stage

KAGGLE = {"source": "kaggle", "dataset": "someone/digits", "version": 1}


def load(folder: Path, **sections: dict[str, Any]) -> Params:
    """The default parameters with changes, where ... removes a key."""
    params = yaml12.read(ROOT / "params.yaml")
    params = without_dots(merged(params, sections))
    (folder / "params.yaml").write_text(yaml12.dump(params), encoding="utf-8")
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
    assert said.startswith("train.learning_rate is unknown; train has ")
    known = said.rpartition("train has ")[2].split(", ")
    assert {"lr", "epochs", "seed"} < set(known)
    assert "image_size" not in known


def test_an_unknown_key_below_a_section_is_named_with_what_is_known_there(tmp_path: Path) -> None:
    said = complaint(tmp_path, train={"augment": {"flipp": True}})
    known = "train.augment has crop, cutmix, erase, flip, image_size, jitter, mixup, rotate, shift, stretch"
    assert said == f"train.augment.flipp is unknown (did you mean train.augment.flip?); {known}"
    said = complaint(tmp_path, train={"augment": {"crop": ..., "cropp": 0.5}})
    assert said.startswith("train.augment.cropp is unknown")


def test_an_augmentation_outside_of_its_section_is_unknown(tmp_path: Path) -> None:
    said = complaint(tmp_path, train={"flip": True})
    assert said.startswith("train.flip is unknown (did you mean train.augment.flip?); train has augment, ")


@pytest.mark.parametrize("section", ["prepare", "train.augment"])
def test_params_from_before_image_size_are_told_its_name(tmp_path: Path, section: str) -> None:
    old: dict[str, Any] = {"image_size": ..., "size": 28}
    said = complaint(tmp_path, **({"prepare": old} if section == "prepare" else {"train": {"augment": old}}))
    assert said.startswith(f"{section}.size is unknown (did you mean {section}.image_size?); {section} has ")


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


@pytest.mark.parametrize(
    ("line", "written", "read"),
    [
        *(
            ("lr: 1.0e-3", f"lr: {text}", float(text))
            for text in ("1e-4", "1e-05", "1E-4", "+2e-4", "1.5e-4", "0.0001", "3.e-4")
        ),
        ("seed: 0\n  epochs", "seed: 010\n  epochs", 10),
        ("seed: 0\n  epochs", "seed: 0o17\n  epochs", 15),
        ("seed: 0\n  epochs", "seed: 1_000\n  epochs", 1000),
        ("classes: {}", "classes: {yes: tumor, no: healthy}", {"yes": "tumor", "no": "healthy"}),
        (
            "classes: {}",
            "classes: {off: yes, ~a: null, b: ~, 'c': 'on'}",
            {"off": "yes", "~a": None, "b": None, "c": "on"},
        ),
        ("classes: {}", "classes: &same {a: b}", {"a": "b"}),
    ],
)
def test_a_value_is_what_it_is_to_dvc(tmp_path: Path, line: str, written: str, read: object) -> None:
    default = (ROOT / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text("\ufeff" + default.replace(line, written), encoding="utf-8")
    params = load_params(file)
    assert read in (params.train.lr, params.train.seed, params.prepare.classes)
    assert params.model_dump() == load_yaml(str(file)), "as DVC reads it"


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
        (
            "prepare",
            "classes",
            {0: None},
            "prepare.classes.0 is 0 (int): input should be a valid string, so put it in quo",
        ),
        (
            "prepare",
            "classes",
            {"cane": 3},
            "prepare.classes.cane is 3 (int): input should be a valid string, so put it",
        ),
        (
            "prepare",
            "classes",
            {"cane": ""},
            "prepare.classes.cane is '' (str): string should have at least 1 character",
        ),
        ("prepare", "classes", {"size": "big"}, "prepare.classes.size: DVC overlooks changes of this key (dvc#10296)"),
        ("prepare", "include", "", "prepare.include is '' (str): string should have at least 1 character"),
        ("download", "path", "~/photos", f"download.path is ~/photos, but DVC does not expand ~; write {Path.home()}/"),
        (
            "model",
            "weights",
            "~no-such-user/x",
            "model.weights is ~no-such-user/x, but DVC does not expand ~; write ~no-such-user/x",
        ),
        ("model", "weights", None, "model.weights is None (NoneType): input should be a valid string"),
        (
            "download",
            "sha256",
            "a" * 64,
            "download.sha256 is set, but only an archive of kaggle is compared with it, not",
        ),
        ("download", "version", "2", "download.version is '2' (str): input should be a valid integer"),
        ("train", "threads", 10**6, "train.threads is 1000000 (int): input should be less than or equal to 1024"),
        ("train", "batch", 10**30, "train.batch is 1000000000000000000000000000000 (int): input should be less than"),
        (
            "model",
            "widths",
            [10**9],
            "model.widths.0 is 1000000000 (int): input should be less than or equal to 1000000",
        ),
        ("train", "lr", 1 << 4000, "train.lr is 1318"),
        ("train", "decay", 2, "train.decay is 2, but schedule constant has none; set 0, or schedule: wsd"),
        ("train", "schedule", "wsd", "train.warmup + decay is 21, expected at most train.epochs, 20"),
        (
            "model",
            "name",
            "resnet50",
            "model.name is 'resnet50', expected article, keras_mnist, residual, or timm/NAME; di",
        ),
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
    warmup = {"warmup": 21} if key == "schedule" and value != "step" else {}
    assert complaint(tmp_path, **{section: {key: value} | warmup}).startswith(said)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet50", "did you mean timm/resnet50?"),
        ("ResNet50.tv2_in1k", "did you mean timm/resnet50?"),
        ("timm/resnet-50", "did you mean timm/resnet50?"),
        ("keras-mnist", "did you mean keras_mnist?"),
        ("timm/residual", "did you mean residual?"),
        ("timm/qqq", "https://huggingface.co/timm lists them"),
        ("", "https://huggingface.co/timm lists them"),
    ],
)
def test_an_unknown_network_is_refused_with_the_one_that_was_meant(tmp_path: Path, name: str, near: str) -> None:
    expected = "expected article, keras_mnist, residual, or timm/NAME"
    assert complaint(tmp_path, model={"name": name}) == f"model.name is {name!r}, {expected}; {near}"


def test_the_networks_are_those_of_networks_py_and_of_timm() -> None:
    assert params._networks() == list(NETWORKS)
    assert params._architectures() == set(timm.list_models())


@pytest.mark.parametrize(
    ("name", "size", "seen", "said"),
    [
        ("article", 31, 0, "prepare.image_size is 31, but article expects at least 32"),
        ("article", 32, 0, None),
        ("keras_mnist", 9, 0, "prepare.image_size is 9, but keras_mnist expects at least 10"),
        ("keras_mnist", 28, 28, None),
        ("keras_mnist", 28, 24, "train.augment.image_size is 24, but keras_mnist sees images of one size alone; set 0"),
        ("residual", 15, 0, "prepare.image_size is 15, but residual expects at least 16"),
        ("residual", 28, 15, "train.augment.image_size is 15, but residual expects at least 16"),
        ("residual", 28, 40, None),
        ("timm/resnet18", 8, 9, None),
    ],
)
def test_images_of_a_size_that_the_network_cannot_take_are_refused(
    tmp_path: Path, name: str, size: int, seen: int, said: str | None
) -> None:
    sections: dict[str, Any] = {"prepare": {"image_size": size}, "train": {"augment": {"image_size": seen}}}
    if said:
        assert complaint(tmp_path, model={"name": name}, **sections) == said
    else:
        assert load(tmp_path, model={"name": name}, **sections).prepare.image_size == size


def test_settings_of_a_backbone_are_refused_all_at_once_where_there_is_none(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"head": [512], "input_size": 224},
        "train": {"freeze": 2, "layer_decay": 0.75},
    }
    off = "model.input_size: 0, model.head: [], train.freeze: 0, train.layer_decay: 1"
    said = complaint(tmp_path, **sections)
    assert said == f"model.name is keras_mnist, which is no backbone of timm; set {off}"
    sections["model"]["name"] = "timm/resnet50.tv2_in1k"
    assert load(tmp_path, **sections).train.freeze == 2


def test_decay_is_for_wsd(tmp_path: Path) -> None:
    assert load(tmp_path, train={"schedule": "wsd", "decay": 15, "warmup": 5}).train.decay == 15


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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("train: [", "line 2, column 1: did not find expected node content"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed in this context"),
        ("a:\n\tx: 1", "line 2, column 1: found character that cannot start any token"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("x: !!python/object:os.system {}", "line 1, column 4: could not determine a constructor for the tag"),
        ("x: 1\ny: 2\nx: 3", 'line 3, column 1: found duplicate key "x" with value "3" (original value: "1")'),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: *b", "line 1, column 4: found undefined alias"),
        ("a: 2024-13-45", "month must be in 1..12"),
    ],
)
def test_what_is_no_yaml_is_told_with_line_and_column(tmp_path: Path, text: str | bytes, why: str) -> None:
    assert f"params.yaml is not valid YAML: {why}" in complaint_about(tmp_path, text)


def test_what_is_written_is_read_as_it_was() -> None:
    texts = [
        "yes",
        "010",
        "1e-4",
        "~",
        "null",
        "",
        "*",
        "a: b",
        " x",
        "#",
        "it's\n two",
        "猫\u2028",
        "=",
        "2024-01-01",
        ".",
    ]
    values = {
        "texts": texts,
        "by text": dict.fromkeys(texts),
        "numbers": [1e-05, 1.0, -3, True, None],
        "none": [{}, []],
    }
    assert yaml12.parse(yaml12.dump(values)) == values


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
