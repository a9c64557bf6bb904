"""Every operation inside torch.compile: one graph without breaks, forward and backward, the same bits as outside it.

The backend is aot_eager: it traces through the fake implementations and the autograd formulas and generates no code.
"""

import pytest
import torch
from m2rl_kernels import gather_rows, group_advantages, linear_kl, linear_logprob, policy_loss, token_logprob
from torch import Tensor


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.arange(24) % 7
C, BEHAVIOUR, ADVANTAGE = randn(3, 24, seed=2)
TEACHER = randn(24, 16, seed=3), randn(30, 16, seed=4)
CU_SEQLENS = torch.tensor([0, 9, 24], dtype=torch.int32)


def of_linear_logprob(x, w):
    logp, entropy = linear_logprob(x, w, TARGETS, temperature=0.7, return_entropy=True)
    return (logp * C).sum() + entropy.sum()


def of_linear_logprob_wide(x, w):
    return linear_logprob(x, w.repeat(99, 1), TARGETS, cache_bytes=0).sum()


def of_token_logprob(x, w):
    return token_logprob(x @ w.repeat(200, 1).T, TARGETS).sum()


def of_linear_kl(x, w):
    return linear_kl(x, w, *TEACHER, direction="reverse").sum()


def of_policy_loss(x, w):
    logp, entropy = linear_logprob(x, w, TARGETS, return_entropy=True)
    loss, stats = policy_loss(
        logp,
        BEHAVIOUR,
        ADVANTAGE,
        torch.ones(24),
        ref_logp=BEHAVIOUR,
        kl_coef=0.1,
        entropy=entropy,
        entropy_coef=0.1,
        kind="gspo",
        cu_seqlens=CU_SEQLENS,
        segment=TARGETS % 2,
        n_segments=2,
    )
    return loss + stats.sum()


def of_group_advantages(x, w):
    got = group_advantages(x[:, 0].detach(), torch.arange(0, 25, 8), cu_seqlens=torch.arange(0, 49, 2), total_tokens=48)
    return (x @ w.T).sum() * got.adv.sum() + got.token_adv.sum() + got.live.sum()


def of_gather_rows(x, w):
    return (gather_rows(x, torch.tensor([5, 3, 20])) @ w.T).square().sum()


CASES = [f for name, f in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__.removeprefix("of_"))
def test_one_graph_and_the_same_bits(f, dynamic):
    torch._dynamo.reset()
    results: list[tuple[Tensor, ...]] = []
    for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        x, w = randn(24, 8).requires_grad_(), randn(30, 8, seed=1).requires_grad_()
        value = g(x, w)
        results.append((value.detach(), *torch.autograd.grad(value, (x, w))))
    for outside, inside in zip(*results):
        assert torch.equal(outside, inside)


@pytest.mark.parametrize(
    "name",
    [
        *("linear_logprob_fwd", "linear_logprob_bwd", "token_logprob_fwd", "token_logprob_bwd"),
        *("policy_loss_fwd", "group_advantages"),
    ],
)
def test_no_other_device_s_addresses_reach_the_c_code(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [has(f"m2rl::{name}", key) for key in ("CPU", "CUDA", "Meta", "MPS", "XPU")] == [True] * 3 + [False] * 2


def test_shapes_without_data():
    on_meta = [t.to("meta") for t in (C, BEHAVIOUR, ADVANTAGE, C)]
    loss, stats = policy_loss(*on_meta, kind="gspo", cu_seqlens=CU_SEQLENS.to("meta"))
    got = group_advantages(on_meta[0], CU_SEQLENS.to("meta"))
    assert loss.shape == () and stats.shape[0] == 1 and got.adv.shape == (24,) and got.mean.shape == (2,)


@pytest.mark.parametrize("target", [-100, -1, 2100, 5000])
@pytest.mark.parametrize("f", [linear_logprob, token_logprob], ids=lambda f: f.__name__)
def test_a_target_outside_the_vocabulary_is_never_a_number(f, target):
    """A compiled call cannot look at its targets first, and an index of -100 means a row to torch."""
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for V in (220, 2100, 5000):
        targets = torch.tensor([0, max(target, V) if target > 0 else target, 7])
        inputs = (randn(3, 8), randn(V, 8)) if f is linear_logprob else (randn(3, V),)
        try:
            logp = compiled(*inputs, targets)
        except (IndexError, RuntimeError) as error:
            assert "out of" in str(error)
        else:
            assert logp.isnan().tolist() == [False, True, False]
