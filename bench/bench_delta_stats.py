"""delta_stats and count_sketch alone, against the same quantities in torch eager.

    pytest bench/bench_delta_stats.py --benchmark-enable --benchmark-only

CPU seconds of the process, of all its threads: waiting for a busy machine does not lengthen them. The floor is one read
of the base and the models: `floor_bytes`.
"""

import time

import pytest
import torch
from m2rl_kernels.delta_stats import count_sketch, delta_stats

N, M = 1 << 22, 4


def _models():
    torch.manual_seed(0)
    base = (torch.randn(N) * 0.02).bfloat16()
    return base, [(base.float() + torch.randn(N) * 1e-3 * (torch.rand(N) < 0.3)).bfloat16() for _ in range(M)]


def eager(base, models, dtype=torch.float32):
    """gram, both and agree [M, M], changed, l1 and the largest [M]: what `delta_stats` adds beside its histograms."""
    d = torch.stack([x.to(dtype) - base.to(dtype) for x in models])
    moved, sign = (d != 0).to(dtype), d.sign()
    both, difference = moved @ moved.T, sign @ sign.T  # (agree) - (disagree)
    return d @ d.T, both, (both + difference) / 2, (torch.stack(models) != base).sum(1), d.abs().sum(1), d.abs().amax(1)


@pytest.mark.parametrize("provider", ["ours", "torch eager"])
def test_bench_delta_stats(benchmark, provider):
    base, models = _models()
    found, (gram, both, agree, *_) = delta_stats([base], [[x] for x in models]), eager(base, models, torch.float64)
    assert abs(found.gram[0] - gram.numpy()).max() < 2e-6 * gram.max()
    assert (found.both[0] == both.numpy()).all() and (found.agree[0] == agree.numpy()).all()
    run = (lambda: delta_stats([base], [[x] for x in models])) if provider == "ours" else lambda: eager(base, models)
    benchmark.extra_info.update(elements=N, models=M, dtype="bfloat16", floor_bytes=2 * (M + 1) * N)
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


def test_bench_count_sketch(benchmark):
    base, models = _models()
    benchmark.extra_info.update(elements=N, size=4096, dtype="bfloat16", floor_bytes=2 * 2 * N)
    benchmark.pedantic(lambda: count_sketch(models[0], base=base, size=4096, name="w"), rounds=7, warmup_rounds=2)


def test_bench_read(benchmark):
    """The floor as a call: one read of the same bytes."""
    base, models = _models()
    words = [x.view(torch.int64) for x in (base, *models)]
    benchmark.pedantic(lambda: [int(x.sum()) for x in words], rounds=7, warmup_rounds=2)


@pytest.fixture(autouse=True)
def cpu_clock(benchmark):
    benchmark._timer = time.process_time
