"""The record of the machine, and what of it counts."""

import os
import platform
import re
import socket
import subprocess
import sys

import pytest
import torch

from src import environment
from src.environment import bits, describe, settle
from src.params import load_params
from src.runtime import PipelineError
from tests.helpers import ROOT

CPU = torch.device("cpu")
x86_only = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="portable bits are of x86-64 CPUs")


def test_the_record_names_the_versions_that_the_pipeline_uses() -> None:
    needed = (ROOT / "requirements.in").read_text(encoding="utf-8").split("# the tests and the checks")[0]
    pinned = re.findall(r"^([a-z0-9-]+)[=>]=", needed, flags=re.MULTILINE)
    assert sorted(pinned) == sorted(environment.PACKAGES)
    assert describe(CPU)["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_the_record_is_the_same_at_any_time_and_names_no_host() -> None:
    first = describe(CPU)
    assert describe(CPU) == first
    assert socket.gethostname() not in str(first)
    assert first["threads"] == torch.get_num_threads()
    assert first["cpu"]


def test_the_number_of_threads_is_the_one_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        for asked, expected in ((3, 3), (1, 1), (0, os.cpu_count())):
            settle(load_params().train.model_copy(update={"threads": asked}))
            assert describe(CPU)["threads"] == expected
    finally:
        torch.set_num_threads(before)


@x86_only
@pytest.mark.parametrize(("portable", "isa"), [(True, "AVX2"), (False, "DEFAULT")])
def test_portable_settles_the_instruction_set(portable: bool, isa: str) -> None:
    # ATEN_CPU_CAPABILITY=default stands for whatever the machine would do on its own.
    code = f"""
import torch
from src.environment import *
from src.params import load_params
settle(load_params().train.model_copy(update={{"portable": {portable}}}))
print(describe(torch.device("cpu"))["isa"])"""
    clean = {name: value for name, value in os.environ.items() if name not in environment.PORTABLE}
    clean |= {} if portable else {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == isa


@x86_only
def test_a_cpu_without_avx2_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(PipelineError, match=r"needs a CPU with AVX2, this one has DEFAULT; set train\.portable: false"):
        settle(load_params().train)


@pytest.mark.parametrize(
    ("key", "counts"),
    [("isa", True), ("threads", True), ("math", True), ("gpu", True), ("python", False), ("system", False)],
)
def test_checkpoints_depend_on_what_changes_bits_and_on_nothing_else(key: str, counts: bool) -> None:
    params, record = load_params().train, describe(CPU)
    assert (bits(record | {key: "another"}, params) != bits(record, params)) is counts


@pytest.mark.parametrize(("package", "counts"), [("torch", True), ("matplotlib", False)])
def test_of_the_packages_only_those_that_compute_count(package: str, counts: bool) -> None:
    params, record = load_params().train, describe(CPU)
    other = record | {"packages": record["packages"] | {package: "0"}}
    assert (bits(other, params) != bits(record, params)) is counts


@pytest.mark.parametrize("portable", [True, False])
def test_the_kind_of_cpu_counts_unless_bits_are_portable(portable: bool) -> None:
    params, record = load_params().train.model_copy(update={"portable": portable}), describe(CPU)
    assert (bits(record | {"cpu": "another"}, params) != bits(record, params)) is not portable


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_that_was_freed_is_used_again_without_asking_the_system() -> None:
    code = """
import resource
import torch
from src.environment import settle
from src.params import load_params
settle(load_params().train)
def faults():
    torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    before = faults()
print(faults() - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
