"""The Triton kernels compile for sm_80, sm_90 and sm_100 without a GPU; registers, shared memory and spills are printed
(`pytest -rP`) and gated: no stack frame, no local memory, shared memory within a block's limit, tensor cores in use.

The suite compiles the configurations with the most live registers and one of each kind. All that a call can select, on
consumer GPUs (sm_89, sm_120) too:    python tests/kernels/test_triton_compile.py
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled", allow_module_level=True)

from m2rl_kernels import linear_logprob_triton as lt  # noqa: E402
from m2rl_kernels import token_logprob_triton as tt  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes per block, CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = (80, 90, 100)
MMA = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def compile_kernel(kernel, types, constants, capability, num_warps, num_stages=3):
    """(cubin, shared bytes, ptx). `types`: the Triton type of each run-time argument; pointers and `stride*`, `H`, `M`
    are declared divisible by 16, as the launches make them."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [n for n in types if types[n].startswith("*") or n.startswith("stride") or n in ("H", "M")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ptx"]


def usage(cubin, tmp_path):
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], text=True, capture_output=True, check=True).stdout
    registers, stack, _, local = (
        int(g) for g in re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text).groups()
    )
    return registers, stack, local


def check(label, kernel, types, constants, capability, num_warps, num_stages, tmp_path, tensor_cores=False):
    cubin, shared, ptx = compile_kernel(kernel, types, constants, capability, num_warps, num_stages)
    registers, stack, local = usage(cubin, tmp_path)
    print(f"{label:40} sm_{capability}  registers {registers:3}  shared {shared:6}  stack {stack}  local {local}")
    assert stack == 0 and local == 0, "registers spill"
    assert shared <= SHARED_LIMIT[capability]
    if tensor_cores:
        assert MMA[capability] in ptx


def descriptor(dtype, rows, columns, tma):
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"


PRODUCTS = {  # name: (operation, MODE, LIST, WITH_U, STORE_E, SCALED)
    "forward, entropy, cached": ("forward", lt.SUMS, False, True, True, False),
    "forward, cached": ("forward", lt.SUMS, False, False, True, False),
    "forward, entropy": ("forward", lt.SUMS, False, True, False, False),
    "forward": ("forward", lt.SUMS, False, False, False, False),
    "recompute": ("forward", lt.EXPONENTIALS, False, False, True, False),
    "recompute, scaled": ("forward", lt.EXPONENTIALS, False, False, True, True),
    "guard, maximum": ("guard", lt.MAXIMUM, True, False, False, False),
    "guard, entropy, cached": ("guard", lt.SUMS, True, True, True, False),
    "guard, cached": ("guard", lt.SUMS, True, False, True, False),
    "guard, entropy": ("guard", lt.SUMS, True, True, False, False),
    "guard": ("guard", lt.SUMS, True, False, False, False),
}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# float16 never caches and scales what it recomputes; the others never scale.
ALL_PRODUCTS = [
    (name, dtype)
    for dtype in SIZES
    for name in PRODUCTS
    if ("scaled" in name) == (dtype == "fp16" and "recompute" in name) and not (dtype == "fp16" and "cached" in name)
]
HEAVIEST = ("forward, entropy, cached", "forward", "recompute", "guard, maximum", "guard, entropy, cached")
SUITE = [
    *((name, "bf16", capability) for name in HEAVIEST for capability in ARCHITECTURES),
    *(("recompute, scaled", "fp16", capability) for capability in ARCHITECTURES),
    *(("forward, entropy, cached", "bf16", capability) for capability in (89, 120)),
    *((name, "fp32", 90) for name in HEAVIEST),
]


@pytest.mark.parametrize(("name", "dtype", "capability"), SUITE)
def test_linear_logprob_product(name, dtype, capability, tmp_path, rows=None):
    operation, mode, listed, with_u, store, scaled = PRODUCTS[name]
    c = lt.configured(operation, capability // 10, SIZES[dtype])
    types = {
        "x": f"*{dtype}",
        "w": f"*{dtype}",
        "y": "*i64",
        "target": "*fp32",
        "anchor": "*fp32",
        "rows": "*i32" if listed else "*fp32",
        "count": "*i32" if listed else "*fp32",
        "S_part": "*fp32",
        "U_part": "*fp32",
        "E": f"*{dtype}" if store else "*fp32",
        "at_target": "*fp32",
        "row_scale": "*fp32",
        "M": "i32",
        "V": "i32",
        "H": "i32",
        "R": "i32",
        "stride_x": "i32",
        "stride_w": "i32",
        "stride_e": "i32",
        "inv_t": "fp32",
        "x_desc": descriptor(dtype, c.BM, c.BK, c.tma),
        "w_desc": descriptor(dtype, c.BV, c.BK, c.tma),
        "e_desc": descriptor(dtype, c.BM, c.BV // 4, c.tma) if store else "*fp32",
    }
    constants = {
        "MODE": mode,
        "LIST": listed,
        "WITH_U": with_u,
        "STORE_E": store,
        "SCALED": scaled,
        "TMA": c.tma,
        "BM": c.BM,
        "BV": c.BV,
        "BK": c.BK,
        "GROUP": c.group,
    }
    check(
        f"product: {name} {dtype}",
        lt.product_kernel,
        types,
        constants | ({} if rows is None else {"M": rows}),  # Triton makes a constant of an argument that is 1
        capability,
        c.num_warps,
        c.num_stages,
        tmp_path,
        tensor_cores=dtype != "fp32",
    )


SLICES = [(True, True), (True, False), (False, False)]  # the only one, the first, a later one


@pytest.mark.parametrize(
    ("first", "only", "dtype", "capability"),
    [
        *((*s, "bf16", capability) for s in SLICES for capability in ARCHITECTURES),
        (False, False, "bf16", 120),
        (True, True, "fp32", 90),
    ],
)
def test_linear_logprob_grad_hidden(first, only, dtype, capability, tmp_path):
    c = lt.configured("grad_hidden", capability // 10, SIZES[dtype])
    types = {
        "E": f"*{dtype}",
        "w": f"*{dtype}",
        "acc32": "*fp32",
        "out": f"*{dtype}",
        "scale": "*fp32",
        "M": "i32",
        "V": "i32",
        "H": "i32",
        "stride_e": "i32",
        "stride_w": "i32",
        "e_desc": descriptor(dtype, c.BM, c.BK, c.tma),
        "w_desc": descriptor(dtype, c.BK, c.BV, c.tma),
    }
    constants = {"FIRST": first, "ONLY": only, "TMA": c.tma, "BM": c.BM, "BV": c.BV, "BK": c.BK, "GROUP": c.group}
    check(
        f"grad_hidden: first {first}, only {only} {dtype}",
        lt.grad_hidden_kernel,
        types,
        constants,
        capability,
        c.num_warps,
        c.num_stages,
        tmp_path,
        tensor_cores=dtype != "fp32",
    )


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_linear_logprob_row_kernels(capability, tmp_path):
    f, i = "*fp32", "i32"
    check(
        "target_logit",
        lt.target_logit_kernel,
        {
            "x": "*bf16",
            "w": "*bf16",
            "y": "*i64",
            "target": f,
            "M": i,
            "V": i,
            "H": i,
            "stride_x": i,
            "stride_w": i,
            "inv_t": "fp32",
            "outside": "fp32",
        },
        {"BH": 1024},
        capability,
        4,
        3,
        tmp_path,
    )
    check(
        "anchor",
        lt.anchor_kernel,
        {"part": f, "rows": "*i32", "count": "*i32", "target": f, "anchor": f, "M": i, "n_v": i},
        {"BT": 64, "BM": 32},
        capability,
        4,
        3,
        tmp_path,
    )
    for listed in (False, True):
        check(
            f"finalize, listed {listed}",
            lt.finalize_kernel,
            {
                "S_part": f,
                "U_part": f,
                "y": "*i64",
                "rows": "*i32",
                "count": "*i32",
                "target": f,
                "anchor": f,
                "S_out": f,
                "U_out": f,
                "E": "*bf16",
                "M": i,
                "V": i,
                "n_v": i,
                "R": i,
                "stride_e": i,
                "max_sum": "fp32",
            },
            {"LIST": listed, "WITH_U": True, "BT": 64, "BM": 32},
            capability,
            4,
            3,
            tmp_path,
        )
    check(
        "epilogue on given logits",
        lt.epilogue_kernel,
        {
            "z": f,
            "y": "*i64",
            "target": f,
            "anchor": f,
            "S_part": f,
            "U_part": f,
            "E": "*bf16",
            "at_target": f,
            "row_scale": f,
            "inv_t": "fp32",
        }
        | dict.fromkeys(
            ["first_row", "first_v", "first_tile", "width", "M", "R", "stride_z", "stride_e"],
            i,
        ),
        {"MODE": lt.SUMS, "WITH_U": True, "STORE_E": True, "SCALED": False, "B": lt.BLAS_BLOCK},
        capability,
        8,
        3,
        tmp_path,
    )
    check(
        "convert",
        lt.convert_kernel,
        {
            "E": "*bf16",
            "out": "*bf16",
            "y": "*i64",
            "alpha": f,
            "beta": f,
            "at_target": f,
            "V": i,
            "stride_e": i,
            "stride_out": i,
        },
        {"B": 2048},
        capability,
        4,
        3,
        tmp_path,
    )


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_token_logprob(capability, tmp_path):
    f, i = "*fp32", "i32"
    check(
        "token forward",
        tt.forward_kernel,
        {
            "logits": "*bf16",
            "targets": "*i64",
            "target": f,
            "anchor": f,
            "S_out": f,
            "U_out": f,
            "V": i,
            "stride": i,
            "inv_t": "fp32",
            "max_sum": "fp32",
        },
        {"WITH_U": True, "B": tt.BLOCK},
        capability,
        8,
        3,
        tmp_path,
    )
    check(
        "token backward",
        tt.backward_kernel,
        {
            "grad": "*bf16",
            "logits": "*bf16",
            "targets": "*i64",
            "anchor": f,
            "alpha": f,
            "beta": f,
            "gamma": f,
            "V": i,
            "stride": i,
            "inv_t": "fp32",
        },
        {"WITH_U": True, "B": tt.BLOCK},
        capability,
        8,
        3,
        tmp_path,
    )


if __name__ == "__main__":
    import tempfile

    folder = Path(tempfile.mkdtemp())
    count = 0
    for capability in SHARED_LIMIT:
        for name, dtype in ALL_PRODUCTS:
            test_linear_logprob_product(name, dtype, capability, folder)
        test_linear_logprob_product("forward, entropy, cached", "bf16", capability, folder, rows=1)
        for dtype in SIZES:
            for first, only in SLICES:
                test_linear_logprob_grad_hidden(first, only, dtype, capability, folder)
        test_linear_logprob_row_kernels(capability, folder)
        test_token_logprob(capability, folder)
        count += len(ALL_PRODUCTS) + 1 + len(SIZES) * len(SLICES)
    print(f"{count} products and the row kernels, no spills")
