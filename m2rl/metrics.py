"""What a run writes down: metrics.jsonl and rollouts.jsonl, TensorBoard or W&B when asked, and its last table."""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from m2rl.command import whole_file
from m2rl.config import Log
from m2rl.objectives import GroupStats
from m2rl.samples import record
from m2rl.scores import Score, average
from m2rl.types import STATUSES, InputError, Sample, StepStats

MISMATCH_ALARM_K3 = 1e-3  # mean k3 between trainer and engine above this means that they are not the same policy


def rollout_metrics(samples: Sequence[Sample], groups: Sequence[GroupStats]) -> dict[str, float]:
    """Per domain: reward, pass rate, dead groups (all right / all wrong), length, truncation, verifier statuses."""
    out: dict[str, float] = {}
    for domain in dict.fromkeys(s.prompt.domain for s in samples):
        mine = [s for s in samples if s.prompt.domain == domain]
        rewards = [s.reward for s in mine if not math.isnan(s.reward)]
        its = [g for g in groups if g.domain == domain]
        statuses = Counter(s.status for s in mine)
        out |= {
            f"{domain}/reward": sum(rewards) / max(len(rewards), 1),
            f"{domain}/pass_rate": sum(r >= 1 for r in rewards) / max(len(rewards), 1),
            f"{domain}/groups": len(its),
            f"{domain}/groups_all_right": sum(not g.live and g.mean > 0.5 for g in its),
            f"{domain}/groups_all_wrong": sum(not g.live and g.mean <= 0.5 for g in its),
            f"{domain}/response_tokens": sum(len(s.tokens) for s in mine) / len(mine),
            f"{domain}/truncated": sum(s.finish == "length" for s in mine) / len(mine),
        }
        out |= {f"{domain}/status/{name}": statuses.get(name, 0) / len(mine) for name in STATUSES}
    return out


def training_metrics(stats: StepStats) -> dict[str, float]:
    """Per domain means of the sums that the loss kernel returned: entropy, mismatch, clip and TIS shares, KL."""
    out: dict[str, float] = {}
    for domain, sums in stats.per_domain.items():
        count = sums.get("count", 0.0)
        if count:
            out |= {f"{domain}/{name}": value / count for name, value in sums.items() if name != "count"}
            out[f"{domain}/trained_tokens"] = count
    return out


class Recorder:
    """Writes the run's records; on ranks other than 0 it writes nothing."""

    def __init__(
        self, folder: Path, options: Log, active: bool, config: Mapping[str, Any], name: str, keep_to_step: int | None
    ):
        self.active, self.options, self.writer, self.wandb = active, options, None, None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for stem in ("metrics", "rollouts"):
            _truncate(folder / f"{stem}.jsonl", keep_to_step)
        self.metrics_file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.rollouts_file = open(folder / "rollouts.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if options.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "log.tensorboard: the tensorboard package is not installed (pip install tensorboard)"
                ) from None
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_to_step)
        if options.wandb:
            try:
                import wandb
            except ImportError:
                raise InputError("log.wandb: the wandb package is not installed (pip install wandb)") from None
            known = folder / "wandb-run-id"  # a resumed run goes on in the same one
            run = known.read_text() if keep_to_step is not None and known.exists() else secrets.token_hex(4)
            known.write_text(run)
            self.wandb = wandb.init(
                project=options.wandb, name=name, dir=str(folder), config=dict(config), id=run, resume="allow"
            )

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        if not self.active:
            return
        clean = {
            k: (round(v, 8) if math.isfinite(v) else str(v)) if isinstance(v, float) else v for k, v in values.items()
        }
        self.metrics_file.write(json.dumps({"step": step, **clean}) + "\n")
        self.metrics_file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self.writer is not None:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def rollouts(self, step: int, samples: Sequence[Sample]) -> None:
        """The first samples of each domain, with everything a reader needs to judge the verdict."""
        if not self.active:
            return
        written: Counter[str] = Counter()
        for s in samples:
            if written[s.prompt.domain] < self.options.rollouts_per_step:
                written[s.prompt.domain] += 1
                self.rollouts_file.write(
                    json.dumps(
                        {"step": step, **record(s), "weight_version": s.weight_version},
                        ensure_ascii=False,
                    )
                    + "\n"
                )
        self.rollouts_file.flush()

    def close(self) -> None:
        if self.active:
            self.metrics_file.close()
            self.rollouts_file.close()
            if self.writer is not None:
                self.writer.close()
            if self.wandb is not None:
                self.wandb.finish()


def _truncate(path: Path, keep_to_step: int | None) -> None:
    """Drop what a killed run wrote after the checkpoint that is resumed (None: keep nothing)."""
    if not path.exists():
        return
    kept = []
    if keep_to_step is not None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < keep_to_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # the last line of a killed process
    with whole_file(path) as file:
        file.writelines(kept)


def scores_table(before: Mapping[str, Score], after: Mapping[str, Score]) -> Table:
    """Avg@K per domain before and after, with 95% intervals."""
    k = next(iter(after.values())).k
    table = Table(title=f"Avg@{k}, % (95% interval over problems)", title_justify="left")
    for heading in ("domain", "before", "after", "gain", "problems"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")

    def cell(s: Score) -> str:
        return f"{100 * s.avg_at_k:.1f} ({100 * s.ci95[0]:.1f} - {100 * s.ci95[1]:.1f})"

    for domain, b in before.items():
        a = after[domain]
        table.add_row(domain, cell(b), cell(a), f"{100 * (a.avg_at_k - b.avg_at_k):+.1f}", str(a.problems))
    table.add_section()
    table.add_row(
        "average",
        f"{100 * average(before):.1f}",
        f"{100 * average(after):.1f}",
        f"{100 * (average(after) - average(before)):+.1f}",
        "",
    )
    return table
