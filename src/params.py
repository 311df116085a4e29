"""params.yaml as frozen, typed sections: the manual of every knob, and the only reader of that file."""

import importlib.util
import os.path
import re
from collections.abc import Iterator, Sequence
from datetime import date
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from src import paths, yaml12
from src.runtime import PipelineError

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrOff = Annotated[int, Field(ge=0, le=1_000_000)]
SizeOrOff = Annotated[int, Field(ge=0, le=4096)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Device = Literal["auto", "cuda", "mps", "cpu"]


TIMM = "timm/"
"""How the names of timm's backbones begin in model.name."""
FIXED_SIZE = ("article", "keras_mnist")
"""Networks that take images of one size alone, since their first fully connected layer has a weight for each pixel."""


class Section(BaseModel):
    """No unknown key, no missing key, no silent conversion, no change after reading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Download(Section):
    """Where the images come from."""

    source: Literal["sample", "kaggle", "folder"]
    """sample: 5,000 MNIST digits, without network; kaggle: a Kaggle data set; folder: your own images."""
    dataset: str
    """kaggle: owner/slug, as in the data set's address; unused by the other sources."""
    version: CountOrOff
    """kaggle: the data set's version, 1 or more; unused by the other sources."""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """kaggle: the archive's SHA-256 as 64 hexadecimal digits; '' accepts any, and prints the one found."""
    path: Text
    """folder: a folder of class folders, or of one zip, or a zip: data/inbox, or an absolute path anywhere."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> "Download":
        _refuse_home("path", self.path)
        if self.source != "kaggle" and self.sha256:
            raise ValueError(
                f"sha256 is set, but only an archive of kaggle is compared with it, not {self.source}; set ''"
            )
        if self.source == "kaggle" and (self.dataset.count("/") != 1 or not all(self.dataset.split("/"))):
            raise ValueError("dataset: expected owner/slug, such as alessiocorrado99/animals10")
        if self.source == "kaggle" and self.version < 1:
            raise ValueError("version: expected the data set's version, 1 or more, so that a rerun gets the same bytes")
        return self


class Prepare(Section):
    """How an image of the archive becomes pixels."""

    image_size: Annotated[int, Field(ge=8, le=1024)]
    """Side of the prepared square images, in pixels."""
    channels: Literal[1, 3]
    """1: gray; 3: RGB."""
    include: Text
    """Which files of the archive to use, as a shell pattern on the path inside it, without regard to case; '*' uses
    all."""
    classes: dict[str, Text | None]
    """Class folder: name of the class; null leaves the folder, and all below it, out; folders not named here keep their
    name."""
    class_level: CountOrOff
    """Where folders lie in folders, which are the classes: 1 the first below those that hold everything and those of
    train and test, 2 the next, and so on. 0 finds it where only one reading is possible, and else stops."""
    max_rejected: Share
    """Largest share of files that may be broken before the stage fails."""

    @model_validator(mode="after")
    def _classes_are_noticed(self) -> "Prepare":
        if ignored := sorted(self.classes.keys() & {"size", "nfiles"}):
            raise ValueError(f"classes.{ignored[0]}: DVC overlooks changes of this key (dvc#10296); rename the folder")
        return self


class Split(Section):
    """Which images train, which choose, which judge."""

    seed: Seed
    """Another seed draws another split."""
    validation: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images for validation (of the official training images where official is true)."""
    test: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images for testing; unused where official is true."""
    official: bool
    """Keep the train and test folders (or idx files) of the archive as they are."""

    @model_validator(mode="after")
    def _something_is_left(self) -> "Split":
        if not self.official and self.validation + self.test >= 1:
            raise ValueError(f"validation + test is {self.validation + self.test:g}, expected less than 1")
        return self


class Model(Section):
    """The network."""

    name: str
    """A function of src/networks.py (article, keras_mnist, residual), or timm/NAME for a backbone of timm."""
    widths: Annotated[list[Count], Field(min_length=1)]
    """residual: channels of each stage."""
    depth: Annotated[int, Field(ge=1, le=1000)]
    """residual: blocks a stage."""
    dropout: Share
    """Share of the features that are set to zero in training."""
    pretrained: bool
    """timm: begin with pretrained weights; false draws them."""
    weights: Text
    """timm: a file of weights, or a folder with NAME.safetensors; otherwise the hub's cache, then the hub."""
    input_size: SizeOrOff
    """timm: side to which the backbone has the images resized; 0 takes the one of its own configuration."""
    head: list[Count]
    """timm: widths of the fully connected layers between backbone and classes; [] for other networks."""

    @model_validator(mode="after")
    def _network_exists(self) -> "Model":
        _refuse_home("weights", self.weights)
        if self.name not in _networks() and not (self.is_timm and self._architecture in _architectures()):
            expected = f"{', '.join(_networks())}, or timm/NAME"
            raise ValueError(f"name is {self.name!r}, expected {expected}{self._near()}")
        return self

    @property
    def is_timm(self) -> bool:
        """Whether the network is a backbone of timm."""
        return self.name.startswith(TIMM)

    @property
    def _architecture(self) -> str:
        return self.name.removeprefix(TIMM).partition(".")[0]

    def _near(self) -> str:
        known = {name: name for name in _networks()} | {name: f"{TIMM}{name}" for name in _architectures()}
        near = get_close_matches(self._architecture.lower(), known, n=1)
        return f"; did you mean {known[near[0]]}?" if near else "; https://huggingface.co/timm lists them"


class Augment(Section):
    """How each training image is changed, each by its own draw, on the device."""

    image_size: SizeOrOff
    """Side of what training sees, in pixels: smaller costs less, and larger test images are then classified better
    (Touvron et al. 2019). 0 keeps prepare.image_size."""
    flip: bool
    """Mirror it left to right with probability 1/2."""
    shift: SizeOrOff
    """Move it by up to so many pixels each way; what comes in from outside repeats the edge."""
    rotate: Annotated[float, Field(ge=0, le=180)]
    """Turn it by up to so many degrees each way."""
    crop: Annotated[float, Field(gt=0, le=1)]
    """Cut out a part of at least this share of its area, and enlarge it (random resized crop); 1 keeps the whole."""
    stretch: Annotated[float, Field(ge=1, le=4)]
    """Let the sides of the cut part differ by up to this ratio; 1 keeps it square."""
    jitter: Share
    """Change brightness, contrast, saturation and tint by up to this share each."""
    erase: Share
    """Paint over a box of 2 to 20 % of its area with probability `erase` (random erasing)."""
    mixup: Share
    """Blend it with another one of its step, and their labels, with probability `mixup`."""
    cutmix: Share
    """Paste a box of another one of its step onto it, labels by area, with probability `cutmix`."""

    @model_validator(mode="after")
    def _one_mix_an_image(self) -> "Augment":
        if self.mixup + self.cutmix > 1:
            raise ValueError(f"mixup + cutmix is {self.mixup + self.cutmix:g}, expected at most 1")
        return self


class Train(Section):
    """How the network is trained."""

    seed: Seed
    """Seed of the initial weights, of the order, of augmentation and of dropout."""
    epochs: Count
    """Passes over the training images."""
    batch: Count
    """Images a step, over all devices together; a single image left over at an epoch's end joins the step before."""
    optimizer: Literal["adam", "adamw", "muon", "sgd"]
    """adam, adamw (decay apart from the gradient), muon (adamw, but matrices step along their orthogonalized momentum)
    or sgd (Nesterov momentum of 0.9)."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The learning rate, such as 1.0e-3; the highest, where the schedule changes it."""
    schedule: Literal["constant", "wsd", "cosine", "onecycle"]
    """constant; wsd: warm-up, stable, then linear decay to 0; cosine: decay from the warm-up's end on; onecycle: linear
    decay from there on. A longer run continues where a shorter one stood: constant from its end, wsd from the end of
    its stable part, cosine and onecycle never."""
    warmup: CountOrOff
    """Epochs in which the learning rate grows from 0, step by step."""
    decay: CountOrOff
    """wsd: epochs at the end in which it falls to 0; 0 for the other schedules."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The optimizer's weight decay; norms and biases have none."""
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Largest norm of the gradient of all weights together; 0 does not limit it."""
    ema: Share
    """Evaluate and save a running average of the weights, which keeps this share of itself in each step; 0: none."""
    label_smoothing: Share
    """Share of each label that is spread evenly over the classes."""
    class_weights: bool
    """Weigh each class by its rarity, so that all count the same."""
    freeze: CountOrOff
    """timm: first epochs in which the backbone stays as it is and only the head is trained."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """timm: each layer's learning rate as a share of that of the next one, so that earlier layers change less."""
    augment: Augment
    patience: CountOrOff
    """Stop after so many epochs without a better validation accuracy; 0 never stops early."""
    snapshot_every: CountOrOff
    """Save the weights after every so many epochs; 0 saves none."""
    device: Device
    """auto: CUDA, else Apple's MPS, else the CPU."""
    precision: Literal["auto", "32", "bf16", "16"]
    """auto: mixed bf16 where the device has it (on CPUs only without portable), 16 on older CUDA devices, else 32."""
    compile: bool
    """Compile the network (torch.compile): slower to start, faster a step on most GPUs."""
    threads: Annotated[int, Field(ge=0, le=1024)]
    """Threads of the CPU; another number gives other last bits. 0 takes one for each core of the machine."""
    portable: bool
    """The same bytes on every x86-64 CPU with AVX2, for the same number of threads; false lets each do its best."""
    checkpoint_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Within an epoch, keep the state after so many minutes; 0 keeps it at the end of each epoch only."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "Train":
        if self.decay and self.schedule != "wsd":
            raise ValueError(f"decay is {self.decay}, but schedule {self.schedule} has none; set 0, or schedule: wsd")
        if self.schedule == "wsd" and self.warmup + self.decay > self.epochs:
            raise ValueError(
                f"warmup + decay is {self.warmup + self.decay}, expected at most train.epochs, {self.epochs}"
            )
        return self


class Evaluate(Section):
    """How the test images are predicted."""

    batch: Count
    """Images a step; changes the speed, and the probabilities by the noise of floating point."""
    flip: bool
    """Average the probabilities of each image and of its mirror image (test-time augmentation)."""
    sure: Annotated[float, Field(gt=0, lt=1)]
    """Share of the sure answers that shall be right: chosen on validation, a less confident answer is "not sure"; no
    answer is called sure where validation cannot show it with 95 % confidence, which takes 268 images for 0.99."""
    device: Device
    """As train.device."""


class Plot(Section):
    """What the pictures show."""

    seed: Seed
    """Draws the random test images."""
    examples: Annotated[int, Field(ge=1, le=100)]
    """Test images in the grid of predictions, and at most so many in the grid of mistakes."""


class Params(Section):
    """The whole of params.yaml."""

    download: Download
    prepare: Prepare
    split: Split
    model: Model
    train: Train
    evaluate: Evaluate
    plot: Plot

    @model_validator(mode="after")
    def _network_takes_the_images(self) -> "Params":
        name, prepared, seen = self.model.name, self.prepare.image_size, self.train.augment.image_size
        smallest = smallest_image(name, self.model.widths)
        for key, size in (("prepare.image_size", prepared), ("train.augment.image_size", seen or prepared)):
            if size < smallest:
                raise ValueError(f"{key} is {size}, but {name} expects at least {smallest}")
        if name in FIXED_SIZE and seen not in (0, prepared):
            raise ValueError(f"train.augment.image_size is {seen}, but {name} sees images of one size alone; set 0")
        return self

    @model_validator(mode="after")
    def _only_backbones_have_their_settings(self) -> "Params":
        off = {"model.input_size": 0, "model.head": [], "train.freeze": 0, "train.layer_decay": 1}
        found = {key: getattr(getattr(self, key.split(".")[0]), key.split(".")[1]) for key in off}
        if not self.model.is_timm and (unused := [f"{key}: {off[key]}" for key in off if found[key] != off[key]]):
            raise ValueError(f"model.name is {self.model.name}, which is no backbone of timm; set {', '.join(unused)}")
        return self


def smallest_image(network: str, widths: Sequence[int]) -> int:
    """Give the side, in pixels, of the smallest images that a network takes; backbones of timm resize theirs."""
    # article halves them five times, residual once for each width and leaves two pixels.
    smallest: dict[str, int] = {"article": 2**5, "keras_mnist": 10, "residual": 2 ** (len(widths) + 1)}
    return smallest.get(network, 1)


def load_params(path: Path = paths.PARAMS) -> Params:
    """Read and check the whole of params.yaml, so that a typo anywhere is found by the first stage that runs.

    Raises PipelineError with the key's name, the value found and what was expected.
    """
    try:
        return Params.model_validate(yaml12.read(path))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing; `git checkout {path}` brings the default back") from None
    except ValidationError as error:
        # One mistake at a time; an unknown key first, since it is usually the reason why another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        sentence = _explain(first["loc"], first["type"], first["msg"], first["input"])
        raise PipelineError(f"{path}: {sentence}") from None
    except ValueError as error:
        raise PipelineError(f"{path} is not valid YAML: {error}") from None


def _explain(location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    key = ".".join(str(part) for part in location if part != "[key]")
    message = message.removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "extra_forbidden":
        section, _, _ = key.rpartition(".")
        return f"{key} is unknown{_near(key)}; {section or 'the file'} has {', '.join(_keys_of(section))}"
    if kind == "missing":
        return f"{key} is missing; add it (`git show HEAD:params.yaml` shows the whole file)"
    if kind == "value_error":
        return ".".join(filter(None, [key, message]))
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        message += f", so put it in quotes: {str(value)!r}"
    return f"{key or 'the file'} is {value!r:.200} ({type(value).__name__}): {message}"


def _refuse_home(key: str, path: str) -> None:
    if path.startswith("~"):
        expanded = os.path.expanduser(path)  # noqa: PTH111  # Path's own fails where there is no such user
        raise ValueError(f"{key} is {path}, but DVC does not expand ~; write {expanded}")


def _near(key: str) -> str:
    """Suggest the key that was meant: one of that name elsewhere, one whose last word it is, or one spelt alike."""
    known = list(_keys())
    same = [name for name in known if re.search(rf"[._]{re.escape(key.rpartition('.')[2])}$", name)]
    near = get_close_matches(key, same or known, n=1, cutoff=0.0 if same else 0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def _keys(section: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _keys_of(section: str) -> list[str]:
    return sorted(name for above, _, name in (key.rpartition(".") for key in _keys()) if above == section)


@cache
def _networks() -> list[str]:
    """Read the names of our own networks from their source, since to import it takes seconds, and torch."""
    source = Path(__file__).with_name("networks.py").read_text(encoding="utf-8")
    registry = source.partition("\nNETWORKS: ")[2].partition("\n}\n")[0]
    return re.findall(r'^    "(\w+)": ', registry, re.MULTILINE)


@cache
def _architectures() -> frozenset[str]:
    """Read the names of timm's backbones from their sources, for the same reason, in 0.03 s."""
    spec = importlib.util.find_spec("timm")
    assert spec
    assert spec.origin
    files = sorted(Path(spec.origin).with_name("models").rglob("*.py"))
    sources = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return frozenset(re.findall(r"^@register_model\s+def (\w+)", sources, re.MULTILINE))
