"""Builds csrc with CMake into kernels/m2rl_kernels/: libm2rl_cpu.so always, libm2rl_cuda.so where nvcc is found.

The libraries link neither torch nor Python, so the build needs no torch, no GPU, and one wheel serves every CPython 3.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        sys.exit(
            "m2rl needs a C++17 compiler to build its CPU kernels: install one (Debian/Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install) and run pip again."
        )
    return compiler


def find_nvcc() -> str | None:
    if os.environ.get("M2RL_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidate = Path(home) / "bin" / "nvcc"
    return str(candidate) if candidate.exists() else shutil.which("nvcc")


class CMakeBuild(build_ext):
    def run(self):
        compiler, nvcc = find_compiler(), find_nvcc()
        out = ROOT / "kernels" / "m2rl_kernels" if self.inplace else Path(self.build_lib).resolve() / "m2rl_kernels"
        # A fixed build directory makes a second install incremental; the generator's program is passed explicitly
        # because CMake caches its path, which under pip's build isolation points into an environment that is gone the
        # next time.
        build = ROOT / "build" / ("cmake-cuda" if nvcc else "cmake-cpu")
        build.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DM2RL_OUT={out}",
            f"-DM2RL_CUDA={'ON' if nvcc else 'OFF'}",
            "--fresh",
        ]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        print(
            f"m2rl: compiling the CPU library with {compiler}; CUDA library: "
            f"{'with ' + nvcc if nvcc else 'skipped (no nvcc found)'}",
            flush=True,
        )
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel", str(min(os.cpu_count() or 1, 8))], check=True)
        except FileNotFoundError:
            sys.exit("m2rl needs cmake to build its kernels: pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"m2rl: the native build failed (exit status {error.returncode}); the compiler's own message is above. "
                "It needs a C++17 compiler (Debian/Ubuntu: apt install g++); M2RL_CUDA=0 skips the CUDA library."
            )

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries are plain C ABI: any CPython 3 on this platform can load them."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("m2rl_kernels._csrc", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
