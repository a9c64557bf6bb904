"""The Triton kernels of `linear_logprob`: NVIDIA GPUs of compute capability 8.0 and above. Imported on first use only.

Forward: one product X W^T whose epilogue turns a [BM, BV] tile of logits in registers into E = exp(z - k), stores it
where it is to be kept, and reduces it to one partial sum of E and of E (z - k) per row and vocabulary tile (plain
stores, no atomics). `finalize` adds the partials in a fixed order and subtracts S at the target. Rows whose sum is
out of range are appended to a list on the device and redone from their row maximum by the same kernel (nothing waits
for the host; no listed row, no work).

Backward: grad_hidden = diag(a) E' W by our own product, which takes the vocabulary in order for every row: the bits
of a row do not depend on batch, order or on which rows were cached, and a product over slices of the vocabulary
continues from the float32 sums of the slice before. grad_weight = E'^T (diag(a) X) by cuBLAS with float32
accumulation.

Offsets into [M, V] are int64. The last vocabulary tile is masked before the exponential's sum.

Where LOGITS says "blas" the logits come from torch.mm with a float32 result instead, a block of them at a time, and one
more pass turns them into exponentials: for an architecture on which the fused product stays under 620 TFLOP/s
(`python bench/bench_linear_logprob.py --products` measures it). A row's bits are then cuBLAS's: repeatable, but not
promised to be the same in another batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

SLICE_BYTES = 512 << 20  # scratch for recomputed or converted exponentials of one vocabulary slice
HALF_SCALE = 2.0**15  # float16 keeps E / S * 2^15: at most 32768, and 2e-12 is still a number
MAX_SUM = 1.1420073898156842e26  # e^60, the guard: see GUARD_LOGP
BLAS_ROWS, BLAS_COLUMNS, BLAS_BLOCK = 4096, 16384, 4096  # "blas": float32 logits alive at once; columns per program
LOGITS = {8: "fused", 9: "fused", 10: "fused"}  # by `generation`; to be decided by measurement, none was made yet
SUMS, EXPONENTIALS, MAXIMUM = 0, 1, 2  # what a product leaves behind
_SUMS, _MAXIMUM = tl.constexpr(SUMS), tl.constexpr(MAXIMUM)


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch configuration of a product: BM rows x BV columns x BK depth."""

    BM: int
    BV: int
    BK: int
    num_warps: int
    num_stages: int
    group: int = 16  # row tiles that share a pass over the other operand, so that it stays in L2
    tma: bool = True


# Keyed by (operation, compute capability major, element size). Compiled and checked for spills by
# tests/kernels/test_triton_compile.
TILES = {
    ("forward", 8, 2): Tile(128, 128, 32, 8, 4, tma=False),
    ("forward", 9, 2): Tile(128, 256, 64, 8, 3),
    ("forward", 10, 2): Tile(128, 128, 64, 8, 3),
    ("guard", 8, 2): Tile(64, 128, 32, 8, 2, tma=False),  # BV and BK as in `forward`
    ("guard", 9, 2): Tile(64, 256, 64, 8, 2),
    ("guard", 10, 2): Tile(128, 128, 64, 8, 2),
    ("grad_hidden", 8, 2): Tile(128, 128, 32, 8, 4, tma=False),
    ("grad_hidden", 9, 2): Tile(128, 256, 64, 8, 3),
    ("grad_hidden", 10, 2): Tile(128, 128, 64, 8, 3),
    # float32 multiplies in full precision (no TF32), on the ordinary cores, on every architecture
    ("forward", 8, 4): Tile(64, 64, 16, 8, 2, tma=False),
    ("guard", 8, 4): Tile(64, 64, 16, 8, 2, tma=False),
    ("grad_hidden", 8, 4): Tile(64, 64, 16, 8, 2, tma=False),
}


def generation(major: int) -> int:
    """8, 9 or 10: whose tiles a GPU of compute capability `major` runs. Consumer Blackwell (12.x) has neither the
    tensor memory nor the shared memory of 10.x and takes those of 8."""
    if major < 8:
        raise RuntimeError(f"linear_logprob needs a GPU of compute capability 8.0 or above, got {major}.x")
    return major if major in (9, 10) else 8


def tile_for(operation: str, x: Tensor) -> Tile:
    if not x.is_cuda:  # the interpreter: few, large steps
        return Tile(32, 128, 64, 4, 1, group=2)
    return configured(operation, torch.cuda.get_device_capability(x.device)[0], x.element_size())


def configured(operation: str, major: int, itemsize: int) -> Tile:
    return TILES.get((operation, generation(major), itemsize)) or TILES[operation, 8, itemsize]


def logits_from(x: Tensor) -> str:
    return LOGITS[generation(torch.cuda.get_device_capability(x.device)[0])] if x.is_cuda else "fused"


@triton.jit
def target_logit_kernel(x, w, y, target, M, V, H, stride_x, stride_w, inv_t, outside, BH: tl.constexpr):
    """target_i = <x_i, w[y_i]> / T; `outside` (NaN, or 0 under tensor parallelism) where y_i is not in [0, V)."""
    row = tl.program_id(0).to(tl.int64)
    yi = tl.load(y + row).to(tl.int64)
    inside = (yi >= 0) & (yi < V)
    yi = tl.where(inside, yi, 0)
    acc = tl.zeros([BH], tl.float32)
    for h in range(0, H, BH):
        col = h + tl.arange(0, BH)
        a = tl.load(x + row * stride_x + col, mask=col < H, other=0.0).to(tl.float32)
        b = tl.load(w + yi * stride_w + col, mask=col < H, other=0.0).to(tl.float32)
        acc += a * b
    tl.store(target + row, tl.where(inside, tl.sum(acc, 0) * inv_t, outside))


@triton.jit
def exponentials(
    acc,
    ki,
    yi,
    shift,
    at_target,
    row_scale,
    e_desc,
    E,
    stride_e,
    row,
    keep,
    m,
    v_first,
    V,
    inv_t,
    MODE: tl.constexpr,
    LIST: tl.constexpr,
    WITH_U: tl.constexpr,
    STORE_E: tl.constexpr,
    SCALED: tl.constexpr,
    TMA: tl.constexpr,
    W: tl.constexpr,
):
    """The epilogue on W columns of a tile: e to E, and the row sums of e and e (z - k)."""
    v = v_first + tl.arange(0, W)
    d = acc * inv_t - ki[:, None]
    at_y = v[None, :] == yi[:, None]
    if MODE == _SUMS:
        d = tl.where(at_y, shift[:, None], d)  # shift is exactly 0, but on the guard path
    e = tl.where((v < V)[None, :], tl.exp2(d * 1.4426950408889634), 0.0)
    if MODE != _SUMS:
        if SCALED:
            e = e * row_scale[:, None]
        e = tl.where(at_y, at_target[:, None], e)
    if STORE_E:
        if TMA and not LIST:
            e_desc.store([m, v_first], e.to(e_desc.dtype))
        else:
            out = E + row.to(tl.int64)[:, None] * stride_e + v[None, :]
            tl.store(out, e.to(E.dtype.element_ty), mask=keep[:, None] & (v < V)[None, :])
    s = tl.sum(e, 1)
    if WITH_U:  # log e, not d: keeping d beside e spills registers on sm_90 (128 x 256 tile)
        u = tl.sum(e * tl.log2(tl.maximum(e, 1e-38)), 1) * 0.6931471805599453
    else:
        u = s
    return s, u


@triton.jit
def product_kernel(
    x_desc,
    w_desc,
    e_desc,
    x,
    w,
    y,
    target,
    anchor,
    rows,
    count,
    S_part,
    U_part,
    E,
    at_target,
    row_scale,
    M,
    V,
    H,
    R,
    stride_x,
    stride_w,
    stride_e,
    inv_t,
    MODE: tl.constexpr,
    LIST: tl.constexpr,
    WITH_U: tl.constexpr,
    STORE_E: tl.constexpr,
    SCALED: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles of z = x w^T / T, persistent over (row tile, vocabulary tile); per tile
    SUMS: partial sums of e = exp(z - k) and of e (z - k) to [tile, row], and e to E where STORE_E and row < R;
    EXPONENTIALS: e, or `at_target` at the target, to E;  MAXIMUM: the row maximum to S_part.
    LIST: the rows are rows[0..count), both on the device, and partials are indexed by position in the list."""
    if LIST:
        used = tl.load(count)
    else:
        used = M
    n_m = tl.cdiv(used, BM)
    n_v = tl.cdiv(V, BV)
    in_group = GROUP * n_v
    for t in range(tl.program_id(0), n_m * n_v, tl.num_programs(0)):
        first = (t // in_group) * GROUP  # row tiles run fastest inside a group: a tile of w stays in L2
        height = tl.minimum(n_m - first, GROUP)
        tile_m = first + (t % in_group) % height
        tile_v = (t % in_group) // height
        slot = tile_m * BM + tl.arange(0, BM)
        ok_m = slot < used
        if LIST:
            row = tl.load(rows + slot, mask=ok_m, other=0)
        else:
            row = slot
        v = tile_v * BV + tl.arange(0, BV)
        ok_v = v < V
        acc = tl.zeros([BM, BV], tl.float32)
        for k in range(0, H, BK):
            depth = k + tl.arange(0, BK)
            if TMA and not LIST:
                a = x_desc.load([tile_m * BM, k])
            else:
                a = tl.load(
                    x + row.to(tl.int64)[:, None] * stride_x + depth[None, :],
                    mask=ok_m[:, None] & (depth[None, :] < H),
                    other=0.0,
                )
            if TMA:
                b = w_desc.load([tile_v * BV, k])
            else:
                b = tl.load(
                    w + v.to(tl.int64)[:, None] * stride_w + depth[None, :],
                    mask=ok_v[:, None] & (depth[None, :] < H),
                    other=0.0,
                )
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        part = tile_v.to(tl.int64) * M + slot
        if MODE == _MAXIMUM:
            z = tl.where(ok_v[None, :], acc * inv_t, float("-inf"))
            tl.store(S_part + part, tl.max(z, 1), mask=ok_m)
        else:
            ki = tl.load(anchor + row, mask=ok_m, other=0.0)
            yi = tl.load(y + row, mask=ok_m, other=-1).to(tl.int32)
            shift, at, factor = ki, ki, ki
            if MODE == _SUMS:
                shift = tl.load(target + row, mask=ok_m, other=0.0) - ki
            else:
                at = tl.load(at_target + row, mask=ok_m, other=0.0)
                if SCALED:
                    factor = tl.load(row_scale + row, mask=ok_m, other=0.0)
            keep = ok_m & (row < R)
            # Four strips of columns, one after the other: a whole tile's epilogue spills registers.
            W: tl.constexpr = BV // 4
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BV // 2)), (0, 2, 1)))
            acc0, acc1 = tl.split(tl.permute(tl.reshape(left, (BM, 2, W)), (0, 2, 1)))
            acc2, acc3 = tl.split(tl.permute(tl.reshape(right, (BM, 2, W)), (0, 2, 1)))
            strips = (acc0, acc1, acc2, acc3)
            s = tl.zeros([BM], tl.float32)
            u = tl.zeros([BM], tl.float32)
            for i in tl.static_range(4):
                si, ui = exponentials(
                    strips[i],
                    ki,
                    yi,
                    shift,
                    at,
                    factor,
                    e_desc,
                    E,
                    stride_e,
                    row,
                    keep,
                    tile_m * BM,
                    tile_v * BV + i * W,
                    V,
                    inv_t,
                    MODE,
                    LIST,
                    WITH_U,
                    STORE_E,
                    SCALED,
                    TMA,
                    W,
                )
                s += si
                u += ui
            if MODE == _SUMS:
                tl.store(S_part + part, s, mask=ok_m)
                if WITH_U:
                    tl.store(U_part + part, u, mask=ok_m)


@triton.jit
def epilogue_kernel(
    z,
    y,
    target,
    anchor,
    S_part,
    U_part,
    E,
    at_target,
    row_scale,
    first_row,
    first_v,
    first_tile,
    width,
    M,
    R,
    stride_z,
    stride_e,
    inv_t,
    MODE: tl.constexpr,
    WITH_U: tl.constexpr,
    STORE_E: tl.constexpr,
    SCALED: tl.constexpr,
    B: tl.constexpr,
):
    """What product_kernel does with its tile, for B columns of one row of given float32 logits."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    column = tl.program_id(1) * B + tl.arange(0, B)
    inside = column < width
    k = tl.load(anchor + row)
    d = tl.load(z + local * stride_z + column, mask=inside, other=0.0) * inv_t - k
    at_y = first_v + column == tl.load(y + row)
    if MODE == _SUMS:
        d = tl.where(at_y, tl.load(target + row) - k, d)
    e = tl.where(inside, tl.exp2(d * 1.4426950408889634), 0.0)
    if MODE != _SUMS:
        if SCALED:
            e = e * tl.load(row_scale + row)
        e = tl.where(at_y, tl.load(at_target + row), e)
    if STORE_E:
        kept = column < tl.where(row < R, width, 0)
        tl.store(E + row * stride_e + first_v + column, e.to(E.dtype.element_ty), mask=kept)
    if MODE == _SUMS:
        part = (first_tile + tl.program_id(1)).to(tl.int64) * M + row
        tl.store(S_part + part, tl.sum(e, 0))
        if WITH_U:
            tl.store(U_part + part, tl.sum(tl.where(e > 0, e * d, 0.0), 0))


@triton.jit
def anchor_kernel(part, rows, count, target, anchor, M, n_v, BT: tl.constexpr, BM: tl.constexpr):
    """anchor = the maximum over the vocabulary tiles, for the listed rows."""
    slot = tl.program_id(0) * BM + tl.arange(0, BM)
    used = tl.load(count)
    ok = slot < used
    if tl.program_id(0) * BM < used:
        row = tl.load(rows + slot, mask=ok, other=0)
        best = tl.load(target + row, mask=ok, other=0.0)
        for t in range(0, n_v, BT):
            tile = t + tl.arange(0, BT)
            p = tl.load(
                part + tile.to(tl.int64)[:, None] * M + slot[None, :],
                mask=(tile < n_v)[:, None] & ok[None, :],
                other=float("-inf"),
            )
            best = tl.maximum(best, tl.max(p, 0))
        tl.store(anchor + row, best, mask=ok)


@triton.jit
def finalize_kernel(
    S_part,
    U_part,
    y,
    rows,
    count,
    target,
    anchor,
    S_out,
    U_out,
    E,
    M,
    V,
    n_v,
    R,
    stride_e,
    max_sum,
    LIST: tl.constexpr,
    WITH_U: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    """S and U from the partials, in one order; E' = E - S at the target of kept rows. Not LIST: rows out of range go
    to the list."""
    slot = tl.program_id(0) * BM + tl.arange(0, BM)
    if LIST:
        used = tl.load(count)
    else:
        used = M
    ok = slot < used
    if tl.program_id(0) * BM < used:
        S = tl.zeros([BM], tl.float32)
        U = tl.zeros([BM], tl.float32)
        for t in range(0, n_v, BT):
            tile = t + tl.arange(0, BT)
            at = tile.to(tl.int64)[:, None] * M + slot[None, :]
            mask = (tile < n_v)[:, None] & ok[None, :]
            S += tl.sum(tl.load(S_part + at, mask=mask, other=0.0), 0)
            if WITH_U:
                U += tl.sum(tl.load(U_part + at, mask=mask, other=0.0), 0)
        if LIST:
            row = tl.load(rows + slot, mask=ok, other=0)
        else:
            row = slot
        tl.store(S_out + row, S, mask=ok)
        tl.store(U_out + row, U, mask=ok)
        if not LIST:
            bad = ok & ((max_sum >= S) == 0)  # true for NaN as well
            position = tl.atomic_add(count + tl.zeros([BM], tl.int32), 1, mask=bad)
            tl.store(rows + position, row, mask=bad)
        yi = tl.load(y + row, mask=ok, other=0).to(tl.int64)
        shift = tl.load(target + row, mask=ok, other=0.0) - tl.load(anchor + row, mask=ok, other=0.0)
        e = tl.exp2(shift * 1.4426950408889634) - S
        keep = ok & (row < R) & (yi >= 0) & (yi < V)
        tl.store(E + row.to(tl.int64) * stride_e + yi, e.to(E.dtype.element_ty), mask=keep)


@triton.jit
def convert_kernel(E, out, y, alpha, beta, at_target, V, stride_e, stride_out, B: tl.constexpr):
    """out = E (alpha + beta log E), and `at_target` at the target: the factor of an entropy gradient. May run in
    place."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * B + tl.arange(0, B)
    e = tl.load(E + row * stride_e + v, mask=v < V, other=0.0).to(tl.float32)
    log_e = tl.where(e > 0, tl.log(tl.where(e > 0, e, 1.0)), 0.0)
    f = e * (tl.load(alpha + row) + tl.load(beta + row) * log_e)
    f = tl.where(v == tl.load(y + row), tl.load(at_target + row), f)
    tl.store(out + row * stride_out + v, f.to(out.dtype.element_ty), mask=v < V)


@triton.jit
def grad_hidden_kernel(
    e_desc,
    w_desc,
    E,
    w,
    acc32,
    out,
    scale,
    M,
    V,
    H,
    stride_e,
    stride_w,
    FIRST: tl.constexpr,
    ONLY: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """[BM, BV] tile of (E' w), the vocabulary in order, continued from acc32 unless FIRST. The ONLY slice scales its
    rows and rounds them to `out`; one of several leaves its sums in acc32."""
    n_m, n_h = tl.cdiv(M, BM), tl.cdiv(H, BV)
    in_group = GROUP * n_h
    t = tl.program_id(0)
    first = (t // in_group) * GROUP
    height = tl.minimum(n_m - first, GROUP)
    tile_m = first + (t % in_group) % height
    tile_h = (t % in_group) // height
    row = tile_m * BM + tl.arange(0, BM)
    col = tile_h * BV + tl.arange(0, BV)
    row64 = row.to(tl.int64)
    mask = (row < M)[:, None] & (col < H)[None, :]
    corner = (tile_m * BM).to(tl.int64) * H + tile_h * BV  # an int64 corner and int32 steps: fewer registers
    step = tl.arange(0, BM)[:, None] * H + tl.arange(0, BV)[None, :]
    if FIRST:
        acc = tl.zeros([BM, BV], tl.float32)
    else:
        acc = tl.load(acc32 + corner + step, mask=mask, other=0.0)
    for k in range(0, V, BK):
        if TMA:
            a = e_desc.load([tile_m * BM, k])
            b = w_desc.load([k, tile_h * BV])
        else:
            depth = k + tl.arange(0, BK)
            a = tl.load(
                E + row64[:, None] * stride_e + depth[None, :],
                mask=(row < M)[:, None] & (depth < V)[None, :],
                other=0.0,
            )
            b = tl.load(
                w + depth.to(tl.int64)[:, None] * stride_w + col[None, :],
                mask=(depth < V)[:, None] & (col < H)[None, :],
                other=0.0,
            )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if ONLY:
        a_i = tl.load(scale + row, mask=row < M, other=0.0)
        tl.store(out + corner + step, (acc * a_i[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(acc32 + corner + step, acc, mask=mask)


# ---- launches ------------------------------------------------------------------------------------------------------


def aligned(x: Tensor) -> Tensor:
    """x itself if tensor-memory loads can address it (unit column stride, rows of 16 bytes), else a copy."""
    fits = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def cache_columns(V: int) -> int:
    """Row stride of kept exponentials: rows start on 128 bytes for any V."""
    return triton.cdiv(V, 64) * 64


def _programs(x: Tensor, tiles: int) -> int:
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(count, tiles)


def _desc(x: Tensor, block: list[int], tma: bool):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block) if tma else x


def target_logits(x_MH: Tensor, w_VH: Tensor, y_M: Tensor, inv_t: float, outside: float, out: Tensor) -> Tensor:
    M, H = x_MH.shape
    target_logit_kernel[(M,)](
        x_MH,
        w_VH,
        y_M,
        out,
        M,
        w_VH.shape[0],
        H,
        x_MH.stride(0),
        w_VH.stride(0),
        inv_t,
        outside,
        BH=min(1024, triton.next_power_of_2(H)),
        num_warps=4,
    )
    return out


def product(
    mode,
    x_MH,
    w_VH,
    y_M,
    target,
    anchor,
    E,
    inv_t,
    *,
    rows=None,
    count=None,
    S_part=None,
    U_part=None,
    at_target=None,
    row_scale=None,
    kept_rows=0,
) -> None:
    """One product over all rows, or over the listed ones; absent pointers are replaced by one that is never read."""
    listed, dummy = rows is not None, anchor
    (M, H), V = x_MH.shape, w_VH.shape[0]
    if not listed and logits_from(x_MH) == "blas":
        _product_blas(mode, x_MH, w_VH, y_M, target, anchor, E, inv_t, S_part, U_part, at_target, row_scale, kept_rows)
        return
    c = tile_for("guard" if listed else "forward", x_MH)
    tiles = triton.cdiv(M, c.BM) * triton.cdiv(V, c.BV)
    product_kernel[(_programs(x_MH, tiles),)](
        _desc(x_MH, [c.BM, c.BK], c.tma),
        _desc(w_VH, [c.BV, c.BK], c.tma),
        dummy if E is None else _desc(E[:, :V], [c.BM, c.BV // 4], c.tma),
        x_MH,
        w_VH,
        y_M,
        target,
        anchor,
        rows if listed else dummy,
        count if listed else dummy,
        dummy if S_part is None else S_part,
        dummy if U_part is None else U_part,
        dummy if E is None else E,
        dummy if at_target is None else at_target,
        dummy if row_scale is None else row_scale,
        M,
        V,
        H,
        kept_rows,
        x_MH.stride(0),
        w_VH.stride(0),
        0 if E is None else E.stride(0),
        inv_t,
        MODE=mode,
        LIST=listed,
        WITH_U=U_part is not None,
        STORE_E=E is not None and kept_rows > 0,
        SCALED=row_scale is not None,
        TMA=c.tma,
        BM=c.BM,
        BV=c.BV,
        BK=c.BK,
        GROUP=c.group,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        enable_fp_fusion=True,  # Triton 3.10 turns it off by default
    )


def _product_blas(mode, x, w, y, target, anchor, E, inv_t, S_part, U_part, at_target, row_scale, kept_rows) -> None:
    M, V, dummy = x.shape[0], w.shape[0], anchor
    z = torch.empty(min(M, BLAS_ROWS), min(V, BLAS_COLUMNS), dtype=torch.float32, device=x.device)
    for v in range(0, V, BLAS_COLUMNS):
        width = min(BLAS_COLUMNS, V - v)
        for r in range(0, M, BLAS_ROWS):
            height = min(BLAS_ROWS, M - r)
            _add_product(z[:height, :width], x[r : r + height], w[v : v + width].T, True)
            epilogue_kernel[(height, triton.cdiv(width, BLAS_BLOCK))](
                z,
                y,
                target,
                anchor,
                dummy if S_part is None else S_part,
                dummy if U_part is None else U_part,
                dummy if E is None else E,
                dummy if at_target is None else at_target,
                dummy if row_scale is None else row_scale,
                r,
                v,
                v // BLAS_BLOCK,
                width,
                M,
                kept_rows,
                z.stride(0),
                0 if E is None else E.stride(0),
                inv_t,
                MODE=mode,
                WITH_U=U_part is not None,
                STORE_E=E is not None and kept_rows > 0,
                SCALED=row_scale is not None,
                B=BLAS_BLOCK,
                num_warps=8,
                enable_fp_fusion=True,
            )


def _sum_columns(x: Tensor, listed: bool = False) -> int:
    """Columns that one partial sum covers."""
    return BLAS_BLOCK if not listed and logits_from(x) == "blas" else tile_for("forward", x).BV


def forward(x_MH: Tensor, w_VH: Tensor, y_M: Tensor, inv_t: float, with_entropy: bool, cache_RV: Tensor) -> Tensor:
    """stats [4, M] (target logit, anchor, S, U); fills the cache [R, >= V] with E'."""
    M, V, R = x_MH.shape[0], w_VH.shape[0], cache_RV.shape[0]
    stats = torch.empty(4, M, dtype=torch.float32, device=x_MH.device)
    if M == 0:
        return stats
    x, w = aligned(x_MH), aligned(w_VH)
    target, anchor, S, U = stats
    target_logits(x, w, y_M, inv_t, float("nan"), target)
    anchor.copy_(target)
    part = torch.empty(2, triton.cdiv(V, _sum_columns(x, True)), M, dtype=torch.float32, device=x.device)
    S_part, U_part = part[0], part[1] if with_entropy else None
    rows, count = torch.empty(M, dtype=torch.int32, device=x.device), torch.zeros(1, dtype=torch.int32, device=x.device)
    E = cache_RV if R else None
    for listed in (False, True):  # the second time over the rows that the first put on the list
        n_v = triton.cdiv(V, _sum_columns(x, listed))
        which = {"rows": rows, "count": count} if listed else {}
        if listed:
            product(MAXIMUM, x, w, y_M, target, anchor, None, inv_t, S_part=S_part, **which)
            anchor_kernel[(triton.cdiv(M, 32),)](S_part, rows, count, target, anchor, M, n_v, BT=64, BM=32)
        product(SUMS, x, w, y_M, target, anchor, E, inv_t, S_part=S_part, U_part=U_part, kept_rows=R, **which)
        finalize_kernel[(triton.cdiv(M, 32),)](
            S_part,
            S_part if U_part is None else U_part,
            y_M,
            rows,
            count,
            target,
            anchor,
            S,
            U,
            cache_RV if R else S,
            M,
            V,
            n_v,
            R,
            cache_RV.stride(0) if R else 0,
            MAX_SUM,
            LIST=listed,
            WITH_U=with_entropy,
            BT=64,
            BM=32,
        )
    return stats


def shard_sums(x_MH, w_VH, y_M, target, anchor, inv_t, with_entropy) -> Tensor:
    """[2, M]: S and U of this shard of the vocabulary, relative to a given anchor (tensor parallel)."""
    x, w, M = aligned(x_MH), aligned(w_VH), x_MH.shape[0]
    sums = torch.empty(2, M, dtype=torch.float32, device=x.device)
    if M == 0:
        return sums
    n_v = triton.cdiv(w.shape[0], _sum_columns(x))
    part = torch.empty(2, n_v, M, dtype=torch.float32, device=x.device)
    rows, count = torch.empty(M, dtype=torch.int32, device=x.device), torch.zeros(1, dtype=torch.int32, device=x.device)
    product(SUMS, x, w, y_M, target, anchor, None, inv_t, S_part=part[0], U_part=part[1] if with_entropy else None)
    finalize_kernel[(triton.cdiv(M, 32),)](
        part[0],
        part[1],
        y_M,
        rows,
        count,
        target,
        anchor,
        sums[0],
        sums[1],
        sums,
        M,
        w.shape[0],
        n_v,
        0,
        0,
        MAX_SUM,
        LIST=False,
        WITH_U=with_entropy,
        BT=64,
        BM=32,
    )
    return sums


def _add_product(out32: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out32 (+)= a @ b in float32."""
    if a.dtype == torch.float32:
        torch.addmm(out32, a, b, beta=0.0 if first else 1.0, out=out32)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=out32)
    else:
        torch.addmm(out32, a, b, out_dtype=torch.float32, out=out32)


def _grad_hidden(E, w, acc32, out, scale, first: bool, only: bool) -> None:
    (M, V), H, c = E.shape, w.shape[1], tile_for("grad_hidden", w)
    grid = (triton.cdiv(M, c.BM) * triton.cdiv(H, c.BV),)
    grad_hidden_kernel[grid](
        _desc(E, [c.BM, c.BK], c.tma),
        _desc(w, [c.BK, c.BV], c.tma),
        E,
        w,
        out if acc32 is None else acc32,
        out,
        scale,
        M,
        V,
        H,
        E.stride(0),
        w.stride(0),
        FIRST=first,
        ONLY=only,
        TMA=c.tma,
        BM=c.BM,
        BV=c.BV,
        BK=c.BK,
        GROUP=c.group,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )


def slice_columns(rows: int, V: int, itemsize: int) -> int:
    """Columns of one vocabulary slice: SLICE_BYTES of scratch, a multiple of every tile."""
    return max(1024, min(triton.cdiv(V, 1024) * 1024, SLICE_BYTES // max(1, rows * itemsize) // 1024 * 1024))


def backward(c_M, h_M, x_MH, w_VH, y_M, stats, cache_RV, inv_t, need_hidden, need_weight, grad_weight_out):
    """(grad_x [M, H] or None, grad_weight [V, H] or None). Rows below R use the cache, the others are recomputed
    slice by slice; an entropy gradient converts every row, slice by slice."""
    M, (V, H), R, dtype = x_MH.shape[0], w_VH.shape, min(cache_RV.shape[0], x_MH.shape[0]), x_MH.dtype
    grad_x = torch.empty(M, H, dtype=dtype, device=x_MH.device) if need_hidden else None
    grad_w = torch.empty(V, H, dtype=dtype, device=x_MH.device) if need_weight and grad_weight_out is None else None
    if M == 0:
        return grad_x, None if grad_w is None else grad_w.zero_()
    x, w = aligned(x_MH), aligned(w_VH)
    target, anchor, S, U = stats
    e_target, scale, row_scale = (target - anchor).exp(), -inv_t / S, None
    if dtype == torch.float16:  # the stored factor is E * row_scale
        row_scale, scale = HALF_SCALE / S, torch.full_like(S, -inv_t / HALF_SCALE)
    if h_M is None:
        alpha = beta = None
        scale, at_target = scale * c_M, e_target - S
    else:  # dz = scale F, F = E (alpha + beta log E); F is normalised by |c| + |h| so that float16 holds it
        size = c_M.abs() + h_M.abs()
        size = torch.where(size > 0, size, 1.0)
        scale, c, beta = scale * size, c_M / size, h_M / size
        alpha = c - beta * U / S
        at_target = e_target * (alpha + beta * (target - anchor)) - c * S
        if row_scale is not None:  # log of the stored factor is z - k + log row_scale
            alpha = alpha - beta * row_scale.log()
    if row_scale is not None:
        at_target = at_target * row_scale
    weight_scale = None
    if dtype == torch.float16 and need_weight:  # small gradients leave float16's range: their scale stays outside
        weight_scale = scale.abs().amax()
        xs = (x.float() * (scale / torch.where(weight_scale > 0, weight_scale, 1.0))[:, None]).to(dtype)
    else:
        xs = (x.float() * scale[:, None]).to(dtype) if need_weight else None
    done = R if h_M is None else 0  # rows that need no scratch
    if done and grad_x is not None:
        _grad_hidden(cache_RV[:done, :V], w, None, grad_x[:done], scale[:done], True, True)
    if done == M and grad_weight_out is None:
        if grad_w is not None:
            torch.mm(cache_RV[:M, :V].T, xs, out=grad_w)
        return grad_x, grad_w
    rest = M - done
    columns = slice_columns(rest, V, x.element_size())
    scratch = torch.empty(rest, columns, dtype=dtype, device=x.device)
    acc32 = torch.empty(rest, H, dtype=torch.float32, device=x.device) if need_hidden and columns < V else None
    direct = grad_weight_out if grad_w is None and weight_scale is None else None  # float32 sums may go straight there
    slice_w = None
    if need_weight and direct is None:
        slice_w = torch.empty(min(columns, V), H, dtype=torch.float32, device=x.device)
    for v in range(0, V, columns):
        ve = min(v + columns, V)
        w_s, y_s, F = w[v:ve], y_M - v, scratch[:, : ve - v]
        again = slice(R, M)  # recomputed
        if R < M:
            product(
                EXPONENTIALS,
                x[again],
                w_s,
                y_s[again],
                target[again],
                anchor[again],
                F[R - done :],
                inv_t,
                at_target=at_target[again],
                row_scale=None if row_scale is None else row_scale[again],
                kept_rows=M - R,
            )
        if alpha is not None and beta is not None:
            blocks = triton.cdiv(ve - v, 2048)
            for part, source in ((slice(0, R), cache_RV[:R, v:ve]), (slice(R, M), F[R:])):
                if part.stop > part.start:
                    convert_kernel[(part.stop - part.start, blocks)](
                        source,
                        F[part],
                        y_s[part],
                        alpha[part],
                        beta[part],
                        at_target[part],
                        ve - v,
                        source.stride(0),
                        F.stride(0),
                        B=2048,
                    )
        if rest and grad_x is not None:
            _grad_hidden(F, w_s, acc32, grad_x[done:], scale[done:], v == 0, acc32 is None)
        if need_weight:
            sums = grad_weight_out[v:ve] if slice_w is None else slice_w[: ve - v]
            if done:
                _add_product(sums, cache_RV[:done, v:ve].T, xs[:done], direct is None)
            if rest:
                _add_product(sums, F.T, xs[done:], direct is None and not done)
            if weight_scale is not None:
                sums *= weight_scale
            if grad_w is not None:
                grad_w[v:ve] = sums
            elif direct is None:
                grad_weight_out[v:ve] += sums
    if grad_x is not None and acc32 is not None:
        grad_x[done:] = acc32.mul_(scale[done:, None])
    return grad_x, grad_w
