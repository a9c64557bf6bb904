"""The Triton kernels of policy_loss and group_advantages: interpreted against the CPU paths, and compiled for each GPU
generation without a GPU. What they do on a GPU: tests/gpu/kernels/test_small_kernels.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

REGISTERS_PER_THREAD = 255


def test_interpreted_kernels_agree_with_the_cpu_paths():
    script = Path(__file__).parents[1] / "support" / "interpret_small_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr


def policy_loss_source(kind: str, rows: int = 8):
    """rows: segments and their total, rounded up to a power of two."""
    from m2rl_kernels.policy_loss import STATS
    from m2rl_kernels.policy_loss_triton import BLOCK, COLUMNS, NUM_WARPS, policy_loss_kernel

    types = dict.fromkeys(
        [
            "logp",
            "behaviour",
            "advantage",
            "weight",
            "old",
            "ref",
            "entropy",
            "grad_logp",
            "grad_entropy",
            "partial",
            "loss",
            "stats",
        ],
        "*fp32",
    ) | {"cu_seqlens": "*i32", "segment": "*i64", "ticket": "*i32", "N": "i32", "n_segments": "i32"}
    types |= dict.fromkeys(["eps_low", "eps_high", "dual_clip", "tis_cap", "kl_coef", "entropy_coef"], "fp32")
    constants = {
        "KIND": kind,
        "KL": "k3",
        "BEHAVIOUR": True,
        "OLD": True,
        "REF": True,
        "ENTROPY": True,
        "ENTROPY_GRAD": True,
        "SEGMENT": True,
        "DUAL": True,
        "TIS": True,
        "ROWS": rows,
        "BLOCK": BLOCK,
        "STATS": len(STATS),
        "CHUNK": max(4096 // (rows * COLUMNS), 1),
    }
    return policy_loss_kernel, types, constants, NUM_WARPS


def advantages_source(mode: str):
    from m2rl_kernels.advantages_triton import BLOCK, NUM_WARPS, TOKENS, group_advantages_kernel

    types = {
        "rewards": "*fp32",
        "offsets": "*i64",
        "cu_seqlens": "*i32",
        "batch_std": "*fp64",
        "adv": "*fp32",
        "mean_out": "*fp32",
        "std_out": "*fp32",
        "live": "*i1",
        "token_adv": "*fp32",
        "eps": "fp32",
    }
    return (
        group_advantages_kernel,
        types,
        {"MODE": mode, "BROADCAST": True, "BLOCK": BLOCK, "TOKENS": TOKENS},
        NUM_WARPS,
    )


def batch_std_source():
    from m2rl_kernels.advantages_triton import batch_std_kernel

    return batch_std_kernel, {"rewards": "*fp32", "out": "*fp64", "S": "i32"}, {"BLOCK": 1024}, 8


def resources(kernel, types, constants, num_warps, capability) -> dict[str, int]:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    ptx = compiled.asm["ptx"]
    assert f"sm_{capability}" in ptx
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"m2rl_small_{os.getpid()}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    try:
        text = subprocess.run(
            [str(cuobjdump), "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    finally:
        path.unlink()
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "name,source",
    [
        *((f"policy_loss {k}", lambda k=k: policy_loss_source(k)) for k in ("grpo", "gspo", "cispo", "reinforce")),
        *((f"policy_loss of {r} rows", lambda r=r: policy_loss_source("grpo", r)) for r in (2, 32)),
        *((f"group_advantages {m}", lambda m=m: advantages_source(m)) for m in ("grpo", "rloo", "batch_std")),
        ("batch_std", batch_std_source),
    ],
)
def test_compiles_without_spills(name, source, capability):
    used = resources(*source(), capability)
    print(f"{name} sm_{capability}: {used}")
    assert used["LOCAL"] == 0 and used["STACK"] == 0 and used["REG"] <= REGISTERS_PER_THREAD, used
