"""Loads m2rl's two native libraries with ctypes: addresses and sizes in, a status out. Free of torch.

`cpu()` gives libm2rl_cpu.so; `cuda()` gives libm2rl_cuda.so, which is a file of its own because it cannot load on a
machine without a driver. Both are built by `pip install .` from csrc/; csrc/ops.h is the table of their functions.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

ABI_VERSION = 4  # M2RL_ABI_VERSION in csrc/ops.h
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}  # M2rlDtype in csrc/ops.h
_HERE = Path(__file__).parent


def _load(name: str, version_symbol: str, hint: str) -> ctypes.CDLL:
    path = _HERE / name
    if not path.exists():
        raise ImportError(f"{path} is missing: {hint}")
    library = ctypes.CDLL(str(path))
    version = getattr(library, version_symbol)()
    if version != ABI_VERSION:
        raise ImportError(
            f"{path} has ABI version {version}, this m2rl_kernels needs {ABI_VERSION}: "
            "run `pip install -e .` (or `pip install .`) again"
        )
    return library


@functools.cache
def cpu() -> ctypes.CDLL:
    """The CPU library. ImportError with the command that builds it if it is absent or stale."""
    return _load("libm2rl_cpu.so", "m2rl_abi_version", "build it with `pip install -e .` in the m2rl folder")


@functools.cache
def cuda() -> ctypes.CDLL:
    """The CUDA library. ImportError with the command that builds it if it is absent or stale."""
    return _load(
        "libm2rl_cuda.so",
        "m2rl_cuda_abi_version",
        "install the CUDA toolkit (nvcc), then build it with `pip install -e .` in the m2rl folder",
    )
