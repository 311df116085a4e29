"""Pretrained backbones of timm (Wightman 2019), with the normalisation and the input size that each was trained with.

timm is imported only when a backbone is asked for, since that takes seconds.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from src.params import TIMM, Model
from src.runtime import PipelineError, home, watch


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier.

    mean, deviation: of each channel, 0 to 255; size: side of its images, in px; features: how many numbers it gives for
    an image.
    """

    module: nn.Module
    mean: list[float]
    deviation: list[float]
    size: int
    features: int


def make_backbone(name: str, *, channels: int, size: int = 0, generator: Generator | None = None) -> Backbone:
    """Build a backbone as timm does, drawing from the generator, for images of `size` px, or else of its own size.

    Its dropout and its stochastic depth are off: they would draw from hidden state. Raises PipelineError for a name
    that timm does not know, and for images that the backbone cannot take.
    """
    import timm

    config = _config(name)
    size = size or config.input_size[-1]
    try:
        with _seeded(generator.initial_seed() if generator else 0):
            module = timm.create_model(_known(name), num_classes=0, in_chans=channels, **_fixed(config, size))
        for part in module.modules():
            for rate in {"p"} if isinstance(part, nn.modules.dropout._DropoutNd) else {"drop_prob", "drop_rate"}:
                if isinstance(getattr(part, rate, None), float):
                    setattr(part, rate, 0.0)
        with torch.no_grad():  # asked rather than looked up: not every backbone says rightly how many these are
            (features,) = module.eval()(torch.zeros(1, channels, size, size))[0].shape
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise PipelineError(f"{name} takes no images of {channels} x {size} x {size} ({_reason(error)})") from None
    mean, deviation = ([255 * x for x in values] for values in (config.mean, config.std))
    if channels == 1:
        mean, deviation = [sum(mean) / 3], [sum(deviation) / 3]
    return Backbone(module, mean, deviation, size, features)


def pretrained_weights(params: Model, module: nn.Module, *, channels: int, size: int) -> dict[str, Tensor]:
    """Read the weights of `module` from model.weights, a file or a folder of NAME.safetensors, or from the hub's cache.

    A file is as on the hub, with a classifier for any number of classes, or with none; what the cache lacks, the hub
    gives. Raises PipelineError with the one file to fetch where the weights are nowhere, or with the file that holds
    others.
    """
    import timm

    name, place, config = params.name, Path(params.weights), _config(params.name)
    file = place if place.is_file() or place.suffix else place / f"{_known(name)}.safetensors"
    if file == place and not file.exists():
        raise PipelineError(f"model.weights is {place}, but there is no such file; `data/weights` takes the hub's")
    watch(file)  # one that changes, or appears, during the run would be in the lock, but not in the model
    source = file if file.exists() else _from_hub(name, config, file)
    wanted = module.state_dict().keys()
    try:
        state = timm.models.load_state_dict(str(source), weights_only=True)
        classes = _count_classes(state, config, wanted)
        overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0}
        with _seeded(0):
            # For as many classes as the file has: only then timm insists that all weights be there.
            whole = timm.create_model(
                _known(name),
                pretrained=True,
                num_classes=classes,
                in_chans=channels,
                pretrained_cfg_overlay=overlay,
                **_fixed(config, size),
            )
        found = whole.state_dict()
        return {key: found[key] for key in wanted}
    except Exception as error:  # of safetensors, of pickle and of torch: a family for each
        raise PipelineError(f"{source} does not hold the weights of {name} ({_reason(error)})") from None


def layer_groups(backbone: nn.Module, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group a backbone's weights by depth; `lr_scale` is a group's share of the learning rate (Clark et al. 2020).

    The layer after its last one is the head, whose share is 1.
    """
    from timm.optim._param_groups import param_groups_layer_decay

    groups = param_groups_layer_decay(backbone, weight_decay, layer_decay=layer_decay)
    return [{**group, "lr_scale": layer_decay * group["lr_scale"]} for group in groups]


def _known(name: str) -> str:
    return name.removeprefix(TIMM)


def _config(name: str) -> Any:
    """timm's record of a backbone: where its weights are, and what images they were trained on."""
    import timm

    known = _known(name)
    try:
        return timm.models.get_pretrained_cfg(known, allow_unregistered=False)
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{known.partition('.')[0]}.*")) or "none"
        raise PipelineError(f"model.name is {name!r}, but timm knows no such weights; it knows {tags}") from None


def _fixed(config: Any, size: int) -> dict[str, Any]:
    """Tell a backbone that is made for one size of images, as most transformers are, which one that is."""
    return {"img_size": size} if config.fixed_input_size else {}


def _from_hub(name: str, config: Any, file: Path) -> Path:
    """Find a backbone's weights in the hub's cache, or fetch them there. Raises PipelineError that names `file`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    address, reason = config.url, "timm names none there"
    if repository := config.hf_hub_id:
        remote = config.hf_hub_filename or "model.safetensors"
        address = f"https://huggingface.co/{repository}/resolve/main/{remote}"
        if isinstance(cached := try_to_load_from_cache(repository, remote), str):
            return Path(cached)
        try:
            # Without network this fails at once, where a download tries for minutes (huggingface_hub 2.4).
            get_hf_file_metadata(hf_hub_url(repository, remote))
            return Path(hf_hub_download(repository, remote))
        except Exception as error:  # of the hub, of its HTTP client and of the system: a family for each
            reason = _reason(error)
    raise PipelineError(
        f"the weights of {name} are neither in {home() / file} nor in the hub's cache, and the hub does not give them "
        f"({reason}); fetch {address} and save it as {home() / file}, or set model.pretrained: false"
    )


def _count_classes(state: dict[str, Tensor], config: Any, wanted: Collection[str]) -> int:
    """Tell for how many classes a file has a classifier; one in a foreign format has that of timm's record."""
    classifier = config.classifier if isinstance(config.classifier, str) else (config.classifier or [""])[0]
    if (weight := state.get(f"{classifier}.weight")) is not None:
        return len(weight)
    return 0 if state.keys() >= set(wanted) else int(config.num_classes)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, from which timm draws, and put its state back."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
