"""params.yaml as frozen, typed sections: the manual of every knob, and the only reader of that file."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from src import paths
from src.runtime import PipelineError

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Device = Literal["auto", "cuda", "mps", "cpu"]


class Section(BaseModel):
    """No unknown key, no missing key, no silent conversion, no change after reading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Download(Section):
    """Where the images come from."""

    source: Literal["sample", "kaggle", "folder"]
    """sample: 5,000 MNIST digits, without network; kaggle: a Kaggle data set; folder: your own images."""
    dataset: str
    """kaggle: owner/slug, as in the data set's address; else unused."""
    version: CountOrOff
    """kaggle: the data set's version, 1 or more; else unused."""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """kaggle: the archive's SHA-256 as 64 hexadecimal digits; '' accepts any and prints the one found."""
    path: str
    """folder: a folder of class folders, or of one zip, or a zip: data/inbox, or an absolute path anywhere."""

    @model_validator(mode="after")
    def _kaggle_is_pinned(self) -> "Download":
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
    include: str
    """Which files of the archive to use, as a shell pattern on the path inside it, without regard to case; '*' uses
    all."""
    classes: dict[str, str | None]
    """Class folder: name of the class; null leaves the folder, and all below it, out; folders not named here keep their
    name."""
    class_level: CountOrOff
    """Where folders lie in folders, which are the classes: 1 the first below those that hold everything and those of
    train and test, 2 the next, and so on. 0 finds it where only one reading is possible, and else stops."""
    max_rejected: Share
    """Largest share of files that may be broken before the stage fails."""


class Split(Section):
    """Which images train, which choose, which judge."""

    seed: Seed
    """Another seed draws another split."""
    validation: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images to choose by (of the official training images where official is true)."""
    test: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images to judge by; unused where official is true."""
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
    depth: Count
    """residual: blocks a stage."""
    dropout: Share
    """Share of the features that are set to zero in training."""
    pretrained: bool
    """timm: begin with pretrained weights; false draws them."""
    weights: str
    """timm: a file of weights, or a folder with NAME.safetensors; else the hub's cache, or the hub."""
    input_size: CountOrOff
    """timm: side to which the backbone has the images resized; 0 takes the one of its own configuration."""
    head: list[Count]
    """timm: widths of the fully connected layers between backbone and classes."""


class Augment(Section):
    """How each training image is changed, each by its own draw, on the device."""

    image_size: CountOrOff
    """Side of what training sees, in pixels: smaller costs less, and larger images are then known better (Touvron et
    al. 2019). 0 keeps prepare.image_size."""
    flip: bool
    """Mirror it left to right with probability 1/2."""
    shift: CountOrOff
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
    """Images a step, over all devices together."""
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
    """wsd: epochs at the end in which it falls to 0; else unused."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The optimizer's weight decay; norms and biases have none."""
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Largest norm of the gradient of all weights together; 0 does not limit it."""
    ema: Share
    """Judge and keep a running average of the weights, which takes over this share of itself in each step; 0: none."""
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
    threads: CountOrOff
    """Threads of the CPU; another number gives other last bits. 0 takes one for each core of the machine."""
    portable: bool
    """The same bytes on every x86-64 CPU with AVX2, for the same number of threads; false lets each do its best."""
    checkpoint_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Within an epoch, keep the state after so many minutes; 0 keeps it at the end of each epoch only."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "Train":
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
    sure: Annotated[float, Field(gt=0, le=1)]
    """Share of the sure answers that shall be right: chosen on validation, a less confident answer is "not sure"."""
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


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 and DVC do, which also writes such: PyYAML's YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """Read YAML as params.yaml is read. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def load_params(path: Path = paths.PARAMS) -> Params:
    """Read and check the whole of params.yaml, so that a typo anywhere is found by the first stage that runs.

    Raises PipelineError with the key's name, the value found and what was expected.
    """
    try:
        return Params.model_validate(parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing; `git checkout {path}` brings the default back") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        # One mistake at a time; an unknown key first, since it is usually the reason why another one is missing.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise PipelineError(_explain(path, first["loc"], first["type"], first["msg"], first["input"])) from None


def _explain(path: Path, location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    key = ".".join(str(part) for part in location) or "the file"
    message = message.removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "extra_forbidden":
        return f"{path}: {key} is unknown; known in its place: {', '.join(_siblings(location))}"
    if kind == "missing":
        return f"{path}: {key} is missing; add it (`git show HEAD:params.yaml` shows the whole file)"
    if kind == "value_error":
        return f"{path}: {key}.{message}"
    return f"{path}: {key} is {value!r} ({type(value).__name__}): {message}"


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Params
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return sorted(model.model_fields)
