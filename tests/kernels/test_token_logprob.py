"""token_logprob on the CPU against its definition in float64; the Triton half is in test_logprob_triton.py."""

import sys

import pytest
import torch
from m2rl_kernels import token_logprob
from m2rl_kernels.linear_logprob import SHORT_ROW
from m2rl_kernels.token_logprob import token_logprob_bwd, token_logprob_fwd, token_logprob_ref

MODULE = sys.modules["m2rl_kernels.token_logprob"]


def make(N, V, scale=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, V, generator=g) * scale).to(dtype)
    return logits, torch.randint(V, (N,), generator=g), *torch.randn(2, N, generator=g)


def run(f, logits, targets, c, h, **options):
    logits = logits.detach().requires_grad_()
    logp, entropy = f(logits, targets, return_entropy=True, **options)
    (grad,) = torch.autograd.grad((logp * c).sum() + (entropy * h).sum(), logits)
    return logp.detach(), entropy.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "V", "scale"), [(1, 5, 1.0), (33, 4097, 1.0), (20, 5000, 0.004), (20, 5000, 25.0), (3, 151669, 2.0)]
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_it_matches_float64(N, V, scale, dtype, temperature):
    logits, targets, c, h = make(N, V, scale, dtype)
    want = run(token_logprob_ref, logits.double(), targets, c.double(), h.double(), temperature=temperature)
    got = run(token_logprob, logits, targets, c, h, temperature=temperature)
    bound = 2e-5 if scale < 25 else 1e-4  # rows at -150 nats: float32 itself resolves 1.5e-5
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == dtype
    assert float((got[0] - want[0]).abs().max()) <= bound and float((got[1] - want[1]).abs().max()) <= 5e-5
    error = float((got[2].double() - want[2]).norm() / want[2].norm())
    assert error <= (2e-5 if dtype == torch.float32 else 4e-3)
    if scale == 25.0:
        assert float(want[0].min()) < -60  # the guard path did run


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 33, 220, SHORT_ROW - 1, SHORT_ROW])
@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_it_matches_float64_on_short_rows_that_end_anywhere(V, scale, entropy_gradient):
    logits, targets, c, h = make(30, V, scale)
    h = h if entropy_gradient else 0 * h
    want = run(token_logprob_ref, logits.double(), targets, c.double(), h.double(), temperature=0.7)
    got = run(token_logprob, logits, targets, c, h, temperature=0.7)
    assert float((got[0] - want[0]).abs().max()) <= 4e-7 * float(logits.abs().max()) / 0.7 + 1e-5
    assert float((got[1] - want[1]).abs().max()) <= 5e-5
    assert float((got[2] - want[2]).norm()) <= 2e-5 * float(want[2].norm()) + 1e-6


@pytest.mark.parametrize("V", [7, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be_drawn(V, dtype):
    logits, _, c, h = make(20, V, dtype=dtype)
    masked = torch.arange(V) % 3 == 1
    targets = torch.full((20,), 3)
    got = run(token_logprob, logits.masked_fill(masked, -torch.inf), targets, c.to(dtype), h.to(dtype))
    without = run(token_logprob, logits[:, ~masked].contiguous(), torch.full((20,), 2), c.to(dtype), h.to(dtype))
    for ours, theirs in zip((*got[:2], got[2][:, ~masked].float()), (*without[:2], without[2].float())):
        assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5 if dtype != torch.bfloat16 else 1e-2)
    assert not got[2][:, masked].any()
    assert token_logprob(logits.masked_fill(masked, -torch.inf), torch.ones(20, dtype=torch.int64)).eq(-torch.inf).all()


def test_a_row_that_is_not_finite_gives_nan_and_leaves_its_neighbours_alone():
    for V in (300, 5000):
        logits, targets, _, _ = make(20, V)
        want = token_logprob(logits, targets, return_entropy=True)
        for bad in (float("nan"), float("inf")):
            spoilt = logits.clone()
            spoilt[5, 9] = bad
            for ours, whole in zip(token_logprob(spoilt, targets, return_entropy=True), want):
                assert ours[5].isnan() and torch.equal(ours[torch.arange(20) != 5], whole[torch.arange(20) != 5])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("V", [220, 5000, 40000])
def test_a_row_has_the_same_bits_in_any_batch(V, threads):
    try:
        torch.set_num_threads(threads)
        logits, targets, c, h = make(19, V)
        whole = run(token_logprob, logits, targets, c, h)
        for rows in (torch.tensor([7]), torch.randperm(19, generator=torch.Generator().manual_seed(1))):
            for ours, reference in zip(run(token_logprob, logits[rows], targets[rows], c[rows], h[rows]), whole):
                assert torch.equal(ours, reference[rows])
    finally:
        torch.set_num_threads(1)


def test_rows_with_a_stride_int32_targets_and_logp_alone():
    logits, targets, c, h = make(30, 5000)
    wide = torch.zeros(30, 6000)
    wide[:, :5000] = logits
    want = run(token_logprob, logits, targets, c, 0 * h)
    assert torch.equal(run(token_logprob, wide[:, :5000], targets.int(), c, 0 * h)[2], want[2])
    logits.requires_grad_()
    logp = token_logprob(logits, targets)
    assert torch.equal(logp.detach(), want[0])
    (grad,) = torch.autograd.grad((logp * c).sum(), logits)
    assert torch.allclose(grad, want[2], atol=1e-7)


@pytest.mark.parametrize("V", [220, 5000])
def test_repeated_runs_are_bitwise_equal_and_do_not_read_uninitialised_memory(V):
    logits, targets, c, h = make(30, V, 25.0)
    first = run(token_logprob, logits, targets, c, h)
    try:
        torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
        poisoned = run(token_logprob, logits, targets, c, h)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, poisoned):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("V", [9, SHORT_ROW + 8])
def test_opcheck_and_gradcheck(V, with_entropy):
    logits, targets, c, h = make(4, V)
    torch.library.opcheck(token_logprob_fwd, (logits.requires_grad_(), targets, 0.7, with_entropy))
    with torch.no_grad():
        _, _, stats = token_logprob_fwd(logits, targets, 0.7, with_entropy)
    torch.library.opcheck(token_logprob_bwd, (c, h if with_entropy else None, logits.detach(), targets, stats, 0.7))
    small = make(3, 7)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_logprob(z, targets[:3] % 7, return_entropy=True), small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(3)}, r"logits must have shape \[N, V\] with V > 0, got \[3\]"),
        ({"logits_NV": torch.zeros(5, 3).T}, r"logits must have unit stride along V, got strides \(1, 3\)"),
        ({"targets_N": torch.zeros(3)}, r"targets must be int64 or int32, got torch\.float32"),
        ({"targets_N": torch.tensor([0, 1, 5])}, r"targets must be in \[0, V\) = \[0, 5\), got 0 \.\. 5"),
        ({"temperature": -1.0}, r"temperature must be in \[1e-30, 1e30\], got -1\.0"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        token_logprob(**{"logits_NV": torch.zeros(3, 5), "targets_N": torch.zeros(3, dtype=torch.int64), **change})


def test_without_triton_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"needs Triton: pip install 'triton>=3\.6'"):
        MODULE._triton()
