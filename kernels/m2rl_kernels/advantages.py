"""Group advantages over ragged groups of rewards, with the mask of the samples that teach anything.

    grpo       (r - mean_g) / (std_g + eps)              std: unbiased, over the group
    dr_grpo     r - mean_g
    rloo        r - mean of the group's others = n_g / (n_g - 1) (r - mean_g)
    batch_std  (r - mean_g) / (std_batch + eps)          std: unbiased, over all rewards of the call

A NaN reward is a missing sample: it counts in no mean, no std and no n_g, and its advantage is 0. A group is live when
it has two present rewards that differ; every advantage of a group that is not live is exactly 0, and so is its std.
An infinite reward is not a missing one: every advantage that it enters is NaN or infinite.
Mean and variance are two-pass and in float64 inside: a common offset of the rewards costs no accuracy.

Letters: S samples, G groups, T tokens. Errors: ValueError. Error bound: 1e-6 * max|r| / (std + eps) against float64.
Sources: GRPO 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740; the paper's setting is grpo with eps 1e-6, groups of 16.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from m2rl_kernels import native

MODES = ("grpo", "dr_grpo", "rloo", "batch_std")  # Mode in csrc/advantages.cpp


class Advantages(NamedTuple):
    adv: Tensor  # [S] in the dtype of rewards
    mean: Tensor  # [G] of the present rewards; NaN for a group without any
    std: Tensor  # [G] unbiased, of the group in every mode; 0 with fewer than two present rewards
    live: Tensor  # [S] bool: the reward is present and its group's present rewards differ
    token_adv: Tensor | None = None  # [T] adv of each token's sample, when cu_seqlens was given


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor,
    mode: str = "grpo",
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    *,
    total_tokens: int | None = None,
) -> Advantages:
    """Advantages of samples that lie group by group: group g is rewards[group_offsets[g]:group_offsets[g + 1]].

    rewards [S] float32 or float64; NaN = missing. group_offsets [G+1] int32 or int64, rising from 0 to S; a group may
    be empty. mode: grpo, dr_grpo, rloo or batch_std, the formulas at the head of this file. eps: added to the std
    (grpo, batch_std). cu_seqlens [S+1] int32 or int64: also broadcast to tokens (sample s owns tokens
    cu_seqlens[s]:cu_seqlens[s + 1]); total_tokens = cu_seqlens[-1] spares CUDA the synchronisation that reads it.

    ValueError names the argument, the rule and the value.
    """
    _check(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens)
    if cu_seqlens is not None and total_tokens is None:
        total_tokens = int(cu_seqlens[-1])
    adv, mean, std, live, token_adv = group_advantages_op(
        rewards, group_offsets, mode, float(eps), cu_seqlens, total_tokens or 0
    )
    return Advantages(adv, mean, std, live, None if cu_seqlens is None else token_adv)


def group_advantages_ref(rewards, group_offsets, mode="grpo", eps=1e-6, cu_seqlens=None) -> Advantages:
    """The definition, group by group in float64."""
    r, bounds = rewards.double(), group_offsets.tolist()
    adv, live, means, stds = torch.zeros_like(r), torch.zeros(len(r), dtype=torch.bool), [], []
    batch = r[~r.isnan()].std() if (~r.isnan()).sum() > 1 else r.new_zeros(())
    for a, b in itertools.pairwise(bounds):
        x = r[a:b][~r[a:b].isnan()]
        means.append(x.mean())
        alive = len(x) > 1 and bool(x.min() < x.max())
        stds.append(x.std() if alive else r.new_zeros(()))
        if alive:
            divisor = {"grpo": stds[-1] + eps, "dr_grpo": 1.0, "rloo": 1 - 1 / len(x), "batch_std": batch + eps}[mode]
            live[a:b] = ~r[a:b].isnan()
            adv[a:b] = torch.where(r[a:b].isnan(), 0.0, (r[a:b] - means[-1]) / divisor)
    token_adv = None if cu_seqlens is None else adv.repeat_interleave(cu_seqlens.long().diff())
    return Advantages(adv, r.new_tensor(means), r.new_tensor(stds), live, token_adv)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _require(condition, message) -> None:
    if not condition:
        raise ValueError(message() if callable(message) else message)


def _check(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens) -> None:
    _require(
        rewards.dim() == 1 and rewards.dtype in (torch.float32, torch.float64),
        lambda: f"rewards must be float32 or float64 [S], got {rewards.dtype} {list(rewards.shape)}",
    )
    _require(mode in MODES, lambda: f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    _require(eps >= 0, lambda: f"eps must be at least 0, got {eps}")
    _offsets("group_offsets", group_offsets, rewards.device, last=len(rewards))
    if cu_seqlens is not None:
        _offsets("cu_seqlens", cu_seqlens, rewards.device, last=total_tokens)
        _require(
            len(cu_seqlens) == len(rewards) + 1,
            lambda: f"cu_seqlens must have S+1 = {len(rewards) + 1} entries, got {list(cu_seqlens.shape)}",
        )
    _require(total_tokens is None or total_tokens >= 0, lambda: f"total_tokens must be at least 0, got {total_tokens}")


def _offsets(name: str, x: Tensor, device: torch.device, last: int | None) -> None:
    _require(
        x.dim() == 1 and len(x) >= 1 and x.dtype in (torch.int32, torch.int64),
        lambda: f"{name} must be int32 or int64 with at least one entry, got {x.dtype} {list(x.shape)}",
    )
    _require(x.device == device, lambda: f"{name} must be on the device of rewards, {device}, got {x.device}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # on CUDA this would wait for the device
        _require(
            int(x[0]) == 0 and bool((x.diff() >= 0).all()) and (last is None or int(x[-1]) == last),
            lambda: (
                f"{name} must rise from 0 to {'the end' if last is None else last}, got "
                f"{x[:4].tolist()} ... {x[-4:].tolist()}"
            ),
        )


# ---- torch.library operation -----------------------------------------------------------------------------------------


@torch.library.custom_op("m2rl::group_advantages", mutates_args=(), device_types=("cpu", "cuda"))
def group_advantages_op(
    rewards: Tensor, group_offsets: Tensor, mode: str, eps: float, cu_seqlens: Tensor | None, total_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(adv, mean, std, live, token_adv); token_adv is empty without cu_seqlens."""
    if rewards.is_cuda:
        from m2rl_kernels.advantages_triton import group_advantages_triton

        with torch.cuda.device_of(rewards):  # Triton launches on the current device
            return group_advantages_triton(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens)
    return group_advantages_cpu(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens)


@group_advantages_op.register_fake
def _(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens):
    G = group_offsets.shape[0] - 1
    return (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(G),
        rewards.new_empty(G),
        rewards.new_empty(rewards.shape, dtype=torch.bool),
        rewards.new_empty(total_tokens if cu_seqlens is not None else 0),
    )


# ---- CPU -------------------------------------------------------------------------------------------------------------


def group_advantages_cpu(rewards, group_offsets, mode, eps, cu_seqlens, total_tokens):
    """The same in C++, in float64 inside."""
    S, G = len(rewards), len(group_offsets) - 1
    rewards, offsets = rewards.contiguous(), group_offsets.long().contiguous()
    tokens = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    adv, live = torch.empty_like(rewards), torch.empty(S, dtype=torch.bool)
    mean, std = rewards.new_empty(G), rewards.new_empty(G)
    token_adv = rewards.new_empty(total_tokens if tokens is not None else 0)
    address = lambda x: ctypes.c_void_p(None if x is None else x.data_ptr())  # noqa: E731
    native.cpu().m2rl_group_advantages(
        ctypes.c_int32(rewards.dtype == torch.float64),
        address(rewards),
        address(offsets),
        ctypes.c_int64(G),
        ctypes.c_int32(MODES.index(mode)),
        ctypes.c_double(eps),
        *(address(x) for x in (tokens, adv, mean, std, live, token_adv)),
    )
    return adv, mean, std, live, token_adv
