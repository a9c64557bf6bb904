"""csrc/*.cu run on the host, thread by thread: the CUDA kernels give the CPU's bits, and break no rule of the device.

What a GPU alone can show (registers, speed, real concurrency) is tests/gpu's and test_triton_compile.py's matter.
"""

import ctypes
import mmap
import shutil

import emulated
import numpy as np
import pytest
import torch
from m2rl_kernels import SyncPlan, checksum, native, pack, plan_packing, unpack
from m2rl_kernels.delta_merge import merge_tensors, topk_masks
from m2rl_kernels.packing import pack_ref
from merge_cases import EXACT, SUMMED, models

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

SHAPES = [(70, 33), (5000,), (1,), (0, 4), (30, 257), (1 << 13,)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(params=["first thread first", "last thread first"])
def cuda(library, request):
    """Within `with cuda():` the CUDA kernels run; one that calls none fails."""
    library.emulated_order(int(request.param == "last thread first"))

    class Switch:
        def __enter__(self):
            self.library = emulated.InPlaceOfCpu(library)
            self.patch = pytest.MonkeyPatch()
            self.patch.setattr(native, "cpu", lambda: self.library)

        def __exit__(self, kind, *_):
            self.patch.undo()
            assert kind or self.library.calls

    return Switch


def at_page_ends(tensors):
    """Copies that end where an inaccessible page begins: one element too far ends the process."""
    libc, copies = ctypes.CDLL(None, use_errno=True), []
    for x in tensors:
        size = x.numel() * x.element_size()
        pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
        assert libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
        copy = torch.frombuffer(memory, dtype=torch.uint8)[pages - size : pages].view(x.dtype).view(x.shape)
        copies.append(copy.copy_(x))
    return copies


@pytest.mark.parametrize("experts,dtype", [(1, torch.float32), (4, torch.bfloat16), (7, torch.float16)])
@pytest.mark.parametrize("method,options", EXACT)
def test_merges_are_the_cpu_s_bits(cuda, method, options, experts, dtype):
    base, tuned = models(SHAPES, dtype, experts)
    want = merge_tensors(base, tuned, method, **options)
    with cuda():
        got = merge_tensors(at_page_ends(base), [at_page_ends(e) for e in tuned], method, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("method,options", SUMMED)
def test_rules_with_float64_sums_agree_to_a_step(cuda, method, options):
    base, tuned = models(SHAPES, torch.float32, 4)
    want = merge_tensors(base, tuned, method, **options)
    with cuda():
        got = merge_tensors(base, tuned, method, **options)
    assert all(not a.numel() or float((a - b).abs().max()) < 1e-7 for a, b in zip(got, want))


@pytest.mark.parametrize("density", [1e-4, 0.2, 0.9])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_sets_are_the_cpu_s(cuda, density, scope, dtype):
    base, tuned = models(SHAPES, dtype, 2)
    want = topk_masks(base, tuned, density, scope=scope)
    with cuda():
        got = topk_masks(base, tuned, density, scope=scope, chunk=2048)
    assert all(torch.equal(a, b) for x, y in zip(got, want) for a, b in zip(x, y))


def hidden_from_the_sample(n):
    """Large values only where sample_kernel of merge.cu does not look, small ones where it does."""
    draws = max(128, n // 2048)
    draw, width = np.arange(draws, dtype=np.uint64), np.uint64(n // draws)
    at = draw * width + (draw * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % width
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)).mul(64).round() + 64
    for start in (at // np.uint64(32) * np.uint64(32)).tolist():
        x[start : start + 32] *= 1e-3
    return x


@pytest.mark.parametrize("density", [0.003, 0.2499, 0.5001])
@pytest.mark.parametrize(
    "values",
    [
        lambda n, g: torch.randn(n, generator=g),  # the bracket holds, its keys are stored
        lambda n, g: torch.randn(n, generator=g).mul(8).round(),  # a few heavy values: counted, cut among their ties
        lambda n, g: torch.randn(n, generator=g).mul(2000).round(),  # ties among the stored keys
        lambda n, g: torch.arange(n) % 4.0,  # ranks near the border of two heavy values
        lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.3),  # zero is heavy
        lambda n, g: torch.full((n,), 2.5),
        lambda n, g: torch.randn(n // 32, generator=g).repeat_interleave(32),  # neighbours alike: a wide bracket
        lambda n, g: hidden_from_the_sample(n),  # the bracket misses
    ],
    ids=["smooth", "steps", "small steps", "borders", "zeros", "one value", "alike", "hidden"],
)
def test_selection_is_exact_whatever_the_values(cuda, values, density):
    g = torch.Generator().manual_seed(0)
    sizes = (1 << 16, 3000, (1 << 13) + 5)
    lists = [[values(n // 32 * 32, g) for n in sizes] for _ in range(2)]
    zero = [torch.zeros_like(x) for x in lists[0]]
    for scope in ("tensor", "model"):
        want = topk_masks(zero, lists, density, scope=scope)
        with cuda():
            got = topk_masks(zero, lists, density, scope=scope, chunk=16384)
        assert all(torch.equal(a, b) for x, y in zip(got, want) for a, b in zip(x, y)), scope


def test_selection_is_exact_where_more_lies_in_the_bracket_than_can_be_stored(cuda):
    x = torch.randn(1 << 13, generator=torch.Generator().manual_seed(0)).repeat_interleave(32)
    zero = torch.zeros_like(x)
    want = topk_masks([zero], [[x]], 0.2)
    with cuda():
        got = topk_masks([zero], [[x]], 0.2)
    assert torch.equal(got[0][0], want[0][0])


def test_a_merge_of_unaligned_shards(cuda):
    base, tuned = models([(1 << 14,)], torch.bfloat16, 2)
    whole = merge_tensors(base, tuned, "dare_linear", density=0.5, names=["w"])[0]
    for cut in (1, 77, 128, 4096):
        with cuda():
            part = merge_tensors(
                [base[0][cut:]], [[x[0][cut:]] for x in tuned], "dare_linear", density=0.5, names=["w"], offsets=[cut]
            )[0]
        assert torch.equal(part, whole[cut:])


@pytest.mark.parametrize("method", ["average", "ties", "sce"])
def test_nan_is_named(cuda, method):
    base, tuned = models(SHAPES, torch.float32, 2)
    tuned[1][4][3, 5] = float("nan")
    with cuda(), pytest.raises(ValueError, match="tensor 4 of expert 1 has 1 NaN or infinite"):
        merge_tensors(base, tuned, method, density=0.5)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_sync_writes_and_hashes_the_cpu_s_bits(cuda, source, target):
    g = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (301, 64), "b.weight": (96, 36), "norm.weight": (33,)}
    hf = {k: torch.randn(s, generator=g).to(source) for k, s in shapes.items()}
    hf["norm.weight"][:6] = torch.tensor([0.0, -0.0, float("inf"), 1e-7, 65519.0, 3.4e4]).to(source)
    storage = {k: torch.full(s, float("nan"), dtype=target) for k, s in shapes.items()}
    plan = SyncPlan(hf, storage, world_size=1, rank=0)
    with cuda():
        plan.sync(hf)
        sums = checksum(list(storage.values()))
    assert all(torch.equal(storage[k], w.to(target)) for k, w in hf.items())
    assert torch.equal(sums, checksum(list(storage.values())))


def test_packs_and_unpacks(cuda):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 90, (64,), generator=g).tolist()
    total = sum(lengths)
    fields = {
        "ids": torch.randint(0, 1 << 40, (total,), generator=g),
        "mask": torch.rand(total, generator=g) > 0.5,
        "logp": torch.randn(total, generator=g),
        "hidden": torch.randn(total, 3, generator=g).bfloat16(),
        "wide": torch.randn(total, 8, generator=g),
    }
    plan = plan_packing(lengths, 512)
    back = {k: torch.empty_like(v).fill_(1) for k, v in fields.items()}
    for i in range(plan.bins_per_rank):
        b = plan.bin(0, i)
        with cuda():
            packed = pack(b, shift=["next"], next=fields["ids"], **fields)
            unpack(b, back, **{k: packed[k] for k in fields})
        assert torch.equal(packed["next"], pack_ref(b, fields["ids"], shifted=True))
        assert all(torch.equal(packed[k], pack_ref(b, fields[k])) for k in fields)
    assert all(torch.equal(back[k], v) for k, v in fields.items())
