"""csrc/*.cu run on the host: built over cuda_on_host/cuda_runtime.h, and called wherever the CPU library would be."""

import ctypes
import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from m2rl_kernels import native
from m2rl_kernels.weight_sync import COPY, TILE

CSRC = Path(__file__).parents[2] / "csrc"
LAUNCH = re.compile(r"(\w+(?:<[^<>()]*>)?)\s*<<<(.*?)>>>\(", re.DOTALL)
DYNAMIC_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]


def in_cpp(source: str) -> str:
    """CUDA's two pieces of grammar that C++ lacks: launches, and shared memory of a size given at the launch."""
    source = DYNAMIC_SHARED.sub(r"\1* const \2 = reinterpret_cast<\1*>(emulated::dynamic_shared);", source)
    return LAUNCH.sub(r"emulated::Launch{\2}.run(\1, ", source)


def build(folder: Path) -> ctypes.CDLL:
    """Every csrc/*.cu as one library in `folder`."""
    includes = [f"-I{Path(__file__).parent / 'cuda_on_host'}", f"-I{CSRC}"]
    objects = []
    for path in sorted(CSRC.glob("*.cu")):
        source = folder / f"{path.stem}.cpp"
        source.write_text(f'#line 1 "{path}"\n{in_cpp(path.read_text())}')
        objects.append(source.with_suffix(".o"))
        subprocess.run(["c++", *FLAGS, *includes, "-c", source, "-o", objects[-1]], check=True)
    library = folder / "libm2rl_cuda_on_host.so"
    subprocess.run(["c++", "-shared", *objects, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class InPlaceOfCpu:
    """The CPU library with the CUDA kernels behind those of its functions that have one; `calls` counts them."""

    def __init__(self, kernels: ctypes.CDLL):
        self._kernels, self._cpu, self.calls = kernels, native.cpu(), 0

    def __getattr__(self, name: str) -> Any:
        if name in ("m2rl_merge_select", "m2rl_merge_sums", "m2rl_merge_apply"):
            return lambda *arguments: self._run(name, *arguments[:-1])  # a stream in place of the number of threads
        if name in ("m2rl_sync_copy", "m2rl_sync_checksum"):
            return lambda *arguments: self._sync(name, *arguments[:-1])
        return self._pack if name == "m2rl_pack_rows" else getattr(self._cpu, name)

    def _run(self, name: str, *arguments: Any) -> int:
        self.calls += 1
        return getattr(self._kernels, f"{name}_cuda")(*arguments, ctypes.c_void_p(0))

    def _sync(self, name: str, copies: ctypes.c_void_p, n: ctypes.c_int64, *rest: Any) -> None:
        table = np.frombuffer((ctypes.c_char * (n.value * COPY.itemsize)).from_address(copies.value), COPY)
        tiles = -(-(table["rows"] * table["columns"]) // TILE)
        first = np.cumsum(tiles) - tiles
        status = self._run(name, copies, ctypes.c_void_p(first.ctypes.data), n, ctypes.c_int64(int(tiles.sum())), *rest)
        assert status == 0

    def _pack(self, *arguments: Any) -> None:
        *fields, n, source, target, lengths = arguments
        rows = (ctypes.c_int64 * n.value).from_address(lengths.value)
        first = (ctypes.c_int64 * n.value)(*itertools.accumulate(rows[:-1], initial=0))
        tokens = ctypes.c_int64(sum(rows))
        assert self._run("m2rl_pack_rows", *fields, tokens, n, source, target, lengths, first) == 0
