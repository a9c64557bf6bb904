"""Which sequences share a forward pass, and laying their tokens end to end.

plan_packing: sequences of lengths l_i into bins of at most max_tokens, the SAME number of bins on every rank, of nearly
equal cost

    cost_i = a * l_i + b * l_i^2              (a: matrix products per token, b: attention)

1. best-fit decreasing gives the number of bins, at most 11/9 of the optimum plus one; rounded up to a multiple of
   world_size;
2. the sequences are dealt anew, longest first, each to the bin of least cost with room (LPT); where that runs out of
   room the bins of step 1 stand, unless ranks would then differ by more than 3% and one more bin per rank helps;
3. bins are sorted by cost and dealt in rows of world_size, so that what runs at the same time on all ranks costs about
   the same; in a row the costliest bin goes to the rank with the least so far.

All of it is a pure function of its arguments, the same on every rank, without a tensor in sight; ties go to the lowest
index. On the host in C++: O(S log K).

pack, unpack and gather_rows move the tokens: one call for all fields of a bin, an exact round trip, no synchronisation.

Letters: S sequences, T tokens of a bin, K bins. Floor: every byte of a field is read and written once; a bin's metadata
is 0.7 MB, so on a GPU it is bound by the launch.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from m2rl_kernels import native

TOLERANCE = 1.03  # rank imbalance above which one more bin per rank is tried
MAX_FIELDS_PER_LAUNCH = 16  # kMaxFields in csrc/pack.cu
SHIFTABLE = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class PackBin:
    """One forward pass of one rank."""

    indices: np.ndarray  # int64 [S_bin], ascending: which sequences, in the order they lie
    lengths: np.ndarray  # int64 [S_bin]
    starts: np.ndarray  # int64 [S_bin]: where each begins among all tokens of the plan, in order of sequence
    _on_device: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

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

    def table(self, device: torch.device) -> Tensor:
        """int64 [3, S_bin] on the device: starts, cu_seqlens[:-1], lengths. Copied once, without waiting for it."""
        if device not in self._on_device:
            host = torch.from_numpy(np.stack([self.starts, self.cu_seqlens[:-1], self.lengths]))
            pinned = host.pin_memory() if device.type == "cuda" else host
            self._on_device[device] = pinned.to(device, non_blocking=True)
        return self._on_device[device]


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
        flat = [self.order[a:b] for a, b in itertools.pairwise(self.bin_offsets.tolist())]
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
        """The same when ranks wait for each other after every bin, as under FSDP: the sum over i of the costliest i-th
        bin, over the mean rank's cost."""
        mean = self.bin_costs.sum() / self.world_size
        return float(self.bin_costs.max(0).sum() / mean) if mean > 0 else 1.0


def plan_packing(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, world_size: int = 1, cost: tuple[float, float] = (1.0, 0.0)
) -> PackPlan:
    """Bins of at most max_tokens tokens for every rank, see above. On the host, deterministic.

    lengths [S]: tokens of each sequence, at least 0. cost = (a, b): a * l + b * l^2 per sequence, any unit, neither
    negative.
    Returns at least one bin per rank, so that ranks without work still take part in collectives.

    ValueError names the argument, the rule and the value: also for a sequence longer than max_tokens.
    """
    lengths = np.asarray(lengths)
    _require(
        lengths.ndim == 1 and (lengths.size == 0 or lengths.dtype.kind in "iu"),
        lambda: f"lengths must be integers [S], got {lengths.dtype} {list(lengths.shape)}",
    )
    lengths = lengths.astype(np.int64)
    _require(
        0 < max_tokens < 2**31, lambda: f"max_tokens must be in [1, 2^31), as cu_seqlens is int32, got {max_tokens}"
    )
    _require(lengths.size < 2**31, lambda: f"lengths must have fewer than 2^31 entries, got {lengths.size}")
    _require(world_size >= 1, lambda: f"world_size must be at least 1, got {world_size}")
    _require(
        len(cost) == 2 and all(0 <= c < float("inf") for c in cost),
        lambda: f"cost must be two finite numbers (a, b), neither negative, got {cost}",
    )
    wrong = np.flatnonzero((lengths > max_tokens) | (lengths < 0))
    if wrong.size:
        i = wrong[0]
        raise ValueError(
            f"lengths must be in [0, max_tokens] = [0, {max_tokens}], got {lengths[i]} at index {i}"
            + (f", and {wrong.size - 1} more" if wrong.size > 1 else "")
        )
    order, offsets = plan_packing_cpu(lengths, int(max_tokens), world_size, sequence_costs(lengths, cost))
    return PackPlan(lengths, order, offsets, world_size, int(max_tokens), (float(cost[0]), float(cost[1])))


def sequence_costs(lengths: np.ndarray, cost: tuple[float, float]) -> np.ndarray:
    """float64 [S]"""
    l = lengths.astype(np.float64)
    return cost[0] * l + cost[1] * l * l


def plan_packing_ref(
    lengths: np.ndarray, max_tokens: int, world_size: int, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The three steps, as (order, bin_offsets). Of bins with equal room, best fit takes the one last put there."""
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    fit: list[list[int]] = []  # step 1
    with_room: dict[int, list[int]] = {}  # stacks of bins
    for i in longest_first:
        room = min((r for r, stack in with_room.items() if stack and r >= lengths[i]), default=None)
        if room is None:
            fit.append([])
        k = len(fit) - 1 if room is None else with_room[room].pop()
        fit[k].append(i)
        with_room.setdefault(int((max_tokens if room is None else room) - lengths[i]), []).append(k)
    K = max(-(-len(fit) // world_size), 1) * world_size
    roomy = _deal(longest_first, lengths, costs, K, max_tokens)  # step 2
    bins = roomy or fit + [[] for _ in range(K - len(fit))]
    ranks, imbalance = _to_ranks(bins, costs, world_size)
    more = None if roomy or imbalance <= TOLERANCE else _deal(longest_first, lengths, costs, K + world_size, max_tokens)
    if more:
        more_ranks, more_imbalance = _to_ranks(more, costs, world_size)
        bins, ranks = (more, more_ranks) if more_imbalance < imbalance else (bins, ranks)
    dealt = [sorted(bins[k]) for r in ranks for k in r]
    return (
        np.array([i for b in dealt for i in b], dtype=np.int64),
        np.concatenate([[0], np.cumsum([len(b) for b in dealt])]).astype(np.int64),
    )


def _deal(
    longest_first: Sequence[int], lengths: np.ndarray, costs: np.ndarray, K: int, max_tokens: int
) -> list[list[int]] | None:
    """Each sequence to the bin of least cost with room; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(K)]
    rooms, loads = [max_tokens] * K, [0.0] * K
    for i in longest_first:
        best = min((k for k in range(K) if rooms[k] >= lengths[i]), key=lambda k: (loads[k], k), default=None)
        if best is None:
            return None
        bins[best].append(i)
        rooms[best] -= int(lengths[i])
        loads[best] += float(costs[i])
    return bins


def _to_ranks(bins: list[list[int]], costs: np.ndarray, world_size: int) -> tuple[list[list[int]], float]:
    """Step 3: the bins of every rank in the order they run, and the imbalance."""
    loads = [float(sum(costs[i] for i in b)) for b in bins]
    by_cost = sorted(range(len(bins)), key=lambda k: (-loads[k], k))
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    busy = [0.0] * world_size
    for row in range(0, len(bins), world_size):
        lightest = sorted(range(world_size), key=lambda r: (busy[r], r))
        for r, k in zip(lightest, by_cost[row : row + world_size]):
            ranks[r].append(k)
            busy[r] += loads[k]
    return ranks, max(busy) * world_size / sum(busy) if sum(busy) > 0 else 1.0


def plan_packing_cpu(
    lengths: np.ndarray, max_tokens: int, world_size: int, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same decisions in C++."""
    order, offsets = np.empty(len(lengths), np.int64), np.empty(len(lengths) + 2 * world_size + 1, np.int64)
    lengths, costs = np.ascontiguousarray(lengths), np.ascontiguousarray(costs)
    plan = native.cpu().m2rl_plan_packing
    plan.restype = ctypes.c_int64
    K = plan(
        _address(lengths),
        _address(costs),
        ctypes.c_int64(len(lengths)),
        ctypes.c_int64(max_tokens),
        ctypes.c_int64(world_size),
        ctypes.c_double(TOLERANCE),
        _address(order),
        _address(offsets),
    )
    return order, offsets[: K + 1].copy()


def _address(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def _require(condition, message) -> None:
    if not condition:
        raise ValueError(message() if callable(message) else message)


# ---- moving tokens ---------------------------------------------------------------------------------------------------


def pack(
    plan_bin: PackBin, *, shift: Sequence[str] = (), ignore_index: int = -100, **fields: Tensor
) -> dict[str, Tensor]:
    """The bin's tokens of every field, sequence after sequence: name -> [T, ...], on the field's device.

    fields: each [T_all, ...] contiguous, on one device: all sequences of the plan in order of index. Fields [T_all] of
    a signed integer type named in `shift` give the NEXT token of the same sequence instead (targets); the last position
    of each sequence gets ignore_index, never another sequence's token. At most 16 fields per launch on CUDA. Bytes are
    copied: nothing is differentiable (gather_rows is).

    ValueError names the argument, the rule and the value.
    """
    needed = int((plan_bin.starts + plan_bin.lengths).max(initial=0))
    for name, x in fields.items():
        _check_field(name, x, needed, "all tokens of the plan")
    for name in shift:
        _require(name in fields, lambda: f"shift must name fields, got {name!r}, not among {sorted(fields)}")
        x = fields[name]
        _require(
            x.dim() == 1 and x.dtype in SHIFTABLE,
            lambda: f"{name} must be signed integers [T_all] to be shifted, got {x.dtype} {list(x.shape)}",
        )
        low, high = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max
        _require(
            low <= ignore_index <= high,
            lambda: f"ignore_index must fit {name}, {x.dtype}: in [{low}, {high}], got {ignore_index}",
        )
    out = {name: x.new_empty(plan_bin.tokens, *x.shape[1:]) for name, x in fields.items()}
    _move(plan_bin, [(fields[n], out[n], n in shift) for n in fields], ignore_index, packing=True)
    return out


def unpack(plan_bin: PackBin, out: Mapping[str, Tensor], **fields: Tensor) -> Mapping[str, Tensor]:
    """The inverse of pack: writes each field's [T, ...] to the bin's places in out[name] [T_all, ...], of the same
    dtype and device, contiguous; other bins' places stay as they are. Returns out. ValueError names the argument, the
    rule and the value."""
    needed = int((plan_bin.starts + plan_bin.lengths).max(initial=0))
    for name, x in fields.items():
        _require(name in out, lambda: f"out must hold a tensor for {name!r}, got {sorted(out)}")
        _check_field(f"out[{name!r}]", out[name], needed, "all tokens of the plan")
        _check_field(name, x, plan_bin.tokens, "the bin's tokens")
        _require(
            x.dtype == out[name].dtype and x.shape[1:] == out[name].shape[1:] and len(x) == plan_bin.tokens,
            lambda: (
                f"{name} must be {out[name].dtype} {[plan_bin.tokens, *out[name].shape[1:]]}, "
                f"got {x.dtype} {list(x.shape)}"
            ),
        )
    _move(plan_bin, [(fields[n], out[n], False) for n in fields], 0, packing=False)
    return out


def pack_ref(plan_bin: PackBin, x: Tensor, shifted: bool = False, ignore_index: int = -100) -> Tensor:
    """The definition of one packed field."""
    parts = [x[a : a + n] for a, n in zip(plan_bin.starts.tolist(), plan_bin.lengths.tolist())]
    if shifted:
        parts = [torch.cat([p[1:], p.new_full((1,), ignore_index)]) for p in parts if len(p)]
    return torch.cat(parts) if parts else x[:0]


def _check_field(name: str, x: Tensor, rows: int, what: str) -> None:
    _require(
        x.dim() >= 1 and len(x) >= rows, lambda: f"{name} must have at least {rows} rows, {what}, got {list(x.shape)}"
    )
    _require(x.is_contiguous(), lambda: f"{name} must be contiguous, got strides {x.stride()} for {list(x.shape)}")
    _require(
        not (x.requires_grad and torch.is_grad_enabled()),
        lambda: f"{name} must not require a gradient, which a copy of bytes would drop: detach it or use gather_rows",
    )


def _move(plan_bin: PackBin, moves: list[tuple[Tensor, Tensor, bool]], fill: int, packing: bool) -> None:
    """Rows of every (src, dst, shifted), from the plan's places to the bin's when packing, else back."""
    moves = [move for move in moves if move[0].numel()]
    if not moves or plan_bin.tokens == 0:
        return
    device = moves[0][0].device
    _require(device.type in ("cpu", "cuda"), lambda: f"fields must be on the CPU or a CUDA device, got {device}")
    for src, dst, _ in moves:
        _require(
            src.device == device and dst.device == device,
            lambda: f"fields must be on one device, {device}, got {src.device} and {dst.device}",
        )
    table = plan_bin.table(device)
    places = (table[0], table[1]) if packing else (table[1], table[0])
    for at in range(0, len(moves), MAX_FIELDS_PER_LAUNCH):
        part = moves[at : at + MAX_FIELDS_PER_LAUNCH]
        n = len(part)
        fields = (
            ctypes.c_int32(n),
            (ctypes.c_void_p * n)(*[src.data_ptr() for src, _, _ in part]),
            (ctypes.c_void_p * n)(*[dst.data_ptr() for _, dst, _ in part]),
            (ctypes.c_int64 * n)(*[src[0].numel() * src.element_size() for src, _, _ in part]),  # not its stride: 1 row
            (ctypes.c_int32 * n)(*[shifted for _, _, shifted in part]),
            (ctypes.c_int64 * n)(*[fill] * n),
        )
        sequences = [ctypes.c_void_p(t.data_ptr()) for t in (*places, table[2])]
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
            with torch.cuda.device(device):
                status = native.cuda().m2rl_pack_rows_cuda(
                    *fields,
                    ctypes.c_int64(plan_bin.tokens),
                    ctypes.c_int64(table.shape[1]),
                    *sequences,
                    ctypes.c_void_p(table[1].data_ptr()),
                    ctypes.c_void_p(stream),
                )
            if status:
                raise RuntimeError(f"m2rl_pack_rows_cuda failed with CUDA error {status}")
        else:
            native.cpu().m2rl_pack_rows(*fields, ctypes.c_int64(table.shape[1]), *sequences)


def gather_rows(x_TH: Tensor, rows_N: Tensor) -> Tensor:
    """x[rows]: [N, ...], differentiable. rows int64 [N] in [0, T), all different: the gradient is then a plain scatter,
    free of atomics and bitwise repeatable."""
    _require(
        rows_N.dim() == 1 and rows_N.dtype == torch.int64,
        lambda: f"rows must be int64 [N], got {rows_N.dtype} {list(rows_N.shape)}",
    )
    _require(
        rows_N.device == x_TH.device, lambda: f"rows must be on {x_TH.device}, the device of x, got {rows_N.device}"
    )
    _require(x_TH.dim() >= 1, lambda: f"x must have shape [T, ...], got {list(x_TH.shape)}")
    if rows_N.device.type == "cpu" and not torch.compiler.is_compiling() and len(rows_N):
        low, high = (int(v) for v in torch.aminmax(rows_N))
        _require(
            low >= 0 and high < len(x_TH), lambda: f"rows must be in [0, T) = [0, {len(x_TH)}), got {low} .. {high}"
        )
        _require(len(torch.unique(rows_N)) == len(rows_N), "rows must all be different, got a row twice")
    return gather_rows_op(x_TH, rows_N)


@torch.library.custom_op("m2rl::gather_rows", mutates_args=())
def gather_rows_op(x_TH: Tensor, rows_N: Tensor) -> Tensor:
    return x_TH.index_select(0, rows_N)


@gather_rows_op.register_fake
def _(x_TH, rows_N):
    return x_TH.new_empty(rows_N.shape[0], *x_TH.shape[1:])


@torch.library.custom_op("m2rl::scatter_rows", mutates_args=())
def scatter_rows_op(x_NH: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """[rows, ...] zeros with x at the given rows."""
    return x_NH.new_zeros(rows, *x_NH.shape[1:]).index_copy_(0, rows_N, x_NH)


@scatter_rows_op.register_fake
def _(x_NH, rows_N, rows):
    return x_NH.new_empty(rows, *x_NH.shape[1:])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


gather_rows_op.register_autograd(
    lambda ctx, grad: (scatter_rows_op(grad, ctx.saved_tensors[0], ctx.rows), None), setup_context=_save
)
