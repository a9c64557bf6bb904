"""SyncPlan and checksum on a GPU: the same bits as on the CPU, in place, without waiting for the host."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

from m2rl_kernels import SyncPlan, checksum

SHAPES = {"model.embed_tokens.weight": (1511, 256), "model.norm.weight": (256,)} | {
    f"model.layers.0.{name}.weight": shape
    for name, shape in {
        "self_attn.q_proj": (512, 256),
        "self_attn.k_proj": (128, 256),
        "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 512),
        "mlp.gate_proj": (640, 256),
        "mlp.up_proj": (640, 256),
        "mlp.down_proj": (256, 640),
        "self_attn.q_norm": (33,),
    }.items()
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def weights(dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=g).to(dtype).to(device) for k, s in SHAPES.items()}


def engine(tp, dtype, device):
    new = lambda *s: torch.full(s, 7.0, dtype=dtype, device=device)  # noqa: E731
    p = "model.layers.0."
    return {
        "model.embed_tokens.weight": new(1536 // tp, 256),
        "model.norm.weight": new(256),
        p + "self_attn.qkv_proj.weight": new(768 // tp, 256),
        p + "self_attn.o_proj.weight": new(256, 512 // tp),
        p + "mlp.gate_up_proj.weight": new(1280 // tp, 256),
        p + "mlp.down_proj.weight": new(256, 640 // tp),
        p + "self_attn.q_norm.weight": new(33),
    }


def shard(w, world, rank):
    parts = w.chunk(world)
    return parts[rank].contiguous() if rank < len(parts) else w[:0]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_the_same_bits_as_on_the_cpu(tp, world, source, target):
    results = []
    for device in ("cpu", "cuda"):
        hf = weights(source, device)
        storage = engine(tp, target, device)
        plans = [
            SyncPlan(hf, storage, world_size=world, rank=r, tp_size=tp, tp_rank=tp - 1, bucket_bytes=1 << 20)
            for r in range(world)
        ]
        before = [t.data_ptr() for t in storage.values()]
        shards = [{k: shard(w, world, r) for k, w in hf.items()} for r in range(world)]
        if world == 1:
            plans[0].sync(shards[0])
            plans[0].verify(shards[0])
        else:
            for i in range(len(plans[0].buckets)):
                plans[0].scatter_bucket(i, torch.stack([p.pack_bucket(i, s) for p, s in zip(plans, shards)]))
        assert before == [t.data_ptr() for t in storage.values()]
        results.append([t.cpu() for t in storage.values()])
        results.append(checksum(list(storage.values())).cpu())
    assert torch.equal(results[1], results[3])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2]))


def test_sync_does_not_wait_for_the_host_and_captured_graphs_see_new_weights():
    hf, storage = weights(torch.float32, "cuda"), engine(1, torch.bfloat16, "cuda")
    plan = SyncPlan(hf, storage)
    plan.sync(hf)
    norm, out = storage["model.norm.weight"], torch.zeros(256, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(norm * 2)
    hf["model.norm.weight"] += 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.sync(hf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert torch.equal(out, hf["model.norm.weight"].bfloat16() * 2)


def test_large_offsets():
    """More than 2^31 elements behind one address."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip(f"needs 20 GiB of free GPU memory, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB are free")
    w = torch.zeros(2**21 + 3, 1024, dtype=torch.bfloat16, device="cuda")
    w[-1] = torch.arange(1024, device="cuda")
    target = {"a": torch.empty_like(w)}
    SyncPlan({"a": w}, target).sync({"a": w})
    assert torch.equal(target["a"][-1], w[-1]) and torch.equal(checksum([w]), checksum([target["a"]]))
