"""Merging against the float64 definition, bit for bit where the result is defined to the bit."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m2rl_kernels import delta_merge as dm
from m2rl_kernels import merge_recipe, native
from m2rl_kernels.delta_merge import merge_ref, merge_tensors, random_mask_ref, recipe, topk_masks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    ("average", {}),
    ("average", {"weights": [1.0, 2.0, 0.5]}),
    ("task_arithmetic", {"lam": 0.7}),
    ("task_arithmetic", {"normalize": True}),
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.3, "scope": "model"}),
    ("ties", {"density": 0.3, "preset": "paper"}),
    ("ties", {"density": 0.2, "normalize": False, "weights": [1.0, 0.3, 2.0]}),
    ("dare_linear", {"density": 0.3}),
    ("dare_linear", {"density": 0.3, "rescale": "l1"}),
    ("dare_ties", {"density": 0.5}),
    ("dare_ties", {"density": 0.8, "trim_density": 0.2, "preset": "paper"}),
    ("sce", {}),
    ("sce", {"density": 0.2}),
    ("sce", {"density": 0.2, "sce_select": "deltas"}),
    ("sce", {"sce_eps": 1e-6}),
    ("ram", {}),
    ("ram_plus", {}),
    ("ram_plus", {"scope": "model"}),
    ("breadcrumbs", {"density": 0.3}),
    ("breadcrumbs_ties", {"density": 0.3, "scope": "model"}),
    ("model_stock", {}),
    ("karcher", {}),
]


def models(shapes, dtype, experts=3, seed=0, share=0.4, sigma=1e-3):
    g = torch.Generator().manual_seed(seed)
    base = [torch.randn(s, generator=g) * 0.05 for s in shapes]
    tuned = [
        [
            (b + torch.randn(b.shape, generator=g) * sigma * (torch.rand(b.shape, generator=g) < share)).to(dtype)
            for b in base
        ]
        for _ in range(experts)
    ]
    return [b.to(dtype) for b in base], tuned


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    smallest = torch.finfo(dtype).smallest_normal
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=smallest))) - bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method,options", CASES)
def test_agrees_with_the_definition(method, options, dtype):
    base, experts = models([(70, 33), (5000,), (1,), (0, 4), (300, 257)], dtype)
    names = [str(t) for t in range(5)]
    got = merge_tensors(base, experts, method, **options)
    exact = merge_ref(base, experts, recipe(method, 3, **options), names)
    wrong = total = 0
    for t, (o, e, b) in enumerate(zip(got, exact, base)):
        assert o.dtype == dtype and o.shape == b.shape
        # one rounding of the output, plus a few float32 roundings of values no larger than b and the scaled deltas
        largest = b.double().abs() + sum(
            (4 * (x[t].double() - b.double()).abs() for x in experts), torch.zeros(b.shape)
        )
        rounding = 0.5 * ulp(e, dtype) if dtype != torch.float32 else 0.0
        excess = (o.double() - e).abs() / (rounding + 4 * ulp(largest, torch.float32))
        assert not excess.numel() or float(excess.max()) <= 1
        wrong += int((o != e.to(dtype)).sum())
        total += o.numel()
    assert (
        wrong <= (2e-4 if dtype != torch.float32 else 0.6) * total
    )  # correctly rounded but for float32's own last bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_topk_keeps_exactly_k_with_ties_at_the_lowest_index(dtype, scope):
    base, experts = models([(200, 100), (33,), (4097,), (70000,)], dtype, share=0.3)  # bf16 deltas tie by the thousand
    masks = topk_masks(base, experts, 0.2, scope=scope)
    for k, e in enumerate(experts):
        delta = [(x.float() - b.float()).abs().reshape(-1) for x, b in zip(e, base)]
        groups = [torch.cat(delta)] if scope == "model" else delta
        kept = [torch.cat([m.reshape(-1) for m in masks[k]])] if scope == "model" else [m.reshape(-1) for m in masks[k]]
        for magnitude, mask in zip(groups, kept):
            want = torch.zeros_like(mask)
            count = max(1, int(0.2 * len(magnitude)))
            want[torch.argsort(magnitude, descending=True, stable=True)[:count]] = True
            assert int(mask.sum()) == count
            assert torch.equal(mask, want)


def atoms(n, values, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.tensor(values, dtype=torch.float32)[torch.randint(len(values), (n,), generator=g)]


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0, 1.0],
        [1.0],
        [0.0, 1e-3, 2e-3, 3e-3],
        [1e-40, 0.0, 1e-38],
        [1.0, np.nextafter(np.float32(1), 2)],
        list(np.linspace(1, 1.01, 500)),
    ],
)
@pytest.mark.parametrize("density", [1e-5, 0.2, 0.5, 0.9999])
def test_selection_is_exact_on_heavy_ties(values, density):
    n = 300_000
    base, expert = torch.zeros(n), atoms(n, values, seed=len(values))
    (mask,) = topk_masks([base], [[expert]], density)[0]
    want = torch.zeros(n, dtype=torch.bool)
    want[torch.argsort(expert.abs(), descending=True, stable=True)[: max(1, int(density * n))]] = True
    assert torch.equal(mask, want)


def test_selection_survives_a_sample_that_misses():
    """Magnitudes sorted against the strata, and all mass in one corner: the bracket misses, the histograms must not."""
    n = 1 << 20
    x = torch.zeros(n)
    x[:512] = torch.linspace(1, 2, 512)  # fewer than a stratum holds: the sample sees at most a few of them
    for k in (1, 100, 511, 512, 513, 5000):
        (mask,) = topk_masks([torch.zeros(n)], [[x]], (k + 0.5) / n)[0]
        want = torch.zeros(n, dtype=torch.bool)
        want[torch.argsort(x, descending=True, stable=True)[:k]] = True
        assert torch.equal(mask, want), k


def against_the_sample(n, sampled_are_large):
    """The sample's positions are fixed by the size: values chosen against it put the answer on either side."""
    cluster = 32
    draws = max(64, n // (128 * cluster))
    width = n // draws
    j = np.arange(draws, dtype=np.uint64)
    jitter = (j * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    starts = (j.astype(np.int64) * width + (jitter % np.uint64(width)).astype(np.int64)) // cluster * cluster
    g = torch.Generator().manual_seed(0)
    small, large = torch.rand(n, generator=g) * 0.5, 1 + torch.rand(n, generator=g)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.from_numpy(starts[:, None] + np.arange(cluster)).reshape(-1)] = True
    return torch.where(chosen == sampled_are_large, large, small), chosen


@pytest.mark.parametrize("sampled_are_large", [True, False])
def test_selection_survives_a_sample_that_lies(sampled_are_large):
    n = 300_000
    x, _ = against_the_sample(n, sampled_are_large)
    (mask,) = topk_masks([torch.zeros(n)], [[x]], 0.5)[0]
    want = torch.zeros(n, dtype=torch.bool)
    want[torch.argsort(x, descending=True, stable=True)[: n // 2]] = True
    assert torch.equal(mask, want)


@pytest.mark.parametrize("density", [1e-6, 0.5, 0.99])
@pytest.mark.parametrize("sampled_are_large", [True, False])
@pytest.mark.parametrize("zeros", ["none", "unseen", "seen"])
def test_variance_selection_counts_what_the_sample_cannot_know(zeros, sampled_are_large, density):
    """How many are kept depends on the non-zero variances, which are counted in the pass that selects."""
    n = 300_000
    x, chosen = against_the_sample(n, sampled_are_large)
    x[{"none": x < 0, "unseen": ~chosen & (x * 7919 % 1 < 0.5), "seen": chosen}[zeros]] = 0
    experts = torch.stack([x, torch.zeros(n)])
    merged = merge_tensors([torch.zeros(n)], [[e] for e in experts], "sce", density=density, sce_select="deltas")[0]
    kept = dm.variance_mask_ref(experts, density)
    assert torch.equal(merged != 0, kept) and int(kept.sum()) == int(density * int((x != 0).sum()))


shapes = st.lists(
    st.one_of(st.tuples(st.integers(0, 70), st.integers(1, 40)), st.tuples(st.integers(0, 5000))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes,
    dtype=st.sampled_from(DTYPES),
    density=st.floats(1e-3, 1.0),
    threads=st.integers(1, 7),
    chunk=st.sampled_from([1024, 4096, 65536]),
    method=st.sampled_from(["ties", "dare_ties", "dare_linear", "sce", "breadcrumbs", "ram_plus", "della"]),
    scope=st.sampled_from(["tensor", "model"]),
    isa=st.integers(0, 2),
)
def test_bytes_do_not_depend_on_threads_chunks_or_instruction_set(
    shapes, dtype, density, threads, chunk, method, scope, isa
):
    base, experts = models(shapes, dtype)
    options = {"density": density if method != "della" else 0.5, "scope": scope}
    want = merge_tensors(base, experts, method, threads=1, **options)
    limit = native.cpu().m2rl_merge_isa_limit
    try:
        limit(ctypes.c_int32(isa))
        got = merge_tensors(base, experts, method, threads=threads, chunk=chunk, **options)
    finally:
        limit(ctypes.c_int32(2))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want) if a.numel())


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 3000), density=st.floats(0.01, 1.0))
def test_topk_count_is_exact_for_any_size(data, n, density):
    seed = data.draw(st.integers(0, 1000))
    base, experts = models([(n,)], torch.bfloat16, experts=1, seed=seed)
    (mask,) = topk_masks(base, experts, density)[0]
    assert int(mask.sum()) == (n if density >= 1 else max(1, int(density * n)))


def test_density_one_is_the_identity_path():
    base, experts = models([(300, 40)], torch.bfloat16)
    full = merge_tensors(base, experts, "dare_linear", density=1.0)
    assert torch.equal(full[0], merge_tensors(base, experts, "task_arithmetic")[0])
    assert topk_masks(base, experts, 1.0)[0][0].all()


def test_all_zero_deltas_give_the_base_back():
    base, _ = models([(300, 40), (7,)], torch.bfloat16)
    for method in ("task_arithmetic", "ties", "dare_ties", "sce", "ram", "breadcrumbs", "model_stock", "della"):
        got = merge_tensors(base, [base, base], method, density=0.3)
        assert all(torch.equal(a, b) for a, b in zip(got, base)), method


def test_unaligned_views_and_other_layouts():
    base, experts = models([(1000,)], torch.bfloat16)
    for shift in (1, 3):
        stored = [torch.cat([torch.zeros(shift, dtype=torch.bfloat16), x[0]])[shift:] for x in (base, *experts)]
        assert stored[0].data_ptr() % 16
        got = merge_tensors([stored[0]], [[x] for x in stored[1:]], "ties", density=0.3)
        assert torch.equal(got[0], merge_tensors(base, experts, "ties", density=0.3)[0])
    wide, tuned = models([(40, 30)], torch.float32)
    got = merge_tensors([wide[0].T], [[e[0].T] for e in tuned], "task_arithmetic")
    assert torch.equal(got[0], merge_tensors(wide, tuned, "task_arithmetic")[0].T)


def test_mixed_types_and_out():
    base, experts = models([(100,), (50, 2)], torch.float32)
    experts[1] = [x.bfloat16() for x in experts[1]]
    out = [torch.empty(100, dtype=torch.float16), torch.empty(50, 2, dtype=torch.float16)]
    got = merge_tensors(base, experts, "task_arithmetic", out=out)
    assert got[0] is out[0]
    want = merge_ref(base, experts, recipe("task_arithmetic", 3), ["0", "1"])
    assert all(torch.equal(a, b.half()) for a, b in zip(out, want))


# ---- random masks ----


def test_dare_mask_is_the_documented_philox():
    n = 100_000
    got = merge_tensors(
        [torch.zeros(n)],
        [[torch.ones(n)], [torch.ones(n) * 4]],
        "dare_linear",
        density=0.37,
        rescale="none",
        seed=5,
        names=["w"],
    )[0]
    want = random_mask_ref(5, "w", 0, n, 0.37).float() + 4 * random_mask_ref(5, "w", 1, n, 0.37).float()
    assert torch.equal(got, want)


def test_philox_known_answer():
    """Philox4x32-7 of Random123's reference implementation: counter and key all zero, all ones, and digits of pi."""

    def block(counter, key):
        x = [np.uint64(c) for c in counter]
        k = list(key)
        for _ in range(7):
            p, q = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
            low = np.uint64(0xFFFFFFFF)
            x = [
                (q >> np.uint64(32)) ^ x[1] ^ np.uint64(k[0]),
                q & low,
                (p >> np.uint64(32)) ^ x[3] ^ np.uint64(k[1]),
                p & low,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return [int(v) for v in x]

    assert block([0, 0, 0, 0], [0, 0]) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert block([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=4), threads=st.integers(1, 5), seed=st.integers(-(2**40), 2**40))
def test_dare_mask_is_the_same_in_any_shard(cuts, threads, seed):
    base, experts = models([(5000,)], torch.float32, share=1.0)
    whole = merge_tensors(base, experts, "dare_linear", density=0.5, seed=seed, names=["w"])[0]
    edges = [0, *sorted(cuts), 5000]
    parts = [
        merge_tensors(
            [base[0][a:b]],
            [[e[0][a:b]] for e in experts],
            "dare_linear",
            density=0.5,
            seed=seed,
            names=["w"],
            offsets=[a],
            threads=threads,
        )[0]
        for a, b in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_dare_keep_rate_and_expectation():
    n, p, runs = 200_000, 0.3, 20
    base, experts = models([(n,)], torch.float32, experts=1, share=1.0)
    delta = experts[0][0] - base[0]
    total, kept = torch.zeros(n, dtype=torch.float64), 0
    for seed in range(runs):
        out = merge_tensors(base, experts, "dare_linear", density=p, seed=seed)[0]
        z = (out - base[0]).double()
        total += z
        kept += int(random_mask_ref(seed, "0", 0, n, p).sum())
    assert abs(kept - n * runs * p) < 5 * (n * runs * p * (1 - p)) ** 0.5
    error = total / runs - delta.double()
    sigma = delta.abs().double() * ((1 - p) / p / runs) ** 0.5
    assert (error / sigma.clamp(min=1e-12)).square().mean().sqrt() == pytest.approx(1, abs=0.05)  # and no bias:
    assert abs(float(error.sum())) < 5 * float(sigma.square().sum().sqrt())
    lanes = random_mask_ref(0, "0", 0, n // 128 * 128, p).view(-1, 128).double().mean(0)
    assert float((((lanes - p) ** 2) / (p * (1 - p) / (n // 128))).sum()) == pytest.approx(
        128, abs=5 * (2 * 128) ** 0.5
    )


def test_masks_differ_by_seed_name_and_expert():
    masks = [
        random_mask_ref(s, name, k, 4096, 0.5) for s, name, k in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    for i in range(4):
        for j in range(i):
            assert 1800 < int((masks[i] ^ masks[j]).sum()) < 2300


def test_della_probabilities_follow_the_rank_in_the_row():
    rows, n, p, eps = 4000, 64, 0.5, 0.2
    base, delta = torch.zeros(rows, n), (torch.arange(n) + 1.0).repeat(rows, 1)
    out = merge_tensors([base], [[delta]], "della_linear", density=p, epsilon=eps, rescale="none")[0]
    rate = (out != 0).double().mean(0)
    want = p - eps + 2 * eps * torch.arange(n) / (n - 1)
    assert (rate - want).abs().max() < 5 * (0.25 / rows) ** 0.5
    unbiased = merge_tensors([base], [[delta]], "della_linear", density=p, epsilon=eps)[0]
    assert ((unbiased.double().mean(0) / delta[0]) - 1).abs().max() < 5 * (0.7 / 0.3 / rows) ** 0.5


# ---- SCE at the size of RL's deltas ----


def test_sce_keeps_the_authors_weights_where_mergekit_falls_back_to_uniform():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(4000, generator=g) * 0.02
    scales = [3e-4, 1.5e-4, 1.5e-4, 1e-4]
    experts = [base + torch.randn(4000, generator=g) * s for s in scales]
    delta = torch.stack([x - base for x in experts]).double()
    energy = delta.square().mean(1)
    assert energy.sum() < 1e-6  # the rule that makes mergekit give up
    s = torch.where(delta.sum(0) >= 0, 1.0, -1.0)
    agree = delta.sign() == s

    def merged(w):
        return base.double() + (w[:, None] * agree * delta).sum(0) / (w[:, None] * agree).sum(0).clamp(min=1e-30)

    ours = merge_tensors([base], [[x] for x in experts], "sce")[0]
    theirs = merge_tensors([base], [[x] for x in experts], "sce", preset="mergekit")[0]
    assert (ours.double() - merged(energy / energy.sum())).abs().max() < 1e-8
    assert (theirs.double() - merged(torch.full((4,), 0.25, dtype=torch.float64))).abs().max() < 1e-8
    assert (ours - theirs).abs().max() > 1e-5


# ---- spectral ----


def test_spectral_rules():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(24, 16, generator=g)
    one = torch.randn(24, 16, generator=g)
    alone = dm.tsv_m([base], [[base + one]])[0]
    assert torch.allclose(alone, base + one, atol=1e-5)  # one expert: all its parts, nothing to orthogonalise
    u, _, vt = torch.linalg.svd(torch.randn(24, 16, generator=g), full_matrices=False)
    first, second = u[:, :1] @ vt[:1] * 3, u[:, 1:2] @ vt[1:2] * 2
    got = dm.tsv_m([base], [[base + first], [base + second]])[0]
    assert torch.allclose(got - base, first + second, atol=1e-4)  # already orthogonal: the sum
    iso = dm.iso_c([base], [[base + first], [base + second]])[0] - base
    s = torch.linalg.svdvals(iso)
    assert torch.allclose(s, torch.full_like(s, 5 / 16), atol=1e-4)
    assert torch.allclose(
        dm.iso_c([base[0]], [[base[0] + one[0]], [base[0] + one[1]]])[0], base[0] + (one[0] + one[1]) / 2, atol=1e-6
    )


# ---- bad input ----


def test_errors_name_the_argument_the_rule_and_the_value():
    base, experts = models([(10,)], torch.float32)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got 0"):
        dm.ties(base, experts, density=0)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got 1.5"):
        dm.ties(base, experts, density=1.5)
    with pytest.raises(ValueError, match="method must be one of average"):
        merge_tensors(base, experts, "magic")
    with pytest.raises(ValueError, match=r"experts\[1\]\[0\] must have shape \[10\], got \[9\]"):
        merge_tensors(base, [experts[0], [experts[1][0][:9]]], "sce")
    with pytest.raises(ValueError, match=r"must be float32, bfloat16 or float16, got torch\.float64"):
        merge_tensors(base, [[experts[0][0].double()]], "sce")
    with pytest.raises(ValueError, match="weights must be one number or one per expert"):
        merge_tensors(base, experts, "average", weights=[1.0])
    with pytest.raises(ValueError, match=r"unknown merge option 'densty'"):
        merge_tensors(base, experts, "ties", densty=0.2)
    with pytest.raises(ValueError, match="density must be given for ties: the fraction"):
        merge_tensors(base, experts, "ties")
    with pytest.raises(ValueError, match=r"overflow torch\.float16; choose a wider dtype"):
        merge_tensors([torch.full((3,), 4e4)], [[torch.full((3,), 7e4)]], "average", dtype=torch.float16)
    with pytest.raises(ValueError, match="iterations must be 0 or more, got -5"):
        merge_tensors(None, experts, "karcher", iterations=-5)
    with pytest.raises(ValueError, match="base must be given for sce"):
        merge_tensors(None, experts, "sce")
    experts[1][0][3] = float("nan")
    experts[1][0][4] = float("inf")
    for method in ("average", "ties", "sce", "dare_ties"):
        with pytest.raises(ValueError, match="tensor 0 of expert 1 has 2 NaN or infinite elements"):
            merge_tensors(base, experts, method, density=0.5)


def test_presets_change_only_their_options():
    from dataclasses import fields

    named = {"scope", "ties", "zero_sign", "rescale", "normalize", "sce_select", "sce_eps", "compute_dtype", "preset"}
    for method in merge_recipe.METHODS:
        plain = recipe(method, 2, density=0.5)
        for preset in merge_recipe.PRESETS:
            other = recipe(method, 2, density=0.5, preset=preset)
            assert {f.name for f in fields(plain) if getattr(plain, f.name) != getattr(other, f.name)} <= named


def test_state_dicts_and_modules():
    a, b, c = (torch.nn.Linear(4, 3) for _ in range(3))
    merged = dm.merge_state_dicts(a, [b, c], "average")
    assert torch.equal(merged["weight"], (b.weight + c.weight).detach() / 2)
    states = [{"w": torch.zeros(3), "n": torch.tensor([1, 2])}, {"w": torch.ones(3), "n": torch.tensor([1, 2])}]
    assert torch.equal(
        dm.merge_state_dicts(states[0], states[1:], "task_arithmetic", lam=0.5)["w"], torch.full((3,), 0.5)
    )
    states[1]["n"] = torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"n is torch.int64, which is copied and not merged, and it differs"):
        dm.merge_state_dicts(states[0], states[1:], "task_arithmetic")


def test_conversions_round_to_nearest_even_like_torch():
    """Every float16 and a sweep of float32 through the native loads and stores."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every)]
    widened = merge_tensors(None, [[every]], "average", dtype=torch.float32)[0]
    assert torch.equal(widened, every.float())
    bits = torch.randint(0, 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(torch.float32)
    near = torch.cat(
        [
            every.float() * (1 + 2.0**-11),
            every.float() * (1 - 2.0**-11),
            every.float() + 2.0**-25,
            values[values.isfinite()],
        ]
    )
    for dtype in (torch.bfloat16, torch.float16):
        small = near[near.to(dtype).isfinite()]
        got = merge_tensors(None, [[small]], "average", dtype=dtype)[0]
        assert torch.equal(got, small.to(dtype))
