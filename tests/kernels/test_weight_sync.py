"""SyncPlan on simulated ranks, bitwise: FSDP worlds 1-8, TP 1-4; Qwen3, Llama, Qwen2 shapes; tied and untied heads."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from m2rl_kernels import SyncPlan, checksum
from m2rl_kernels.weight_sync import checksum_ref, map_parameters

# name: layers, hidden, heads, kv heads, head dim, intermediate, vocabulary, tied, query-key norms, biases
MODELS = {
    "qwen3": (2, 24, 8, 4, 6, 40, 151, True, True, False),
    "qwen3 untied": (1, 24, 4, 2, 8, 40, 130, False, True, False),  # at TP 4 key-value heads are repeated
    "llama": (2, 32, 4, 4, 8, 56, 128, False, False, False),
    "qwen2": (1, 16, 4, 4, 4, 24, 97, True, False, True),
    "qwen3 of six heads": (1, 24, 6, 3, 4, 36, 140, True, True, False),
}


def fits(name, tp):
    """vLLM's condition: heads and inner columns divide, key-value heads divide or are repeated evenly."""
    _, _, heads, kv, _, inner, _, _, _, _ = MODELS[name]
    return heads % tp == 0 and inner % tp == 0 and (kv % tp == 0 or tp % kv == 0)


def model(name, dtype=torch.float32, seed=0):
    """Hugging Face's parameters."""
    layers, H, heads, kv, d, inner, V, tied, norms, biases = MODELS[name]
    shapes = {"model.embed_tokens.weight": (V, H)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for part, n in (("q", heads), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{part}_proj.weight"] = (n * d, H)
            if biases:
                shapes[f"{p}self_attn.{part}_proj.bias"] = (n * d,)
        shapes[p + "self_attn.o_proj.weight"] = (H, heads * d)
        if norms:
            shapes |= {p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,)}
        shapes |= {
            p + "mlp.gate_proj.weight": (inner, H),
            p + "mlp.up_proj.weight": (inner, H),
            p + "mlp.down_proj.weight": (H, inner),
            p + "input_layernorm.weight": (H,),
            p + "post_attention_layernorm.weight": (H,),
        }
    shapes["model.norm.weight"] = (H,)
    if not tied:
        shapes["lm_head.weight"] = (V, H)
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}


def engine(name, hf, tp, rank, dtype=torch.bfloat16, pad=64):
    """What the engine should hold, cut out by hand with vLLM's rules; cast first, then sliced."""
    _, _, heads, kv, d, _, V, _, _, _ = MODELS[name]
    cast = {k: v.to(dtype) for k, v in hf.items()}
    padded = -(-V // pad) * pad
    share = padded // tp

    def vocabulary(w):
        full = torch.full((padded, w.shape[1]), 7.0, dtype=dtype)
        full[:V] = w
        return full[rank * share : (rank + 1) * share].clone()

    def heads_of(w, n):
        if n >= tp:
            return w.chunk(tp)[rank]
        return w.split(d)[rank * n // tp]

    out = {}
    for key, w in cast.items():
        if "embed_tokens" in key or "lm_head" in key:
            out[key] = vocabulary(w)
        elif ".q_proj." in key:
            k, v = (cast[key.replace("q_proj", p)] for p in ("k_proj", "v_proj"))
            out[key.replace("q_proj", "qkv_proj")] = torch.cat([heads_of(w, heads), heads_of(k, kv), heads_of(v, kv)])
        elif "gate_proj" in key:
            up = cast[key.replace("gate_proj", "up_proj")]
            out[key.replace("gate_proj", "gate_up_proj")] = torch.cat([w.chunk(tp)[rank], up.chunk(tp)[rank]])
        elif "o_proj" in key or "down_proj" in key:
            out[key] = w.chunk(tp, 1)[rank].contiguous()
        elif not any(p in key for p in ("k_proj", "v_proj", "up_proj")):
            out[key] = w.clone()
    return out


def shard(w, world, rank):
    """FSDP2's rows: torch.chunk, and nothing for ranks beyond."""
    parts = w.chunk(world)
    return parts[rank].contiguous() if rank < len(parts) else w[:0]


def empty_engine(want):
    """The storage to be written: garbage, except that rows of padding already are what they stay."""
    storage = {}
    for key, w in want.items():
        storage[key] = torch.full_like(w, float("nan"))
        if "embed_tokens" in key or "lm_head" in key:
            storage[key][(w == 7.0).all(1)] = 7.0
    return storage


def simulate(plans, hf, world):
    """One sync of every rank, the all-gather replaced by stacking."""
    shards = [{k: shard(w, world, r) for k, w in hf.items()} for r in range(world)]
    if world == 1:
        plans[0].sync(shards[0])
        return shards
    for i in range(len(plans[0].buckets)):
        gathered = torch.stack([p.pack_bucket(i, s) for p, s in zip(plans, shards)])
        for plan in plans:
            plan.scatter_bucket(i, gathered)
    return shards


def same(a, b):
    return torch.equal(
        a.view(torch.int16 if a.element_size() == 2 else torch.int32),
        b.view(torch.int16 if b.element_size() == 2 else torch.int32),
    )


@pytest.mark.parametrize("name,tp", [(name, tp) for name in MODELS for tp in (1, 2, 3, 4) if fits(name, tp)])
def test_every_rank_writes_exactly_what_the_engine_should_hold(name, tp):
    for world in range(1, 9):
        hf = model(name)
        wants = [engine(name, hf, tp, r % tp) for r in range(world)]
        storage = [empty_engine(w) for w in wants]
        plans = [
            SyncPlan(hf, s, world_size=world, rank=r, tp_size=tp, tp_rank=r % tp, bucket_bytes=4096)
            for r, s in enumerate(storage)
        ]
        assert world == 1 or len(plans[0].buckets) > 1
        for seed in (0, 1):  # twice: in place, and nothing left over from the first time
            hf = model(name, seed=seed)
            simulate(plans, hf, world)
            for r, s in enumerate(storage):
                want = engine(name, hf, tp, r % tp)
                assert all(same(s[k], want[k]) for k in want), (world, r)


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("source,target", list(itertools.product(FLOATS, FLOATS)))
def test_all_conversions(source, target):
    hf = model("qwen3", source)
    hf["model.norm.weight"][:6] = torch.tensor([0.0, -0.0, float("inf"), 1e-7, 65519.0, 3.4e4]).to(source)
    for world in (1, 2):
        storage = [empty_engine(engine("qwen3", hf, 1, 0, target)) for _ in range(world)]
        plans = [SyncPlan(hf, s, world_size=world, rank=r) for r, s in enumerate(storage)]
        simulate(plans, hf, world)
        assert all(same(s[k], w) for s in storage for k, w in engine("qwen3", hf, 1, 0, target).items())


def test_mixed_dtypes_of_masters_and_of_engine_tensors():
    hf = model("qwen3")
    hf = {k: v.bfloat16() if "norm" in k else v for k, v in hf.items()}
    want = {k: (v.float() if k == "model.norm.weight" else v) for k, v in engine("qwen3", hf, 1, 0).items()}
    want["model.norm.weight"] = hf["model.norm.weight"].float()
    for world in (1, 2):
        storage = [empty_engine(want) for _ in range(world)]
        simulate([SyncPlan(hf, s, world_size=world, rank=r) for r, s in enumerate(storage)], hf, world)
        assert all(same(s[k], w) for s in storage for k, w in want.items())


def test_addresses_never_move_and_a_moved_tensor_is_named():
    hf = model("qwen3")
    storage = empty_engine(engine("qwen3", hf, 1, 0))
    plan = SyncPlan(hf, storage)
    before = {k: t.data_ptr() for k, t in storage.items()}
    plan.sync(hf)
    plan.sync(model("qwen3", seed=1))
    assert before == {k: t.data_ptr() for k, t in storage.items()}
    storage["model.norm.weight"].data = storage["model.norm.weight"].clone()
    with pytest.raises(RuntimeError, match=r"engine tensors moved since the plan was built: model.norm.weight"):
        plan.sync(hf)


def test_a_tied_head_may_share_storage_or_be_a_tensor_of_its_own():
    hf = model("qwen3")
    want = engine("qwen3", hf, 1, 0)
    shared = empty_engine(want)
    shared["lm_head.weight"] = shared["model.embed_tokens.weight"]
    SyncPlan(hf, shared).sync(hf)
    own = empty_engine(want) | {"lm_head.weight": empty_engine(want)["model.embed_tokens.weight"]}
    SyncPlan(hf, own).sync(hf)
    for storage in (shared, own):
        assert same(storage["lm_head.weight"], want["model.embed_tokens.weight"])
        assert same(storage["model.embed_tokens.weight"], want["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "break_it,message",
    [
        (lambda s, t: s.update({"model.extra.weight": torch.zeros(3)}), "source model.extra.weight .3. has no target"),
        (lambda s, t: t.update({"model.ghost.weight": torch.zeros(3)}), "target model.ghost.weight .3. has no source"),
        (
            lambda s, t: s.pop("model.layers.0.self_attn.k_proj.weight"),
            r"qkv_proj.weight needs .*k_proj.weight, which no",
        ),
        (lambda s, t: t.update({"model.norm.weight": torch.zeros(9)}), r"model.norm.weight \[24\] does not fit"),
        (
            lambda s, t: s.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(24, 41)}),
            "down_proj.weight .24, 41. does not fit",
        ),
        (lambda s, t: s.update({"lm_head.weight": torch.zeros(151, 24)}), "source lm_head.weight .* has no target"),
    ],
)
def test_what_does_not_map_is_named(break_it, message):
    hf = model("qwen3")
    storage = engine("qwen3", hf, 1, 0)
    break_it(hf, storage)
    with pytest.raises(ValueError, match=message):
        SyncPlan(hf, storage)


def test_rows_written_twice_are_named():
    shapes = {f"a.{part}_proj.weight": (4, 2) for part in "qkv"} | {"a.qkv_proj.weight": (12, 2)}
    with pytest.raises(ValueError, match=r"target a.qkv_proj.weight is written twice"):
        map_parameters(shapes, {"a.qkv_proj.weight": (12, 2)})


def test_a_checkpoint_fused_already_cannot_be_cut_for_tensor_parallelism():
    with pytest.raises(ValueError, match="fused already"):
        map_parameters({"a.qkv_proj.weight": (12, 2)}, {"a.qkv_proj.weight": (6, 2)}, tp_size=2)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"tp_rank": 1}, r"tp_rank must be in \[0, 1\), got 1"),
        ({"bucket_bytes": 0}, "bucket_bytes must be above 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SyncPlan({"a": (2, 2)}, {"a": torch.zeros(2, 2)}, **change)


def test_wrong_tensors_are_named():
    with pytest.raises(ValueError, match="target a must be contiguous"):
        SyncPlan({"a": (2, 3)}, {"a": torch.zeros(3, 2).T})
    plan = SyncPlan({"a": (2, 2), "b": (3,)}, {"a": torch.zeros(2, 2), "b": torch.zeros(3)}, world_size=2)
    with pytest.raises(ValueError, match="shards must hold every source, got none for b"):
        plan.sync({"a": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"shard of a must be rows 0:1 of \[2, 2\], contiguous, float, on cpu, got"):
        plan.sync({"a": torch.zeros(2, 2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"shard of a must be rows 0:1 of .* got torch.float32 \[2, 1\]"):
        plan.sync({"a": torch.zeros(2, 1), "b": torch.zeros(2)})  # as many elements, another layout
    with pytest.raises(ValueError, match=r"shards must be of the plan's sources, got extra besides"):
        plan.sync({"a": torch.zeros(1, 2), "b": torch.zeros(2), "extra": torch.zeros(1)})


# ---- checksums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksum_is_its_definition(dtype):
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 7, 64, 1000, 5001)]
    tensors += [torch.zeros(0, dtype=dtype), torch.tensor([float("nan"), -0.0]).to(dtype)]
    got = checksum(tensors).numpy().view("uint64").tolist()
    assert got == [list(checksum_ref(t)) for t in tensors]


def test_checksum_sees_position_sign_of_zero_and_one_bit():
    x = torch.randn(40, 8).bfloat16()
    swapped, zeros = x[[1, 0, *range(2, 40)]], torch.zeros(5)
    flipped = x.clone()
    flipped.view(torch.int16)[17, 3] ^= 1
    a, b, c = checksum([x, swapped, flipped])
    assert (a != b).all() and (a != c).all() and (checksum([zeros])[0] != checksum([-zeros])[0]).all()


def test_checksum_does_not_depend_on_threads(monkeypatch):
    x = [torch.randn(700_001), torch.randn(300, 1111).bfloat16()]
    one = checksum(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(one, checksum(x))


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited through /proc and setrlimit of Linux")
def test_threads_that_the_system_refuses_are_done_without():
    program = """if True:
        import resource, torch
        from m2rl_kernels import checksum
        x = torch.arange(1 << 20, dtype=torch.float32)
        checksum([x[:8]])
        expected = checksum([x])
        torch.set_num_threads(4)
        in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20),) * 2)  # less than the stack of a thread
        assert torch.equal(checksum([x]), expected)
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name,tp", [("qwen3", 2), ("qwen3 untied", 4), ("qwen2", 1)])
def test_verify_passes_after_a_sync_and_names_what_differs(name, tp):
    hf = model(name)
    storage = empty_engine(engine(name, hf, tp, tp - 1))
    plan = SyncPlan(hf, storage, tp_size=tp, tp_rank=tp - 1)
    with pytest.raises(RuntimeError, match=f"of {len(storage)} engine tensors differ from the policy: model"):
        plan.verify(hf)
    plan.sync(hf)
    plan.verify(hf)
    storage["model.layers.0.mlp.down_proj.weight"].view(torch.int16)[3, 1] ^= 1
    with pytest.raises(RuntimeError, match=f"1 of {len(storage)} engine tensors differ .*model.layers.0.mlp.down_proj"):
        plan.verify(hf)


def test_two_real_ranks(tmp_path):
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path / "store"),), nprocs=2)


def _two_ranks(rank, store):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    for tp in (1, 2):
        hf = model("qwen3")
        want = engine("qwen3", hf, tp, rank % tp)
        storage = empty_engine(want)
        plan = SyncPlan(hf, storage, world_size=2, rank=rank, tp_size=tp, tp_rank=rank % tp, bucket_bytes=4096)
        shards = {k: shard(w, 2, rank) for k, w in hf.items()}
        for _ in range(2):
            plan.sync(shards)
        assert all(same(storage[k], w) for k, w in want.items())
        plan.verify(shards)
    dist.destroy_process_group()
