"""delta_stats and count_sketch against their definitions, and the sketch's stated bias and variance."""

import math

import numpy as np
import pytest
import torch
from m2rl_kernels import count_sketch, delta_stats
from m2rl_kernels.delta_stats import DeltaStats, concatenate, count_sketch_ref, delta_stats_ref

SHAPES = [(1,), (63,), (65, 3), (4096,), (4097,), (130, 257), (0,), (300_000,)]


def make(dtype=torch.bfloat16, models=3, density=0.3, shapes=SHAPES, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return base, [
        [
            (b.float() + 0.02 * torch.randn(b.shape, generator=g) * (torch.rand(b.shape, generator=g) < density)).to(
                dtype
            )
            for b in base
        ]
        for _ in range(models)
    ]


def check(got: DeltaStats, want: DeltaStats):
    for name in ("numel", "both", "agree", "changed", "exponents"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name
    scale = want.norm[:, :, None] * want.norm[:, None, :]
    assert (abs(got.gram - want.gram) <= 2e-6 * scale + 1e-30).all()
    np.testing.assert_allclose(got.l1, want.l1, rtol=2e-6)
    assert np.array_equal(got.largest, want.largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("models", [1, 2, 5])
def test_equals_the_definition(dtype, models):
    base, tuned = make(dtype, models)
    check(delta_stats(base, tuned), delta_stats_ref(base, tuned))


def test_dtypes_mix_and_the_bfloat16_criterion_differs_from_exact_change():
    base, (tuned,) = make(torch.float32, 1, density=1.0, shapes=[(1000,)])
    tuned = [b + 1e-6 for b in base]
    got = delta_stats([b.bfloat16().float() for b in base], [tuned, [t.bfloat16() for t in tuned]])
    assert got.nonzero[0, 0] == 1000 and got.changed[0, 0] < 100 and got.nonzero[0, 1] == got.changed[0, 1]


def test_threads_do_not_change_a_bit(monkeypatch):
    base, tuned = make()
    one = delta_stats(base, tuned)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    four = delta_stats(base, tuned)
    assert all(np.array_equal(getattr(one, k), getattr(four, k)) for k in DeltaStats.__dataclass_fields__)


def test_derived_quantities_by_hand():
    base = [torch.zeros(8)]
    a, b = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([0.0, 0, 2, -2, 2, 2, 0, 0])
    s = delta_stats(base, [[a], [b], [torch.zeros(8)]])
    assert s.cosine[0, 0, 1] == 0 and s.gram[0, 1, 1] == 16 and s.norm[0].tolist() == [2, 4, 0]
    assert s.sign_agreement[0, 0, 1] == 0.5 and s.jaccard[0, 0, 1] == 2 / 6 and s.overlap[0, 0, 1] == 2 / 4
    assert s.expected_jaccard[0, 0, 1] == 0.25 / 0.75
    assert np.isnan(s.cosine[0, 0, 2]) and np.isnan(s.sign_agreement[0, 0, 2]) and s.jaccard[0, 0, 2] == 0
    assert s.exponents[0, 1, 128] == 4 and s.exponents[0, 1, 0] == 4 and s.exponents[0, 0, 127] == 4


def test_totals_selections_and_calls_tensor_by_tensor_agree():
    base, tuned = make()
    whole = delta_stats(base, tuned)
    parts = concatenate([delta_stats([b], [[m[t]] for m in tuned]) for t, b in enumerate(base)])
    assert all(np.array_equal(getattr(whole, k), getattr(parts, k)) for k in DeltaStats.__dataclass_fields__)
    assert np.array_equal(whole.total().gram[0], whole.gram.sum(0)) and whole.select([2, 3]).total().numel == 195 + 4096
    flat = delta_stats([torch.cat([b.flatten() for b in base])], [[torch.cat([x.flatten() for x in m])] for m in tuned])
    assert np.array_equal(flat.both, whole.total().both) and np.array_equal(flat.exponents, whole.total().exponents)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: delta_stats([torch.zeros(2)], []), "models must hold at least one"),
        (lambda: delta_stats([torch.zeros(2)], [[]]), r"models\[0\] must hold as many tensors as base, 1, got 0"),
        (
            lambda: delta_stats([torch.zeros(2)], [[torch.zeros(3)]]),
            r"models\[0\]\[0\] must have the shape \[2\], got \[3\]",
        ),
        (lambda: delta_stats([torch.zeros(2).double()], [[torch.zeros(2)]]), r"base\[0\] must be float32, bfloat16 or"),
        (lambda: delta_stats([torch.zeros(2, 3).T], [[torch.zeros(3, 2)]]), r"base\[0\] must be contiguous"),
        (lambda: count_sketch(torch.zeros(3), size=1), r"size must be in \[2, 2\^31\), got 1"),
        (lambda: count_sketch(torch.zeros(3), base=torch.zeros(4)), r"base must have the shape \[3\], got \[4\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the sketch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,size", [(1, 16), (16, 16), (1000, 64), (777, 200), (5000, 4096), (0, 8)])
def test_sketch_is_its_definition(n, size):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    got, want = count_sketch(x, size=size, seed=3, name="w"), count_sketch_ref(x, size, 3, "w")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sketch_of_a_delta_and_linearity():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50_000, generator=g)
    assert torch.equal(count_sketch(a, base=b), count_sketch(a - b))
    torch.testing.assert_close(
        count_sketch(a, size=512) + count_sketch(b, size=512), count_sketch(a + b, size=512), rtol=1e-5, atol=1e-4
    )
    assert torch.equal(count_sketch(a.bfloat16()), count_sketch(a.bfloat16().float()))


def test_threads_do_not_change_a_sketch(monkeypatch):
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    one = count_sketch(x, size=1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(one, count_sketch(x, size=1000))


@pytest.mark.parametrize("outliers", [False, True])
def test_cosine_is_unbiased_and_varies_as_stated(outliers):
    """200 seeds. Outlier columns at the stride of a hidden size would share buckets without the shift per tile."""
    g, size, n, seeds = torch.Generator().manual_seed(1), 256, 256 * 60, 200
    a, noise = torch.randn(2, n, generator=g)
    b = 0.5 * a + math.sqrt(0.75) * noise
    if outliers:
        a[7::size] *= 8
        b[7::size] *= 8
    cosine = float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
    found = torch.stack([count_sketch(a, size=size, seed=s) @ count_sketch(b, size=size, seed=s) for s in range(seeds)])
    found = found / (a.double().norm() * b.double().norm())
    bound = math.sqrt((1 + cosine**2) / size)
    assert abs(float(found.mean()) - cosine) < 4 * bound / math.sqrt(seeds)
    assert 0.8 * bound < float(found.std()) < 1.15 * bound


def test_names_and_seeds_hash_independently():
    x = torch.ones(4096 * 3)
    a, b, c = (count_sketch(x, seed=s, name=n) for s, n in ((0, "a"), (0, "b"), (1, "a")))
    assert not torch.equal(a, b) and not torch.equal(a, c)
