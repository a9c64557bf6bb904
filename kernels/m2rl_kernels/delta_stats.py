"""What fine-tuning changed: exact pairwise statistics of deltas in one reading, and sketches of trajectories.

    d_k = x_k - base, in float32                 (the subtraction of two bfloat16 numbers of like size is exact)
    gram_ij = <d_i, d_j>                       cosine_ij = gram_ij / sqrt(gram_ii gram_jj)
    both_ij = |{d_i != 0 and d_j != 0}|        agree_ij = |{both, and the signs are equal}|
    changed_k = |{bf16(x_k) != bf16(base)}|    the elements that differ where the engine sees them
    exponents_k[e] = |{biased exponent of d_k is e}|: |d| in [2^(e-127), 2^(e-126)); e = 0: zero or subnormal

`delta_stats` reads every model once and holds a few blocks; products are float32 over 4096 elements and float64 beyond,
in an order that does not depend on threads. `count_sketch` keeps `size` numbers of a tensor such that inner products
survive: element i of tile t = i // size goes to bucket (i + shift_t) mod size with a random sign, so

    E <sketch(a), sketch(b)> = <a, b>,   std of the cosine <= sqrt((1 + cosine^2) / size):  1.6-2.2% at 4096

Use the exact statistics when the models are at hand; the sketch is for checkpoints that will be gone. CPU only: callers
stream from files. Sources: count sketch, Charikar et al. 2002; feature hashing, 0902.2206.

Letters: T tensors, M models, N elements. Floor: one read of (M + 1) models.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2rl_kernels import native

CODES = {getattr(torch, name): code for name, code in native.DTYPE_CODES.items()}


@dataclass(frozen=True)
class DeltaStats:
    """Per tensor; `total` adds them up. Counts are int64, sums float64; matrices are symmetric."""

    numel: np.ndarray  # [T]
    gram: np.ndarray  # [T, M, M]
    both: np.ndarray  # [T, M, M] elements where both deltas are nonzero; the diagonal counts each model's own
    agree: np.ndarray  # [T, M, M] of these, equal in sign
    changed: np.ndarray  # [T, M] elements whose bfloat16 value differs from the base's
    exponents: np.ndarray  # [T, M, 256]
    l1: np.ndarray  # [T, M] sum |d|
    largest: np.ndarray  # [T, M] max |d|

    @property
    def nonzero(self) -> np.ndarray:
        """[T, M]"""
        return np.diagonal(self.both, axis1=1, axis2=2)

    @property
    def norm(self) -> np.ndarray:
        """[T, M]"""
        return np.sqrt(np.diagonal(self.gram, axis1=1, axis2=2))

    @property
    def cosine(self) -> np.ndarray:
        """[T, M, M]; NaN where a delta is zero."""
        return _ratio(self.gram, self.norm[:, :, None] * self.norm[:, None, :])

    @property
    def sign_agreement(self) -> np.ndarray:
        """[T, M, M] agree / both; NaN where no element is changed by both."""
        return _ratio(self.agree, self.both)

    @property
    def jaccard(self) -> np.ndarray:
        """[T, M, M] |A and B| / |A or B|."""
        return _ratio(self.both, self.nonzero[:, :, None] + self.nonzero[:, None, :] - self.both)

    @property
    def overlap(self) -> np.ndarray:
        """[T, M, M] |A and B| / min(|A|, |B|)."""
        return _ratio(self.both, np.minimum(self.nonzero[:, :, None], self.nonzero[:, None, :]))

    @property
    def expected_jaccard(self) -> np.ndarray:
        """[T, M, M] the Jaccard index of independent supports of these densities: pq / (p + q - pq)."""
        p = self.nonzero / np.maximum(self.numel, 1)[:, None]
        product = p[:, :, None] * p[:, None, :]
        return _ratio(product, p[:, :, None] + p[:, None, :] - product)

    def total(self) -> DeltaStats:
        """Of all tensors together, T = 1."""
        added = {
            k: getattr(self, k).sum(0, keepdims=True)
            for k in ("numel", "gram", "both", "agree", "changed", "exponents", "l1")
        }
        return DeltaStats(**added, largest=self.largest.max(0, keepdims=True, initial=0.0))

    def select(self, tensors: Sequence[int]) -> DeltaStats:
        """The rows of some tensors, e.g. those of one layer; `.total()` then adds them up."""
        return DeltaStats(
            **{k: getattr(self, k)[np.asarray(tensors, dtype=np.int64)] for k in self.__dataclass_fields__}
        )


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.asarray(b) > 0)


def delta_stats(base: Sequence[Tensor], models: Sequence[Sequence[Tensor]]) -> DeltaStats:
    """Statistics of models[k][t] - base[t] for all T tensors and M models, in one reading.

    CPU tensors, contiguous, float32, bfloat16 or float16 in any mixture; memory-mapped ones are read as they come. To
    bound memory call it tensor by tensor and `concatenate` the results.

    ValueError names the argument, the rule and the value.
    """
    T, M = len(base), len(models)
    _require(M >= 1, "models must hold at least one model, got none")
    for k, model in enumerate(models):
        _require(len(model) == T, f"models[{k}] must hold as many tensors as base, {T}, got {len(model)}")
    sums, counts = np.zeros((T, M * M + 2 * M)), np.zeros((T, 2 * M * M + M + M * 256), np.int64)
    for t in range(T):
        row = [base[t], *(model[t] for model in models)]
        for name, x in zip(["base", *(f"models[{k}]" for k in range(M))], row):
            _check(f"{name}[{t}]", x, base[t].shape)
        native.cpu().m2rl_delta_stats(
            ctypes.c_int64(base[t].numel()),
            ctypes.c_int32(M),
            ctypes.c_void_p(base[t].data_ptr()),
            ctypes.c_int32(CODES[base[t].dtype]),
            (ctypes.c_void_p * M)(*[x.data_ptr() for x in row[1:]]),
            (ctypes.c_int32 * M)(*[CODES[x.dtype] for x in row[1:]]),
            ctypes.c_void_p(sums[t].ctypes.data),
            ctypes.c_void_p(counts[t].ctypes.data),
            ctypes.c_int32(torch.get_num_threads()),
        )
    square = lambda a: np.triu(a.reshape(T, M, M)) + np.triu(a.reshape(T, M, M), 1).swapaxes(1, 2)  # noqa: E731
    return DeltaStats(
        np.array([b.numel() for b in base], np.int64),
        square(sums[:, : M * M]),
        square(counts[:, : M * M]),
        square(counts[:, M * M : 2 * M * M]),
        counts[:, 2 * M * M : 2 * M * M + M],
        counts[:, 2 * M * M + M :].reshape(T, M, 256),
        sums[:, M * M : M * M + M],
        sums[:, M * M + M :],
    )


def concatenate(parts: Sequence[DeltaStats]) -> DeltaStats:
    """The statistics of several calls over the same models, tensor after tensor."""
    return DeltaStats(**{k: np.concatenate([getattr(p, k) for p in parts]) for k in DeltaStats.__dataclass_fields__})


def delta_stats_ref(base: Sequence[Tensor], models: Sequence[Sequence[Tensor]]) -> DeltaStats:
    """The definition, in float64 after the float32 subtraction."""
    rows = []
    for t, b in enumerate(base):
        d = torch.stack([m[t].flatten().float() - b.flatten().float() for m in models])
        support, sign, exponent = (d != 0).double(), d.sign().double(), d.view(torch.int32) >> 23 & 255
        both, d = support @ support.T, d.double()
        rows.append(
            (
                b.numel(),
                d @ d.T,
                both.long(),
                ((sign @ sign.T + both) / 2).long(),
                torch.stack([(m[t].bfloat16() != b.bfloat16()).sum() for m in models]),
                torch.stack([e.bincount(minlength=256) for e in exponent]),
                d.abs().sum(1),
                d.abs().amax(1) if b.numel() else d.sum(1),
            )
        )
    return DeltaStats(*(np.stack([np.asarray(r[i]) for r in rows]) for i in range(8)))


def count_sketch(x: Tensor, *, base: Tensor | None = None, size: int = 4096, seed: int = 0, name: str = "") -> Tensor:
    """float64 [size] sketch of x, or of x - base. Inner products of sketches of one (size, seed, name) estimate those
    of the tensors; sketches add up as the tensors do. Give every tensor its own name, so that tensors are hashed
    independently.

    x, base: CPU, contiguous, float32, bfloat16 or float16, one shape. One read, no atomics, the same bits for any
    thread count. ValueError names the argument, the rule and the value.
    """
    _check("x", x, x.shape)
    _require(2 <= size < 2**31, f"size must be in [2, 2^31), got {size}")
    if base is not None:
        _check("base", base, x.shape)
    out = torch.zeros(size, dtype=torch.float64)
    native.cpu().m2rl_count_sketch(
        ctypes.c_int64(x.numel()),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int32(CODES[x.dtype]),
        ctypes.c_void_p(None if base is None else base.data_ptr()),
        ctypes.c_int32(CODES[(x if base is None else base).dtype]),
        ctypes.c_uint64(sketch_key(seed, name)),
        ctypes.c_int64(size),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return out


def count_sketch_ref(x: Tensor, size: int = 4096, seed: int = 0, name: str = "") -> Tensor:
    """The definition, element by element; Philox as in csrc/counter_rng.h."""
    out, key = torch.zeros(size, dtype=torch.float64), sketch_key(seed, name)
    for i, value in enumerate(x.flatten().double().tolist()):
        tile, j = divmod(i, size)
        word = _philox(tile << 24 | j // 128, 2, key)[j % 128 // 32]
        low, high = _philox(tile, 3, key)[:2]
        out[(j + (high << 32 | low) % size) % size] += -value if word >> j % 32 & 1 else value
    return out


def sketch_key(seed: int, name: str) -> int:
    """64 bits of (seed, name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def _philox(counter: int, stream: int, key: int) -> list[int]:
    x, k = [counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF, 0, stream], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(7):
        p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [q >> 32 ^ x[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ x[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def _check(name: str, x: Tensor, shape: torch.Size) -> None:
    _require(x.device.type == "cpu", f"{name} must be on the CPU, got {x.device}")
    _require(x.dtype in CODES, f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    _require(x.is_contiguous(), f"{name} must be contiguous, got strides {x.stride()} for {list(x.shape)}")
    _require(x.shape == shape, f"{name} must have the shape {list(shape)}, got {list(x.shape)}")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
