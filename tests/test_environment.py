"""The record of the machine, and what of it counts."""

import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import src
from src import environment
from src.environment import bits, describe, keep_record, settle
from src.params import load_params
from src.runtime import PipelineError
from tests.helpers import ROOT

CPU = torch.device("cpu")
FIRST, OTHER = {"cpu_model": "family 25"}, {"cpu_model": "family 26"}
x86_only = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="portable bits are of x86-64 CPUs")


@pytest.mark.parametrize(
    ("former", "kept"),
    [
        ({"model": "a", **FIRST}, FIRST),  # the same bytes again, from another machine
        ({"model": "b", **FIRST}, OTHER),
        ([FIRST], OTHER),  # as it once was
        (None, OTHER),
    ],
)
def test_the_record_names_the_machine_that_made_the_model_first(
    tmp_path: Path, former: object, kept: dict[str, str]
) -> None:
    file = tmp_path / "environment.json"
    if former:
        file.write_text(json.dumps(former), encoding="utf-8")
    keep_record(file, OTHER, "a")
    assert json.loads(file.read_bytes()) == {"model": "a", **kept}


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


@pytest.mark.parametrize("key", ["cpu", "cpu_model", "instruction_sets"])
@pytest.mark.parametrize("portable", [True, False])
def test_the_kind_of_cpu_counts_unless_bits_are_portable(portable: bool, key: str) -> None:
    params, record = load_params().train.model_copy(update={"portable": portable}), describe(CPU)
    assert (bits(record | {key: "another"}, params) != bits(record, params)) is not portable


def test_portable_checkpoints_know_nothing_of_the_cpu() -> None:
    params = load_params().train.model_copy(update={"portable": True})
    known = {"isa", "threads", "math", "device", "gpu", "cuda", "cudnn", "driver", "torch", "lightning-fabric"}
    assert bits(describe(CPU), params).keys() == known


ZEN_3 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu avx2

processor\t: 1
model\t\t: 7
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (ZEN_3, "AuthenticAMD, family 25, model 1"),
        (ARM, "implementer 0x41, part 0xd40"),
        (None, "Intel64 Family 6 Model 142 Stepping 10, GenuineIntel"),
    ],
)
def test_the_record_says_which_kind_of_cpu_it_is(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, expected: str
) -> None:
    def read(_path: Path, **_options: str) -> str:
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6 Model 142 Stepping 10, GenuineIntel")
    assert environment._cpu_model() == expected


@x86_only
def test_the_record_names_the_instruction_sets_of_arithmetic() -> None:
    found = describe(CPU)["instruction_sets"]
    assert {"avx2", "fma3"} <= set(found)
    assert found == sorted(found)
    assert not {"aes", "clflush", "sha", "l2_cache_size", "num_physical_cores"} & set(found)


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


# --- the settings of the process

ENTRIES = [
    f"{folder}.{file.stem}"
    for folder in ("stages", "tools", "benchmarks", "app")
    for file in sorted((ROOT / folder).glob("[!_]*.py"))
]
IMPORT = """
import importlib, os, sys
module, *settings = sys.argv[1:]
class Watch:
    def find_spec(self, name, *rest):
        if name in ("torch", "numpy", "sklearn", "onnxruntime"):  # each reads some of them, only when it is loaded
            missing = set(settings) - set(os.environ)
            sys.exit(f"{module} imports {name} without {missing}" if missing else 0)
sys.meta_path.insert(0, Watch())
importlib.import_module(module)
"""


def without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in src.SETTINGS}


@pytest.mark.parametrize("module", ENTRIES)
def test_every_way_into_the_project_settles_the_process_before_a_library_reads_it(module: str) -> None:
    command = [sys.executable, "-c", IMPORT, module, *src.SETTINGS]
    done = subprocess.run(command, cwd=ROOT, env=without_settings(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("own", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_a_setting_of_the_users_own_stays(own: dict[str, str], expected: str) -> None:
    command = [sys.executable, "-c", "import os, src; print(os.environ['OMP_WAIT_POLICY'])"]
    done = subprocess.run(command, cwd=ROOT, env=without_settings() | own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@x86_only
def test_numpy_computes_with_what_every_cpu_has() -> None:
    code = """
import src
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from threadpoolctl import threadpool_info
print([name for name in __cpu_dispatch__ if __cpu_features__[name] and name != "X86_V3"])
print([(pool["architecture"], pool["num_threads"]) for pool in threadpool_info()])"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=without_settings(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[('Nehalem', 1)]"]
