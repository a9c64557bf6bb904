"""policy_loss, group_advantages and packing on a GPU: against the CPU paths and float64, repeatable, never waiting."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

import numpy as np
from m2rl_kernels import gather_rows, group_advantages, pack, plan_packing, policy_loss, unpack
from m2rl_kernels.advantages import MODES
from m2rl_kernels.packing import pack_ref
from m2rl_kernels.policy_loss import KINDS, KLS, policy_loss_fwd, policy_loss_ref


def fields(N, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(7, N, generator=g, device="cuda") * 0.4 - 1
    weight = torch.rand(N, generator=g, device="cuda")
    weight[::5] = 0
    segment = torch.randint(-1, 5, (N,), generator=g, device="cuda")
    return dict(zip(("logp", "behaviour", "old", "ref", "entropy", "advantage"), x)) | {
        "weight": weight,
        "segment": segment,
    }


def cu_seqlens(N):
    inner = torch.randperm(max(N - 1, 1), generator=torch.Generator().manual_seed(N))[:10].sort().values + 1
    return (
        torch.cat([torch.zeros(1), inner, torch.tensor([N])]).to("cuda", torch.int32)
        if N > 20
        else torch.tensor([0, N], dtype=torch.int32, device="cuda")
    )


def run(f, x, N, **options):
    logp, entropy = x["logp"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()
    loss, stats = f(
        logp,
        x["behaviour"],
        x["advantage"],
        x["weight"],
        x["old"],
        x["ref"],
        entropy=entropy,
        entropy_coef=0.1,
        kl_coef=0.3,
        cu_seqlens=cu_seqlens(N),
        segment=x["segment"],
        n_segments=5,
        **options,
    )
    return loss.detach(), stats, *torch.autograd.grad(loss, (logp, entropy))


def ours(logp, behaviour, advantage, weight, old, ref, **options):
    return policy_loss(logp, behaviour, advantage, weight, old_logp=old, ref_logp=ref, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 255, 256, 257, 5000, 32768])
def test_policy_loss_against_float64(kind, N):
    x = fields(N)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    for kl in KLS:
        for got, want in zip(
            run(ours, x, N, kind=kind, kl=kl, dual_clip=3.0),
            run(policy_loss_ref, exact, N, kind=kind, kl=kl, dual_clip=3.0),
        ):
            assert (got - want).abs().max() <= 3e-6 * want.abs().max().clamp(min=1), kl


def test_policy_loss_is_repeatable_and_safe_on_two_streams():
    N = 32768
    x = fields(N)
    first = run(ours, x, N)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(ours, x, N))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(first, result))


def test_nothing_waits_for_the_host():
    x, offsets = fields(4096), torch.arange(0, 4097, 16, device="cuda")
    plan = plan_packing([100] * 40, 4096)
    b, ids = plan.bin(0, 0), torch.arange(4000, device="cuda")
    run(ours, x, 4096)
    group_advantages(x["logp"], offsets)
    pack(b, ids=ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy_loss(x["logp"], x["behaviour"], x["advantage"], x["weight"], segment=x["segment"], n_segments=5)
        group_advantages(x["logp"], offsets, cu_seqlens=torch.arange(4097, device="cuda"), total_tokens=4096)
        pack(b, shift=["t"], ids=ids, t=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_policy_loss_in_a_cuda_graph():
    x = fields(8192)
    call = lambda: policy_loss(x["logp"], x["behaviour"], x["advantage"], x["weight"], old_logp=x["old"])  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss, stats = call()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    again = call()
    assert torch.equal(loss, again[0]) and torch.equal(stats, again[1])


def test_policy_loss_passes_opcheck_on_cuda():
    x = fields(300)
    torch.library.opcheck(
        policy_loss_fwd,
        (
            x["logp"].requires_grad_(),
            x["behaviour"],
            x["advantage"],
            x["weight"],
            x["old"],
            None,
            None,
            None,
            x["segment"],
            "grpo",
            0.2,
            0.28,
            None,
            2.0,
            "k3",
            0.0,
            0.0,
            5,
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_group_advantages_agree_with_the_cpu(mode, dtype):
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (500,), generator=g)
    sizes[7] = 5000
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    rewards = (torch.rand(int(offsets[-1]), generator=g) * 4).floor().to(dtype)
    rewards[::11] = float("nan")
    cu = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(0, 900, rewards.shape, generator=g).cumsum(0)])
    want = group_advantages(rewards, offsets, mode, cu_seqlens=cu)
    got = group_advantages(rewards.cuda(), offsets.cuda(), mode, cu_seqlens=cu.cuda(), total_tokens=int(cu[-1]))
    assert torch.equal(got.live.cpu(), want.live)
    for a, b in zip((got.adv, got.mean, got.std, got.token_adv), (want.adv, want.mean, want.std, want.token_adv)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_pack_and_unpack_on_the_gpu():
    lengths = np.random.default_rng(0).lognormal(5, 1, 700).astype(int).clip(1, 4000)
    total = int(lengths.sum())
    g = torch.Generator("cuda").manual_seed(0)
    data = {
        "ids": torch.randint(0, 1 << 40, (total,), generator=g, device="cuda"),
        "mask": torch.rand(total, generator=g, device="cuda") > 0.5,
        "logp": torch.randn(total, generator=g, device="cuda"),
        "odd": torch.randn(total, 3, generator=g, device="cuda").bfloat16(),
        "hidden": torch.randn(total, 2560, generator=g, device="cuda").bfloat16(),
    }
    data |= {f"f{i}": data["logp"] + i for i in range(20)}  # more than one launch holds
    plan = plan_packing(lengths, 16384, 2)
    back = {k: torch.ones_like(v) for k, v in data.items()}
    for r in range(2):
        for i in range(plan.bins_per_rank):
            b = plan.bin(r, i)
            packed = pack(b, shift=["t"], t=data["ids"], **data)
            assert torch.equal(packed.pop("t"), pack_ref(b, data["ids"], shifted=True))
            assert all(torch.equal(packed[k], pack_ref(b, data[k])) for k in data)
            unpack(b, back, **packed)
    assert all(torch.equal(back[k], v) for k, v in data.items())


def test_gather_rows_gradient_is_repeatable():
    x = torch.randn(5000, 2560, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.randperm(5000, device="cuda")[:3000]
    upstream = torch.randn(3000, 2560, device="cuda", dtype=torch.bfloat16)
    grads = [torch.autograd.grad(gather_rows(x, rows), x, upstream)[0] for _ in range(2)]
    expected = torch.zeros_like(x)
    expected[rows] = upstream
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], expected)
