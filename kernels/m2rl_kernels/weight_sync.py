"""The policy's new weights into an engine's fixed storage: cast, gather, scatter; checksums prove that they arrived.

    sources   Hugging Face names; each rank holds the rows [r c, (r + 1) c) of dim 0, c = ceil(rows / world) (FSDP2; the
              last ranks may hold fewer rows, or none)
    targets   the engine's named tensors on this rank, contiguous, written in place and never reallocated:
              fused (qkv_proj, gate_up_proj: row ranges), tied heads, vocabularies padded at the end, tensor-parallel
              slices (column-parallel: row ranges per head group, key-value heads repeated when fewer than ranks;
              row-parallel: strided columns)

`SyncPlan` works out once, from shapes alone, which rectangle of which source is which rectangle of which target, and
raises with names when a source or a part of a target is left over or written twice. `sync` then needs two launches per
bucket: cast the shards into a flat buffer, all-gather it, scatter every rectangle. On one rank the master weights are
cast straight into the targets. Buckets are double-buffered: the next is on its way while this one is scattered.

Floor for Qwen3-4B (4.02e9 parameters): 24 GB moved from float32 masters, 16 GB from bfloat16. Conversions round to
nearest even. Nothing here knows an engine or a model; torch only.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from m2rl_kernels import native

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
VOCABULARY = ("embed_tokens", "lm_head")  # modules whose rows are tokens: engines pad them
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
CODES = {getattr(torch, name): code for name, code in native.DTYPE_CODES.items()}
TILE = 16384  # elements per block, kTile in csrc/sync.cu
COPY = np.dtype(
    [
        ("src", "u8"),
        ("dst", "u8"),
        ("rows", "i8"),
        ("columns", "i8"),
        ("src_stride", "i8"),
        ("dst_stride", "i8"),
        ("tensor", "i8"),
        ("first", "i8"),
    ]
)  # M2rlCopy in csrc/ops.h


class Rectangle(NamedTuple):
    """source[row : row + rows, column : column + columns] is target[to_row : to_row + rows, 0 : columns]."""

    source: str
    target: str
    row: int
    column: int
    rows: int
    columns: int
    to_row: int


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor whose first dimension is sharded; a scalar is one row."""
    return (int(shape[0]) if len(shape) else 1), math.prod(shape[1:])


def map_parameters(
    sources: Mapping[str, Sequence[int]],
    targets: Mapping[str, Sequence[int]],
    *,
    tp_size: int = 1,
    tp_rank: int = 0,
    fused: Mapping[str, Sequence[str]] = FUSED,
    tied: Mapping[str, str] = TIED,
) -> list[Rectangle]:
    """Which rectangle of which source is which rectangle of which target, from names and shapes alone.

    ValueError lists the sources that go nowhere, the targets (or rows of them) that nothing is written to or that are
    written twice, and the pairs whose shapes do not fit each other under tp_size.
    """
    home = {part: (whole, parts) for whole, parts in fused.items() for part in parts}
    rectangles: list[Rectangle] = []
    problems: list[str] = []
    for name, shape in sources.items():
        where = [name] if name in targets else []
        words = name.split(".")
        for at, word in enumerate(words):
            whole = ".".join([*words[:at], home[word][0], *words[at + 1 :]]) if word in home else ""
            if whole in targets:
                where.append(whole)
                rectangles += _fused(sources, targets, name, whole, word, home[word][1], tp_size, tp_rank, problems)
        where += [t for t, s in tied.items() if s == name and t in targets and t not in sources]
        if not where:
            problems.append(f"source {name} {list(shape)} has no target")
        for target in where:
            if target == name or target in tied:
                rectangles += _plain(name, shape, target, targets[target], tp_size, tp_rank, fused, problems)
    problems += _coverage(rectangles, targets, sources)
    if problems:
        raise ValueError(
            "weights do not map: "
            + "; ".join(problems[:12])
            + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        )
    return rectangles


def _plain(name, shape, target, target_shape, tp_size, tp_rank, fused, problems) -> list[Rectangle]:
    (rows, columns), (to_rows, to_columns) = _matrix(shape), _matrix(target_shape)
    full = Rectangle(name, target, 0, 0, rows, columns, 0)
    if any(word in VOCABULARY for word in target.split(".")) and columns == to_columns and to_rows * tp_size >= rows:
        first = min(tp_rank * to_rows, rows)
        return [full._replace(row=first, rows=min(first + to_rows, rows) - first)]
    if (rows, columns) == (to_rows, to_columns):
        return [full]
    if any(word in fused for word in name.split(".")):
        problems.append(f"{name} is fused already and cannot be cut for tensor parallelism")
    elif columns == to_columns and rows == to_rows * tp_size:
        return [full._replace(row=tp_rank * to_rows, rows=to_rows)]
    elif rows == to_rows and columns == to_columns * tp_size:
        return [full._replace(column=tp_rank * to_columns, columns=to_columns)]
    else:
        problems.append(f"{name} {list(shape)} does not fit {target} {list(target_shape)} at tp_size {tp_size}")
    return []


def _fused(sources, targets, name, whole, word, parts, tp_size, tp_rank, problems) -> list[Rectangle]:
    """The part's rows in the fused tensor: parts one below the other, each this rank's share. Keys and values
    of fewer heads than ranks are repeated: their share is then what the fused tensor leaves for them."""
    siblings = [name.replace(f".{word}.", f".{part}.") for part in parts]
    missing = [s for s in siblings if s not in sources]
    if missing:
        problems.append(f"{whole} needs {', '.join(missing)}, which no source has")
        return []
    rows = [_matrix(sources[s])[0] for s in siblings]
    to_rows, columns = _matrix(targets[whole])
    shares = [r // tp_size for r in rows]
    copies = 1
    if sum(shares) != to_rows and len(parts) == 3 and to_rows > shares[0] and rows[1] == rows[2]:
        shares[1] = shares[2] = (to_rows - shares[0]) // 2
        copies = shares[1] * tp_size // rows[1]
    k = siblings.index(name)
    fits = sum(shares) == to_rows and all(_matrix(sources[s])[1] == columns for s in siblings)
    exact = all(
        share * tp_size == r * (copies if i and len(parts) == 3 else 1)
        for i, (share, r) in enumerate(zip(shares, rows))
    )
    if not (fits and exact):
        problems.append(
            f"{name} {list(sources[name])} does not fit {whole} {list(targets[whole])} at tp_size {tp_size}"
        )
        return []
    index = tp_rank // copies if k and len(parts) == 3 else tp_rank
    return [Rectangle(name, whole, index * shares[k], 0, shares[k], columns, sum(shares[:k]))]


def _coverage(rectangles, targets, sources) -> Iterator[str]:
    by_target: dict[str, list[Rectangle]] = {name: [] for name in targets}
    for r in rectangles:
        by_target[r.target].append(r)
    for name, mine in by_target.items():
        rows, _ = _matrix(targets[name])
        at = 0
        for r in sorted(mine, key=lambda r: (r.to_row, r.rows)):
            if r.to_row < at and r.rows:
                yield f"target {name} is written twice, by {' and '.join(sorted({m.source for m in mine}))}"
                break
            if r.to_row > at:
                yield f"target {name} rows {at}:{r.to_row} have no source"
            at = max(at, r.to_row + r.rows)
        else:
            padded = any(word in VOCABULARY for word in name.split(".")) and mine
            if at < rows and not padded:
                yield f"target {name} {list(targets[name])} " + (
                    f"rows {at}:{rows} have no source" if mine else "has no source"
                )


@dataclass(frozen=True)
class Bucket:
    """Sources that travel together. A rank's buffer holds c * columns elements of each: as much on every rank."""

    names: tuple[str, ...]
    offsets: tuple[int, ...]  # of each source in a rank's buffer, elements
    length: int  # of a rank's buffer
    dtype: torch.dtype  # of the targets


class SyncPlan:
    """Built once; `sync` may then be called as often as the weights change."""

    def __init__(
        self,
        sources: Mapping[str, Any],
        targets: Mapping[str, Tensor],
        *,
        world_size: int = 1,
        rank: int = 0,
        tp_size: int = 1,
        tp_rank: int = 0,
        bucket_bytes: int = 256 << 20,
        fused: Mapping[str, Sequence[str]] = FUSED,
        tied: Mapping[str, str] = TIED,
    ):
        """
        sources: name -> whole shape, or a tensor with that .shape (a DTensor will do), in the same order on every rank.
        targets: name -> this rank's engine tensor, contiguous, float32, bfloat16 or float16; a tied head that shares
            storage with the embedding is skipped. world_size, rank: of the group the sources are sharded over.
        tp_size, tp_rank: of the engine. bucket_bytes: gathered size of a bucket on one rank.

        ValueError names parameters that are unmapped or mapped twice, and the argument that is wrong.
        """
        _require(world_size >= 1 and 0 <= rank < world_size, f"rank must be in [0, {world_size}), got {rank}")
        _require(tp_size >= 1 and 0 <= tp_rank < tp_size, f"tp_rank must be in [0, {tp_size}), got {tp_rank}")
        _require(bucket_bytes > 0, f"bucket_bytes must be above 0, got {bucket_bytes}")
        self.world_size, self.rank = world_size, rank
        self.shapes = {name: tuple(getattr(s, "shape", s)) for name, s in sources.items()}
        self.targets: dict[str, Tensor] = {}
        seen: dict[Any, str] = {}
        for name, t in targets.items():
            _require(t.is_contiguous(), f"target {name} must be contiguous, got strides {t.stride()}")
            _require(t.dtype in CODES, f"target {name} must be float32, bfloat16 or float16, got {t.dtype}")
            key = (t.data_ptr(), t.numel(), t.dtype)
            if t.numel() and key in seen and (seen[key], name) in _pairs(tied):
                continue
            seen[key] = name
            self.targets[name] = t
        devices = {t.device for t in self.targets.values()}
        _require(len(devices) == 1, f"targets must be on one device, got {sorted(map(str, devices))}")
        self.device = devices.pop()
        self.addresses = {name: t.data_ptr() for name, t in self.targets.items()}
        self.rectangles = map_parameters(
            self.shapes,
            {n: t.shape for n, t in self.targets.items()},
            tp_size=tp_size,
            tp_rank=tp_rank,
            fused=fused,
            tied=tied,
        )
        self.of_source: dict[str, list[Rectangle]] = {name: [] for name in self.shapes}
        for r in self.rectangles:
            self.of_source[r.source].append(r)
        self.target_index = {name: i for i, name in enumerate(self.targets)}
        self.buckets = self._buckets(bucket_bytes)
        self._buffers: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._tables: dict[Any, tuple[tuple[int, ...], Table]] = {}

    # -- layout

    def shard_rows(self, name: str, rank: int) -> tuple[int, int]:
        """[begin, end) of dim 0 that a rank holds."""
        rows, _ = _matrix(self.shapes[name])
        chunk = -(-rows // self.world_size)
        return min(rank * chunk, rows), min((rank + 1) * chunk, rows)

    def _buckets(self, bucket_bytes: int) -> list[Bucket]:
        buckets: list[Bucket] = []
        names: list[str] = []
        offsets: list[int] = []
        length, current = 0, torch.float32

        def close():
            if names:
                buckets.append(Bucket(tuple(names), tuple(offsets), length, current))

        for name in self.shapes:
            rows, columns = _matrix(self.shapes[name])
            size = -(-(-(-rows // self.world_size) * columns) // 8) * 8  # 16-byte vectors from every source's start
            dtypes = {self.targets[r.target].dtype for r in self.of_source[name]}
            _require(len(dtypes) == 1, f"targets of {name} must have one dtype, got {sorted(map(str, dtypes))}")
            dtype = dtypes.pop()
            if names and (dtype != current or (length + size) * dtype.itemsize * self.world_size > bucket_bytes):
                close()
                names, offsets, length = [], [], 0
            current = dtype
            names.append(name)
            offsets.append(length)
            length += size
        close()
        return buckets

    # -- the steps

    def sync(self, shards: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Write every target. shards: name -> this rank's rows (a DTensor or its local tensor), contiguous, any of the
        three dtypes; collective over `group` when world_size > 1. No synchronisation with the host."""
        local = self._local(shards)
        self._check_addresses()
        if self.world_size == 1:
            for dtype, names in self._by_dtype(local):
                for bucket_dtype in {b.dtype for b in self.buckets}:
                    chosen = [n for b in self.buckets if b.dtype == bucket_dtype for n in b.names if n in names]
                    self._run("direct", local, chosen, partial(self._direct, chosen, local), dtype, bucket_dtype)
            return
        pending = self._start(0, local, group)
        for i in range(len(self.buckets)):
            following = self._start(i + 1, local, group) if i + 1 < len(self.buckets) else None
            pending[0].wait()
            self.scatter_bucket(i, pending[1])
            pending = following

    def _start(self, i: int, local: dict[str, Tensor], group) -> Any:
        bucket = self.buckets[i]
        key = (i % 2, bucket.dtype)
        length = max(b.length for b in self.buckets if b.dtype == bucket.dtype)
        if key not in self._buffers:
            new = lambda n: torch.empty(n, dtype=bucket.dtype, device=self.device)  # noqa: E731
            self._buffers[key] = (new(length), new(length * self.world_size))
        mine, everyone = (b[: bucket.length * n] for b, n in zip(self._buffers[key], (1, self.world_size)))
        self.pack_bucket(i, local, mine)
        work = dist.all_gather_into_tensor(everyone, mine, group=group, async_op=True)
        return work, everyone.view(self.world_size, -1)

    def pack_bucket(self, i: int, shards: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """[length]: this rank's shards of bucket i, cast to the targets' dtype, each at its offset."""
        bucket = self.buckets[i]
        local = self._local(shards, bucket.names)
        out = torch.empty(bucket.length, dtype=bucket.dtype, device=self.device) if out is None else out
        for dtype, names in self._by_dtype(local):
            chosen = [(n, o) for n, o in zip(bucket.names, bucket.offsets) if n in names]
            self._run(
                ("pack", i),
                {**local, "": out},
                [n for n, _ in chosen] + [""],
                partial(self._packing, chosen, local, out),
                dtype,
                bucket.dtype,
            )
        return out

    def scatter_bucket(self, i: int, gathered: Tensor) -> None:
        """gathered [world_size, length]: what pack_bucket gave on every rank; written to the targets in one launch."""
        bucket = self.buckets[i]
        self._run(
            ("scatter", i), {"": gathered}, [""], partial(self._gathered, bucket, gathered), bucket.dtype, bucket.dtype
        )

    def expected_checksum(self, shards: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
        """[targets, 2] what `checksum` of the targets is after a sync of these shards; nothing is written. Rows of a
        padded vocabulary beyond the tokens count as they are in the engine now."""
        local = self._local(shards)
        sums = torch.zeros(len(self.targets), 2, dtype=torch.int64, device=self.device)
        if self.world_size == 1:
            for dtype, names in self._by_dtype(local):
                for bucket_dtype in {b.dtype for b in self.buckets}:
                    chosen = [n for b in self.buckets if b.dtype == bucket_dtype for n in b.names if n in names]
                    self._run("direct", local, chosen, partial(self._direct, chosen, local), dtype, bucket_dtype, sums)
        else:
            for i, bucket in enumerate(self.buckets):
                work, everyone = self._start(i, local, group)
                work.wait()
                self._run(
                    ("scatter", i),
                    {"": everyone},
                    [""],
                    partial(self._gathered, bucket, everyone),
                    bucket.dtype,
                    bucket.dtype,
                    sums,
                )
        for name, t in self.targets.items():
            rows, columns = _matrix(t.shape)
            written = max((r.to_row + r.rows for r in self.rectangles if r.target == name), default=0)
            if written < rows:
                row = (
                    t.data_ptr() + written * columns * t.element_size(),
                    0,
                    1,
                    (rows - written) * columns,
                    0,
                    0,
                    self.target_index[name],
                    written * columns,
                )
                self._run(("padding", name), {"": t}, [""], partial(list, [row]), t.dtype, t.dtype, sums)
        return sums

    def verify(self, shards: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
        """RuntimeError naming the targets that differ from these shards. One device-to-host read."""
        same = (self.expected_checksum(shards, group) == checksum(list(self.targets.values()))).all(1).tolist()
        wrong = [name for name, equal in zip(self.targets, same) if not equal]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} of {len(same)} engine tensors differ from the policy: "
                + ", ".join(wrong[:8])
                + (" ..." if len(wrong) > 8 else "")
            )

    # -- rows of the copy table: (src, dst, rows, columns, src_stride, dst_stride, tensor, first)

    def _copy(self, r: Rectangle, source: int, source_dtype: torch.dtype, width: int, skip: int, begin: int, end: int):
        """Rows [begin, end) of the source that rectangle r wants; the source's row `skip` lies at address `source`."""
        target = self.targets[r.target]
        pitch, columns = _matrix(target.shape)[1], r.columns
        first = (r.to_row + begin - r.row) * pitch
        row = (
            source + ((begin - skip) * width + r.column) * source_dtype.itemsize,
            self.addresses[r.target] + first * target.element_size(),
            end - begin,
            columns,
            width,
            pitch,
        )
        if columns == width == pitch:
            row = (row[0], row[1], 1, (end - begin) * columns, 0, 0)
        return (*row, self.target_index[r.target], first)

    def _packing(self, chosen: Sequence[tuple[str, int]], local: dict[str, Tensor], out: Tensor) -> list[tuple]:
        return [
            (local[n].data_ptr(), out.data_ptr() + offset * out.element_size(), 1, local[n].numel(), 0, 0, 0, 0)
            for n, offset in chosen
        ]

    def _direct(self, names: Sequence[str], local: dict[str, Tensor]) -> list[tuple]:
        return [
            self._copy(r, local[n].data_ptr(), local[n].dtype, _matrix(self.shapes[n])[1], 0, r.row, r.row + r.rows)
            for n in names
            for r in self.of_source[n]
            if r.rows
        ]

    def _gathered(self, bucket: Bucket, gathered: Tensor) -> list[tuple]:
        rows = []
        for name, offset in zip(bucket.names, bucket.offsets):
            width = _matrix(self.shapes[name])[1]
            for rank in range(self.world_size):
                begin, end = self.shard_rows(name, rank)
                address = gathered.data_ptr() + (rank * bucket.length + offset) * gathered.element_size()
                for r in self.of_source[name]:
                    a, b = max(begin, r.row), min(end, r.row + r.rows)
                    if a < b:
                        rows.append(self._copy(r, address, bucket.dtype, width, begin, a, b))
        return rows

    def _run(
        self,
        key: Any,
        tensors: Mapping[str, Tensor],
        read: Sequence[str],
        build: Callable[[], list[tuple]],
        src_dtype: torch.dtype,
        dst_dtype: torch.dtype,
        sums: Tensor | None = None,
    ) -> None:
        """Run the table that `build` describes; kept while the tensors it reads lie where they lay."""
        addresses = tuple(tensors[name].data_ptr() for name in read)
        cached = self._tables.get((key, src_dtype, dst_dtype))
        if cached is None or cached[0] != addresses:
            host = np.array([row for row in build() if row[3]], dtype=COPY)
            cached = self._tables[(key, src_dtype, dst_dtype)] = (addresses, Table(host, self.device))
        cached[1].run(src_dtype, dst_dtype, sums)

    # -- checks

    def _local(self, shards: Mapping[str, Tensor], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        out = {}
        odd = shards.keys() - self.shapes.keys()
        _require(not odd, f"shards must be of the plan's sources, got {', '.join(sorted(odd)[:8])} besides")
        for name in self.shapes if names is None else names:
            if name not in shards:
                raise ValueError(f"shards must hold every source, got none for {name}")
            t = shards[name]
            t = t.to_local() if hasattr(t, "to_local") else t  # DTensor
            begin, end = self.shard_rows(name, self.rank)
            want = (end - begin, *self.shapes[name][1:]) if self.shapes[name] else ()
            _require(
                tuple(t.shape) == want and t.is_contiguous() and t.dtype in CODES and t.device == self.device,
                f"shard of {name} must be rows {begin}:{end} of {list(self.shapes[name])}, contiguous, float, on "
                f"{self.device}, got {t.dtype} {list(t.shape)} on {t.device}",
            )
            out[name] = t
        return out

    def _by_dtype(self, local: dict[str, Tensor]) -> list[tuple[torch.dtype, set[str]]]:
        names = {d: {n for n, t in local.items() if t.dtype == d} for d in CODES}
        return [(d, chosen) for d, chosen in names.items() if chosen]

    def _check_addresses(self) -> None:
        moved = [name for name, t in self.targets.items() if t.data_ptr() != self.addresses[name]]
        if moved:
            raise RuntimeError(
                f"engine tensors moved since the plan was built: {', '.join(moved[:8])}; captured "
                "graphs would still read the old storage. Build the plan after every allocation"
            )


class Table:
    """A copy table where the kernels read it."""

    def __init__(self, host: np.ndarray, device: torch.device):
        self.host, self.device = host, device
        if device.type == "cuda":
            tiles = -(-(host["rows"] * host["columns"]) // TILE)
            self.tiles = int(tiles.sum())
            self.copies, self.first_tile = (
                torch.from_numpy(a.view(np.int64).copy()).pin_memory().to(device, non_blocking=True)
                for a in (host, np.cumsum(tiles) - tiles)
            )

    def run(self, src_dtype: torch.dtype, dst_dtype: torch.dtype, sums: Tensor | None = None) -> None:
        """Copy; or with `sums` add the checksums of what would be copied."""
        if not len(self.host):
            return
        n, codes = ctypes.c_int64(len(self.host)), (ctypes.c_int32(CODES[src_dtype]), ctypes.c_int32(CODES[dst_dtype]))
        out = () if sums is None else (ctypes.c_void_p(sums.data_ptr()),)
        if self.device.type == "cuda":
            library, stream = native.cuda(), torch.cuda.current_stream(self.device).cuda_stream
            call = library.m2rl_sync_copy_cuda if sums is None else library.m2rl_sync_checksum_cuda
            with torch.cuda.device(self.device):
                status = call(
                    ctypes.c_void_p(self.copies.data_ptr()),
                    ctypes.c_void_p(self.first_tile.data_ptr()),
                    n,
                    ctypes.c_int64(self.tiles),
                    *codes,
                    *out,
                    ctypes.c_void_p(stream),
                )
            if status:
                raise RuntimeError(f"weight_sync's kernel failed with CUDA error {status}")
        else:
            library = native.cpu()
            call = library.m2rl_sync_copy if sums is None else library.m2rl_sync_checksum
            call(ctypes.c_void_p(self.host.ctypes.data), n, *codes, *out, ctypes.c_int32(torch.get_num_threads()))


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [T, 2]: two 64-bit hashes per tensor (bits of unsigned numbers), on their device, no synchronisation.

    Of the elements' bits and positions, so that swapped rows differ; the same bits on CPU and GPU. tensors: contiguous,
    float32, bfloat16 or float16, on one device. One read; 8.0 GB for Qwen3-4B.
    """
    for i, t in enumerate(tensors):
        _require(
            t.is_contiguous() and t.dtype in CODES and t.device == tensors[0].device,
            f"tensors must be contiguous floats on one device, got {t.dtype} {list(t.shape)} with strides "
            f"{t.stride()} on {t.device} at index {i}",
        )
    device = tensors[0].device if tensors else torch.device("cpu")
    sums = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device)
    for dtype in CODES:
        rows = [
            (t.data_ptr(), 0, 1, t.numel(), 0, 0, i, 0) for i, t in enumerate(tensors) if t.dtype == dtype and t.numel()
        ]
        Table(np.array(rows, dtype=COPY), device).run(dtype, dtype, sums)
    return sums


def checksum_ref(t: Tensor) -> tuple[int, int]:
    """The definition for one tensor, in Python integers."""
    words = {2: torch.int16, 4: torch.int32}[t.element_size()]
    first = second = 0
    for i, bits in enumerate(t.contiguous().view(words).flatten().tolist()):
        a = ((i + 1) * 0x9E3779B97F4A7C15 + (bits % (1 << 8 * t.element_size())) * 0xD1B54A32D192ED03) % 2**64
        a ^= a >> 32
        a = a * 0xD6E8FEB86659FD93 % 2**64
        a ^= a >> 32
        first += a
        a = a * 0xD6E8FEB86659FD93 % 2**64
        second += a ^ a >> 29
    return first % 2**64, second % 2**64


def _pairs(tied: Mapping[str, str]) -> set[tuple[str, str]]:
    return {pair for t, s in tied.items() for pair in ((t, s), (s, t))}


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)
