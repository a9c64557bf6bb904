"""`torchrun -m m2rl.train`: one step, top to bottom.

    prompts = mixture.batch(step)                 data/               a pure function of (seed, step)
    samples = collect(engine, pool, prompts, n)   rollout/collect.py  decoding overlaps verification
    adv     = group_stats(samples)                objectives.py       over the global batch
    rows    = to_rows(samples, adv)               objectives.py       denominators become token weights, the dead drop
    stats   = learner.step(rows, objective)       learner.py          pack, forward, loss, backward, AdamW
    engine.sync(policy)                           rollout/            new weights into the engine's storage

With no arguments it trains the built-in model on generated problems; `--config` names a TOML file, `--help` lists every
key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from m2rl import checkpoint, embedded, metrics
from m2rl.command import exit_with, leader_speaks, whole_file
from m2rl.config import Config, build, check, differing_keys, load, read_config, to_toml
from m2rl.data import Mixture, eval_prompts, load_sources, quotas
from m2rl.display import Display
from m2rl.domains.pool import VerifierPool
from m2rl.launch import Stopping, on_rank_0, process_group
from m2rl.learner import Learner, added
from m2rl.objectives import GroupStats, PolicyGradient, Supervised, TrainRow, group_stats, to_rows, trained_mask
from m2rl.policy import Policy, load_model, reading_model, shard
from m2rl.rollout.carry import CarryOver
from m2rl.rollout.collect import collect
from m2rl.rollout.engine import EVAL_STEP, Engine, Request, generate, sample_seed
from m2rl.rollout.memory import Parked, park
from m2rl.rollout.sharing import Sharing
from m2rl.rollout.start import end_tokens, start_engine
from m2rl.safetensors_io import resolve_folder
from m2rl.scores import Score, average, score
from m2rl.telemetry import Energy, Phases, memory_gib, mfu
from m2rl.types import InputError, Prompt, Sample, StepStats

MAX_SKIPPED_IN_A_ROW = 3
PROBE_TOKENS = 64
PROBE_K3 = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    with leader_speaks():
        config, dry_run = load(list(sys.argv[1:] if argv is None else argv))
        if dry_run:
            from m2rl.plan import print_plan

            print_plan(config)
            return 0
    mixed = config.model.compute_dtype != "float32"
    with process_group(config.threads, always=mixed) as device, Stopping() as stopping:
        return train(config, device, stopping)


def train(config: Config, device: torch.device, stopping: Stopping) -> int:
    """Run one config to its end, its warm start first; returns the exit status."""
    start = time.perf_counter()
    if config.rollout.engine == "vllm" and config.algorithm != "sft":
        from m2rl.rollout.vllm import check_version

        check_version()  # before minutes of warm start or of loading a model
    display = Display(checkpoint.rank() == 0)
    wall: dict[str, float] = {}
    if config.warm_start:
        folder = config.folder / "warm_start"
        sft, where = read_config(config.warm_start)
        steps = config.warm_start_steps or sft.train.steps
        sft = dataclasses.replace(
            sft,
            seed=config.seed,
            run_dir=str(folder),
            threads=config.threads,
            train=dataclasses.replace(sft.train, steps=steps),
        )
        if cached_model(folder, check(sft, where)):
            display.say(f"Warm start: {folder / 'model'} (cached)")
        else:
            status = Run(sft, device, stopping, display).sft()
            if status is None:
                return 0
        wall["warm_start"] = time.perf_counter() - start
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder / "model")))
    if config.algorithm == "distill":
        from m2rl.distill import Distillation  # it builds on this file

        run: Run = Distillation(config, device, stopping, display)
    else:
        run = Run(config, device, stopping, display)
    run.wall |= wall
    run.started = start
    if config.algorithm == "sft":
        run.sft()
    else:
        run.roll()
    return 0


def cached_model(folder: Path, config: Config) -> bool:
    """Whether the folder holds the finished model of this very config."""
    if not (folder / "model" / "config.json").is_file() or not (folder / "config.toml").is_file():
        return False
    saved = build(Config, tomllib.loads((folder / "config.toml").read_text()), str(folder / "config.toml"))
    return not differing_keys(saved, config) and saved.train.steps == config.train.steps


class Run:
    """What SFT and GRPO share: the folder, the tokenizer, the policy, the learner, checkpoints and records."""

    def __init__(self, config: Config, device: torch.device, stopping: Stopping, display: Display):
        self.config, self.device, self.stopping, self.display = config, device, stopping, display
        self.folder = config.folder
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.started = time.perf_counter()
        self.wall: dict[str, float] = {}
        self.energy = Energy(device)
        self.dtype = getattr(torch, config.model.compute_dtype)
        self.skipped_in_a_row = 0
        self.resume_from = checkpoint.resume_path(self.folder, config.resume, config.train.steps)
        if self.resume_from is not None:
            saved = build(Config, tomllib.loads((self.resume_from / "config.toml").read_text()), str(self.resume_from))
            changed = differing_keys(saved, config)
            if changed:
                raise InputError(
                    f"{self.folder} holds an unfinished run with other settings ({', '.join(changed)}): restore "
                    "them to continue it, or start over with --resume never, or name another --run-dir"
                )
        on_rank_0(self._prepare_folder)
        if config.model.path == "embedded":
            self.model_path = str(self.folder / "init")
        else:
            try:
                self.model_path = str(resolve_folder(config.model.path))
            except InputError as error:
                raise InputError(f"model.path: {error}") from None
        with reading_model(f"model.path {self.model_path}: no usable tokenizer"):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.model_path)

    def _prepare_folder(self) -> None:
        """A fresh run moves what an earlier one left into previous/, a resumed one what came after its checkpoint;
        nothing is deleted but an older previous/."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resume_from is None:
            names = ["checkpoints", "model", "metrics.jsonl", "rollouts.jsonl", "summary.json", "config.toml"]
            old = [self.folder / n for n in names if (self.folder / n).exists()]
        else:  # checkpoints of a branch that is given up must not be taken for the newest
            step = checkpoint.step_of(self.resume_from)
            old = [p for p in checkpoint.complete(self.folder) if checkpoint.step_of(p) > step]
            (self.folder / "summary.json").unlink(missing_ok=True)
        if old:
            shutil.rmtree(self.folder / "previous", ignore_errors=True)
            (self.folder / "previous").mkdir()
            for path in old:
                path.rename(self.folder / "previous" / path.name)
        if self.config.model.path == "embedded" and self.resume_from is None:
            embedded.save(self.folder / "init", self.config.seed)
        (self.folder / "config.toml").write_text(to_toml(self.config))

    def build_policy(self, path: str) -> Policy:
        c = self.config
        return shard(
            Policy(load_model(path)),
            self.device,
            self.dtype,
            c.train.replicas,
            c.model.activation_checkpointing,
            c.model.compile,
        )

    def begin(self, domains: Sequence[str]) -> tuple[int, dict[str, Any]]:
        """Load the policy, build the learner, restore a checkpoint; the step to start at and what the checkpoint
        carried."""
        c = self.config
        self.policy = self.build_policy(self.model_path)
        self.parameters = sum(p.numel() for p in self.policy.parameters())
        self.learner = Learner(
            self.policy,
            c.optim,
            c.train.steps,
            c.train.tokens_per_bin,
            domains,
            1.0 if c.algorithm == "sft" else c.rollout.temperature,
        )
        state: dict[str, Any] = {"step": 0}
        if self.resume_from is not None:
            state = checkpoint.load(self.resume_from, self.policy, self.learner.optimizer)
            self.display.say(f"Resuming {self.folder} at step {state['step']}")
        self.recorder = metrics.Recorder(
            self.folder,
            c.log,
            checkpoint.rank() == 0,
            dataclasses.asdict(c),
            c.name,
            state["step"] if self.resume_from else None,
        )
        return state["step"], state

    def save(self, step: int, extra: dict[str, Any]) -> None:
        checkpoint.save(
            self.folder,
            step,
            self.policy,
            self.learner.optimizer,
            to_toml(self.config),
            self.config.train.keep_checkpoints,
            extra,
        )

    def after_step(self, stats: StepStats, step: int, extra: dict[str, Any]) -> bool:
        """Count skipped steps, save when due; True if the run was asked to stop (then everything is saved)."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if stats.skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.display.stop()
            raise InputError(
                f"the gradient was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row (last at step {step}); no "
                f"update was made in them; checkpoints in {self.folder / 'checkpoints'} are intact"
            )
        t = self.config.train
        stop = self.stopping.agreed()
        if stop or step + 1 == t.steps or (t.save_every and (step + 1) % t.save_every == 0):
            self.save(step + 1, extra)
        if stop and step + 1 < t.steps:
            self.display.stop()
            self.display.say(f"Stopped after step {step + 1}; the same command continues from there.")
            return True
        return False

    def record(self, step: int, stats: StepStats, phases: Phases, extra: dict[str, Any]) -> None:
        seconds = sum(phases.seconds.values())
        learn = phases.seconds.get("learn", 0.0)
        used = mfu(self.parameters, stats.tokens, learn, self.world, self.device)
        self.recorder.metrics(
            step,
            {
                "loss": stats.loss,
                "grad_norm": stats.grad_norm,
                "lr": self.learner.learning_rate(step),
                "skipped": int(stats.skipped),
                "tokens": stats.tokens,
                "trained_tokens": stats.trained_tokens,
                "tokens_per_s": stats.tokens / max(seconds, 1e-9),
                "step_s": seconds,
                **({"mfu": used} if used is not None else {}),
                **memory_gib(self.device),
                **{f"time/{k}_s": v for k, v in phases.seconds.items()},
                **metrics.training_metrics(stats),
                **extra,
            },
        )

    # ---- SFT ----

    def sft(self) -> Path | None:
        """Supervised fine-tuning: per-token mean over the step's assistant tokens. The exported model, None if
        stopped."""
        c = self.config
        loaded = load_sources(c.data.train, c, self.tokenizer, verifiable=False)
        mixture = Mixture(loaded.sources, quotas(c.domain, loaded.sources, c.train.batch_size), c.seed)
        names = list(mixture.quota)
        start, _ = self.begin(names)
        objective, too_long, through, wall = Supervised(), 0, 0, Phases()
        self.display.start("warm start" if self.folder.name == "warm_start" else "sft", c.train.steps, start)
        for step in range(start, c.train.steps):
            phases = Phases()
            with phases("data"):
                rows = []
                for domain, index in mixture.indices(step):
                    tokens, trained = loaded.sources[domain].demonstration(index)
                    if len(tokens) > c.train.tokens_per_bin:
                        too_long += 1
                        continue
                    rows.append(TrainRow(tokens, np.array(trained), 0.0, 1.0, names.index(domain)))
                total = sum(int(r.trained.sum()) for r in rows)
                if not total:
                    raise InputError(
                        f"step {step}: every demonstration is longer than train.tokens_per_bin "
                        f"{c.train.tokens_per_bin} tokens"
                    )
                for r in rows:
                    r.weight = 1 / total
            with phases("learn"):
                stats = self.learner.step(rows, objective, step)
            through += stats.tokens
            wall.add(phases)
            self.record(step, stats, phases, {"too_long": too_long})
            self.display.update(
                step + 1, f"loss {stats.loss:.3f}  {stats.tokens / sum(phases.seconds.values()):,.0f} tokens/s"
            )
            if self.after_step(stats, step, {}):
                return None
        self.display.stop()
        with wall("export"):
            model = checkpoint.export(self.folder / "model", self.policy, self.tokenizer, self.export_dtype)
        self.recorder.close()
        self.summarise(wall, through, model, {"too_long": too_long})
        if too_long:
            self.display.say(f"{too_long} demonstrations were longer than train.tokens_per_bin and were skipped")
        self.display.say(f"SFT done: {model}")
        return model

    @property
    def export_dtype(self) -> torch.dtype:
        return self.dtype

    # ---- GRPO, and what learns from rollouts like it ----

    def roll(self) -> None:
        """Train on rollouts over a mixture of domains, evaluated before and after; `grpo_step` is one step."""
        c, phases = self.config, Phases()
        r = c.rollout
        loaded = load_sources(c.data.train, c, self.tokenizer, verifiable=True)
        if loaded.skipped:
            self.display.say(
                f"Skipped rows: {loaded.skipped} (longer than rollout.max_prompt_tokens, or not in the mixture)"
            )
        quota = quotas(c.domain, loaded.sources, r.prompts_per_step)
        self.mixture = Mixture(loaded.sources, quota, c.seed, rounds=1 + r.dynamic_sampling_rounds)
        self.domains = [d for d, q in quota.items() if q]
        held_out = eval_prompts(c, self.tokenizer)
        start, state = self.begin(self.domains)
        if start == 0:
            self.display.say(
                f"{self.parameters / 1e6:,.2f}M parameters, {r.prompts_per_step} prompts x {r.group_size} samples per "
                f"step ({', '.join(f'{d} {q}' for d, q in quota.items())}), {self.world} rank(s) on {self.device.type}"
            )
        reference = None
        if c.objective.kl_coef > 0:
            reference = self.build_policy(self.model_path).requires_grad_(False).eval()
        parked = self.park()  # a resumed run's moments are where the engine builds its cache
        self.engine: Engine = self.build_engine()
        self.engine.sleep()
        parked.restore()
        self.sharing = Sharing(not r.deterministic, r.tensor_parallel)
        self.carry = CarryOver(int(r.carry_over * r.prompts_per_step))
        carried = [(step, i) for step, i in state.get("carried", [])]
        self.carry.restart(
            [((step, i), self.mixture.batch(step)[i]) for step, i in carried], r.group_size, self.sharing
        )
        objective = PolicyGradient(c.objective)
        with VerifierPool(workers=r.verifier_workers, deadline_s=r.verifier_timeout_s, sandbox=r.sandbox) as self.pool:
            if "code" in self.domains:
                self.display.say(f"Programs of the model run in sandbox level {self.pool.sandbox_level}")
            try:
                with self.generating(start):
                    self.probe(start)
                before = {d: Score(**s) for d, s in state.get("before", {}).items()}
                if not before:
                    with phases("evaluate"):
                        before = self.evaluate(held_out, start)
                extra = {"before": {d: s.as_dict() for d, s in before.items()}}
                tokens = 0
                self.display.start(c.algorithm, c.train.steps, start)
                for step in range(start, c.train.steps):
                    stats, spent = self.grpo_step(step, objective, reference)
                    tokens += stats.tokens
                    phases.add(spent)
                    if c.evaluation.every and (step + 1) % c.evaluation.every == 0 and step + 1 < c.train.steps:
                        with phases("evaluate"):
                            self.record_scores(step, self.evaluate(held_out, step + 1))
                    if self.after_step(stats, step, extra | {"carried": self.carry.places}):
                        return
                self.display.stop()
                with phases("evaluate"):
                    after = self.evaluate(held_out, c.train.steps)
                    self.record_scores(c.train.steps, after)
            finally:
                self.display.stop()
                self.engine.close()
                self.recorder.close()
        with phases("export"):
            model = checkpoint.export(self.folder / "model", self.policy, self.tokenizer, self.export_dtype)
        self.finish(before, after, phases, tokens, model)

    def build_engine(self) -> Engine:
        end = end_tokens(self.tokenizer, self.policy.model.generation_config)
        return start_engine(self.config, self.model_path, self.policy.config, self.device, end)

    def grpo_step(self, step: int, objective: PolicyGradient, reference: Policy | None) -> tuple[StepStats, Phases]:
        phases = Phases()
        with self.generating(step, phases), phases("rollout"):
            samples, groups, advantages, replaced = self.rollout(step)
        with phases("pack"):
            # Weights that have blown up sample NaN log-probabilities: such a rollout teaches nothing and counts as
            # skipped.
            finite = all(np.isfinite(s.logp).all() for s in samples)
            batches = self.batches(samples, advantages) if finite else []
        flat = [row for batch in batches for row in batch]
        if reference is not None:
            with phases("reference"):
                for row, logp in zip(flat, self.learner.score(flat, reference)):
                    row.ref_logp = logp
        if len(batches) > 1:  # with a single update the policy that is trained is still the one that sampled
            with phases("old_logp"):
                for row, logp in zip(flat, self.learner.score(flat)):
                    row.old_logp = logp
        with phases("learn"):
            updates = [self.learner.step(batch, objective, step) for batch in batches]
        stats = added(updates) if updates else StepStats(float("nan"), float("nan"), True, 0, 0)
        summary = metrics.rollout_metrics(samples, groups)
        self.alarm(step, stats)
        self.recorder.rollouts(step, samples)
        self.record(
            step,
            stats,
            phases,
            {
                **summary,
                "groups_replaced": replaced,
                "groups_carried": len(self.carry.places),
                **self.engine_metrics(step, samples),
            },
        )
        rewards = "  ".join(f"{d} [bold]{summary[f'{d}/reward']:.2f}[/]" for d in self.domains)
        generated = sum(len(s.tokens) for s in samples)
        self.display.update(step + 1, f"reward {rewards}  {generated / phases.seconds['rollout']:,.0f} tok/s")
        return stats, phases

    def engine_metrics(self, step: int, samples: Sequence[Sample]) -> dict[str, Any]:
        """How weights reached the engine, what was free at each edge of its memory, and how old the oldest were."""
        return {
            "sync_route": getattr(self.engine, "route", "copy"),
            **{f"memory/free_{edge}_gib": free for edge, free in getattr(self.engine, "ledger", {}).items()},
            "weight_lag": step - min((s.weight_version for s in samples), default=step),
        }

    def alarm(self, step: int, stats: StepStats) -> None:
        """Say so when trainer and engine drift apart: then the samples are not the policy's own."""
        for domain, sums in stats.per_domain.items():
            k3 = sums["mismatch_k3"] / sums["count"] if sums["count"] else 0.0
            if k3 > metrics.MISMATCH_ALARM_K3:
                self.display.say(
                    f"[red]step {step}, {domain}: mean k3 between engine and trainer is {k3:.1e} nats "
                    f"(alarm at {metrics.MISMATCH_ALARM_K3:g})[/]"
                )

    def batches(self, samples: Sequence[Sample], advantages: np.ndarray) -> list[list[TrainRow]]:
        """The rollout as updates_per_rollout parts of whole groups, each with its own denominators."""
        c, n = self.config, self.config.rollout.group_size
        parts, groups = c.objective.updates_per_rollout, len(samples) // n
        cuts = [i * groups // parts * n for i in range(parts + 1)]
        return [
            to_rows(samples[a:b], advantages[a:b], self.domains, c.objective, c.rollout.max_new_tokens)
            for a, b in itertools.pairwise(cuts)
        ]

    def rollout(self, step: int) -> tuple[list[Sample], list[GroupStats], np.ndarray, int]:
        """Samples of one step; with dynamic sampling, dead groups replaced in prompt order by live ones of later
        rounds."""
        c = self.config
        carry = self.carry if c.rollout.carry_over else None
        if step + 1 == c.train.steps:
            self.carry.allowance = 0  # nothing comes after the last step
        samples = self.collect(self.mixture.batch(step), c.rollout.group_size, step, carry=carry)
        advantages, groups = group_stats(samples, c.objective)
        replaced = 0
        for round in range(1, c.rollout.dynamic_sampling_rounds + 1):
            dead = [i for i, g in enumerate(groups) if not g.live]
            if not dead:
                break
            missing = {d: sum(groups[i].domain == d for i in dead) for d in self.domains}
            prompts: list[Prompt] = []
            for p in self.mixture.batch(step, round):
                if missing[p.domain] > 0:
                    missing[p.domain] -= 1
                    prompts.append(p)
            fresh = self.collect(prompts, c.rollout.group_size, step)
            fresh_advantages, fresh_groups = group_stats(fresh, c.objective)
            n = c.rollout.group_size
            for j, group in enumerate(fresh_groups):
                place = next((i for i in dead if groups[i].domain == group.domain), None)
                if group.live and place is not None:
                    dead.remove(place)
                    groups[place] = group
                    samples[place * n : (place + 1) * n] = fresh[j * n : (j + 1) * n]
                    advantages[place * n : (place + 1) * n] = fresh_advantages[j * n : (j + 1) * n]
                    replaced += 1
        if c.objective.advantage == "batch_std" and replaced:
            advantages, groups = group_stats(samples, c.objective)
        return samples, groups, advantages, replaced

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        step: int,
        temperature: float | None = None,
        max_new_tokens: int = 0,
        carry: CarryOver | None = None,
    ) -> list[Sample]:
        r = self.config.rollout
        return collect(
            self.engine,
            self.pool,
            self.tokenizer,
            prompts,
            n,
            seed=self.config.seed,
            step=step,
            max_new_tokens=max_new_tokens or r.max_new_tokens,
            temperature=r.temperature if temperature is None else temperature,
            sharing=self.sharing,
            ahead=r.max_sequences,
            carry=carry,
        )

    def park(self) -> Parked:
        return park(self.learner.optimizer) if self.config.rollout.park_optimizer else Parked()

    @contextlib.contextmanager
    def generating(self, version: int, phases: Phases | None = None) -> Iterator[None]:
        """The engine awake with the policy's weights; afterwards the accelerator's memory is the trainer's again."""
        phases = phases or Phases()
        with phases("sync"):
            parked = self.park()
            self.engine.sync(self.policy, version)
            self.engine.wake()
        yield
        with phases("sync"):
            self.engine.sleep()
            parked.restore()

    def evaluate(self, held_out: Sequence[Prompt], version: int) -> dict[str, Score]:
        e = self.config.evaluation
        if not held_out:
            return {}
        with self.generating(version):
            return score(self.collect(held_out, e.k, EVAL_STEP, e.temperature, e.max_new_tokens))

    def record_scores(self, step: int, scores: dict[str, Score]) -> None:
        values: dict[str, Any] = {f"eval/{d}/avg_at_k": s.avg_at_k for d, s in scores.items()}
        if scores:
            self.recorder.metrics(step, values | {"eval/avg_at_k": average(scores)})

    def probe(self, version: int) -> None:
        """Score what the engine samples in the trainer as well; two different policies end the run before it starts."""
        prompts = self.mixture.batch(0)[:4]
        limit = max(1, min(self.config.rollout.max_new_tokens, PROBE_TOKENS // len(prompts)))
        requests = [
            Request(
                i, p.tokens, sample_seed(self.config.seed, EVAL_STEP, p.id, 0), limit, self.config.rollout.temperature
            )
            for i, p in enumerate(prompts)
        ]
        rows = []
        for p, f in zip(prompts, generate(self.engine, requests)):
            s = Sample(p, 0, f.tokens, f.logp, f.finish, f.weight_version)
            rows.append(TrainRow([*p.tokens, *f.tokens], trained_mask(s), 1.0, 0.0, 0, np.asarray(f.logp, np.float32)))
        if self.world > 1:  # every rank must pack the same rows: rank 0's
            shared: list[Any] = [rows]
            dist.broadcast_object_list(shared, src=0)
            rows = shared[0]
        delta = np.concatenate([mine - row.behaviour_logp for mine, row in zip(self.learner.score(rows), rows)])
        k3 = float(np.mean(np.exp(delta) - delta - 1))
        if not k3 <= PROBE_K3:
            raise InputError(
                f"rollout engine and trainer disagree on {len(delta)} probe tokens at weight version {version}: "
                f"mean k3 {k3:.2e} nats, largest |log-probability difference| {np.abs(delta).max():.3f} "
                f"(limit {PROBE_K3:g}); their weights, tokenizer or temperature differ"
            )

    def summarise(self, phases: Phases, tokens: int, model: Path, more: dict[str, Any]) -> None:
        """Write summary.json, which says that the run is finished."""
        self.wall |= phases.seconds
        self.wall["total"] = time.perf_counter() - self.started
        joules = self.energy.joules()
        summary = {
            **more,
            "wall_s": {k: round(v, 3) for k, v in self.wall.items()},
            "trained_tokens_per_s": tokens / max(phases.seconds.get("learn", 0.0), 1e-9),
            "world_size": self.world,
            "device": self.device.type,
            "seed": self.config.seed,
            "model": str(model),
            **({"energy_j": joules} if joules is not None else {}),
        }
        if checkpoint.rank() == 0:
            with whole_file(self.folder / "summary.json") as out:
                out.write(json.dumps(summary, indent=1) + "\n")

    def finish(
        self, before: dict[str, Score], after: dict[str, Score], phases: Phases, tokens: int, model: Path
    ) -> None:
        scores = {"before": before, "after": after}
        self.summarise(
            phases, tokens, model, {part: {d: s.as_dict() for d, s in its.items()} for part, its in scores.items()}
        )
        if checkpoint.rank() != 0:
            return
        say = self.display.say
        say("")
        if after:
            self.display.console.print(metrics.scores_table(before, after))
        say("Wall time  " + "  ".join(f"{k} {v:.1f} s" for k, v in self.wall.items()))
        if tokens:
            say(f"Throughput {tokens / phases.seconds['learn']:,.0f} tokens/s through the learner, prompts included")
        say(f"Files      {self.folder}/  (summary.json, metrics.jsonl, rollouts.jsonl, config.toml, model/)")
        say(
            "Next       torchrun -m m2rl.train --help            every option\n"
            '           torchrun -m m2rl.train --config my.toml  your model, your data (README, "Real input")'
        )


if __name__ == "__main__":
    exit_with(main)
