"""The softmax and the policy loss compiled for base, AVX2 and AVX-512 give the same bits: a result does not depend on
the machine. (The library takes the widest set there is, so each is compiled here on its own; the merges can be limited
at run time, see test_delta_merge.)"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from m2rl_kernels.policy_loss import KINDS, KLS, STATS, _Arguments

ROOT = Path(__file__).parents[2]
CMAKE = (ROOT / "CMakeLists.txt").read_text()
NEEDS = {"base": set(), "avx2": {"avx2", "fma", "bmi2"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
SOURCE = """
#define M2RL_ISA own
#include "softmax_blocks.isa.h"
#undef M2RL_JOIN
#undef M2RL_TABLE
#include "policy_loss_blocks.isa.h"
extern "C" auto* row() { return m2rl::softmax_blocks_own.row; }
extern "C" auto* tokens() { return m2rl::policy_loss_blocks_own.tokens; }
extern "C" auto* sum() { return m2rl::policy_loss_blocks_own.sum; }
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """{instruction set: library}, compiled with CMakeLists.txt's own flags; those this machine can run."""
    compiler, cpu = shutil.which("c++") or shutil.which("g++"), Path("/proc/cpuinfo")
    has = set(cpu.read_text().split()) if cpu.exists() else set()
    names = [name for name, needs in NEEDS.items() if needs <= has]
    if compiler is None or len(names) < 2:
        pytest.skip("a C++ compiler and an x86 processor with AVX2 are needed to compare instruction sets")
    flags = re.search(r"set\(M2RL_CXX_FLAGS (.*)\)", CMAKE)[1].split()
    folder = tmp_path_factory.mktemp("isa")
    (folder / "own.cpp").write_text(SOURCE)
    running = {}
    for name in names:
        wide = re.search(rf"set\(M2RL_ISA_FLAGS_{name} (.*)\)", CMAKE)[1].replace('""', "").split()
        command = [compiler, "-std=c++17", "-shared", "-fPIC", *flags, *wide, f"-I{ROOT / 'csrc'}", "own.cpp"]
        running[name] = subprocess.Popen([*command, "-o", f"{name}.so"], cwd=folder)
    assert not any(process.wait() for process in running.values())
    return {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in names}


def pointer(library, name, restype, *argtypes):
    getter = getattr(library, name)
    getter.restype = ctypes.c_void_p
    return ctypes.CFUNCTYPE(restype, *argtypes)(getter())


def assert_same(results):
    first, *others = results.values()
    for other in others:
        for a, b in zip(first, other):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0, 1e30])
def test_softmax_rows(libraries, scale):
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 15, 16, 17, 31, 32, 33, 100, 220, 2047, 2048, 4095, 4096):
        z, results = torch.randn(n, generator=g) * scale, {}
        for name, library in libraries.items():
            row = pointer(
                library,
                "row",
                None,
                *(ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64, ctypes.c_float),
                *(ctypes.c_void_p,) * 3,
            )
            grad, logp, plogp = torch.zeros(n), torch.zeros(1), torch.zeros(1)
            row(z.data_ptr(), n, 0.7, n // 3, -1.3, grad.data_ptr(), logp.data_ptr(), plogp.data_ptr())
            results[name] = (grad, logp, plogp)
        assert_same(results)
        assert results["base"][1].isfinite()


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_blocks(libraries, kind, spread):
    g = torch.Generator().manual_seed(0)
    for n in (1, 15, 16, 17, 100, 512):
        logp, behaviour, advantage, weight, old, ref, entropy, ratio = torch.randn(8, n, generator=g).mul(spread)
        results = {}
        for kl, (name, library) in ((kl, item) for kl in range(len(KLS)) for item in libraries.items()):
            vectors = [x.data_ptr() for x in (logp, behaviour, advantage, weight, old, ref, entropy)]
            grad_logp, grad_entropy, slope, table = (torch.zeros(s) for s in (n, n, n, len(STATS) * 512))
            numbers = (KINDS.index(kind), kl, 0.8, 1.28, 3.0, 2.0, 0.1, 0.1)
            gradients = (grad_logp.data_ptr(), grad_entropy.data_ptr())
            arguments = _Arguments(n, 0, 1, *vectors, None, None, *gradients, None, None, *numbers)
            tokens = pointer(
                library, "tokens", None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, *(ctypes.c_void_p,) * 3
            )
            given = (ratio.data_ptr(), slope.data_ptr()) if kind == "gspo" else (None, None)
            tokens(ctypes.addressof(arguments), 0, n, *given, table.data_ptr())
            add = pointer(library, "sum", ctypes.c_float, ctypes.c_void_p, ctypes.c_int)
            total = torch.tensor([add(table[3 * 512 :].data_ptr(), n)])
            results[name] = (*results.get(name, ()), grad_logp, grad_entropy, slope, table, total)
        assert_same(results)
        assert grad_logp.any() or kind == "gspo"
