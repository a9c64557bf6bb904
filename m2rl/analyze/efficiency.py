"""Efficiency: what every stage of mixing and of merging cost, from the runs' own records.

    device hours = training hours * devices                        devices: GPUs, or CPU processes where there is no GPU
    training seconds = sum of step_s over metrics.jsonl (every step counted once, also over interrupted sessions)
    mixed / separate = device hours of the mixed run over those of the experts: 33.2% in the paper
                       (2166.4 of 6524.8 H800 hours, its README)

Read from each run folder: config.toml (threads), metrics.jsonl (step_s, tokens, trained_tokens), summary.json (wall
seconds by phase, world size, device, energy). Energy is NVML's counter over the run's last session; it is missing,
never guessed, where there is no NVML.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from m2rl.analyze import figures
from m2rl.analyze.output import PAPER, Analysis
from m2rl.command import named
from m2rl.types import InputError

PAPER_GPU_HOURS = {"math": 2172.8, "code": 3187.2, "science": 787.2, "if": 377.6, "mixed": 2166.4, "distill": 816.0}
"""H800 hours of the reference runs (README of its repository)."""
STAGES = ("sft", "expert", "mixed", "merge", "distill", "other")


@dataclass(frozen=True, slots=True)
class Cost:
    """One run."""

    name: str
    stage: str  # one of STAGES
    device: str  # cuda or cpu
    devices: int
    steps: int
    train_s: float  # wall seconds of the steps
    rollout_s: float  # of those: generation and verification
    learn_s: float  # of those: forward, backward, optimizer
    evaluate_s: float
    device_hours: float  # of training: train_s * devices / 3600
    tokens: int  # through the model in training, prompts included
    trained_tokens: int
    energy_kwh: float | None  # NVML, last session; None where it was not measured
    peak_gib: float | None  # resident memory, or the GPU's peak


def read_run(folder: str | Path, name: str = "", stage: str = "other") -> Cost:
    """The cost of one run folder. InputError if its records are missing or cannot be read."""
    folder = Path(folder)
    metrics_path, summary_path = folder / "metrics.jsonl", folder / "summary.json"
    if not metrics_path.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    steps: dict[int, dict[str, Any]] = {}
    for n, line in enumerate(metrics_path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{metrics_path}:{n}: malformed JSON") from None
        if "step_s" in row:
            steps[int(row["step"])] = row
    if not steps:
        raise InputError(f"{metrics_path} records no step")
    summary: dict[str, Any] = {}
    if summary_path.is_file():
        try:
            summary = json.loads(summary_path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{summary_path} is not valid JSON") from None
    config = folder / "config.toml"
    recipe = tomllib.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}

    def total(key: str) -> float:
        return float(sum(row.get(key) or 0 for row in steps.values()))

    device = str(summary.get("device", "cuda" if any("memory/gpu_peak_gib" in r for r in steps.values()) else "cpu"))
    devices = int(summary.get("world_size", 1)) * (int(recipe.get("threads", 1)) if device == "cpu" else 1)
    memory = "memory/gpu_peak_gib" if device == "cuda" else "memory/resident_gib"
    peaks = [float(row[memory]) for row in steps.values() if memory in row]
    joules = summary.get("energy_j")
    return Cost(
        name or folder.name,
        stage,
        device,
        devices,
        len(steps),
        total("step_s"),
        total("time/rollout_s"),
        total("time/learn_s"),
        float(summary.get("wall_s", {}).get("evaluate", 0.0)),
        total("step_s") * devices / 3600,
        int(total("tokens")),
        int(total("trained_tokens")),
        None if joules is None else float(joules) / 3.6e6,
        max(peaks, default=None),
    )


def merge_cost(name: str, seconds: float, devices: int = 1, device: str = "cpu") -> Cost:
    """The cost of a merge, which has no steps and passes no tokens."""
    return Cost(name, "merge", device, devices, 0, seconds, 0.0, 0.0, 0.0, seconds * devices / 3600, 0, 0, None, None)


def totals(costs: Sequence[Cost]) -> dict[str, dict[str, float | None]]:
    """Sums by stage, and "all". A sum with a missing energy has none."""
    out: dict[str, dict[str, float | None]] = {}
    for stage in (*STAGES, "all"):
        mine = [c for c in costs if stage in (c.stage, "all")]
        if not mine:
            continue
        energy = [c.energy_kwh for c in mine if c.stage != "merge"]
        out[stage] = {
            "runs": len(mine),
            **{k: sum(getattr(c, k) for c in mine) for k in ("device_hours", "steps", "tokens", "trained_tokens")},
            "train_s": sum(c.train_s for c in mine),
            "energy_kwh": sum(e for e in energy if e is not None) if energy and None not in energy else None,
        }
    return out


def ratios(costs: Sequence[Cost]) -> dict[str, float]:
    """Mixed and distilled over the sum of the experts: device hours, tokens, steps. Empty without both sides."""
    by_stage = totals(costs)
    out: dict[str, float] = {}
    experts = by_stage.get("expert")
    if not experts:
        return out
    for stage, label in (("mixed", "mixed"), ("distill", "distilled")):
        if stage not in by_stage:
            continue
        for key in ("device_hours", "tokens", "steps", "energy_kwh"):
            part, whole = by_stage[stage][key], experts[key]
            if part is not None and whole:
                out[f"{label}_over_experts_{key}"] = part / whole
    return out


def analyze(costs: Sequence[Cost]) -> Analysis:
    """The cost table, sums by stage, and the paper's comparison. InputError without runs, or for unlike devices in the
    ratio."""
    if not costs:
        raise InputError("efficiency needs at least one run, got none")
    kinds = sorted({c.device for c in costs if c.stage in ("expert", "mixed", "distill")})
    if len(kinds) > 1:
        raise InputError(f"runs on {' and '.join(kinds)} cannot be compared in device hours")
    unit = "GPU hours" if kinds == ["cuda"] else "CPU hours"
    by_stage, found = totals(costs), ratios(costs)
    separate = sum(PAPER_GPU_HOURS[d] for d in ("math", "code", "science", "if"))
    paper = {
        "mixed_over_experts_device_hours": PAPER_GPU_HOURS["mixed"] / separate,
        "distilled_over_experts_device_hours": PAPER_GPU_HOURS["distill"] / separate,
        "gpu_hours": PAPER_GPU_HOURS,
        "hardware": "32 H800",
    }
    rows = [{f.name: getattr(c, f.name) for f in fields(Cost)} for c in costs]
    stages = [s for s in STAGES if s in by_stage]
    return Analysis(
        "efficiency",
        {
            "device_hours": f"seconds of training steps x devices / 3600 ({unit}); without evaluation and export",
            "train_s": "sum of step_s in metrics.jsonl, each step once",
            "energy_kwh": "NVML total-energy counter of the run's last session; empty where not measured",
            "tokens": "tokens through the model in training, prompts included",
            "mixed_over_experts": "the mixed run over the sum of the single-domain runs",
        },
        f"Comparison: {PAPER}, cost table of its repository (2166.4 of 6524.8 H800 hours = 33.2%). Numbers: the runs' "
        "own telemetry.",
        {"runs": [c.name for c in costs], "unit": unit},
        {"by_stage": by_stage, "ratios": found, "paper": paper},
        {"runs": rows, "stages": [{"stage": s, **v} for s, v in by_stage.items()]},
        [
            figures.bars(
                "hours",
                f"{unit} of training by run",
                {unit: [c.device_hours for c in costs]},
                [c.name for c in costs],
                y_title=unit,
            ),
            figures.bars(
                "stages",
                f"{unit} by stage",
                {unit: [float(by_stage[s]["device_hours"] or 0) for s in stages]},
                stages,
                y_title=unit,
            ),
        ],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experts", nargs="+", default=[], metavar="NAME=RUN", help="run folders of the single domains"
    )
    parser.add_argument("--mixed", nargs="+", default=[], metavar="NAME=RUN")
    parser.add_argument("--distill", nargs="+", default=[], metavar="NAME=RUN")
    parser.add_argument("--sft", nargs="+", default=[], metavar="NAME=RUN")
    parser.add_argument("--merge-seconds", nargs="+", default=[], metavar="NAME=SECONDS", help="wall seconds of merges")


def run(args: argparse.Namespace) -> Analysis:
    costs = []
    given: Mapping[str, tuple[str, Sequence[str]]] = {
        "sft": ("--sft", args.sft),
        "expert": ("--experts", args.experts),
        "mixed": ("--mixed", args.mixed),
        "distill": ("--distill", args.distill),
    }
    for stage, (flag, values) in given.items():
        costs += [read_run(folder, name, stage) for name, folder in named(values, flag).items()]
    for name, seconds in named(args.merge_seconds, "--merge-seconds").items():
        try:
            costs.append(merge_cost(name, float(seconds)))
        except ValueError:
            raise InputError(f"--merge-seconds {name}: seconds must be a number, got {seconds!r}") from None
    return analyze(costs)
