"""policy_loss against its definition in float64, against autograd of TRL's published formulas, and its promises."""

import itertools

import pytest
import torch
from m2rl_kernels import policy_loss
from m2rl_kernels.policy_loss import KINDS, KLS, STATS, policy_loss_fwd, policy_loss_ref

CU = torch.tensor([0, 3, 3, 10, 64], dtype=torch.int32)


def make(seed=0, N=64, dtype=torch.float32, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    f = lambda: torch.randn(N, generator=g, dtype=torch.float64).mul(spread).sub(1).to(dtype)  # noqa: E731
    x = {
        "logp": f(),
        "behaviour": f(),
        "old": f(),
        "ref": f(),
        "entropy": -f(),
        "advantage": f() + 1,
        "weight": torch.rand(N, generator=g, dtype=torch.float64).to(dtype),
    }
    x["weight"][::7] = 0
    return x


def run(x, *, on_policy=False, **options):
    """(loss, stats, grad_logp, grad_entropy)"""
    logp, entropy = x["logp"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()
    loss, stats = policy_loss(
        logp,
        x["behaviour"],
        x["advantage"],
        x["weight"],
        old_logp=None if on_policy else x["old"],
        ref_logp=x["ref"],
        entropy=entropy,
        **options,
    )
    loss.backward()
    return loss.detach(), stats, logp.grad, torch.zeros_like(logp) if entropy.grad is None else entropy.grad


def double(x):
    return {k: v.double() for k, v in x.items()}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kind,kl", list(itertools.product(KINDS, KLS)))
def test_loss_gradients_and_statistics_equal_autograd_of_the_float64_definition(kind, kl, on_policy):
    segment = torch.randint(-1, 3, (64,), generator=torch.Generator().manual_seed(1))
    for dual_clip, tis_cap in ((None, 2.0), (1.5, 1.1), (3.0, None)):
        options = {
            "kind": kind,
            "kl": kl,
            "kl_coef": 0.3,
            "entropy_coef": 0.1,
            "cu_seqlens": CU,
            "dual_clip": dual_clip,
            "tis_cap": tis_cap,
            "segment": segment,
            "n_segments": 3,
            "on_policy": on_policy,
        }
        x = make()
        for got, exact in zip(run(x, **options), run(double(x), **options)):
            assert (got - exact).abs().max() <= 1e-6 * exact.abs().max().clamp(min=1), (dual_clip, tis_cap)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_passes_gradcheck(kind):
    x = make(N=12, dtype=torch.float64, spread=0.1)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)

    def f(logp, entropy):
        # a factor that autograd is told to leave alone must not move under the finite difference either
        return policy_loss_ref(
            logp,
            x["behaviour"],
            x["advantage"],
            x["weight"],
            x["old"],
            x["ref"],
            kind="grpo" if kind == "cispo" else kind,
            kl_coef=0.2,
            entropy=entropy,
            entropy_coef=0.1,
            cu_seqlens=cu,
        )[0]

    assert torch.autograd.gradcheck(f, (x["logp"].requires_grad_(), x["entropy"].requires_grad_()))


def trl(x, kind, beta, epsilon_low, epsilon_high, tis_cap, mask_SL):
    """TRL's GRPOTrainer loss (1.x, loss_type dapo / cispo, importance_sampling_level token / sequence), restated on
    [S, L]."""
    pad = {k: torch.zeros(mask_SL.shape, dtype=v.dtype).masked_scatter(mask_SL, v) for k, v in x.items()}
    mask = mask_SL.to(x["logp"].dtype)
    log_ratio = pad["logp"] - pad["old"]
    if kind == "gspo":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if kind == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=epsilon_high).detach() * pad["advantage"] * pad["logp"]
    else:
        coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
        per_token_loss = -torch.min(coef_1 * pad["advantage"], coef_2 * pad["advantage"])
    per_token_loss = per_token_loss * torch.clamp(torch.exp(pad["old"] - pad["behaviour"]), max=tis_cap)
    per_token_kl = torch.exp(pad["ref"] - pad["logp"]) - (pad["ref"] - pad["logp"]) - 1
    per_token_loss = per_token_loss + beta * per_token_kl
    return (per_token_loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_agrees_with_trls_formula(kind):
    x = double(make())
    lengths = CU.long().diff()
    mask = torch.arange(64)[None, :] < lengths[:, None]
    a = x["logp"].clone().requires_grad_()
    trl({**x, "logp": a}, kind, 0.04, 0.2, 5.0 if kind == "cispo" else 0.28, 2.0, mask).backward()
    b = x["logp"].clone().float().requires_grad_()
    f = {k: v.float() for k, v in x.items()}
    bounds = {"eps_low": 1.0, "eps_high": 4.0} if kind == "cispo" else {"eps_low": 0.2, "eps_high": 0.28}
    loss, _ = policy_loss(
        b,
        f["behaviour"],
        f["advantage"],
        torch.full((64,), 1 / 64),
        old_logp=f["old"],
        ref_logp=f["ref"],
        kind=kind,
        kl_coef=0.04,
        cu_seqlens=CU,
        **bounds,
    )
    loss.backward()
    assert (b.grad - a.grad).abs().max() <= 1e-7


def test_the_gradient_does_not_depend_on_packing():
    """Weights carry the denominators: sequences in one call, or in several, or in another order give the same
    gradient."""
    x, cu = make(), [0, 3, 10, 64]
    for kind in KINDS:
        whole = run(x, kind=kind, kl_coef=0.1, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
        parts = []
        for a, b in itertools.pairwise(cu):
            part = {k: v[a:b] for k, v in x.items()}
            parts.append(run(part, kind=kind, kl_coef=0.1, cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32)))
        assert torch.equal(whole[2], torch.cat([p[2] for p in parts]))
        assert (whole[1] - sum(p[1] for p in parts)).abs().max() < 1e-4
        assert (whole[0] - sum(p[0] for p in parts)).abs() < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_weight_zero_adds_exactly_nothing(kind, bad):
    x = make()
    options = {"kind": kind, "kl_coef": 0.1, "entropy_coef": 0.1, "cu_seqlens": CU}
    clean = run(x, **options)
    for name in ("advantage", "ref", "entropy", "behaviour", *(("logp", "old") if kind != "gspo" else ())):
        x[name][::7] = bad
    dirty = run(x, **options)
    for i in (0, 2, 3):
        assert torch.equal(clean[i], dirty[i])
    assert (dirty[2][::7] == 0).all() or kind == "gspo"  # whose ratio is every token's


def test_strictly_on_policy_is_reinforce_in_its_gradient():
    x = make()
    options = {"on_policy": True, "tis_cap": 2.0, "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32)}
    assert torch.equal(run(x, kind="grpo", **options)[2], run(x, kind="reinforce", **options)[2])
    stats = dict(zip(STATS, run(x, kind="grpo", **options)[1][0].tolist()))
    assert stats["ratio"] == 64 and stats["clip"] == 0


def test_importance_weights_are_capped_and_carry_no_gradient():
    x = make()
    x["advantage"] = torch.ones(64)
    x["behaviour"] = x["logp"] - torch.linspace(-3, 3, 64)
    grad = run(x, kind="reinforce", on_policy=True, tis_cap=2.0)[2]
    expected = -x["weight"] * (x["logp"] - x["behaviour"]).exp().clamp(max=2.0)
    assert (grad - expected).abs().max() < 1e-6


def test_statistics_by_hand():
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    old = logp - torch.tensor([0.0, 0.5, -0.5, 3.0]).log1p()
    loss, stats = policy_loss(
        logp,
        old - 0.1,
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        torch.ones(4),
        old_logp=old,
        ref_logp=logp + 0.5,
        dual_clip=3.0,
        segment=torch.tensor([0, 0, 1, 1]),
        n_segments=2,
    )
    first, second = (dict(zip(STATS, row)) for row in stats.tolist())
    assert first["count"] == 2 and first["clip"] == 1 and second["clip"] == 2  # 1.5 > 1.28; 0.5 < 0.8; 4 > 3
    assert first["ratio"] == pytest.approx(2.5) and second["ratio"] == pytest.approx(4.5)
    assert first["mismatch_k1"] == pytest.approx(-0.2, abs=1e-6)
    assert first["mismatch_k3"] == pytest.approx(2 * (torch.e**0.1 - 1.1), rel=1e-4)
    assert first["kl_k1"] == pytest.approx(-1.0) and first["kl_k3"] == pytest.approx(2 * (torch.e**0.5 - 1.5), rel=1e-5)
    tis = torch.e**0.1
    assert first["tis"] == pytest.approx(2 * tis, rel=1e-6)
    assert float(loss) == pytest.approx(tis * (-1 - 1.28 + 0.8 + 3.0), rel=1e-5)


def test_small_mismatches_are_not_lost_to_cancellation():
    logp = torch.full((1000,), -1.0)
    d = torch.full((1000,), 1e-3)
    _, stats = policy_loss(logp, logp - d, torch.ones(1000), torch.ones(1000))
    exact = torch.expm1(logp.double() - (logp - d).double()) - (logp.double() - (logp - d).double())
    assert float(stats[0, STATS.index("mismatch_k3")]) == pytest.approx(float(exact.sum()), rel=1e-3)


def test_empty_and_single_token():
    empty = torch.zeros(0)
    loss, stats = policy_loss(empty, None, empty, empty, n_segments=3, segment=torch.zeros(0, dtype=torch.int64))
    assert float(loss) == 0 and stats.shape == (3, len(STATS)) and not stats.any()
    logp, entropy = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    loss, _ = policy_loss(logp, None, empty, empty, entropy=entropy, entropy_coef=0.1)
    assert [g.shape for g in torch.autograd.grad(loss, (logp, entropy))] == [(0,), (0,)]
    one = torch.tensor([-0.5], requires_grad=True)
    loss, _ = policy_loss(one, None, torch.tensor([2.0]), torch.tensor([0.5]))
    loss.backward()
    assert float(one.grad) == -1.0


def test_repeated_runs_are_bitwise_equal():
    for kind in KINDS:
        a, b = (run(make(N=64), kind=kind, cu_seqlens=CU, kl_coef=0.1) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "ppo"}, "kind must be one of"),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3, got 'k4'"),
        ({"eps_low": 1.5}, "eps_low must be in"),
        ({"dual_clip": 0.5}, "dual_clip must be None or above 1, got 0.5"),
        ({"tis_cap": 0.0}, "tis_cap must be None or above 0"),
        ({"kl_coef": 0.1}, "kl_coef must be 0 without ref_logp"),
        ({"kl_coef": float("nan"), "ref_logp": torch.zeros(8)}, "kl_coef must be finite, got nan"),
        ({"entropy_coef": float("inf"), "entropy": torch.zeros(8)}, "entropy_coef must be finite, got inf"),
        ({"eps_low": float("nan")}, r"eps_low must be in \[0, 1\], got nan"),
        ({"eps_high": -0.1}, "eps_high must be at least 0, got -0.1"),
        ({"weight_N": None}, r"weight must be a tensor of shape \[N\], got None"),
        ({"entropy_coef": 0.1}, "entropy_coef must be 0 without entropy"),
        ({"kind": "gspo"}, "cu_seqlens must be given"),
        (
            {"kind": "gspo", "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
            "cu_seqlens must rise from 0 to N = 8",
        ),
        ({"segment": torch.zeros(8)}, "segment must be int64"),
        ({"n_segments": 0}, "n_segments must be at least 1"),
        ({"old_logp": torch.zeros(7)}, "old_logp must have the shape of logp"),
        ({"ref_logp": torch.zeros(8).double()}, "ref_logp must have the dtype of logp"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(
            **{name: torch.zeros(8) for name in ("logp_N", "behaviour_logp_N", "advantage_N", "weight_N")} | change
        )


def test_a_second_derivative_is_an_error_and_not_half_of_it():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = policy_loss(logp, None, torch.ones(2), torch.ones(2))
    (grad,) = torch.autograd.grad(loss**2, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        grad.sum().backward()


def test_registered_operation_passes_opcheck():
    x = make(N=16)
    for kind in ("grpo", "gspo"):
        args = (
            x["logp"].requires_grad_(),
            x["behaviour"],
            x["advantage"],
            x["weight"],
            x["old"],
            x["ref"],
            x["entropy"].requires_grad_(),
            torch.tensor([0, 16], dtype=torch.int32),
            None,
            kind,
            0.2,
            0.28,
            None,
            2.0,
            "k3",
            0.1,
            0.1,
            1,
        )
        torch.library.opcheck(policy_loss_fwd, args)


@pytest.mark.parametrize("N", [1, 511, 512, 513, 1500])
def test_blocks_and_segments_of_any_length(N):
    """The CPU works in blocks of 512 tokens and in runs of one segment."""
    cu = torch.tensor([0, N // 3, N // 3, N], dtype=torch.int32)
    runs = (torch.arange(N) // 100) % 4 - 1
    scattered = torch.randint(-1, 3, (N,), generator=torch.Generator().manual_seed(1))
    for kind, segment in itertools.product(KINDS, (None, runs, scattered)):
        x = make(N=N)
        options = {
            "kind": kind,
            "kl_coef": 0.3,
            "entropy_coef": 0.1,
            "cu_seqlens": cu,
            "segment": segment,
            "n_segments": 3,
        }
        for got, exact in zip(run(x, **options), run(double(x), **options)):
            bound = 1e-6 * max(1.0, (N / 64) ** 0.5)  # the loss is a sum of N terms of either sign
            assert (got - exact).abs().max() <= bound * exact.abs().max().clamp(min=1), kind


def test_the_exponential_to_both_ends_of_float32():
    """ratio and mismatch are exponentials: over the whole range within 3 units in the last place, and its limits."""
    d = torch.cat([torch.linspace(-103, 88.7, 5000), torch.tensor([0.0, -200.0, 89.0, 1e30, torch.inf, -torch.inf])])
    N, one = len(d), torch.ones(len(d))
    _, stats = policy_loss(
        d, None, one, one, old_logp=torch.zeros(N), kind="reinforce", segment=torch.arange(N), n_segments=N
    )
    got, exact = stats[:, STATS.index("ratio")].double(), d.double().exp()
    exact = torch.where(exact > torch.finfo(torch.float32).max, torch.inf, exact)
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite])
    error = (got - exact)[finite].abs()
    assert (error <= 3 * 2.0**-23 * exact[finite] + 2.0**-149).all()
    _, stats = policy_loss(torch.tensor([torch.nan]), None, one[:1], one[:1], old_logp=torch.zeros(1))
    assert stats[0, STATS.index("ratio")].isnan()
