"""Merging on CUDA gives the CPU's bits: thresholds, kept sets, random masks, outputs."""

import pytest
import torch
from m2rl_kernels.delta_merge import merge_tensors, topk_masks
from merge_cases import EXACT, SUMMED, models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(700, 33), (5000,), (1,), (0, 4), (300, 257), (1 << 20,)]


def on_gpu(tensors):
    return [x.cuda() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [1, 3, 4, 7])
@pytest.mark.parametrize("method,options", EXACT)
def test_bits_are_those_of_the_cpu(method, options, experts, dtype):
    base, tuned = models(SHAPES, dtype, experts)
    want = merge_tensors(base, tuned, method, **options)
    got = merge_tensors(on_gpu(base), [on_gpu(e) for e in tuned], method, **options)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))


@pytest.mark.parametrize("method,options", SUMMED)
def test_rules_with_float64_sums_agree_to_a_step(method, options):
    base, tuned = models(SHAPES, torch.float32, 4)
    want = merge_tensors(base, tuned, method, **options)
    got = merge_tensors(on_gpu(base), [on_gpu(e) for e in tuned], method, **options)
    assert all(not a.numel() or float((a.cpu() - b).abs().max()) < 1e-7 for a, b in zip(got, want))


@pytest.mark.parametrize("density", [1e-4, 0.2, 0.9])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_sets_are_those_of_the_cpu(density, scope, dtype):
    base, tuned = models(SHAPES, dtype, 2)
    want = topk_masks(base, tuned, density, scope=scope)
    got = topk_masks(on_gpu(base), [on_gpu(e) for e in tuned], density, scope=scope)
    assert all(torch.equal(a.cpu(), b) for x, y in zip(got, want) for a, b in zip(x, y))


def test_unaligned_views_and_shards():
    base, tuned = models(SHAPES, torch.bfloat16, 2)
    b, e = base[5].cuda(), [x[5].cuda() for x in tuned]
    whole = merge_tensors([b], [[x] for x in e], "dare_linear", density=0.5, names=["w"])[0]
    for cut in (1, 77, 128, 4096):
        part = merge_tensors([b[cut:]], [[x[cut:]] for x in e], "dare_linear", density=0.5, names=["w"], offsets=[cut])[
            0
        ]
        assert torch.equal(part, whole[cut:])


def test_nan_is_named():
    base, tuned = models(SHAPES, torch.float32, 2)
    tuned[1][4][3, 5] = float("nan")
    for method in ("average", "ties", "sce"):
        with pytest.raises(ValueError, match="tensor 4 of expert 1 has 1 NaN or infinite"):
            merge_tensors(on_gpu(base), [on_gpu(e) for e in tuned], method, density=0.5)
