"""linear_kl against its definition in float64, and the sampled estimate against the divergence it estimates."""

import pytest
import torch
from m2rl_kernels import linear_kl, linear_logprob, sampled_reverse_kl
from m2rl_kernels.linear_kl import linear_kl_bwd, linear_kl_fwd, linear_kl_ref


def make(N, V, H, K, scale=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    heads = [
        (torch.randn(*shape, generator=g) * size).to(dtype)
        for shape, size in (((N, H), 1.0), ((V, H), scale / H**0.5), ((N, K), 1.0), ((V, K), scale / K**0.5))
    ]
    return heads, torch.randn(N, generator=g)


def run(f, heads, c, **options):
    hidden, weight = heads[0].detach().requires_grad_(), heads[1].detach().requires_grad_()
    kl = f(hidden, weight, *heads[2:], **options)
    return kl.detach(), *torch.autograd.grad((kl * c).sum(), (hidden, weight))


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "V", "scale"), [(1, 130, 1.0), (70, 1300, 0.004), (70, 1300, 2.0), (33, 4097, 4.0)])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 28])
def test_it_matches_float64(direction, dtype, N, V, scale, chunk_bytes):
    heads, c = make(N, V, 40, 24, scale, dtype)
    live = torch.arange(N) % 4 != 1
    want = run(linear_kl_ref, [t.double() for t in heads], c.double(), direction=direction, temperature=0.7, live=live)
    got = run(linear_kl, heads, c, direction=direction, temperature=0.7, live=live, chunk_bytes=chunk_bytes)
    assert float((got[0] - want[0]).abs().max()) <= max(1e-5, 5e-6 * float(want[0].max()))
    flat = 1e-4 if scale < 0.1 else 1e-5  # flat heads: p - q cancels, the divergence is 1e-5 nats
    for ours, truth in zip(got[1:], want[1:]):
        assert ours.dtype == dtype and relative(ours, truth) <= (flat if dtype == torch.float32 else 4e-3)
    assert not got[0][~live].any() and not got[1][~live].any()


def test_a_teacher_equal_to_the_student_is_at_distance_zero():
    (hidden, weight, _, _), c = make(20, 300, 16, 16)
    for direction in ("reverse", "forward"):
        kl, grad_hidden, grad_weight = run(linear_kl, (hidden, weight, hidden, weight), c, direction=direction)
        assert max(float(t.abs().max()) for t in (kl, grad_hidden, grad_weight)) < 2e-6


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(("V", "scale"), [(1, 3.0), (2, 30.0), (700, 80.0), (5000, 200.0)])
def test_no_worse_than_torch_at_any_size_of_the_logits(direction, V, scale):
    """Divergences of hundreds of nats: what cancels must cancel before it is rounded."""
    heads, c = make(64, V, 40, 24, scale)
    want = run(linear_kl_ref, [t.double() for t in heads], c.double(), direction=direction)
    torchs = run(linear_kl_ref, heads, c, direction=direction)
    for ours, theirs, truth in zip(run(linear_kl, heads, c, direction=direction), torchs, want):
        assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm()) + 1e-6 * float(truth.norm())


def test_autocast_changes_nothing():
    heads, c = make(20, 300, 16, 24)
    want = run(linear_kl, heads, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(linear_kl, heads, c)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)


def test_a_row_has_the_same_bits_in_any_batch_and_chunk():
    heads, c = make(70, 1300, 40, 24)
    whole = run(linear_kl, heads, c)
    for rows in (torch.tensor([9]), torch.randperm(70, generator=torch.Generator().manual_seed(1))):
        for chunk_bytes in (1, 1 << 28):
            part = [heads[0][rows], heads[1], heads[2][rows], heads[3]]
            for ours, reference in zip(run(linear_kl, part, c[rows], chunk_bytes=chunk_bytes)[:2], whole):
                assert torch.equal(ours, reference[rows])


def test_the_teacher_gets_no_gradient_and_no_live_row_is_fine():
    heads, _ = make(5, 30, 8, 8)
    for t in heads:
        t.requires_grad_()
    linear_kl(*heads).sum().backward()
    assert heads[0].grad is not None and heads[2].grad is None and heads[3].grad is None
    kl = linear_kl(*heads, live=torch.zeros(5, dtype=torch.bool))
    (grad,) = torch.autograd.grad(kl.sum(), heads[1])
    assert not kl.any() and not grad.any()


def test_gradcheck_of_the_reference_and_opcheck():
    heads, c = make(3, 7, 4, 4)
    doubles = [t.double() for t in heads]
    for direction in ("reverse", "forward"):
        f = lambda x, w: linear_kl(x, w, *doubles[2:], direction=direction, temperature=0.7)  # noqa: E731, B023
        assert torch.autograd.gradcheck(f, (doubles[0].clone().requires_grad_(), doubles[1].clone().requires_grad_()))
    rows = torch.tensor([0, 2])
    torch.library.opcheck(
        linear_kl_fwd, (heads[0].requires_grad_(), heads[1].requires_grad_(), *heads[2:], rows, True, 0.7, 1024)
    )
    with torch.no_grad():
        _, stats = linear_kl_fwd(*heads, rows, True, 0.7, 1024)
    torch.library.opcheck(linear_kl_bwd, (c, *(t.detach() for t in heads), rows, stats, True, 0.7, 1024, True, True))


def test_the_sampled_estimate_and_its_gradient_are_the_divergence_in_the_mean():
    """Exactly, not statistically: every token of the vocabulary once, weighted by its probability."""
    heads, _ = make(1, 40, 8, 8)
    hidden, weight = heads[0].clone().requires_grad_(), heads[1].clone().requires_grad_()
    V = weight.shape[0]
    logp = linear_logprob(hidden.expand(V, -1), weight, torch.arange(V))
    teacher = linear_logprob(heads[2].expand(V, -1).contiguous(), heads[3], torch.arange(V))
    estimate = (logp.exp().detach() * sampled_reverse_kl(logp, teacher)).sum()
    kl, grad_hidden, grad_weight = run(linear_kl_ref, heads, torch.ones(1))
    assert abs(float(estimate.detach()) - float(kl)) < 1e-5
    got = torch.autograd.grad(estimate, (hidden, weight))
    assert relative(got[0], grad_hidden) < 1e-4 and relative(got[1], grad_weight) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_weight_VK": torch.zeros(6, 4)}, "teacher_weight must have the vocabulary of weight, 5, got 6"),
        ({"teacher_hidden_NK": torch.zeros(2, 4)}, "teacher_hidden must have the rows of hidden, 3, got 2"),
        ({"weight_VH": torch.zeros(5, 7)}, r"weight must have shape \[V, 8\], V > 0, got \[5, 7\]"),
        ({"direction": "backward"}, "direction must be 'reverse' or 'forward', got 'backward'"),
        ({"temperature": 0.0}, r"temperature must be in \[1e-30, 1e30\], got 0\.0"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive, got 0"),
        ({"live": torch.ones(2, dtype=torch.bool)}, r"live must be bool of shape \[N\] = \[3\], got torch\.bool \[2\]"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(change, message):
    good = {
        "hidden_NH": torch.zeros(3, 8),
        "weight_VH": torch.zeros(5, 8),
        "teacher_hidden_NK": torch.zeros(3, 4),
        "teacher_weight_VK": torch.zeros(5, 4),
    }
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**good, **change})
