"""SyncPlan beside the per-parameter route of other trainers and beside a plain copy of as many bytes.

    pytest bench/bench_sync.py --benchmark-only [-s]
    python bench/bench_sync.py [--full] [--out FILE]

Shapes: layers of Qwen3-0.6B, and with --full on a GPU the whole of Qwen3-4B. Floor: the bytes that must move (float32
to bfloat16: 6 a parameter; bfloat16 to bfloat16: 4) at the bandwidth of a copy, in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from bench_policy_loss import copy_of
from m2rl_kernels import SyncPlan, checksum

MODELS = {  # layers, hidden, query rows, key-value rows, intermediate, vocabulary
    "qwen3-0.6b x 6 layers": (6, 1024, 2048, 1024, 3072, 16384),
    "qwen3-4b": (36, 2560, 4096, 1024, 9728, 151936),
}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def shapes(full: bool) -> list[str]:
    return list(MODELS) if full and torch.cuda.is_available() else ["qwen3-0.6b x 6 layers"]


def parameters(name: str) -> dict[str, tuple[int, ...]]:
    layers, H, q, kv, inner, V = MODELS[name]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
    for i in range(layers):
        p = f"model.layers.{i}."
        out |= {
            p + "self_attn.q_proj.weight": (q, H),
            p + "self_attn.k_proj.weight": (kv, H),
            p + "self_attn.v_proj.weight": (kv, H),
            p + "self_attn.o_proj.weight": (H, q),
            p + "self_attn.q_norm.weight": (128,),
            p + "self_attn.k_norm.weight": (128,),
            p + "mlp.gate_proj.weight": (inner, H),
            p + "mlp.up_proj.weight": (inner, H),
            p + "mlp.down_proj.weight": (H, inner),
            p + "input_layernorm.weight": (H,),
            p + "post_attention_layernorm.weight": (H,),
        }
    return out | {"model.norm.weight": (H,)}


def fused(name: str) -> str:
    return next((name.replace(p, whole) for whole, parts in PARTS.items() for p in parts if f".{p}." in name), name)


def engine(source: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, torch.Tensor]:
    """vLLM's names: fused tensors in bfloat16."""
    rows: dict[str, tuple[int, ...]] = {}
    for name, shape in source.items():
        whole = fused(name)
        rows[whole] = (rows.get(whole, (0,))[0] + shape[0], *shape[1:])
    return {k: torch.zeros(s, dtype=torch.bfloat16, device=device) for k, s in rows.items()}


def per_parameter(weights, targets):
    """What `load_weights` does for every parameter: cast it, find its slice of the fused tensor, copy."""
    at: dict[str, int] = {}
    for name, w in weights.items():
        whole = fused(name)
        start = at.get(whole, 0)
        targets[whole].narrow(0, start, w.shape[0]).copy_(w.to(torch.bfloat16))
        at[whole] = start + w.shape[0]
    return {}


def run(name, dtype, rounds=None):
    device = protocol.device()
    source = parameters(name)
    g = torch.Generator(device).manual_seed(0)
    weights = {k: torch.randn(s, generator=g, device=device).to(dtype) for k, s in source.items()}
    ours, theirs = engine(source, device), engine(source, device)
    plan = SyncPlan(weights, ours)
    n = sum(w.numel() for w in weights.values())
    plan.sync(weights)
    per_parameter(weights, theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    plan.verify(weights)
    found: dict[str, protocol.Provider | str] = {
        "ours": lambda: (plan.sync(weights), {})[1],
        "per parameter": lambda: per_parameter(weights, theirs),
        "our checksum": lambda: (checksum(list(ours.values())), {})[1],
    }
    case = {"model": name, "parameters": n, "from": str(dtype).removeprefix("torch.")}
    floor = copy_of((dtype.itemsize + 2) * n, device)
    return protocol.compare("weight_sync", case, found, {}, floor, rounds=rounds), found["ours"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sync(benchmark, dtype):
    rows, call = run(shapes(full=False)[0], dtype)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    protocol.main(
        lambda o: [
            row
            for name in shapes(o.full)
            for dtype in (torch.float32, torch.bfloat16)
            for row in run(name, dtype, 15)[0]
        ]
    )
