"""Everything that couples samples: advantages, denominators, and the per-token losses.

    samples -> group_advantages -> token weights over the GLOBAL batch -> rows   (host, once per step)
    loss = sum over trained tokens of weight_t * loss_t                          (device, per bin)

After `to_rows` no denominator is left: the learner computes a plain sum, so the gradient cannot depend on the size of a
bin, the order of packing or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from m2rl_kernels.advantages import group_advantages
from m2rl_kernels.policy_loss import STATS, policy_loss
from torch import Tensor

from m2rl.config import Objective
from m2rl.policy import Packed, Policy
from m2rl.types import Sample


@dataclass(slots=True)
class TrainRow:
    """One sequence for the learner: which of its tokens are trained, and by how much."""

    tokens: list[int]  # [L] prompt and response
    trained: np.ndarray  # [L] bool; the loss falls on these tokens as targets; never on the first
    weight: float  # of every trained token; the global denominator is inside
    advantage: float | np.ndarray  # of the whole sample, or [trained] of each token
    domain: int  # index into the run's domains, for the metrics
    behaviour_logp: np.ndarray | None = None  # [trained] float32 nats, of the engine that sampled
    old_logp: np.ndarray | None = None  # [trained] float32, of the policy before the rollout's first update
    ref_logp: np.ndarray | None = None  # [trained] float32, of the reference policy


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Per prompt group of a step, for the metrics."""

    domain: str
    mean: float
    std: float
    live: bool  # False: all rewards equal (or unverified), the group teaches nothing


def trained_mask(sample: Sample) -> np.ndarray:
    """[P+R] bool: the response tokens that the policy wrote."""
    mask = np.ones(len(sample.tokens), dtype=bool) if sample.mask is None else np.asarray(sample.mask, dtype=bool)
    return np.concatenate([np.zeros(len(sample.prompt.tokens), dtype=bool), mask])


def token_weights(
    lengths: np.ndarray, domains: np.ndarray, included: np.ndarray, aggregation: str, max_new_tokens: int
) -> np.ndarray:
    """[S] float64 weight of each trained token of a sample, by how the batch is averaged. S samples, `lengths` trained
    tokens.

    sequence: 1 / (samples * length): mean over a sample's tokens, then over samples (the paper, GRPO)
    token:    1 / (all trained tokens)                                              (DAPO)
    constant: 1 / (samples * max_new_tokens)                                        (Dr. GRPO)
    domain:   1 / (domains * trained tokens of the domain): equal mass per domain
    Samples not `included` weigh 0 and count in no denominator.
    """
    lengths = np.where(included, lengths, 0).astype(np.float64)
    samples = max(int((lengths > 0).sum()), 1)
    if aggregation == "sequence":
        weight = 1 / (samples * np.maximum(lengths, 1))
    elif aggregation == "token":
        weight = np.full(len(lengths), 1 / max(lengths.sum(), 1))
    elif aggregation == "constant":
        weight = np.full(len(lengths), 1 / (samples * max_new_tokens))
    elif aggregation == "domain":
        present = np.unique(domains[lengths > 0])
        mass = {d: lengths[domains == d].sum() for d in present}
        weight = np.array([1 / (len(present) * mass[d]) if d in mass else 0.0 for d in domains])
    else:
        raise ValueError(f"aggregation must be sequence, token, constant or domain, got {aggregation!r}")
    return np.where(lengths > 0, weight, 0.0)


def group_stats(samples: Sequence[Sample], objective: Objective) -> tuple[np.ndarray, list[GroupStats]]:
    """([S] advantages, per-group statistics) of samples that lie group by group, each from index 0 up."""
    starts = [i for i, s in enumerate(samples) if s.index == 0]
    offsets = torch.tensor([*starts, len(samples)])
    rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    result = group_advantages(rewards, offsets, mode=objective.advantage)
    live = result.live.numpy()
    groups = [
        GroupStats(samples[a].prompt.domain, float(result.mean[g]), float(result.std[g]), bool(live[a:b].any()))
        for g, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist()))
    ]
    return np.where(live, result.adv.numpy(), 0.0), groups


def to_rows(
    samples: Sequence[Sample], advantages: np.ndarray, domains: Sequence[str], objective: Objective, max_new_tokens: int
) -> list[TrainRow]:
    """The rows worth a forward pass. Without KL or entropy terms a sample of zero advantage adds exactly nothing to the
    gradient and is dropped; the first of each dead group stays, at weight 0, so that its domain's metrics stay
    alive."""
    included = np.array(
        [not (objective.mask_truncated and s.finish == "length") and not np.isnan(s.reward) for s in samples]
    )
    masks = [trained_mask(s) for s in samples]
    index = np.array([domains.index(s.prompt.domain) for s in samples])
    weights = token_weights(np.array([m.sum() for m in masks]), index, included, objective.aggregation, max_new_tokens)
    dense = objective.kl_coef > 0 or objective.entropy_coef != 0
    rows = []
    for s, mask, weight, advantage, domain in zip(samples, masks, weights, advantages, index):
        gradient = weight > 0 and (advantage != 0 or dense)
        if not mask.any() or not (gradient or s.index == 0):
            continue
        logp = np.asarray(s.logp, dtype=np.float32)
        rows.append(
            TrainRow(
                [*s.prompt.tokens, *s.tokens],
                mask,
                float(weight) if gradient else 0.0,
                float(advantage),
                int(domain),
                logp[mask[len(s.prompt.tokens) :]],
            )
        )
    return rows


class ObjectiveFn(Protocol):
    """What the learner differentiates, for the N trained tokens of a bin."""

    def forward(
        self, policy: Policy, packed: Packed, rows_N: Tensor, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """What is wanted of the policy: ([N] log-probabilities or divergences in nats, [N] entropies or None)."""
        ...

    def __call__(
        self, values: Tensor, entropy: Tensor | None, fields: dict[str, Tensor], segments: int
    ) -> tuple[Tensor, Tensor]:
        """(loss, [segments, STATS] sums) of what `forward` gave."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """The GRPO family: clipped ratios, truncated importance sampling, KL to a reference, entropy bonus."""

    options: Objective

    def forward(
        self, policy: Policy, packed: Packed, rows_N: Tensor, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Entropy is always a metric; its gradient is computed only when the bonus asks for it."""
        return policy(packed, rows_N, targets_N, temperature)

    def __call__(
        self, values: Tensor, entropy: Tensor | None, fields: dict[str, Tensor], segments: int
    ) -> tuple[Tensor, Tensor]:
        o = self.options
        return policy_loss(
            values,
            fields.get("behaviour_logp"),
            fields["advantage"],
            fields["weight"],
            old_logp=fields.get("old_logp"),
            ref_logp=fields.get("ref_logp"),
            kind=o.loss,
            eps_low=o.clip_low,
            eps_high=o.clip_high,
            dual_clip=o.dual_clip or None,
            tis_cap=o.tis_cap or None,
            kl=o.kl,
            kl_coef=o.kl_coef,
            entropy=entropy if o.entropy_coef or entropy is None else entropy.detach(),
            entropy_coef=o.entropy_coef,
            cu_seqlens=fields["cu_seqlens"],
            segment=fields["domain"],
            n_segments=segments,
        )


@dataclass(frozen=True)
class Supervised:
    """SFT: weight_t * -log p(token_t)."""

    def forward(
        self, policy: Policy, packed: Packed, rows_N: Tensor, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        return policy(packed, rows_N, targets_N, temperature, with_entropy=False)

    def __call__(
        self, values: Tensor, entropy: Tensor | None, fields: dict[str, Tensor], segments: int
    ) -> tuple[Tensor, Tensor]:
        return _weighted(-1.0, values, fields, segments)


@dataclass(frozen=True)
class TeacherDivergence:
    """Distillation over the whole vocabulary: weight_t * KL_t between the policy and a teacher."""

    teacher: Policy
    direction: Literal["reverse", "forward"]

    def forward(
        self, policy: Policy, packed: Packed, rows_N: Tensor, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            features = self.teacher.features(packed, rows_N)
        return policy(packed, rows_N, features, temperature, direction=self.direction)

    def __call__(
        self, values: Tensor, entropy: Tensor | None, fields: dict[str, Tensor], segments: int
    ) -> tuple[Tensor, Tensor]:
        return _weighted(1.0, values, fields, segments)


def _weighted(sign: float, values: Tensor, fields: dict[str, Tensor], segments: int) -> tuple[Tensor, Tensor]:
    """The sum of sign * weight * value: the reinforce form with an advantage of -sign everywhere."""
    return policy_loss(
        values,
        None,
        torch.full_like(fields["advantage"], -sign),
        fields["weight"],
        kind="reinforce",
        tis_cap=None,
        segment=fields["domain"],
        n_segments=segments,
    )


__all__ = [
    "STATS",
    "GroupStats",
    "PolicyGradient",
    "Supervised",
    "TeacherDivergence",
    "TrainRow",
    "group_stats",
    "to_rows",
    "token_weights",
    "trained_mask",
]
