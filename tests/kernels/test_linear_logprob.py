"""linear_logprob on the CPU against its definition in float64, and its promises: bits, memory, dead rows, errors."""

import sys

import pytest
import torch
from m2rl_kernels import linear_logprob, linear_logprob_backward, linear_logprob_forward
from m2rl_kernels.linear_logprob import (
    _backward_cpu,
    _forward_cpu,
    linear_logprob_bwd,
    linear_logprob_fwd,
    linear_logprob_ref,
)
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = sys.modules["m2rl_kernels.linear_logprob"]


def make(N, V, H, dtype=torch.float32, scale=1.0, target="sampled", seed=0):
    """hidden, weight, targets; logits of standard deviation `scale`; targets drawn from the softmax, or its argmin."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) * scale / H**0.5).to(dtype)
    logits = hidden.float() @ weight.float().T
    targets = logits.argmin(1) if target == "argmin" else torch.multinomial(logits.softmax(-1), 1, generator=g)[:, 0]
    return hidden, weight, targets


def upstream(N, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, generator=g), torch.randn(N, generator=g)


def run(f, hidden, weight, targets, c, h, **options):
    """(logp, entropy, grad_hidden, grad_weight) of sum(c logp + h entropy)."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logp, entropy = f(hidden, weight, targets, return_entropy=True, **options)
    grads = torch.autograd.grad((logp * c + entropy * h).sum(), (hidden, weight))
    return logp.detach(), entropy.detach(), *grads


def exact(hidden, weight, targets, c, h, **options):
    return run(linear_logprob_ref, hidden.double(), weight.double(), targets, c.double(), h.double(), **options)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def assert_bounds(got, want, dtype, hidden, weight, temperature):
    z_max = float((hidden.float() @ weight.float().T).abs().max()) / temperature
    bound = 2e-5 if z_max < 30 else 2**-20 * z_max * hidden.shape[1] ** 0.5 / 8 + 1e-5
    assert got[0].dtype == got[1].dtype == torch.float32
    assert float((got[0] - want[0]).abs().max()) <= bound
    assert float((got[1] - want[1]).abs().max()) <= max(5e-5, 2 * bound)
    for ours, theirs, name in ((got[2], want[2], "grad_hidden"), (got[3], want[3], "grad_weight")):
        assert ours.dtype == dtype
        assert relative(ours, theirs) <= (4e-3 if dtype != torch.float32 else 5e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "V", "H"), [(1, 130, 8), (127, 4097, 40), (128, 220, 128), (129, 2048, 16), (300, 2049, 24)]
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_it_matches_float64(N, V, H, dtype, temperature):
    hidden, weight, targets = make(N, V, H, dtype)
    c, h = upstream(N)
    got = run(linear_logprob, hidden, weight, targets, c, h, temperature=temperature)
    assert_bounds(
        got, exact(hidden, weight, targets, c, h, temperature=temperature), dtype, hidden, weight, temperature
    )


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 31, 33, 2047])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_it_matches_float64_on_short_rows_that_end_anywhere(V, scale):
    hidden, weight, targets = make(48, V, 8, scale=scale, target="argmin" if scale > 1 else "sampled")
    c, h = upstream(48)
    assert_bounds(
        run(linear_logprob, hidden, weight, targets, c, h),
        exact(hidden, weight, targets, c, h),
        torch.float32,
        hidden,
        weight,
        1.0,
    )


def test_a_row_that_is_not_finite_gives_nan_and_leaves_its_neighbours_alone():
    hidden, weight, targets = make(32, 220, 16)
    want = linear_logprob(hidden, weight, targets)
    for bad in (float("nan"), float("inf")):
        spoilt = hidden.clone()
        spoilt[5] = bad
        got = linear_logprob(spoilt, weight, targets)
        assert got[5].isnan() and torch.equal(got.nan_to_num()[torch.arange(32) != 5], want[torch.arange(32) != 5])


@pytest.mark.parametrize("V", [50257, 151669, 151936])
def test_it_matches_float64_on_whole_vocabularies(V):
    hidden, weight, targets = make(17, V, 16, torch.bfloat16)
    c, h = upstream(17)
    got = run(linear_logprob, hidden, weight, targets, c, h)
    assert_bounds(got, exact(hidden, weight, targets, c, h), torch.bfloat16, hidden, weight, 1.0)


@pytest.mark.parametrize(
    ("scale", "target"),
    [(0.004, "sampled"), (16.0, "sampled"), (3.0, "argmin"), (30.0, "argmin")],
    ids=["flat", "peaked", "argmin", "guard"],
)
@pytest.mark.parametrize("cache_bytes", [0, 256 * 5000 * 4, 5 << 30])
def test_it_matches_float64_in_hard_cases(scale, target, cache_bytes):
    hidden, weight, targets = make(300, 5000, 64, scale=scale, target=target)
    c, h = upstream(300)
    want = exact(hidden, weight, targets, c, h)
    got = run(linear_logprob, hidden, weight, targets, c, h, cache_bytes=cache_bytes)
    assert_bounds(got, want, torch.float32, hidden, weight, 1.0)
    if scale == 30.0:
        assert float(want[0].min()) < MODULE.GUARD_LOGP  # the guard path did run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_no_worse_than_torch_in_the_same_dtype(dtype, scale):
    hidden, weight, targets = make(64, 3000, 96, dtype, scale)
    c, h = upstream(64)
    want = exact(hidden, weight, targets, c, h)

    def eager(hidden, weight, targets, return_entropy):
        logp = (hidden @ weight.T).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    torchs = run(eager, hidden, weight, targets, c.to(dtype), h.to(dtype))
    got = run(linear_logprob, hidden, weight, targets, c, h)
    for ours, theirs, truth in zip(got, torchs, want):
        assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm()) + 1e-7 * float(truth.norm())


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    """The BLAS and the C++ pass divide the rows among them; the bits must not show it."""
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("V", [220, 4097])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["normal", "guard"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_row_has_the_same_bits_in_any_batch_order_and_cache(V, scale, entropy_gradient, threads):
    N = 300
    hidden, weight, targets = make(N, V, 128, scale=scale, target="sampled" if scale == 1.0 else "argmin")
    c, h = upstream(N)

    def on(rows, **options):
        if entropy_gradient:
            return run(linear_logprob, hidden[rows], weight, targets[rows], c[rows], h[rows], **options)[:3]
        x, w = hidden[rows].requires_grad_(), weight.clone().requires_grad_()
        logp = linear_logprob(x, w, targets[rows], **options)
        return logp.detach(), torch.autograd.grad((logp * c[rows]).sum(), (x, w))[0]

    everything = torch.arange(N)
    alone = on(everything)

    def same(rows, **options):
        for ours, whole in zip(on(rows, **options), alone):
            assert torch.equal(ours, whole[rows])

    for cache_bytes in (0, 100 * V * 4, 256 * V * 4, 300 * V * 4):
        same(everything, cache_bytes=cache_bytes)
    same(torch.randperm(N, generator=torch.Generator().manual_seed(2)))
    for rows in ([0], [299], [5, 3], list(range(7, 24)), list(range(100, 229))):
        same(torch.tensor(rows))
        same(torch.tensor(rows), cache_bytes=0)
    live = torch.rand(N, generator=torch.Generator().manual_seed(3)) < 0.5
    for ours, whole in zip(on(everything, live=live), alone):
        assert torch.equal(ours[live], whole[live]) and not ours[~live].any()


def test_repeated_runs_are_bitwise_equal_and_do_not_read_uninitialised_memory():
    hidden, weight, targets = make(70, 4100, 32)
    c, h = upstream(70)
    first = run(linear_logprob, hidden, weight, targets, c, h, cache_bytes=64 * 4100 * 4)
    try:
        torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        poisoned = run(linear_logprob, hidden, weight, targets, c, h, cache_bytes=64 * 4100 * 4)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, poisoned):
        assert torch.equal(a, b)


def test_dead_rows_are_exactly_skipped():
    hidden, weight, targets = make(40, 220, 16)
    c, h = upstream(40)
    live = torch.arange(40) % 3 == 0
    poisoned, nowhere = torch.where(live[:, None], hidden, float("nan")), torch.where(live, targets, -100)
    logp, entropy, grad_hidden, grad_weight = run(linear_logprob, poisoned, weight, nowhere, c, h, live=live)
    alone = run(linear_logprob, hidden[live], weight, targets[live], c[live], h[live])
    assert torch.equal(logp[live], alone[0]) and torch.equal(grad_weight, alone[3])
    for dead in (logp[~live], entropy[~live], grad_hidden[~live]):
        assert torch.equal(dead, torch.zeros_like(dead))


@pytest.mark.parametrize("live_rows", [[], [7]], ids=["all dead", "one live"])
def test_none_and_one_live_row(live_rows):
    hidden, weight, targets = make(20, 220, 16)
    live = torch.zeros(20, dtype=torch.bool)
    live[live_rows] = True
    c, h = upstream(20)
    got, want = (
        run(linear_logprob, hidden, weight, targets, c, h, live=live),
        exact(hidden, weight, targets, c, h, live=live),
    )
    for ours, truth in zip(got, want):
        assert ours.shape == truth.shape and torch.allclose(ours.double(), truth, atol=2e-5)


def test_no_rows_at_all():
    got = run(linear_logprob, *make(0, 50, 8), *upstream(0))
    assert [list(t.shape) for t in got] == [[0], [0], [0, 8], [50, 8]] and not got[3].any()


@pytest.mark.parametrize("N", [60, 64])
def test_non_contiguous_inputs_and_int32_targets(N):
    hidden, weight, targets = make(N, 300, 24)
    c, h = upstream(N)
    want = run(linear_logprob, hidden, weight, targets, c, h)
    wide, tall, spread = torch.zeros(N, 48), torch.zeros(24, 300), torch.zeros(N, 3, dtype=torch.int64)
    wide[:, ::2], tall.T[:], spread[:, 1] = hidden, weight, targets
    strided = torch.zeros(2 * N, 24)[::2]
    strided.copy_(hidden)
    for x, w, y in ((wide[:, ::2], weight, targets.int()), (strided, tall.T, spread[:, 1])):
        assert not (x.is_contiguous() and w.is_contiguous())
        for ours, theirs in zip(run(linear_logprob, x, w, y, c, h), want):
            assert torch.equal(ours, theirs)


def test_log_probabilities_are_never_positive():
    hidden, weight, _ = make(200, 220, 32, scale=25.0)
    assert float(linear_logprob(hidden, weight, (hidden @ weight.T).argmax(1)).max()) <= 0


def test_the_policy_ratio_is_exactly_one_under_the_same_weights():
    hidden, weight, targets = make(50, 4097, 16)
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets)
    new = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert torch.equal(old, new.detach())


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_only_the_gradients_asked_for(which):
    hidden, weight, targets = make(30, 220, 16)
    c, h = upstream(30)
    want = dict(zip(("hidden", "weight"), run(linear_logprob, hidden, weight, targets, c, 0 * h)[2:]))
    inputs = {"hidden": hidden, "weight": weight}
    inputs[which].requires_grad_()
    logp = linear_logprob(**{f"{k}_{'NH' if k == 'hidden' else 'VH'}": v for k, v in inputs.items()}, targets_N=targets)
    assert logp.requires_grad
    (grad,) = torch.autograd.grad((logp * c).sum(), inputs[which], retain_graph=True)
    (again,) = torch.autograd.grad((logp * c).sum(), inputs[which])
    assert torch.equal(grad, again) and relative(grad, want[which].double()) < 1e-6


def test_gradcheck_of_the_reference():
    hidden, weight, targets = make(5, 11, 4)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    live = torch.tensor([True, True, False, True, True])
    f = lambda x, w: linear_logprob(x, w, targets, temperature=0.7, live=live, return_entropy=True)  # noqa: E731
    assert torch.autograd.gradcheck(f, (hidden, weight))


def test_explicit_backward_accumulates_the_weight_gradient_in_float32():
    hidden, weight, targets = make(90, 2100, 24, torch.bfloat16)
    c, h = upstream(90)
    want = run(linear_logprob, hidden, weight, targets, c, h)
    total = torch.zeros(2100, 24)
    for rows in (slice(0, 48), slice(48, 90)):
        logp, entropy, saved = linear_logprob_forward(hidden[rows], weight, targets[rows], return_entropy=True)
        grad_hidden, nothing = linear_logprob_backward(saved, c[rows], h[rows], grad_weight_out=total)
        assert nothing is None and torch.equal(grad_hidden, want[2][rows]) and torch.equal(logp, want[0][rows])
        assert torch.equal(entropy, want[1][rows])
    truth = exact(hidden, weight, targets, c, h)[3]
    assert relative(total, truth) < 1e-5 < relative(want[3], truth)  # no bfloat16 rounding on the way
    logp, _, saved = linear_logprob_forward(hidden, weight, targets)
    _, grad_weight = linear_logprob_backward(saved, c)
    linear_logprob_backward(saved, c, grad_weight_out=total.zero_())
    assert torch.equal(grad_weight, total.bfloat16())  # one rounding
    with pytest.raises(ValueError, match=r"grad_weight_out must be float32, got torch\.bfloat16"):
        linear_logprob_backward(saved, c, grad_weight_out=grad_weight)
    with pytest.raises(ValueError, match="grad_entropy must be None unless the forward ran with return_entropy=True"):
        linear_logprob_backward(saved, c, h)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.storage_offset() == 0:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


class Products(TorchDispatchMode):
    """Multiplications of all matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("V", "kept", "products"), [(220, 800, 3), (220, 0, 4), (6000, 800, 3), (6000, 512, 3.36), (6000, 0, 4)]
)
def test_three_products_where_everything_is_kept_and_a_fourth_for_what_is_not(V, kept, products):
    hidden, weight, targets = make(800, V, 8)
    with Products() as count, torch.no_grad():
        cache = torch.empty(kept, V)
        stats = _forward_cpu(hidden, weight, targets, 1.0, True, cache)
        _backward_cpu(torch.ones(800), torch.ones(800), hidden, weight, targets, stats, cache, 1.0, True, True, None)
    assert count.multiplications == round(products * 800 * V * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_cache_nothing_near_the_logits_is_made(dtype):
    N, V, H = 3000, 6000, 8
    hidden, weight, targets = make(N, V, H, dtype)
    with Largest() as largest, torch.no_grad():
        cache = torch.empty(0, V)
        stats = _forward_cpu(hidden, weight, targets, 1.0, True, cache)
        _backward_cpu(torch.ones(N), torch.ones(N), hidden, weight, targets, stats, cache, 1.0, True, True, None)
    assert 0 < largest.elements <= max(2 * MODULE.BLOCK_ELEMENTS, V * H, 2 * N * H) < N * V / 10


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2, 3])], ids=["all", "some"])
def test_opcheck(with_entropy, rows):
    hidden, weight, targets = make(5, 13, 8)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(linear_logprob_fwd, (hidden, weight, targets, rows, 0.7, 16, with_entropy))
    with torch.no_grad():
        _, _, stats, cache = linear_logprob_fwd(hidden, weight, targets, rows, 0.7, 16, with_entropy)
    c, h = upstream(5)
    args = (
        c,
        h if with_entropy else None,
        hidden.detach(),
        weight.detach(),
        targets,
        rows,
        stats,
        cache,
        0.7,
        True,
        True,
    )
    torch.library.opcheck(linear_logprob_bwd, args)


def test_float64_takes_the_reference():
    hidden, weight, targets = make(5, 13, 8)
    logp = linear_logprob(hidden.double(), weight.double(), targets)
    assert logp.dtype == torch.float64 and torch.equal(
        logp, linear_logprob_ref(hidden.double(), weight.double(), targets)
    )


GOOD = {"hidden_NH": torch.zeros(3, 8), "weight_VH": torch.zeros(5, 8), "targets_N": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_NH": torch.zeros(3, 2, 4)}, r"hidden must have shape \[N, H\], got \[3, 2, 4\]"),
        (
            {"hidden_NH": torch.zeros(3, 8, dtype=torch.int32)},
            "hidden must be float16, bfloat16, float32 or float64, got torch.int32",
        ),
        ({"weight_VH": torch.zeros(5, 7)}, r"weight must have shape \[V, H\] with H = 8, V > 0, got \[5, 7\]"),
        (
            {"weight_VH": torch.zeros(5, 8).bfloat16()},
            "weight must have the dtype of hidden, torch.float32, got torch.bfloat16",
        ),
        ({"targets_N": torch.zeros(4, dtype=torch.int64)}, r"targets must have shape \[N\] = \[3\], got \[4\]"),
        ({"targets_N": torch.zeros(3)}, "targets must be int64 or int32, got torch.float32"),
        ({"targets_N": torch.tensor([0, 5, 1])}, r"targets must be in \[0, V\) = \[0, 5\), got 0 .. 5"),
        ({"targets_N": torch.tensor([0, -1, 1])}, r"targets must be in \[0, V\) = \[0, 5\), got -1 .. 1"),
        ({"temperature": 0.0}, r"temperature must be in \[1e-30, 1e30\], got 0\.0"),
        ({"temperature": 1e300}, r"temperature must be in \[1e-30, 1e30\], got 1e\+300"),
        ({"temperature": float("nan")}, r"temperature must be in \[1e-30, 1e30\], got nan"),
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
        (
            {"hidden_NH": torch.zeros(3, 8).double(), "weight_VH": torch.zeros(5, 8).double(), "tp_group": object()},
            "hidden must be float16, bfloat16 or float32 with tp_group, got torch.float64",
        ),
        ({"live": torch.ones(3)}, r"live must be bool of shape \[N\] = \[3\], got torch.float32 \[3\]"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**GOOD, **change})


def test_without_triton_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "m2rl_kernels.linear_logprob_triton", raising=False)
    monkeypatch.delattr("m2rl_kernels.linear_logprob_triton", raising=False)  # another test may have imported it
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"needs Triton: pip install 'triton>=3.6'"):
        MODULE._triton()


def _tensor_parallel_rank(rank, size, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for scale, target in ((1.0, "sampled"), (30.0, "argmin")):
        hidden, weight, targets = make(37, 4100, 24, scale=scale, target=target)
        c, h = upstream(37)
        live = torch.arange(37) % 5 != 0
        shard = weight[rank * 2050 : (rank + 1) * 2050]
        results.put(
            (
                scale,
                rank,
                [
                    t.numpy()
                    for t in run(
                        linear_logprob, hidden, shard, targets, c, h, live=live, tp_group=torch.distributed.group.WORLD
                    )
                ],
            )
        )
    targets[5], targets[7] = -100, 4100  # past the check of the arguments, as on CUDA
    logp, _ = MODULE._TensorParallel.apply(hidden, shard, targets, None, 1.0, False, torch.distributed.group.WORLD)
    results.put(("nowhere", rank, [logp.isnan().nonzero().numpy()]))
    torch.distributed.destroy_process_group()


def test_tensor_parallel_shards_of_the_vocabulary_agree_with_the_whole(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_tensor_parallel_rank, args=(r, 2, tmp_path / "store", results)) for r in range(2)
    ]
    for worker in workers:
        worker.start()
    got = {
        (scale, rank): [torch.from_numpy(t) for t in tensors]
        for scale, rank, tensors in (results.get(timeout=60) for _ in range(6))
    }
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    for scale, target in ((1.0, "sampled"), (30.0, "argmin")):
        hidden, weight, targets = make(37, 4100, 24, scale=scale, target=target)
        want = exact(hidden, weight, targets, *upstream(37), live=torch.arange(37) % 5 != 0)
        for rank in range(2):
            logp, entropy, grad_hidden, grad_weight = got[scale, rank]
            assert float((logp - want[0]).abs().max()) <= (2e-5 if scale == 1.0 else 2e-4)
            assert float((entropy - want[1]).abs().max()) <= 5e-5
            assert relative(grad_hidden, want[2]) <= 5e-6
            assert relative(grad_weight, want[3][rank * 2050 : (rank + 1) * 2050]) <= 5e-6
    assert [got["nowhere", rank][0].flatten().tolist() for rank in range(2)] == [[5, 7]] * 2
