"""linear_logprob, token_logprob and linear_kl on a GPU, in bfloat16, float16 and float32, against float64."""

import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

from m2rl_kernels import linear_kl, linear_logprob, linear_logprob_backward, linear_logprob_forward, token_logprob
from m2rl_kernels.linear_kl import linear_kl_ref
from m2rl_kernels.linear_logprob import linear_logprob_bwd, linear_logprob_fwd
from m2rl_kernels.token_logprob import token_logprob_ref

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def make(N, V, H, dtype=BF16, scale=1.0, argmin=False, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(V, H, generator=g, device="cuda") * scale / H**0.5).to(dtype)
    targets = torch.empty(N, dtype=torch.int64, device="cuda")
    for r in range(0, N, 1024):
        z = hidden[r : r + 1024].float() @ weight.float().T
        targets[r : r + 1024] = z.argmin(1) if argmin else torch.multinomial(z.softmax(-1), 1, generator=g)[:, 0]
    return hidden, weight, targets, *torch.randn(2, N, generator=g, device="cuda")


def run(hidden, weight, targets, c, h, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, **options)
    loss = (logp * c).sum() + (0.0 if h is None else (entropy * h).sum())
    return logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


def exact(hidden, weight, targets, c, h, temperature=1.0):
    """float64, 256 rows at a time."""
    w, N = weight.double(), hidden.shape[0]
    logp, entropy = torch.zeros(2, N, dtype=torch.float64, device="cuda")
    dx, dw = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(w)
    for r in range(0, N, 256):
        s = slice(r, min(r + 256, N))
        z = (hidden[s].double() @ w.T / temperature).log_softmax(-1)
        p, at = z.exp(), targets[s, None]
        logp[s], entropy[s] = z.gather(1, at)[:, 0], -(p * z).sum(-1)
        dz = -p * (c[s, None] + (0.0 if h is None else h[s, None] * (z + entropy[s, None])))
        dz.scatter_add_(1, at, c[s, None].double()).div_(temperature)
        dx[s] = dz @ w
        dw += dz.T @ hidden[s].double()
    return logp, entropy, dx, dw


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def assert_bounds(got, want, temperature=1.0, z_max=20.0):
    bound = 2e-5 * max(1.0, z_max / 30 / temperature)
    assert float((got[0] - want[0]).abs().max()) <= bound
    assert float((got[1] - want[1]).abs().max()) <= 5e-5 * max(1.0, z_max / 30 / temperature)
    tolerance = 4e-3 if got[2].dtype != F32 else 1e-5
    assert relative(got[2], want[2]) <= tolerance and relative(got[3], want[3]) <= tolerance


@pytest.fixture
def poison():
    """Every torch.empty is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("N", "V", "H", "dtype"),
    [
        (1, 130, 1024, BF16),
        (127, 4097, 2560, BF16),
        (128, 50257, 1000, BF16),
        (129, 151669, 1024, BF16),
        (3328, 151936, 2560, BF16),
        (300, 151936, 4096, BF16),
        (129, 4097, 1024, F16),
        (300, 50257, 2048, F16),
        (129, 4097, 1024, F32),
        (40, 130, 72, F32),
    ],
)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_linear_matches_float64(N, V, H, dtype, entropy_gradient, poison):
    hidden, weight, targets, c, h = make(N, V, H, dtype)
    h = h if entropy_gradient else None
    want = exact(hidden, weight, targets, c, h)
    for cache_bytes in (5 << 30, (N // 2 // 128) * 128 * V * hidden.element_size(), 0):
        assert_bounds(run(hidden, weight, targets, c, h, cache_bytes=cache_bytes), want)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(
    ("scale", "argmin"),
    [(0.004, False), (16.0, False), (3.0, True), (30.0, True)],
    ids=["flat", "peaked", "argmin", "guard"],
)
def test_linear_in_hard_cases(scale, argmin, temperature, poison):
    hidden, weight, targets, c, h = make(300, 50257, 1024, BF16, scale, argmin)
    want = exact(hidden, weight, targets, c, h, temperature)
    for cache_bytes in (5 << 30, 0):
        got = run(hidden, weight, targets, c, h, temperature=temperature, cache_bytes=cache_bytes)
        assert_bounds(got, want, temperature, z_max=5 * scale)
    if scale == 30.0:
        assert float(want[0].min()) < -60


def test_linear_no_worse_than_torch():
    hidden, weight, targets, c, _ = make(512, 151936, 2560)
    want = exact(hidden, weight, targets, c, None)
    got = run(hidden, weight, targets, c, None)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = (x @ w.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torchs = logp.detach(), None, *torch.autograd.grad((logp * c).sum(), (x, w))
    for i in (0, 2, 3):
        assert float((got[i] - want[i]).norm()) <= 2 * float((torchs[i] - want[i]).norm())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("scale", "argmin"), [(1.0, False), (30.0, True)], ids=["normal", "guard"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_linear_row_bits_depend_on_nothing_else(dtype, scale, argmin, entropy_gradient):
    N, V, H = 700, 50257, 1024
    hidden, weight, targets, c, h = make(N, V, H, dtype, scale, argmin)
    pick = lambda rows: h[rows] if entropy_gradient else None  # noqa: E731
    whole = run(hidden, weight, targets, c, pick(slice(None)))
    permutation = torch.randperm(N, generator=torch.Generator().manual_seed(1)).cuda()
    for rows in (torch.arange(N).cuda(), permutation, permutation[:1], permutation[:129]):
        for cache_bytes in (5 << 30, 128 * (V + 64) * 2, 0):
            got = run(hidden[rows], weight, targets[rows], c[rows], pick(rows), cache_bytes=cache_bytes)
            for ours, reference in zip(got[:3], whole):
                assert torch.equal(ours, reference[rows])
    again = run(hidden, weight, targets, c, pick(slice(None)))
    assert all(torch.equal(a, b) for a, b in zip(again, whole))  # dW too


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(("scale", "argmin"), [(1.0, False), (30.0, True)], ids=["normal", "guard"])
def test_linear_with_logits_by_torch_mm(scale, argmin, entropy_gradient, poison, monkeypatch):
    """The route for an architecture on which the fused product is slow."""
    from m2rl_kernels import linear_logprob_triton as lt

    monkeypatch.setattr(lt, "LOGITS", dict.fromkeys(lt.LOGITS, "blas"))
    hidden, weight, targets, c, h = make(5000, 50257, 1024, BF16, scale, argmin)
    h = h if entropy_gradient else None
    want = exact(hidden, weight, targets, c, h)
    for cache_bytes in (5 << 30, 2432 * 50304 * 2, 0):
        got = run(hidden, weight, targets, c, h, cache_bytes=cache_bytes)
        assert_bounds(got, want, z_max=5 * scale)
        assert all(torch.equal(a, b) for a, b in zip(got, run(hidden, weight, targets, c, h, cache_bytes=cache_bytes)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    hidden, weight, targets, c, h = make(300, 4097, 256)
    want = run(hidden, weight, targets, c, h)
    assert torch.cuda.current_device() == 0
    got = run(*(t.to("cuda:1") for t in (hidden, weight, targets, c, h)))
    assert all(torch.equal(a, b.cpu()) for a, b in zip((t.cpu() for t in want), got))
    logits = (hidden @ weight.T).to("cuda:1")
    assert torch.equal(token_logprob(logits, targets.to("cuda:1")).cpu(), token_logprob(logits.to(0), targets).cpu())


def test_linear_beyond_int32_offsets():
    """16384 x 151936 elements are more than 2^31; the last rows are the ones an int32 offset would lose."""
    N, V, H = 16384, 151936, 256
    hidden, weight, targets, c, _ = make(N, V, H)
    whole = run(hidden, weight, targets, c, None)
    tail = slice(N - 64, N)
    assert_bounds(
        run(hidden[tail], weight, targets[tail], c[tail], None),
        exact(hidden[tail], weight, targets[tail], c[tail], None),
    )
    part = run(hidden[tail], weight, targets[tail], c[tail], None)
    assert all(torch.equal(a[tail], b) for a, b in zip(whole[:3], part[:3]))


def test_linear_memory_is_bounded():
    N, V, H, cache = 16384, 151936, 1024, 1 << 30
    hidden, weight, targets, c, h = make(N, V, H)
    for entropy in (None, h):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run(hidden, weight, targets, c, entropy, cache_bytes=cache)
        extra = torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in results)
        assert extra <= cache + 1e9, f"{extra / 1e9:.2f} GB beyond inputs and gradients"


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_linear_dead_rows_strides_and_int32_targets(where):
    hidden, weight, targets, c, h = make(300, 4097, 1024)
    live = torch.arange(300, device="cuda") % 3 == 0
    wide = torch.full((300, 2048), float("nan"), device="cuda", dtype=BF16)
    wide[:, ::2] = torch.where(live[:, None], hidden, float("nan"))
    got = run(wide[:, ::2], weight, torch.where(live, targets, -100).int(), c, h, live=live.to(where))
    alone = run(hidden[live], weight, targets[live], c[live], h[live])
    for ours, reference in zip(got[:3], alone[:3]):
        assert torch.equal(ours[live], reference) and not ours[~live].any()
    assert torch.equal(got[3], alone[3])
    for rows in ([], [7]):
        few = torch.zeros(300, dtype=torch.bool)
        few[rows] = True
        assert (run(hidden, weight, targets, c, h, live=few)[0] != 0).sum() == len(rows)


def test_linear_accumulates_into_grad_weight_out():
    hidden, weight, targets, c, h = make(1000, 4097, 1024)
    want = exact(hidden, weight, targets, c, h)[3]
    for cache_bytes in (5 << 30, 256 * 4160 * 2, 0):
        total = torch.zeros(4097, 1024, device="cuda")
        for rows in (slice(0, 400), slice(400, 1000)):
            _, _, saved = linear_logprob_forward(
                hidden[rows], weight, targets[rows], return_entropy=True, cache_bytes=cache_bytes
            )
            assert linear_logprob_backward(saved, c[rows], h[rows], grad_weight_out=total)[1] is None
        assert relative(total, want) <= 4e-3


def test_linear_target_out_of_range_is_nan():
    hidden, weight, targets, *_ = make(5, 130, 64)
    targets[2] = 130
    assert linear_logprob(hidden, weight, targets).isnan().tolist() == [False, False, True, False, False]


def test_linear_under_torch_compile_and_opcheck():
    hidden, weight, targets, c, h = make(64, 4097, 64)
    f = lambda x, w: (linear_logprob(x, w, targets) * c).sum()  # noqa: E731
    grads = []
    for g in (f, torch.compile(f, fullgraph=True)):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        grads.append(torch.autograd.grad(g(x, w), (x, w)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    torch.library.opcheck(linear_logprob_fwd, (hidden, weight, targets, None, 0.7, 64, True))
    with torch.no_grad():
        _, _, stats, cache = linear_logprob_fwd(hidden, weight, targets, None, 0.7, 64, True)
    torch.library.opcheck(linear_logprob_bwd, (c, h, hidden, weight, targets, None, stats, cache, 0.7, True, True))


@pytest.mark.parametrize(
    ("N", "V", "dtype", "scale"),
    [
        (1, 130, BF16, 1.0),
        (300, 151669, BF16, 2.0),
        (300, 50257, F16, 2.0),
        (64, 4097, F32, 30.0),
        (16384, 151936, BF16, 2.0),
    ],
)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_token_matches_float64(N, V, dtype, scale, entropy_gradient, poison):
    g = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn(N, V, generator=g, device="cuda") * scale).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=g, device="cuda")
    c, h = torch.randn(2, N, generator=g, device="cuda")
    logp, entropy = token_logprob(logits, targets, temperature=0.7, return_entropy=True)
    (grad,) = torch.autograd.grad((logp * c).sum() + ((entropy * h).sum() if entropy_gradient else 0), logits)
    tail = slice(max(0, N - 64), N)
    z = logits.detach()[tail].double().requires_grad_()
    lp, en = token_logprob_ref(z, targets[tail], 0.7, True)
    (want,) = torch.autograd.grad((lp * c[tail]).sum() + ((en * h[tail]).sum() if entropy_gradient else 0), z)
    assert float((logp[tail] - lp).abs().max()) <= (2e-5 if scale < 30 else 2e-4)
    assert float((entropy[tail] - en).abs().max()) <= 5e-5
    assert relative(grad[tail], want) <= (4e-3 if dtype != F32 else 5e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_linear_kl_matches_float64(direction, dtype, poison):
    hidden, weight, _, c, _ = make(300, 50257, 1024, dtype, 2.0)
    teacher, teacher_weight, *_ = make(300, 50257, 512, dtype, 2.0, seed=1)
    hidden.requires_grad_(), weight.requires_grad_()
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = linear_kl_ref(x, w, teacher.double(), teacher_weight.double(), direction)
    dx, dw = torch.autograd.grad((want * c).sum(), (x, w))
    for chunk_bytes in (1 << 25, 1 << 30):
        kl = linear_kl(hidden, weight, teacher, teacher_weight, direction=direction, chunk_bytes=chunk_bytes)
        got = torch.autograd.grad((kl * c).sum(), (hidden, weight))
        assert float((kl - want).abs().max()) <= 5e-5
        tolerance = 4e-3 if dtype != F32 else 2e-5
        assert relative(got[0], dx) <= tolerance and relative(got[1], dw) <= tolerance


def test_cuda_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "m2rl_kernels.linear_logprob_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    hidden, weight = torch.zeros(2, 8, device="cuda"), torch.zeros(3, 8, device="cuda")
    with pytest.raises(ImportError, match=r"pip install 'triton>=3\.6'"):
        linear_logprob(hidden, weight, torch.zeros(2, dtype=torch.int64, device="cuda"))
