"""The policy: a Hugging Face causal LM over flat packed tokens, sharded with FSDP2.

    logp_N, entropy_N = policy(packed, rows_N, targets_N, temperature)

T tokens of several sequences lie end to end; attention sees each sequence alone (cu_seqlens). Only the N hidden rows
that are scored reach the head, and `linear_logprob` never forms [N, V] logits. Any dense decoder of transformers loads.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from m2rl_kernels.linear_kl import linear_kl
from m2rl_kernels.linear_logprob import linear_logprob
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from m2rl.types import InputError

ATTENTION = "m2rl_packed"


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences laid end to end. Host copies of what the host needs, so that no step waits for the device."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, restarting at 0 in each sequence
    cu_seqlens: Tensor  # [S+1] int32
    max_seqlen: int
    runs: tuple[tuple[int, int], ...]  # (sequences, length) of neighbours of equal length, in order; host only

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], device: torch.device) -> Packed:
        """Without varlen attention neighbours of equal length are one batch: lay sequences in order of length there."""
        sizes = [len(s) for s in sequences]
        lengths = torch.tensor(sizes, dtype=torch.int64)
        ends = lengths.cumsum(0)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
        positions = torch.arange(len(tokens)) - (ends - lengths).repeat_interleave(lengths)
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
        runs = tuple((len(list(run)), size) for size, run in itertools.groupby(sizes))
        return Packed(tokens.to(device), positions.to(device), cu.to(device), max(sizes, default=0), runs)

    def targets(self, scored: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of the tokens in `scored` [T] bool, never a sequence's first: ([N] int64 position whose hidden state predicts
        it, [N] int64 its id)."""
        at = torch.from_numpy(np.flatnonzero(scored)).to(self.tokens.device)
        return at - 1, self.tokens[at]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    packed: Packed,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq,
    D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    if q.is_cuda and q.dtype != torch.float32:  # no varlen kernel takes float32 or runs on a CPU
        return _varlen(q, k, v, packed, scaling)[None], None
    sizes, outputs = [count * length for count, length in packed.runs], []
    for (count, length), *run in zip(packed.runs, q.split(sizes), k.split(sizes), v.split(sizes)):
        qb, kb, vb = (x.unflatten(0, (count, length)).transpose(1, 2) for x in run)
        out = F.scaled_dot_product_attention(
            qb, kb, vb, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
# torch 2.11 takes equal head counts only.
VARLEN_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scaling: float) -> Tensor:
    cu, longest = packed.cu_seqlens, packed.max_seqlen
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=scaling, causal=True)
    grouped: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if VARLEN_GROUPS_HEADS:
            grouped = {"enable_gqa": True}
        else:
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)
    return cast(Tensor, out)


AttentionInterface.register(ATTENTION, packed_attention)  # without a mask function of its name, no mask is made


@dataclass(frozen=True, slots=True)
class Features:
    """What a head makes a distribution of: hidden rows [N, H] and the head [V, H]."""

    hidden: Tensor
    head: Tensor


def feed_scored_rows(layer: nn.Module) -> None:
    """Run the feed-forward of the last decoder layer, most of its work, on the scored rows `rows_N` alone: behind the
    last attention nothing mixes tokens, and no other rows are read."""

    def note(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:  # again where a layer is recomputed
        scored[:] = [kwargs.get("rows_N"), args[0].shape]

    def select(mlp: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return args if scored[0] is None else (args[0].index_select(1, scored[0]),)

    def spread(mlp: nn.Module, args: tuple[Tensor], out_1NH: Tensor) -> Tensor:
        return out_1NH if scored[0] is None else out_1NH.new_zeros(scored[1]).index_copy(1, scored[0], out_1NH)

    scored: list[Any] = [None, None]  # rows_N and the shape [1, T, H] of this pass
    mlp = getattr(layer, "mlp", None)
    if mlp is not None:
        layer.register_forward_pre_hook(note, with_kwargs=True)
        mlp.register_forward_pre_hook(select)
        mlp.register_forward_hook(spread)


class Policy(nn.Module):
    """One module for FSDP2 to shard: backbone, gather of scored rows, fused head."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.config = model.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        packed: Packed,
        rows_N: Tensor,
        targets_N: Tensor | Features | None,
        temperature: float = 1.0,
        with_entropy: bool = True,
        direction: Literal["reverse", "forward"] = "reverse",
    ) -> Any:
        """What is wanted of the distinct positions rows_N, by what `targets_N` is; one forward for FSDP to hook.

        token ids [N]         (log-probability of each after the tokens up to its row, entropy or None); nats, float32
        a teacher's Features  (KL [N] between this policy and the teacher, in `direction`, None)
        None                  this policy's own Features
        """
        hidden_NH, head_VH = self.hidden(packed, rows_N), self.head
        if targets_N is None:  # a sharded head is freed when the root's forward ends
            return Features(hidden_NH, head_VH.clone() if isinstance(self, FSDPModule) else head_VH)
        if isinstance(targets_N, Features):
            kl_N = linear_kl(
                hidden_NH, head_VH, targets_N.hidden, targets_N.head, direction=direction, temperature=temperature
            )
            return kl_N, None
        if not with_entropy:
            return linear_logprob(hidden_NH, head_VH, targets_N, temperature=temperature), None
        return linear_logprob(hidden_NH, head_VH, targets_N, temperature=temperature, return_entropy=True)

    def features(self, packed: Packed, rows_N: Tensor) -> Features:
        return self(packed, rows_N, None)

    def hidden(self, packed: Packed, rows_N: Tensor | None = None) -> Tensor:
        """[N, H] behind the backbone's last norm, at the distinct positions `rows_N` or at all T."""
        out = self.model.get_decoder()(
            input_ids=packed.tokens[None],
            position_ids=packed.positions[None],
            use_cache=False,
            packed=packed,
            rows_N=rows_N,
        )
        hidden_TH = out.last_hidden_state[0]
        return hidden_TH if rows_N is None else hidden_TH[rows_N]

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight


@contextlib.contextmanager
def reading_model(refused: str) -> Iterator[None]:
    """What transformers has against a folder or id as one sentence of the user's: `refused (its first line)`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{refused} ({str(error).splitlines()[0]})") from None


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM from a folder or a hub id on disk, in `dtype` on the CPU; InputError if it cannot serve as a
    policy."""
    with reading_model(f"model.path {path}: not a Hugging Face model folder or id"):
        config = AutoConfig.from_pretrained(path)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(f"model.path {path}: {name} is set; heads that transform their logits are not supported")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise InputError(f"model.path {path}: sliding-window attention is not supported")
    config._attn_implementation = ATTENTION
    try:
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, attn_implementation=ATTENTION)
    except (OSError, ValueError) as error:
        raise InputError(f"model.path {path}: {str(error).splitlines()[0]}") from None
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise InputError(f"model.path {path}: NaN or infinity in {len(bad)} weights, first {bad[0]}")
    return model


def shard(
    policy: Policy,
    device: torch.device,
    compute_dtype: torch.dtype,
    replicas: int = 1,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> Policy:
    """Move to the device and shard over all ranks: per decoder layer, then the root; HSDP when replicas > 1.

    Gradients are summed, never averaged: every denominator is in the token weights already.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % replicas:
        raise InputError(f"train.replicas {replicas} does not divide the number of ranks {world}")
    layers = policy.model.get_decoder().layers
    compile = compile and device.type == "cuda"
    if not compile:  # compiled, one graph serves all layers, and under checkpointing it may keep no state
        feed_scored_rows(layers[-1])
    if activation_checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
    if compile:
        for layer in layers:
            layer.compile(dynamic=True)
    if world == 1 and compute_dtype == torch.float32:
        return policy.to(device)
    shape, names = ((replicas, world // replicas), ("replicate", "shard")) if replicas > 1 else ((world,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:  # each moves to the device as it is sharded, so that no GPU ever holds the whole model
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return policy


@torch.no_grad()
def load_weights(policy: Policy, folder: str | Path) -> None:
    """Write another checkpoint of the same architecture into a (sharded) policy, in place; InputError if it differs."""
    theirs = {name.removesuffix(".weight"): p for name, p in load_model(folder).named_parameters()}
    mine = {
        name.replace("_checkpoint_wrapped_module.", "").removesuffix(".weight"): p
        for name, p in policy.model.named_parameters()
    }
    wrong = sorted(theirs.keys() ^ mine.keys()) or [n for n in mine if theirs[n].shape != mine[n].shape]
    if wrong:
        raise InputError(f"{folder}: another architecture than the policy's, first difference at {wrong[0]}")
    for name, p in mine.items():
        full = theirs[name].to(p.device)
        p.copy_(distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full)


class FullParameters(Mapping[str, Tensor]):
    """Every parameter whole, by its Hugging Face name. A sharded one is gathered when it is read, so that a loop holds
    one at a time; reading is collective, and every rank must read the same names in the same order."""

    def __init__(self, policy: Policy):
        self._named = {
            name.replace("_checkpoint_wrapped_module.", ""): p for name, p in policy.model.named_parameters()
        }

    def __getitem__(self, name: str) -> Tensor:
        p = self._named[name]
        return (p.full_tensor() if isinstance(p, DTensor) else p).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


def full_parameters(policy: Policy) -> FullParameters:
    return FullParameters(policy)


def local_shards(policy: Policy) -> tuple[dict[str, Tensor], dist.ProcessGroup | None]:
    """Every parameter, sharded as it is, by its Hugging Face name, and the group over which dim 0 is sharded."""
    group = None
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass without a backward the root's parameters are still whole
    named = {}
    for name, p in policy.model.named_parameters():
        if isinstance(p, DTensor):
            group = p.device_mesh.get_group(p.device_mesh.ndim - 1)  # HSDP: the last dimension shards
        named[name.replace("_checkpoint_wrapped_module.", "")] = p.detach()
    return named, group


# Loading bars and notes on sharding plans that are not used would break into the run's own display.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
