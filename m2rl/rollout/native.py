"""The default engine: batched decoding in this process, on whatever device the trainer uses, with no further
dependency.

One preallocated key/value cache holds a slot per live sequence. A prompt shared by a whole group is read once and its
keys and values copied to the group's slots; finished rows are compacted away. Each token is drawn by inverse CDF at a
uniform that is a hash of (request seed, position), so a response is the same in any batch, up to the last bits of the
probabilities.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from m2rl.policy import full_parameters
from m2rl.rollout.engine import Finished, Request

ATTENTION = "m2rl_cached"
COMPACT_SHARE = (
    0.125  # drop finished rows once they are this share of the batch; copying the cache more often costs more
)


@dataclass(slots=True)
class SlotCache:
    """Keys and values of the live sequences: [layers, slots, Hkv, length, D], slot b valid up to its own position."""

    keys: Tensor
    values: Tensor

    def widen(self, length: int) -> None:
        if length > self.keys.shape[3]:
            grow = length - self.keys.shape[3]
            self.keys, self.values = (F.pad(x, (0, 0, 0, grow)) for x in (self.keys, self.values))


@dataclass(slots=True)
class Window:
    """What one forward pass touches: the cache, the rows' write positions, and how much of the cache is read."""

    cache: SlotCache
    slots: slice
    positions: Tensor  # [B, q] int64
    mask: Tensor  # [B, 1, q, K] bool
    read: int  # K


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    window: Window,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write key and value [B, Hkv, q, D] at the rows' positions, attend over what is valid. -> [B, q, Hq, D]"""
    layer = module.layer_idx
    keys, values = window.cache.keys[layer, window.slots], window.cache.values[layer, window.slots]
    B, q = window.positions.shape
    if q == 1:
        row = torch.arange(B, device=key.device)
        keys[row, :, window.positions[:, 0]] = key[:, :, 0]
        values[row, :, window.positions[:, 0]] = value[:, :, 0]
    else:  # prefill starts every row at position 0
        keys[:, :, :q], values[:, :, :q] = key, value
    k, v = keys[:, :, : window.read], values[:, :, : window.read]
    out = F.scaled_dot_product_attention(
        query, k, v, attn_mask=window.mask, scale=scaling, enable_gqa=query.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, cached_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def uniform(seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """[B] float64 in (0, 1): splitmix64 of seed + position * golden ratio; int64 arithmetic wraps as uint64's does."""
    z = seeds_B + (positions_B + 1) * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return (((z >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53


def sample(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverse CDF, and its log-probability (nats) where it was drawn from; greedy at T=0."""
    greedy = temperature_B == 0
    logp_BV = torch.log_softmax(logits_BV.float() / torch.where(greedy, 1.0, temperature_B)[:, None], -1)
    cdf = logp_BV.double().exp_().cumsum_(-1)
    token = torch.searchsorted(cdf, (uniform_B * cdf[:, -1])[:, None])[:, 0].clamp_max(logits_BV.shape[1] - 1)
    token = torch.where(greedy, logits_BV.argmax(-1), token)
    return token, logp_BV.gather(1, token[:, None])[:, 0]


class NativeEngine:
    """Implements rollout.engine.Engine. Keeps its own copy of the weights; `sync` writes into it in place."""

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_sequences: int,
        end_tokens: Iterable[int],
    ):
        config = copy.deepcopy(config)
        config._attn_implementation = ATTENTION
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        self.model.to(device).eval().requires_grad_(False)
        self.backbone, self.head = self.model.get_decoder(), self.model.get_output_embeddings()
        self.device, self.dtype, self.max_sequences, self.version = device, dtype, max_sequences, -1
        self.end = torch.tensor(sorted(set(end_tokens)), device=device)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, max_sequences, heads, 64, size)
        self.cache = SlotCache(
            torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        )
        self.queue: deque[Request] = deque()
        self.live: list[Request] = []  # one per row below
        self._rows_changed()

    def _rows_changed(self) -> None:
        """(Re)start the per-row state when nothing is live: `position` of the next token, `last` token, what was
        drawn."""
        long = {"dtype": torch.int64, "device": self.device}
        self.position, self.last = torch.zeros(0, **long), torch.zeros(0, **long)
        self.seed, self.limit, self.count = torch.zeros(0, **long), torch.zeros(0, **long), torch.zeros(0, **long)
        self.temperature = torch.zeros(0, device=self.device)
        self.drawn = torch.zeros(0, 0, **long)
        self.logp = torch.zeros(0, 0, device=self.device)
        self.done = torch.zeros(0, dtype=torch.bool, device=self.device)

    @property
    def pending(self) -> int:
        return len(self.queue) + len(self.live)

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if not request.tokens:
                raise ValueError(f"request {request.id}: tokens must not be empty")
            if request.max_new_tokens < 1:
                raise ValueError(
                    f"request {request.id}: max_new_tokens must be at least 1, got {request.max_new_tokens}"
                )
            self.queue.append(request)

    @torch.inference_mode()
    def poll(self) -> list[Finished]:
        if self.version < 0:
            raise RuntimeError("the engine has no weights yet: call sync first")
        if self.queue and (
            not self.live
            or len(self.live) + len(self.queue) <= self.max_sequences
            or len(self.live) <= self.max_sequences * 3 // 4
        ):
            self._admit()
        elif self.live:
            self._decode()
        return self._collect()

    def cancel(self, ids: Iterable[int]) -> list[Finished]:
        gone = set(ids)
        out = [Finished(r.id, [], [], "abort", self.version) for r in self.queue if r.id in gone]
        self.queue = deque(r for r in self.queue if r.id not in gone)
        keep = [i for i, r in enumerate(self.live) if r.id not in gone]
        for i, r in enumerate(self.live):
            if r.id in gone:  # one that is done already waits for its row to be dropped: it is whole
                ended = bool(torch.isin(self.drawn[i, self.count[i] - 1], self.end))
                out.append(self._finished(i, ("stop" if ended else "length") if self.done[i] else "abort"))
        self._compact(torch.tensor(keep, dtype=torch.int64, device=self.device))
        return out

    def _admit(self) -> None:
        """Read as many waiting prompts as there are free slots, each distinct prompt once."""
        batch = [self.queue.popleft() for _ in range(min(len(self.queue), self.max_sequences - len(self.live)))]
        distinct = {tokens: i for i, tokens in enumerate(dict.fromkeys(r.tokens for r in batch))}
        lengths = torch.tensor([len(t) for t in distinct], device=self.device)
        longest = int(lengths.max())
        ids = torch.zeros(len(distinct), longest, dtype=torch.int64)
        for tokens, i in distinct.items():
            ids[i, : len(tokens)] = torch.tensor(tokens)
        width = max(r.max_new_tokens for r in batch)
        self.cache.widen(max(len(r.tokens) + r.max_new_tokens for r in batch))
        first, source = len(self.live), torch.tensor([distinct[r.tokens] for r in batch], device=self.device)
        # Prefill into the slots that the group will use, then spread each prompt's keys and values over its group.
        positions = torch.arange(longest, device=self.device).expand(len(distinct), -1)
        mask = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()[None, None]
        slots = slice(first, first + len(distinct))
        hidden = self._forward(ids.to(self.device), Window(self.cache, slots, positions, mask, longest))
        logits = self.head(hidden[torch.arange(len(distinct), device=self.device), lengths - 1])[source]
        for store in (self.cache.keys, self.cache.values):
            store[:, first : first + len(batch), :, :longest] = store[:, slots, :, :longest][:, source]
        self.live += batch
        long = {"dtype": torch.int64, "device": self.device}
        grow = width - self.drawn.shape[1]
        if grow > 0:
            self.drawn, self.logp = F.pad(self.drawn, (0, grow)), F.pad(self.logp, (0, grow))
        new = len(batch)
        self.position = torch.cat([self.position, lengths[source]])
        self.last = torch.cat([self.last, torch.zeros(new, **long)])
        self.seed = torch.cat([self.seed, torch.tensor([r.seed for r in batch], **long)])
        self.limit = torch.cat([self.limit, torch.tensor([r.max_new_tokens for r in batch], **long)])
        self.count = torch.cat([self.count, torch.zeros(new, **long)])
        self.temperature = torch.cat(
            [self.temperature, torch.tensor([r.temperature for r in batch], device=self.device)]
        )
        self.drawn = torch.cat([self.drawn, torch.zeros(new, self.drawn.shape[1], **long)])
        self.logp = torch.cat([self.logp, torch.zeros(new, self.logp.shape[1], device=self.device)])
        self.done = torch.cat([self.done, torch.zeros(new, dtype=torch.bool, device=self.device)])
        self._draw(logits, slice(first, first + new))

    def _decode(self) -> None:
        read = int(self.position.max()) + 1
        mask = torch.arange(read, device=self.device) <= self.position[:, None]
        window = Window(self.cache, slice(0, len(self.live)), self.position[:, None], mask[:, None, None], read)
        hidden = self._forward(self.last[:, None], window)
        self.position += 1
        self._draw(self.head(hidden[:, -1]), slice(0, len(self.live)))

    def _forward(self, ids: Tensor, window: Window) -> Tensor:
        return self.backbone(
            input_ids=ids, position_ids=window.positions, use_cache=False, window=window
        ).last_hidden_state

    def _draw(self, logits: Tensor, rows: slice) -> None:
        token, logp = sample(logits, self.temperature[rows], uniform(self.seed[rows], self.count[rows]))
        row = torch.arange(rows.start, rows.stop, device=self.device)
        live = ~self.done[rows]
        column = self.count[rows].clamp_max(self.drawn.shape[1] - 1)
        self.drawn[row, column] = torch.where(live, token, self.drawn[row, column])
        self.logp[row, column] = torch.where(live, logp, self.logp[row, column])
        self.count[rows] += live
        self.last[rows] = token
        self.done[rows] |= torch.isin(token, self.end) | (self.count[rows] >= self.limit[rows])

    def _finished(self, row: int, finish: str) -> Finished:
        n = int(self.count[row])
        return Finished(
            self.live[row].id, self.drawn[row, :n].tolist(), self.logp[row, :n].tolist(), finish, self.version
        )

    def _collect(self) -> list[Finished]:
        done = self.done.nonzero().flatten()
        if not len(done) or (len(done) < len(self.live) * COMPACT_SHARE and len(done) < len(self.live)):
            return []
        ended = torch.isin(self.drawn[done, (self.count[done] - 1)], self.end).tolist()
        out = []
        for row, tokens, logp, n, stop in zip(
            done.tolist(), self.drawn[done].tolist(), self.logp[done].tolist(), self.count[done].tolist(), ended
        ):
            out.append(Finished(self.live[row].id, tokens[:n], logp[:n], "stop" if stop else "length", self.version))
        self._compact((~self.done).nonzero().flatten())
        return out

    def _compact(self, keep: Tensor) -> None:
        self.live = [self.live[i] for i in keep.tolist()]
        if not self.live:
            self._rows_changed()
            return
        used = int(self.position.max()) + 1
        for store in (self.cache.keys, self.cache.values):
            store[:, : len(keep), :, :used] = store[:, keep, :, :used]
        for name in ("position", "last", "seed", "limit", "count", "temperature", "drawn", "logp", "done"):
            setattr(self, name, getattr(self, name)[keep])

    def sync(self, policy: Any, version: int) -> None:
        """Copy the policy's weights into the engine's storage, whose addresses never change; collective over the
        ranks."""
        self.load(full_parameters(policy), version)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self.pending:
            raise RuntimeError(f"sync with {self.pending} requests in flight: finish or cancel them first")
        mine = dict(self.model.named_parameters())
        if mine.keys() != weights.keys():
            raise RuntimeError(f"sync: parameter names differ: {sorted(mine.keys() ^ weights.keys())}")
        for name, p in mine.items():
            p.copy_(weights[name])
        self.version = version

    def sleep(self) -> None:
        """Nothing to give back: the cache is small beside the weights it serves."""

    def wake(self) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        self.queue.clear()
        self.live = []
