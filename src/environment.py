"""The machine: what of it changes the bits of a result, how that is settled, and its record beside the results."""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from src.params import Train
from src.runtime import PipelineError, whole, write_json

PACKAGES = (
    "dvc dvclive filelock jinja2 kaggle lightning-fabric matplotlib mlxtend numpy onnx onnxruntime onnxscript pandas "
    "pillow pillow-heif pydantic requests ruamel-yaml safetensors scikit-learn scipy simplejpeg timm torch tqdm"
).split()
"""What the pipeline itself uses, as in requirements.in."""

# MKL takes its code by the CPU's maker: off Intel it ignores any branch of MKL_CBWR but COMPATIBLE, so that products of
# matrices, exp and log differ (measured on AMD and emulated Intel, and in Intel's oneMKL developer guide).
# Its square root differs even so, which is why nothing here computes one in torch: Adam is fused.
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
"""The variables that torch 2.14 and its libraries read before they first compute."""

_MATH = ("ATEN_", "DNNL_", "KMP_", "MKL_", "ONEDNN_")
"""How the names of variables begin that change how torch computes on a CPU."""

_VECTORS = re.compile("amx|avx|bf16|dot|fma|fp16|i8mm|neon|sme|sve")
"""How the names of instruction sets begin that libraries choose their arithmetic by (torch.cpu.get_capabilities)."""

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
"""Settings of glibc's allocator (mallopt(3))."""


def settle(params: Train) -> None:
    """Fix threads, memory and, where the params ask for portable bits, the instruction set; before torch computes.

    Raises PipelineError on an x86-64 CPU that lacks AVX2. Elsewhere, portable bits mean a fixed number of threads.
    """
    if params.portable and platform.machine() in ("x86_64", "AMD64"):
        os.environ |= PORTABLE
        if (found := torch.backends.cpu.get_cpu_capability()) != "AVX2":
            raise PipelineError(
                f"train.portable needs a CPU with AVX2, this one has {found}; set train.portable: false"
            )
    torch.set_num_threads(params.threads or os.cpu_count() or 1)
    _keep_freed_memory()


def describe(device: torch.device) -> dict[str, Any]:
    """Describe what a result is made with; no time and no host's name: the same machine gives the same bytes."""
    cuda, found = device.type == "cuda", torch.cpu.get_capabilities()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpu": found.get("cpu_name") or platform.processor() or platform.machine(),
        "cpu_model": _cpu_model(),
        "instruction_sets": sorted(name for name, there in found.items() if there is True and _VECTORS.match(name)),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "math": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_MATH)},
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _driver() if cuda else None,
    }


def keep_record(path: Path, machine: dict[str, Any], model: str) -> None:
    """Write which machine made a model, by its SHA-256; the record of the same model, from any machine, stays.

    The file is in git and no output to DVC: portable results that are made again on another CPU leave no change.
    """
    try:
        known = json.loads(path.read_bytes())["model"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        known = None
    if known != model:
        with whole(path) as (part,):
            write_json(part, {"model": model, **machine})


def bits(record: dict[str, Any], params: Train) -> dict[str, Any]:
    """Give the part of a record on which the weights' bits depend; portable ones do not on the kind of CPU."""
    keys = {"isa", "threads", "math", "device", "gpu", "cuda", "cudnn", "driver"}
    keys |= set() if params.portable else {"cpu", "cpu_model", "instruction_sets"}
    packages = {name: record["packages"][name] for name in ("torch", "lightning-fabric")}
    return {key: record[key] for key in sorted(keys)} | packages


def _keep_freed_memory() -> None:
    """Let the process keep what it frees; the system would clear each page again, a fifth of a step of our networks.

    glibc gives a large block back as soon as it is free. Other C libraries have no such setting.
    """
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_model() -> str:
    """Name the kind of CPU by its maker's numbers, since virtual machines call many kinds `AMD EPYC` and no more."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    except OSError:  # not Linux; Windows has the numbers in what it calls the processor
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    keys = {"vendor_id": "", "cpu family": "family ", "model": "model ", "CPU implementer": "implementer "}
    return ", ".join(f"{words}{facts[key]}" for key, words in (keys | {"CPU part": "part "}).items() if key in facts)


def _driver() -> str | None:
    """The version of NVIDIA's driver; Linux tells it in a file."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None
