"""Multi-teacher on-policy distillation: `torchrun -m m2rl.train --config ...` with `algorithm = "distill"`.

    samples  = collect(student)                                      the student's own responses
    teacher  = the domain's expert                                   [[domain]] teacher = "folder"
    A_t      = log pi_teacher(o_t | s_t) - log pi_student(o_t | s_t) sampled reverse KL (the paper's MT-OPD)
    or L_t   = KL(student || teacher), KL(teacher || student)        over the whole vocabulary

Teachers are frozen checkpoints streamed one after another through one further set of weights and the learner's own
packed forward; there is no server. Rewards are verified for the log only. Token mass per domain follows from quotas and
`objective.aggregation` ("domain": equal), or is set by `[[domain]] token_mass`; each step reports it.
Source: the reference's multi-teacher script (reverse KL as advantage, no baseline); GKD, arXiv 2306.13649.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from m2rl import metrics
from m2rl.objectives import GroupStats, PolicyGradient, TeacherDivergence, TrainRow, to_rows
from m2rl.policy import Policy, load_weights, reading_model
from m2rl.telemetry import Phases
from m2rl.train import Run
from m2rl.types import InputError, Sample, StepStats


def check_teachers(student: str, teacher_of: Mapping[str, str]) -> None:
    """InputError, before any weight is read, for a teacher that is not there, is not of the student's architecture, or
    whose tokens mean something else than the student's: it is asked about the student's own token ids."""

    def read(folder: str) -> tuple[PretrainedConfig, dict[str, int]]:
        return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder).get_vocab()

    mine, vocabulary = read(student)
    for domain, folder in teacher_of.items():
        with reading_model(f"domain {domain}: teacher {folder} is not a Hugging Face model folder"):
            its, other = read(folder)
        for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
            a, b = getattr(mine, key, None), getattr(its, key, None)
            if a != b:
                raise InputError(
                    f"domain {domain}: teacher {folder} is of another architecture than the student: "
                    f"{key} is {b}, not {a}"
                )
        if other != vocabulary:
            odd = sorted(set(other.items()) ^ set(vocabulary.items()))
            raise InputError(
                f"domain {domain}: teacher {folder} has another tokenizer than the student: {len(odd)} entries "
                f"differ, first {odd[0][0]!r}"
            )


def share_mass(rows: Sequence[TrainRow], shares_D: Sequence[float]) -> None:
    """Scale the rows' token weights, in place, so that a domain's part of the step's token mass (sum of token weights)
    is its share; the total stays. All shares 0: nothing changes. A domain without rows leaves its part to others."""
    mass_D = token_mass(rows, len(shares_D))
    wanted_D = np.where(mass_D > 0, shares_D, 0.0)
    if not wanted_D.any():
        return
    scale_D = wanted_D / wanted_D.sum() * mass_D.sum() / np.where(mass_D > 0, mass_D, 1.0)
    for row in rows:
        row.weight *= float(scale_D[row.domain])


def token_mass(rows: Sequence[TrainRow], domains: int) -> np.ndarray:
    """Sum of token weights per domain, [D]."""
    return np.bincount([r.domain for r in rows], [r.weight * r.trained.sum() for r in rows], minlength=domains)


class Distillation(Run):
    """The rollout loop of `train.Run` with teachers in the place of rewards."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.teacher_of = {d.name: d.teacher for d in self.config.domain}
        check_teachers(self.model_path, self.teacher_of)
        self.teacher = self.build_policy(next(iter(self.teacher_of.values()))).requires_grad_(False).eval()
        self.loaded = next(iter(self.teacher_of.values()))
        for folder in dict.fromkeys(self.teacher_of.values()):  # another architecture ends the run before it starts
            self.load_teacher(folder)

    def load_teacher(self, folder: str) -> Policy:
        if folder != self.loaded:
            load_weights(self.teacher, folder)
            self.loaded = folder
        return self.teacher

    def taught(self, rows: Sequence[TrainRow]) -> Iterator[tuple[Policy, list[TrainRow]]]:
        """Rows by teacher, each teacher's weights loaded when its turn comes; the resident one first."""
        by_teacher: dict[str, list[TrainRow]] = {}
        for row in rows:
            by_teacher.setdefault(self.teacher_of[self.domains[row.domain]], []).append(row)
        for folder in sorted(by_teacher, key=lambda f: f != self.loaded):
            yield self.load_teacher(folder), by_teacher[folder]

    def grpo_step(self, step: int, objective: PolicyGradient, reference: Policy | None) -> tuple[StepStats, Phases]:
        """One distillation step; the student's engine, packing, learner and metrics are GRPO's."""
        c, phases = self.config, Phases()
        with self.generating(step, phases), phases("rollout"):
            samples = self.collect(self.mixture.batch(step), c.rollout.group_size, step)
        with phases("pack"):
            # every sample teaches, also one without a verdict: advantages of 1 keep all rows, the teacher writes the
            # real ones
            kept = [dataclasses.replace(s, reward=0.0) for s in samples]
            rows = to_rows(kept, np.ones(len(kept)), self.domains, c.objective, c.rollout.max_new_tokens)
            share_mass(rows, [d.token_mass for name in self.domains for d in c.domain if d.name == name])
        totals = torch.zeros(())
        if c.distill.divergence == "sampled_reverse":
            with phases("teacher"):
                for teacher, its in self.taught(rows):
                    for row, logp in zip(its, self.learner.score(its, teacher)):
                        row.advantage = logp - row.behaviour_logp
            with phases("learn"):
                totals = self.learner.backward(rows, objective)
        else:
            direction: Literal["reverse", "forward"] = c.distill.divergence
            with phases("learn"):
                for teacher, its in self.taught(rows):
                    totals = totals + self.learner.backward(its, TeacherDivergence(teacher, direction))
        with phases("learn"):
            stats = self.learner.update(totals, step)
        self.alarm(step, stats)
        self.report(step, samples, rows, stats, phases)
        return stats, phases

    def report(
        self, step: int, samples: Sequence[Sample], rows: Sequence[TrainRow], stats: StepStats, phases: Phases
    ) -> None:
        groups: list[GroupStats] = []
        values = metrics.rollout_metrics(samples, groups) | self.engine_metrics(step, samples)
        mass = token_mass(rows, len(self.domains))
        values |= {f"{d}/token_mass": float(m / mass.sum()) for d, m in zip(self.domains, mass)}
        if self.config.distill.divergence == "sampled_reverse":
            for i, d in enumerate(self.domains):
                nats = [-np.asarray(r.advantage) for r in rows if r.domain == i]
                values[f"{d}/reverse_kl"] = float(np.concatenate(nats).mean()) if nats else 0.0
        else:
            values |= {
                f"{d}/{self.config.distill.divergence}_kl": s["logp"] / max(s["count"], 1.0)
                for d, s in stats.per_domain.items()
            }
        self.recorder.rollouts(step, samples)
        self.record(step, stats, phases, values)
        rewards = "  ".join(f"{d} [bold]{values[f'{d}/reward']:.2f}[/]" for d in self.domains)
        self.display.update(step + 1, f"reward {rewards}")
