"""The accelerator's memory between trainer and engine: what waits on the host, and what is left at every edge.

One step of a colocated run; the order matters, because the allocators of torch and of vLLM do not see each other:

    learn -> park Adam's moments (optional) -> free the trainer's cache -> wake weights -> sync -> wake KV cache
          -> roll out -> sleep (weights and KV cache) -> bring the moments back -> learn
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig

from m2rl.config import Config

GIB = 2**30


def free_cache() -> None:
    """Return what torch's allocator holds but does not use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_gib(device: torch.device) -> float:
    """What the driver has left on this device, GiB; infinite on a CPU."""
    return torch.cuda.mem_get_info(device)[0] / GIB if device.type == "cuda" else float("inf")


def kv_bytes_per_token(config: Config, shape: PretrainedConfig) -> int:
    """Key and value of one token on one engine rank, bytes; with fewer heads than ranks every rank keeps one."""
    item = 2 if config.model.compute_dtype == "bfloat16" else 4
    kv_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * max(kv_heads // config.rollout.tensor_parallel, 1) * head * shape.num_hidden_layers * item


@dataclass
class Parked:
    """An optimizer's state in (pinned) host memory. The tensors stay the same objects; only their storage is gone."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (emptied tensor, its values on the host)

    def restore(self) -> None:
        for tensor, host in self.copies:
            tensor.untyped_storage().resize_(host.numel() * host.element_size())
            tensor.copy_(host.view_as(tensor), non_blocking=True)
        if self.copies and self.copies[0][0].is_cuda:
            torch.cuda.synchronize()  # the pinned copies are freed next
        self.copies.clear()


@torch.no_grad()
def park(optimizer: torch.optim.Optimizer) -> Parked:
    """Move every state tensor that is as large as its parameter to the host; 8 bytes per parameter for AdamW."""
    parked = Parked()
    for state in optimizer.state.values():
        for value in state.values():
            tensor = value.to_local() if hasattr(value, "to_local") else value  # DTensor
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.untyped_storage().size():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                host.copy_(tensor, non_blocking=True)
                parked.copies.append((tensor, host))
    if parked.copies and parked.copies[0][0].is_cuda:
        torch.cuda.synchronize()
    for tensor, _ in parked.copies:
        tensor.untyped_storage().resize_(0)
    return parked
