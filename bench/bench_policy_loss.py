"""policy_loss beside autograd of its definition, torch.compile and TRL's formula: loss, gradient and clip share.

    pytest bench/bench_policy_loss.py --benchmark-only [-s]
    python bench/bench_policy_loss.py [--full] [--out FILE]

Floor: 24 bytes a token (five vectors read, one written) at the bandwidth of a copy of as many bytes, in the same run;
on a GPU this is below the cost of a launch for every usual N.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from m2rl_kernels.policy_loss import policy_loss, policy_loss_ref


def shapes(full: bool) -> list[int]:
    return [4096, 16384, 131072] if full else [16384]


def trl(logp, behaviour, advantage, weight, old):
    """TRL's GRPO loss (loss_type grpo, token-level ratio, truncated importance sampling), restated on flat tokens."""
    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    per_token = -torch.min(coef_1 * advantage, coef_2 * advantage)
    per_token = per_token * torch.clamp(torch.exp(old - behaviour), max=2.0)
    clipped = ((coef_1 < 0.8) & (advantage < 0)) | ((coef_1 > 1.28) & (advantage > 0))
    return (per_token * weight).sum(), clipped.float().mean()


def copy_of(n_bytes: int, device: torch.device) -> protocol.Provider:
    """A copy that moves so many bytes, reads and writes together."""
    source = torch.zeros(max(n_bytes // 8, 1), dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return lambda: (target.copy_(source), {})[1]


def run(N, full=False, rounds=None):
    device = protocol.device()
    g = torch.Generator(device).manual_seed(0)
    logp, behaviour, old, advantage = torch.randn(4, N, generator=g, device=device) * 0.1 - 1
    weight = torch.rand(N, generator=g, device=device) / N
    logp.requires_grad_()
    exact = logp.detach().double().requires_grad_()
    loss, _ = policy_loss_ref(exact, *(x.double() for x in (behaviour, advantage, weight, old)))
    oracle = {"loss": loss.detach(), "grad": torch.autograd.grad(loss, exact)[0]}

    def finish(f):
        def call():
            loss, _ = f()
            return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, logp)[0]}

        return call

    found: dict[str, protocol.Provider | str] = {
        "ours": finish(lambda: policy_loss(logp, behaviour, advantage, weight, old_logp=old)),
        "definition": finish(lambda: policy_loss_ref(logp, behaviour, advantage, weight, old)),
        "TRL formula": finish(lambda: trl(logp, behaviour, advantage, weight, old)),
        "torch.compile": "on the CPU only with --full",
    }
    if device.type == "cuda" or full:
        compiled = torch.compile(trl, dynamic=False)
        found["torch.compile"] = finish(lambda: compiled(logp, behaviour, advantage, weight, old))
    case = {"N": N, "kind": "grpo"}
    rows = protocol.compare("policy_loss", case, found, oracle, copy_of(24 * N, device), rounds=rounds)
    return rows, found["ours"]


@pytest.mark.parametrize("N", shapes(full=False))
def test_policy_loss(benchmark, N):
    rows, call = run(N)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    assert rows[0]["error"]["loss"] <= 2e-6 and rows[0]["error"]["grad"] <= 1e-9


if __name__ == "__main__":
    protocol.main(lambda o: [row for N in shapes(o.full) for row in run(N, o.full, 30)[0]])
