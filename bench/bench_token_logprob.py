"""token_logprob from given logits beside eager torch, torch.compile and TRL's formula.

    pytest bench/bench_token_logprob.py --benchmark-only [-s]
    python bench/bench_token_logprob.py [--full] [--out FILE]

Modes: `forward`; `both` = forward and backward to the logits. Floor: the bytes that must move (forward: one read of the
logits; both: two reads and one write) at the bandwidth of a copy of the same size, measured in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from m2rl_kernels import token_logprob
from m2rl_kernels.token_logprob import token_logprob_ref


def shapes(full: bool) -> list[tuple[int, int]]:
    """(N, V)"""
    if torch.cuda.is_available():
        return [(2048, 151936), (8192, 151936)] + ([(8192, 50257), (16384, 151936)] if full else [])
    return [(4096, 220), (128, 151936)] + ([(1024, 32768)] if full else [])


SEQUENCE = 64


def trl(logits_NV, targets_N):
    """TRL 1.16's log-probability of chosen tokens, restated: [sequences, SEQUENCE, V] logits, one sequence at a time;
    float32 by logsumexp, half precision by log_softmax in that precision."""
    logits, targets = logits_NV.unflatten(0, (-1, SEQUENCE)), targets_N.view(-1, SEQUENCE, 1)
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, targets)[..., 0]
        return (chosen - torch.stack([z.logsumexp(-1) for z in logits])).flatten()
    return torch.cat([z.log_softmax(-1).gather(-1, y)[:, 0] for z, y in zip(logits, targets)])


def run(N, V, mode, full=False, rounds=None):
    device = protocol.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)
    logits = (torch.randn(N, V, generator=g, device=device) * 2).to(dtype)
    y, c = torch.randint(V, (N,), generator=g, device=device), torch.randn(N, generator=g, device=device)

    exact = torch.zeros(N, dtype=torch.float64, device=device)
    gradient = torch.zeros(N, V, dtype=torch.float64, device=device) if mode == "both" and N * V < 1 << 28 else None
    for r in range(0, N, 256):
        rows = slice(r, min(r + 256, N))
        z = logits[rows].double().requires_grad_()
        logp = token_logprob_ref(z, y[rows])
        exact[rows] = logp.detach()
        if gradient is not None:
            (gradient[rows],) = torch.autograd.grad((logp * c[rows].double()).sum(), z)
    oracle = {"logp": exact} if gradient is None else {"logp": exact, "dlogits": gradient}
    if mode == "both":
        logits.requires_grad_()

    def finish(logp):
        if mode == "forward":
            return {"logp": logp}
        (grad,) = torch.autograd.grad((logp.float() * c).sum(), logits)
        return {"logp": logp.detach(), "dlogits": grad}

    def eager(z, y):
        return z.float().log_softmax(-1).gather(1, y[:, None])[:, 0]

    found: dict[str, protocol.Provider | str] = {
        "ours": lambda: finish(token_logprob(logits, y)),
        "ours, entropy": lambda: finish(token_logprob(logits, y, return_entropy=True)[0]),
        "eager": lambda: finish(eager(logits, y)),
    }
    if device.type == "cuda" or full:
        compiled = torch.compile(eager, dynamic=False)
        found["torch.compile"] = lambda: finish(compiled(logits, y))
    else:
        found["torch.compile"] = "on the CPU only with --full (a minute of compilation)"
    found["TRL formula"] = lambda: finish(trl(logits, y))

    source = logits.detach()
    target = torch.empty_like(source)
    case = {"mode": mode, "N": N, "V": V, "dtype": str(dtype).removeprefix("torch.")}
    rows = protocol.compare(
        "token_logprob",
        case,
        found,
        oracle,
        lambda: (target.copy_(source), {})[1],
        floor_scale=0.5 if mode == "forward" else 1.5,
        rounds=rounds,
    )  # a copy reads and writes
    return rows, found["ours"]


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize(("N", "V"), shapes(full=False))
def test_token_logprob(benchmark, N, V, mode):
    rows, call = run(N, V, mode, rounds=None if torch.cuda.is_available() else 5)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    assert rows[0]["error"]["logp"] <= 2e-5


if __name__ == "__main__":
    protocol.main(
        lambda o: [
            row for shape in shapes(o.full) for mode in ("forward", "both") for row in run(*shape, mode, o.full)[0]
        ]
    )
