"""Learner.step(rows, objective) -> StepStats: the only place that differentiates.

rows --plan_packing--> equal bins per rank --policy--> logp, entropy --objective--> loss.backward() --> AdamW
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from m2rl_kernels.packing import plan_packing
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from m2rl.config import Optim
from m2rl.objectives import STATS, ObjectiveFn, TrainRow
from m2rl.policy import Packed, Policy
from m2rl.types import StepStats


@dataclass(slots=True)
class Bin:
    """Sequences of one forward pass, flat. T tokens, N of them trained targets."""

    packed: Packed
    rows: Tensor  # [N] int64: position whose hidden state predicts the target
    targets: Tensor  # [N] int64
    fields: dict[str, Tensor]  # [N] each: weight, advantage, domain, behaviour_logp ...; cu_seqlens [S+1] over N
    members: list[int]  # indices into the step's rows


def make_bin(rows: Sequence[TrainRow], members: Sequence[int], device: torch.device) -> Bin:
    """Lay the member rows end to end, in order of length. A bin without members holds one token of weight 0 that counts
    in no domain, so that every rank runs it."""
    members = sorted(members, key=lambda i: len(rows[i].tokens))
    zero = np.zeros(1, np.float32)
    nothing = TrainRow([0, 0], np.array([False, True]), 0.0, 0.0, -1, zero, zero, zero)
    chosen = [rows[i] for i in members] or [nothing]
    packed = Packed.of([r.tokens for r in chosen], device)
    position, targets = packed.targets(np.concatenate([r.trained for r in chosen]))
    counts = np.array([int(r.trained.sum()) for r in chosen])
    spread: dict[str, np.ndarray] = {
        "weight": np.array([r.weight for r in chosen], np.float32),
        "domain": np.array([r.domain for r in chosen], np.int64),
    }
    arrays = {k: np.repeat(v, counts) for k, v in spread.items()}
    advantages = [np.broadcast_to(np.asarray(r.advantage, np.float32), n) for r, n in zip(chosen, counts)]
    arrays["advantage"] = np.concatenate(advantages)
    for name in ("behaviour_logp", "old_logp", "ref_logp"):
        values = [getattr(r, name) for r in chosen]
        if all(v is not None for v in values):
            arrays[name] = np.concatenate(values)
    fields = {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in arrays.items()}
    fields["cu_seqlens"] = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)).to(device)
    return Bin(packed, position, targets, fields, members)


def added(parts: Sequence[StepStats]) -> StepStats:
    """The statistics of a rollout's several updates as one: sums add, the loss is their mean, the norm the largest."""
    first = parts[0].per_domain
    per_domain = {d: {k: sum(p.per_domain[d][k] for p in parts) for k in first[d]} for d in first}
    return StepStats(
        loss=sum(p.loss for p in parts) / len(parts),
        grad_norm=max((p.grad_norm for p in parts), key=lambda norm: (math.isnan(norm), norm)),
        skipped=any(p.skipped for p in parts),
        tokens=sum(p.tokens for p in parts),
        trained_tokens=sum(p.trained_tokens for p in parts),
        per_domain=per_domain,
    )


class Learner:
    """Policy, AdamW and the learning-rate schedule. Collective over the ranks: all call `step` with the same rows."""

    def __init__(
        self,
        policy: Policy,
        optim: Optim,
        steps: int,
        tokens_per_bin: int,
        domains: Sequence[str],
        temperature: float = 1.0,
    ):
        self.policy, self.optim, self.steps, self.tokens_per_bin = policy, optim, steps, tokens_per_bin
        self.domains, self.temperature = list(domains), temperature
        decay = [p for p in policy.parameters() if p.ndim >= 2]
        plain = [p for p in policy.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            fused=True,
        )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant, linear or cosine decay to min_lr_ratio * lr at the last step."""
        o = self.optim
        if step < o.warmup_steps:
            return o.lr * (step + 1) / o.warmup_steps
        done = (step - o.warmup_steps) / max(self.steps - o.warmup_steps, 1)
        if o.schedule == "linear":
            return o.lr * (1 - (1 - o.min_lr_ratio) * done)
        if o.schedule == "cosine":
            return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
        return o.lr

    def bins(self, rows: Sequence[TrainRow]) -> list[Bin]:
        """This rank's share; every rank gets the same number of bins."""
        lengths = [len(r.tokens) for r in rows]
        hidden = self.policy.config.hidden_size
        # Per token 12 H^2 of matrix work against H per earlier token of attention (forward, per layer).
        plan = plan_packing(
            lengths, max(self.tokens_per_bin, max(lengths, default=2)), self.world, cost=(12.0 * hidden, 1.0)
        )
        return [make_bin(rows, list(members), self.policy.device) for members in plan.bins[self.rank]]

    @torch.no_grad()
    def score(self, rows: Sequence[TrainRow], policy: Policy | None = None) -> list[np.ndarray]:
        """[trained] float32 log-probability of every row's trained tokens, under `policy` (default: the one being
        trained)."""
        mine: list[tuple[int, np.ndarray]] = []
        for b in self.bins(rows):
            logp, _ = (policy or self.policy)(b.packed, b.rows, b.targets, self.temperature, False)
            parts = np.split(logp.float().cpu().numpy(), b.fields["cu_seqlens"][1:-1].cpu().numpy())
            mine += list(zip(b.members, parts))
        everyone: list = [mine]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, mine)
        found = dict(pair for part in everyone for pair in part)
        return [found[i] for i in range(len(rows))]

    def step(self, rows: Sequence[TrainRow], objective: ObjectiveFn, step: int) -> StepStats:
        """One optimizer step on the sum of the rows' losses. A non-finite gradient updates nothing and is reported."""
        return self.update(self.backward(rows, objective), step)

    def update(self, totals: Tensor, step: int) -> StepStats:
        """AdamW on the accumulated gradient; `totals` are the added results of the `backward` calls that made it."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.optim.max_grad_norm or math.inf)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            lr = self.learning_rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens, trained = totals[:3].tolist()
        table = totals[3:].view(len(self.domains), len(STATS))
        per_domain = {d: dict(zip(STATS, table[i].tolist())) for i, d in enumerate(self.domains)}
        return StepStats(loss, grad_norm, skipped, int(tokens), int(trained), per_domain)

    def backward(self, rows: Sequence[TrainRow], objective: ObjectiveFn) -> Tensor:
        """Accumulate the gradient of the whole step; float64 [3 + domains * STATS] sums over all ranks."""
        bins = self.bins(rows)
        loss_sum = torch.zeros((), device=self.policy.device)
        stats_sum = torch.zeros(len(self.domains), len(STATS), device=self.policy.device, dtype=torch.float64)
        self.policy.train()
        for i, b in enumerate(bins):
            if isinstance(self.policy, FSDPModule):
                self.policy.set_requires_gradient_sync(i == len(bins) - 1)
            values, entropy = objective.forward(self.policy, b.packed, b.rows, b.targets, self.temperature)
            loss, stats = objective(values, entropy, b.fields, len(self.domains))
            loss.backward()
            loss_sum += loss.detach()
            stats_sum += stats
        mine = [r for b in bins for r in b.members]
        tokens = sum(len(rows[i].tokens) for i in mine)
        trained = sum(int(rows[i].trained.sum()) for i in mine if rows[i].weight)
        head = torch.tensor([0.0, tokens, trained], dtype=torch.float64, device=self.policy.device)
        head[0] = loss_sum
        totals = torch.cat([head, stats_sum.flatten()])
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.cpu()
