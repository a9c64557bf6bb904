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
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

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
    layer = cast(int, module.layer_idx)
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


AttentionInterface.register(ATTENTION, cached_attention)  # without a mask function of its name, no mask is made


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
    cdf = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, (uniform_B * cdf[:, -1])[:, None])[:, 0].clamp_max(logits_BV.shape[1] - 1)
    token = torch.where(greedy, logits_BV.argmax(-1), token)
    return token, logp_BV.gather(1, token[:, None])[:, 0]


@dataclass(slots=True)
class Rows:
    """What each live sequence is at; B rows, W the longest response allowed among them."""

    position: Tensor  # [B] int64: where the next key and value go
    last: Tensor  # [B] int64: the token drawn last
    seed: Tensor  # [B] int64
    limit: Tensor  # [B] int64: most tokens to draw
    count: Tensor  # [B] int64: tokens drawn
    temperature: Tensor  # [B] float32
    done: Tensor  # [B] bool
    drawn: Tensor  # [B, W] int64
    logp: Tensor  # [B, W] float32

    @staticmethod
    def of(requests: list[Request], device: torch.device) -> Rows:
        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        n, width = len(requests), max((r.max_new_tokens for r in requests), default=0)
        return Rows(
            position=column([len(r.tokens) for r in requests]),
            last=column([0] * n),
            seed=column([r.seed for r in requests]),
            limit=column([r.max_new_tokens for r in requests]),
            count=column([0] * n),
            temperature=torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device),
            done=torch.zeros(n, dtype=torch.bool, device=device),
            drawn=torch.zeros(n, width, dtype=torch.int64, device=device),
            logp=torch.zeros(n, width, dtype=torch.float32, device=device),
        )

    def joined(self, more: Rows) -> Rows:
        width = max(self.drawn.shape[1], more.drawn.shape[1])
        for rows in (self, more):
            grow = width - rows.drawn.shape[1]
            rows.drawn, rows.logp = F.pad(rows.drawn, (0, grow)), F.pad(rows.logp, (0, grow))
        return Rows(*(torch.cat([getattr(self, f.name), getattr(more, f.name)]) for f in fields(Rows)))

    def kept(self, index: Tensor) -> Rows:
        return Rows(*(getattr(self, f.name)[index] for f in fields(Rows)))


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
        self.live: list[Request] = []  # one per row of `rows`
        self.rows = Rows.of([], device)

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
        leaving = torch.tensor([r.id in gone for r in self.live], dtype=torch.bool, device=self.device)
        if leaving.any():
            out += self._finished(leaving.nonzero().flatten())
            self._keep((~leaving).nonzero().flatten())
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
        self.rows = self.rows.joined(Rows.of(batch, self.device))
        self._draw(logits, slice(first, len(self.live)))

    def _decode(self) -> None:
        position = self.rows.position
        read = int(position.max()) + 1
        mask = torch.arange(read, device=self.device) <= position[:, None]
        window = Window(self.cache, slice(0, len(self.live)), position[:, None], mask[:, None, None], read)
        hidden = self._forward(self.rows.last[:, None], window)
        position += 1
        self._draw(self.head(hidden[:, -1]), slice(0, len(self.live)))

    def _forward(self, ids: Tensor, window: Window) -> Tensor:
        return self.backbone(
            input_ids=ids, position_ids=window.positions, use_cache=False, window=window
        ).last_hidden_state

    def _draw(self, logits: Tensor, at: slice) -> None:
        rows = self.rows
        token, logp = sample(logits, rows.temperature[at], uniform(rows.seed[at], rows.count[at]))
        row, live = torch.arange(at.start, at.stop, device=self.device), ~rows.done[at]
        column = rows.count[at].clamp_max(rows.drawn.shape[1] - 1)
        rows.drawn[row, column] = torch.where(live, token, rows.drawn[row, column])
        rows.logp[row, column] = torch.where(live, logp, rows.logp[row, column])
        rows.count[at] += live
        rows.last[at] = token
        rows.done[at] |= torch.isin(token, self.end) | (rows.count[at] >= rows.limit[at])

    def _finished(self, index: Tensor) -> list[Finished]:
        """The responses of these rows; one that is neither ended nor at its limit is an abort."""
        rows = self.rows.kept(index)
        ended = torch.isin(rows.drawn.gather(1, (rows.count - 1)[:, None])[:, 0], self.end).tolist()
        out = []
        for i, tokens, logp, n, end, done in zip(
            index.tolist(), rows.drawn.tolist(), rows.logp.tolist(), rows.count.tolist(), ended, rows.done.tolist()
        ):
            finish: Literal["stop", "length", "abort"] = "stop" if end else "length" if done else "abort"
            out.append(Finished(self.live[i].id, tokens[:n], logp[:n], finish, self.version))
        return out

    def _collect(self) -> list[Finished]:
        done = self.rows.done.nonzero().flatten()
        if not len(done) or len(done) < min(len(self.live) * COMPACT_SHARE, len(self.live)):
            return []
        out = self._finished(done)
        self._keep((~self.rows.done).nonzero().flatten())
        return out

    def _keep(self, index: Tensor) -> None:
        """Move the rows at `index` to the front of the cache and forget the others."""
        self.live = [self.live[i] for i in index.tolist()]
        self.rows = self.rows.kept(index) if self.live else Rows.of([], self.device)
        if self.live:
            used = int(self.rows.position.max()) + 1
            for store in (self.cache.keys, self.cache.values):
                store[:, : len(index), :, :used] = store[:, index, :, :used]

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
