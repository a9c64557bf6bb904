"""group_advantages beside the formula of equal groups (TRL) and a loop over groups.

    pytest bench/bench_advantages.py --benchmark-only [-s]
    python bench/bench_advantages.py [--full] [--out FILE]

Floor: 9 bytes a sample (reward read, advantage and live written) at a copy's bandwidth: bound by the launch on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from bench_policy_loss import copy_of
from m2rl_kernels import group_advantages
from m2rl_kernels.advantages import group_advantages_ref


def shapes(full: bool) -> list[tuple[int, int]]:
    """(groups, group size)"""
    return [(128, 16), (6250, 16), (64, 1024)] if full else [(128, 16), (6250, 16)]


def run(G, size, rounds=None):
    device = protocol.device()
    rewards = (torch.rand(G * size, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    offsets = torch.arange(0, G * size + 1, size)
    oracle = {"adv": group_advantages_ref(rewards, offsets).adv.to(device)}
    rewards, offsets = rewards.to(device), offsets.to(device)

    def trl():
        groups = rewards.view(-1, size)
        mean, std = groups.mean(1).repeat_interleave(size), groups.std(1).repeat_interleave(size)
        return {"adv": (rewards - mean) / (std + 1e-6)}

    def loop():
        parts = rewards.split(size)
        return {"adv": torch.cat([(p - p.mean()) / (p.std() + 1e-6) for p in parts])}

    found = {"ours": lambda: {"adv": group_advantages(rewards, offsets).adv}, "TRL formula": trl, "loop": loop}
    rows = protocol.compare(
        "group_advantages", {"groups": G, "size": size}, found, oracle, copy_of(9 * G * size, device), rounds=rounds
    )
    return rows, found["ours"]


@pytest.mark.parametrize(("G", "size"), shapes(full=False))
def test_group_advantages(benchmark, G, size):
    rows, call = run(G, size)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    assert rows[0]["error"]["adv"] <= 1e-6


if __name__ == "__main__":
    protocol.main(lambda o: [row for shape in shapes(o.full) for row in run(*shape, rounds=15)[0]])
