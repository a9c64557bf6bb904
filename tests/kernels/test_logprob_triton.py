"""The Triton halves of linear_logprob and token_logprob, interpreted in float32 on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined, its own library's kernels included, so the whole file runs again
in a process that starts with it. bfloat16 is not tested here (the interpreter truncates it), nor are permuted rows
bitwise (numpy's matrix product depends on a row's place in the tile): see tests/gpu/kernels.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_interpreted_in_a_process_of_its_own():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__],
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            timeout=300,
        )
        print(done.stdout[-6000:], done.stderr[-2000:])
        assert done.returncode == 0 and " passed" in done.stdout

else:
    from m2rl_kernels import linear_logprob_triton as lt
    from m2rl_kernels import token_logprob_triton as tt
    from m2rl_kernels.linear_logprob import linear_logprob_ref
    from m2rl_kernels.token_logprob import token_logprob_ref

    @pytest.fixture(params=[True, False], ids=["tma", "pointers"])
    def tile(request, monkeypatch):
        """One tile for every product, with and without tensor-memory loads; slices as narrow as they get."""
        monkeypatch.setattr(lt, "tile_for", lambda operation, x: lt.Tile(32, 128, 64, 4, 1, group=2, tma=request.param))
        monkeypatch.setattr(lt, "SLICE_BYTES", 0)

    @pytest.fixture(params=["tma", "pointers", "blas"])
    def route(request, monkeypatch):
        """The same, and logits by torch.mm in blocks that divide neither rows nor vocabulary."""
        tma = request.param == "tma"
        monkeypatch.setattr(lt, "tile_for", lambda operation, x: lt.Tile(32, 128, 64, 4, 1, group=2, tma=tma))
        monkeypatch.setattr(lt, "SLICE_BYTES", 0)
        if request.param == "blas":
            monkeypatch.setattr(lt, "logits_from", lambda x: "blas")
            for name, value in {"BLAS_ROWS": 24, "BLAS_COLUMNS": 256, "BLAS_BLOCK": 128}.items():
                monkeypatch.setattr(lt, name, value)

    def make(N, V, H, scale=1.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * scale / H**0.5
        return hidden, weight, torch.randint(V, (N,), generator=g), *torch.randn(2, N, generator=g)

    def run(hidden, weight, targets, c, h, R, temperature=0.7, out=None):
        """(logp, entropy, grad_hidden, grad_weight, stats) through the Triton path, R rows cached."""
        cache = torch.full((R, lt.cache_columns(weight.shape[0])), float("nan"), dtype=hidden.dtype)
        stats = lt.forward(hidden, weight, targets, 1 / temperature, True, cache)
        logp = stats[0] - stats[1] - stats[2].log()
        entropy = stats[2].log() - stats[3] / stats[2]
        grads = lt.backward(c, h, hidden, weight, targets, stats, cache, 1 / temperature, True, True, out)
        return logp, entropy, *grads, stats

    def exact(hidden, weight, targets, c, h, temperature=0.7):
        hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
        logp, entropy = linear_logprob_ref(hidden, weight, targets, temperature, None, True)
        loss = (logp * c).sum() + (0.0 if h is None else (entropy * h).sum())
        return logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))

    def relative(got, want):
        return float((got.double() - want).norm() / want.norm())

    @pytest.fixture(autouse=True)
    def poison():
        """Every torch.empty is filled with NaN: a kernel that leaves a gap, or reads one, shows."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize(
        ("N", "V", "H", "scale"),
        [(1, 130, 8, 1.0), (40, 130, 40, 0.004), (40, 700, 72, 1.0), (33, 300, 64, 40.0)],
        ids=["one row", "flat", "tails", "guard"],
    )
    @pytest.mark.parametrize("entropy_gradient", [False, True])
    def test_linear_matches_float64(route, N, V, H, scale, entropy_gradient):
        hidden, weight, targets, c, h = make(N, V, H, scale)
        h = h if entropy_gradient else None
        want = exact(hidden, weight, targets, c, h)
        for R in {0, N // 32 * 32 or N}:
            logp, entropy, grad_hidden, grad_weight, stats = run(hidden, weight, targets, c, h, R)
            assert float((logp - want[0]).abs().max()) <= (2e-5 if scale < 40 else 2e-4)
            assert float((entropy - want[1]).abs().max()) <= 5e-5
            assert relative(grad_hidden, want[2]) <= 1e-5 and relative(grad_weight, want[3]) <= 1e-5
            if scale == 40.0:
                assert (stats[0] != stats[1]).any() and float(want[0].min()) < -60  # the guard's list was not empty

    def test_linear_masks_the_vocabulary_tail(route):
        """Flat logits at a width that no tile divides: an unmasked tail would add 127 to every sum of 4097."""
        hidden, weight, targets, c, _ = make(5, 4097, 16, 0.004)
        logp = run(hidden, weight, targets, c, None, 0)[0]
        assert float((logp - exact(hidden, weight, targets, c, None)[0]).abs().max()) <= 2e-5

    @pytest.mark.parametrize("entropy_gradient", [False, True])
    def test_linear_row_bits_do_not_depend_on_batch_or_cache(entropy_gradient, tile):
        hidden, weight, targets, c, h = make(40, 300, 72)
        pick = lambda rows: h[rows] if entropy_gradient else None  # noqa: E731
        whole = run(hidden, weight, targets, c, pick(slice(None)), 40)
        for rows in (slice(0, 40), slice(32, 40)):
            count = len(targets[rows])
            for R in {0, count // 32 * 32, count}:
                got = run(hidden[rows], weight, targets[rows], c[rows], pick(rows), R)
                for ours, reference in zip(got[:3], whole[:3]):
                    assert torch.equal(ours, reference[rows])

    def test_linear_slices_continue_the_same_sums(monkeypatch):
        hidden, weight, targets, c, h = make(33, 1100, 64)
        one = run(hidden, weight, targets, c, h, 0)
        monkeypatch.setattr(lt, "SLICE_BYTES", 0)
        assert lt.slice_columns(33, 1100, 4) == 1024
        many = run(hidden, weight, targets, c, h, 0)
        assert torch.equal(one[2], many[2]) and relative(many[3], one[3].double()) < 1e-6

    def test_linear_accumulates_into_grad_weight_out():
        hidden, weight, targets, c, h = make(40, 300, 24)
        for R, entropy in ((0, h), (32, None), (32, h), (40, None)):
            out = torch.ones(300, 24)
            assert run(hidden, weight, targets, c, entropy, R, out=out)[3] is None
            assert relative(out - 1, exact(hidden, weight, targets, c, entropy)[3]) < 1e-5

    @pytest.mark.parametrize("entropy_gradient", [False, True])
    def test_linear_float16_keeps_small_and_large_gradients(entropy_gradient, monkeypatch):
        """float16 recomputes E / S * 2^15; upstream gradients of 1e-6 and 1e4 stay inside its range."""
        add = lt._add_product  # torch's product with a float32 result is for CUDA only
        monkeypatch.setattr(lt, "_add_product", lambda out, a, b, first: add(out, a.float(), b.float(), first))
        hidden, weight, targets, c, h = make(40, 300, 64, 2.0)
        hidden, weight = hidden.half(), weight.half()
        for size in (1e-6, 1.0, 1e4):
            want = exact(hidden.float(), weight.float(), targets, c * size, h * size if entropy_gradient else None)
            out = torch.zeros(300, 64)
            got = run(hidden, weight, targets, c * size, h * size if entropy_gradient else None, 0, out=out)
            assert float((got[0] - want[0]).abs().max()) <= 2e-5
            assert relative(out, want[3]) <= 4e-3
            half = 2.0**-25 * got[2].numel() ** 0.5 / float(want[2].norm())  # float16's own resolution of the result
            assert got[2].dtype == torch.float16 and relative(got[2], want[2]) <= 4e-3 + half

    def test_linear_target_out_of_range_gives_nan(route):
        hidden, weight, targets, c, _ = make(5, 130, 16)
        targets[2] = 130
        logp = run(hidden, weight, targets, c, None, 5)[0]
        assert logp.isnan().tolist() == [False, False, True, False, False]

    def test_linear_shard_sums_add_up(route):
        hidden, weight, targets, _, _ = make(40, 600, 16)
        whole = lt.forward(hidden, weight, targets, 1.0, True, torch.empty(0, 640))
        total, k = torch.zeros(2, 40), torch.zeros(40)
        for shard in range(2):
            part = weight[shard * 300 : shard * 300 + 300]
            k += lt.target_logits(hidden, part, targets - shard * 300, 1.0, 0.0, torch.empty(40))
        for shard in range(2):
            part = weight[shard * 300 : shard * 300 + 300]
            total += lt.shard_sums(hidden, part, targets - shard * 300, k, k, 1.0, True)
        assert torch.equal(k, whole[0]) and torch.allclose(total, whole[2:], rtol=1e-5)

    def test_misaligned_inputs_are_copied():
        x = torch.zeros(8, 17)[:, 1:]
        assert lt.aligned(x).data_ptr() != x.data_ptr() and lt.aligned(x).stride() == (16, 1)
        row = torch.zeros(1, 20)[:, 1:17]  # contiguous, on an address that is not a multiple of 16 bytes
        assert row.is_contiguous() and lt.aligned(row).data_ptr() % 16 == 0
        assert lt.aligned(whole := torch.zeros(8, 16)) is whole

    def test_guard_and_forward_tiles_share_partials():
        for (operation, major, size), c in lt.TILES.items():
            if operation == "forward":
                guard = lt.TILES["guard", major, size]
                assert (guard.BV, guard.BK) == (c.BV, c.BK)
            assert 1024 % c.BV == 0 and 1024 % c.BK == 0  # slices end on tiles

    @pytest.mark.parametrize(("N", "V", "scale"), [(1, 5, 1.0), (17, 130, 1.0), (5, 4097, 3.0), (12, 300, 90.0)])
    @pytest.mark.parametrize("temperature", [0.6, 1.0])
    @pytest.mark.parametrize("entropy_gradient", [False, True])
    def test_token_matches_float64(N, V, scale, temperature, entropy_gradient):
        g = torch.Generator().manual_seed(0)
        wide = torch.randn(N, V + 3, generator=g) * scale
        logits, targets = wide[:, :V], torch.randint(V, (N,), generator=g)  # rows with a stride
        wide[0, : V // 2] = -torch.inf  # tokens that cannot be drawn
        targets[0] = V - 1
        c, h = torch.randn(N, generator=g), torch.randn(N, generator=g)
        exact_logits = logits.double().requires_grad_()
        logp, entropy = token_logprob_ref(exact_logits, targets, temperature, True)
        (want,) = torch.autograd.grad((logp * c).sum() + ((entropy * h).sum() if entropy_gradient else 0), exact_logits)
        logp, entropy = logp.detach(), entropy.detach()
        target, k, S, U = tt.forward(logits, targets, 1 / temperature, True)
        bound = 2e-5 if scale < 90 else 2e-4
        assert float((target - k - S.log() - logp).abs().max()) <= bound
        assert float((S.log() - U / S - entropy).abs().max()) <= 5e-5
        alpha, beta = -c / temperature / S, None
        if entropy_gradient:
            beta = -h / temperature / S
            alpha = alpha - beta * U / S
        grad = torch.empty(N, V)
        tt.backward(grad, logits, targets, k, alpha, beta, c / temperature, 1 / temperature)
        assert relative(grad, want) <= 2e-5
        if scale == 90.0:
            assert (target != k).any()
