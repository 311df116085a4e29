"""Settings of the whole process. torch, numpy and onnxruntime read them when they are loaded, so they come before.

Each is an environment variable, for the processes that this one starts; one that the user has set stays as it is.
"""

import os

SETTINGS = {
    # OpenMP's threads spin while they wait at a barrier. Of two trainings on two cores each took five times as long.
    "OMP_WAIT_POLICY": "passive",
    # log, exp and power of numpy, and the products and inverses of its OpenBLAS, differ between CPUs in the last bits
    # (measured): so code that any x86-64 CPU with AVX2 has, and one thread, whatever the number of cores.
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Nehalem",
    "OPENBLAS_NUM_THREADS": "1",
    # onnxruntime 1.31 would look up a host and write to the home folder.
    "ORT_DISABLE_TELEMETRY": "1",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
