"""plan_packing beside greedy plans in Python, and pack beside gathering by index.

    pytest bench/bench_packing.py --benchmark-only [-s]
    python bench/bench_packing.py [--full] [--out FILE]

The `error` of a plan is its imbalance minus 1: the cost of the busiest rank over the mean. Its floor is one numpy sort
of the lengths. pack's floor is a copy of the fields' bytes.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from bench_policy_loss import copy_of
from m2rl_kernels import pack, plan_packing
from m2rl_kernels.packing import sequence_costs

COST = (12.0 * 2560, 1.0)  # a 4B model's layer: matrix work per token against attention per earlier token


def lengths_of(sequences):
    return np.random.default_rng(0).lognormal(7, 0.8, sequences).astype(np.int64).clip(1, 16384)


def first_fit_by_arrival(lengths, max_tokens, world_size):
    """What most trainers do: fill a bin until the next sequence does not fit, deal bins to ranks in turn."""
    costs, busy, room, rank = sequence_costs(lengths, COST).tolist(), [0.0] * world_size, max_tokens, 0
    for l, c in zip(lengths.tolist(), costs):
        if l > room:
            rank, room = (rank + 1) % world_size, max_tokens
        room -= l
        busy[rank] += c
    return max(busy) * world_size / sum(busy) - 1


def longest_to_least_busy(lengths, max_tokens, world_size):
    """Sort, then a heap over bins (LPT): good balance, but a bin may overflow max_tokens and none is checked."""
    costs = sequence_costs(lengths, COST).tolist()
    bins = -(-int(lengths.sum()) // max_tokens // world_size) * world_size
    heap = [(0.0, k, []) for k in range(bins)]
    for i in np.argsort(-lengths, kind="stable").tolist():
        load, k, members = heapq.heappop(heap)
        members.append(i)
        heapq.heappush(heap, (load + costs[i], k, members))
    busy = [0.0] * world_size
    for load, k, _ in heap:
        busy[k % world_size] += load
    return max(busy) * world_size / sum(busy) - 1


def run_plan(sequences, max_tokens=16384, world_size=8, rounds=None):
    lengths = lengths_of(sequences)
    as_dict = lambda excess: {"imbalance": torch.tensor([excess])}  # noqa: E731
    found = {
        "ours": lambda: as_dict(plan_packing(lengths, max_tokens, world_size, COST).imbalance - 1),
        "by arrival": lambda: as_dict(first_fit_by_arrival(lengths, max_tokens, world_size)),
        "heap": lambda: as_dict(longest_to_least_busy(lengths, max_tokens, world_size)),
    }
    case = {"sequences": sequences, "max_tokens": max_tokens, "world_size": world_size}
    rows = protocol.compare(
        "plan_packing", case, found, {"imbalance": torch.zeros(1)}, lambda: (np.sort(lengths), {})[1], rounds=rounds
    )
    return rows, found["ours"]


def run_pack(tokens, rounds=None):
    device = protocol.device()
    lengths = lengths_of(tokens // 700)
    plan = plan_packing(lengths, tokens, 1)
    b, total = plan.bin(0, 0), int(lengths.sum())
    g = torch.Generator(device).manual_seed(0)
    fields = {"ids": torch.randint(0, 1 << 17, (total,), generator=g, device=device)}
    fields |= {f"f{i}": torch.randn(total, generator=g, device=device) for i in range(5)}
    index = torch.cat([torch.arange(s, s + n) for s, n in zip(b.starts.tolist(), b.lengths.tolist())]).to(device)
    oracle = {k: v[index].double() for k, v in fields.items()}
    found = {"ours": lambda: pack(b, **fields), "index": lambda: {k: v[index] for k, v in fields.items()}}
    case = {"tokens": b.tokens, "fields": len(fields)}
    bytes_moved = 2 * b.tokens * sum(v.element_size() for v in fields.values())
    rows = protocol.compare("pack", case, found, oracle, copy_of(bytes_moved, device), rounds=rounds)
    return rows, found["ours"]


@pytest.mark.parametrize("sequences", [2048, 100_000])
def test_plan_packing(benchmark, sequences):
    rows, call = run_plan(sequences)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    assert rows[0]["error"]["imbalance"] <= 0.03


def test_pack(benchmark):
    rows, call = run_pack(16384)
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    assert all(e == 0 for e in rows[0]["error"].values())


def measure(o: argparse.Namespace) -> list[dict]:
    plans = [2048, 20_000, 100_000] if o.full else [2048, 100_000]
    packs = [16384, 131072] if o.full else [16384]
    return [row for n in plans for row in run_plan(n, rounds=15)[0]] + [
        row for n in packs for row in run_pack(n, 15)[0]
    ]


if __name__ == "__main__":
    protocol.main(measure)
