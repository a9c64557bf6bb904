"""Which sequences share a forward pass, and laying their tokens end to end.

plan_packing: sequences of lengths l_i into bins of at most max_tokens, the SAME number of bins on every rank, of nearly equal cost

    cost_i = a * l_i + b * l_i^2              (a: matrix products per token, b: attention)

1. best-fit decreasing gives the number of bins, at most 11/9 of the optimum plus one; it is rounded up to a multiple of world_size;
2. the sequences are dealt anew, most costly first, each to the bin of least cost with room (LPT); where that runs out of room the
   bins of step 1 stand;
3. bins are sorted by cost and dealt in rows of world_size, so that what runs at the same time on all ranks costs about the same; in
   a row the costliest bin goes to the rank with the least so far.

All of it is a pure function of its arguments, the same on every rank, without a tensor in sight; ties go to the lowest index.

pack, unpack and gather_rows move the tokens: one call for all fields of a bin, an exact round trip, no synchronisation.

Letters: S sequences, T tokens of a bin, K bins. Floor: 2 bytes moved per byte of field; a bin's metadata is 0.7 MB, launch-bound.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackBin:
    """One forward pass of one rank."""

    indices: np.ndarray  # int64 [S_bin], ascending: which sequences, in the order they lie
    lengths: np.ndarray  # int64 [S_bin]
    starts: np.ndarray  # int64 [S_bin]: where each begins among all tokens of the plan, in order of sequence

    @functools.cached_property
    def cu_seqlens(self) -> np.ndarray:
        """int32 [S_bin + 1]: token offsets in the bin."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    @property
    def tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @functools.cached_property
    def max_seqlen(self) -> int:
        """Longest sequence, a host integer: 0 for an empty bin."""
        return int(self.lengths.max(initial=0))


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Every sequence in exactly one bin; the same number of bins on every rank, empty ones included."""

    lengths: np.ndarray  # int64 [S]
    order: np.ndarray  # int64 [S]: sequences bin by bin, bins rank by rank
    bin_offsets: np.ndarray  # int64 [world_size * bins_per_rank + 1] into order
    world_size: int
    max_tokens: int
    cost: tuple[float, float] = field(default=(1.0, 0.0))

    @property
    def bins_per_rank(self) -> int:
        return (len(self.bin_offsets) - 1) // self.world_size

    @functools.cached_property
    def bins(self) -> list[list[np.ndarray]]:
        """bins[rank][i]: int64 indices of the sequences of that rank's i-th forward pass, ascending."""
        flat = np.split(self.order, self.bin_offsets[1:-1])
        return [flat[r * self.bins_per_rank : (r + 1) * self.bins_per_rank] for r in range(self.world_size)]

    def bin(self, rank: int, i: int) -> PackBin:
        indices = self.bins[rank][i]
        return PackBin(indices, self.lengths[indices], self._starts[indices])

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def bin_costs(self) -> np.ndarray:
        """float64 [world_size, bins_per_rank]"""
        costs = np.concatenate([[0.0], np.cumsum(sequence_costs(self.lengths, self.cost)[self.order])])
        return np.diff(costs[self.bin_offsets]).reshape(self.world_size, -1)

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank over the mean; 1 is perfect."""
        totals = self.bin_costs.sum(1)
        return float(totals.max() / totals.mean()) if totals.mean() > 0 else 1.0

    @property
    def lockstep_imbalance(self) -> float:
        """The same when ranks wait for each other after every bin, as under FSDP: sum of each row's maximum over the mean total."""
        mean = self.bin_costs.sum() / self.world_size
        return float(self.bin_costs.max(0).sum() / mean) if mean > 0 else 1.0


def plan_packing(lengths: Sequence[int] | np.ndarray, max_tokens: int, world_size: int = 1,
                 cost: tuple[float, float] = (1.0, 0.0)) -> PackPlan:
    """Bins of at most max_tokens tokens for every rank, see above. On the host, deterministic.

    lengths [S]: tokens of each sequence, at least 0. cost = (a, b): a * l + b * l^2 per sequence, any unit, neither negative.
    Returns at least one bin per rank, so that ranks without work still take part in collectives.

    ValueError names the argument, the rule and the value: also for a sequence longer than max_tokens.
    """
    lengths = np.asarray(lengths)
    _require(lengths.ndim == 1 and (lengths.size == 0 or lengths.dtype.kind in "iu"),
             lambda: f"lengths must be integers [S], got {lengths.dtype} {list(lengths.shape)}")
    lengths = lengths.astype(np.int64)
    _require(0 < max_tokens < 2**31, lambda: f"max_tokens must be in [1, 2^31), as cu_seqlens is int32, got {max_tokens}")
    _require(world_size >= 1, lambda: f"world_size must be at least 1, got {world_size}")
    _require(len(cost) == 2 and all(0 <= c < float("inf") for c in cost),
             lambda: f"cost must be two finite numbers (a, b), neither negative, got {cost}")
    wrong = np.flatnonzero((lengths > max_tokens) | (lengths < 0))
    if wrong.size:
        i = wrong[0]
        raise ValueError(f"lengths must be in [0, max_tokens] = [0, {max_tokens}], got {lengths[i]} at index {i}"
                         + (f", and {wrong.size - 1} more" if wrong.size > 1 else ""))
    order, offsets = plan_packing_ref(lengths, int(max_tokens), world_size, sequence_costs(lengths, cost))
    return PackPlan(lengths, order, offsets, world_size, int(max_tokens), (float(cost[0]), float(cost[1])))


def sequence_costs(lengths: np.ndarray, cost: tuple[float, float]) -> np.ndarray:
    """float64 [S]"""
    l = lengths.astype(np.float64)
    return cost[0] * l + cost[1] * l * l


def plan_packing_ref(lengths: np.ndarray, max_tokens: int, world_size: int, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The three steps, as (order, bin_offsets). Sequences are taken longest first, equal lengths by index."""
    longest_first = np.argsort(-lengths, kind="stable")
    fit: list[list[int]] = []  # step 1
    room: list[int] = []
    for i in longest_first:
        best = min((k for k in range(len(room)) if room[k] >= lengths[i]), key=lambda k: (room[k], k), default=None)
        if best is None:
            fit.append([])
            room.append(max_tokens)
            best = len(room) - 1
        fit[best].append(int(i))
        room[best] -= int(lengths[i])
    K = max(-(-len(fit) // world_size), 1) * world_size
    bins: list[list[int]] = [[] for _ in range(K)]  # step 2
    room, load = [max_tokens] * K, [0.0] * K
    for i in longest_first:
        best = min((k for k in range(K) if room[k] >= lengths[i]), key=lambda k: (load[k], k), default=None)
        if best is None:
            bins = fit + [[] for _ in range(K - len(fit))]
            break
        bins[best].append(int(i))
        room[best] -= int(lengths[i])
        load[best] += float(costs[i])
    load = [float(sum(costs[i] for i in b)) for b in bins]  # step 3, in the order of assignment
    by_cost = sorted(range(K), key=lambda k: (-load[k], k))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    total = [0.0] * world_size
    for row in range(0, K, world_size):
        lightest = sorted(range(world_size), key=lambda r: (total[r], r))
        for r, k in zip(lightest, by_cost[row : row + world_size]):
            ranks[r].append(k)
            total[r] += load[k]
    dealt = [sorted(bins[k]) for r in ranks for k in r]
    return (np.array([i for b in dealt for i in b], dtype=np.int64),
            np.concatenate([[0], np.cumsum([len(b) for b in dealt])]).astype(np.int64))


def _require(condition, message) -> None:
    if not condition:
        raise ValueError(message() if callable(message) else message)


# ---- moving tokens -------------------------------------------------------------------------------------------------------------


def pack(plan_bin: PackBin, *, shift: Sequence[str] = (), ignore_index: int = -100, **fields: Tensor) -> dict[str, Tensor]:
    """The bin's tokens of every field, sequence after sequence: name -> [T, ...], on the field's device.

    fields: each [T_all, ...] contiguous, all sequences of the plan in order of index. Names listed in `shift` give the NEXT token of
    the same sequence instead (targets); the last position of each sequence gets ignore_index, never another sequence's token.
    """
    rows = torch.from_numpy(_token_rows(plan_bin))
    _check_fields(plan_bin, fields, shift)
    out = {}
    for name, x in fields.items():
        if name in shift:
            last = torch.from_numpy(plan_bin.cu_seqlens[1:].astype(np.int64) - 1)[torch.from_numpy(plan_bin.lengths > 0)].to(x.device)
            out[name] = x[(rows + 1).clamp(max=max(len(x) - 1, 0)).to(x.device)].index_fill_(0, last, ignore_index)
        else:
            out[name] = x[rows.to(x.device)]
    return out


def unpack(plan_bin: PackBin, out: dict[str, Tensor], **fields: Tensor) -> dict[str, Tensor]:
    """The inverse of pack: writes each field's [T, ...] back to the bin's places in out[name] [T_all, ...]. Returns out."""
    rows = torch.from_numpy(_token_rows(plan_bin))
    for name, x in fields.items():
        _require(name in out, lambda: f"out must hold a tensor for {name!r}, got {sorted(out)}")  # noqa: B023
        _require(len(x) == plan_bin.tokens, lambda: f"{name} must have T = {plan_bin.tokens} rows, got {list(x.shape)}")  # noqa: B023
        out[name].index_copy_(0, rows.to(x.device), x)
    return out


def gather_rows(x_TH: Tensor, rows_N: Tensor) -> Tensor:
    """x[rows]: [N, ...]. Differentiable; the rows must differ, so that the gradient is a plain scatter, free of atomics."""
    return x_TH.index_select(0, rows_N)


def _token_rows(plan_bin: PackBin) -> np.ndarray:
    return np.repeat(plan_bin.starts - plan_bin.cu_seqlens[:-1], plan_bin.lengths) + np.arange(plan_bin.tokens)


def _check_fields(plan_bin: PackBin, fields: dict[str, Tensor], shift: Sequence[str]) -> None:
    needed = int((plan_bin.starts + plan_bin.lengths).max(initial=0))
    for name, x in fields.items():
        _require(x.dim() >= 1 and len(x) >= needed,
                 lambda: f"{name} must have at least {needed} rows, all tokens of the plan, got {list(x.shape)}")  # noqa: B023
    for name in shift:
        _require(name in fields, lambda: f"shift must name fields, got {name!r}, not among {sorted(fields)}")  # noqa: B023
